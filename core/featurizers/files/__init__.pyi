from .regular import contained as contained
from .regular import read_bytes as read_bytes
from .replacement import filling as filling
from .replacement import os_errors as os_errors
from .replacement import refuse_full as refuse_full
from .replacement import replacing as replacing
from .replacement import resolved as resolved
from .torch_files import load_torch as load_torch
