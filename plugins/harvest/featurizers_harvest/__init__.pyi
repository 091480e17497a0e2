from .engines import Engine as Engine
from .engines import Ray as Ray
from .harvesting import check as check
from .harvesting import harvest as harvest
from .reading import Harvest as Harvest
from .reading import open as open
from .shards import Result as Result
