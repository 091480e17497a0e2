from .cells import Cells as Cells
from .cells import Edit as Edit
from .cells import IntArray as IntArray
from .clean import Prompts as Prompts
from .sweep import Report as Report
from .sweep import Sweep as Sweep
