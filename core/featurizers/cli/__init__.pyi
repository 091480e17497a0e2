from .options import dtype_named as dtype_named
from .options import layer_numbers as layer_numbers
