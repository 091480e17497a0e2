from .contract import FeaturizerContract as FeaturizerContract
from .held import CELLS as CELLS
from .held import SITES as SITES
from .held import Held as Held
from .holder_contract import HolderContract as HolderContract
from .measuring import Outcome as Outcome
from .measuring import measure as measure
from .site_map_contract import SiteMapContract as SiteMapContract
