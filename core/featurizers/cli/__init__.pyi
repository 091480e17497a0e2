from .options import dtype_named as dtype_named
from .options import layer_numbers as layer_numbers
from .output import commit_link as commit_link
from .output import print_json as print_json
from .progress import ProgressBar as ProgressBar
from .progress import progress_bar as progress_bar
from .results import write_results as write_results
