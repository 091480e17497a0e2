from .options import dtype_named as dtype_named
from .options import layer_numbers as layer_numbers
from .progress import ProgressBar as ProgressBar
from .progress import progress_bar as progress_bar
