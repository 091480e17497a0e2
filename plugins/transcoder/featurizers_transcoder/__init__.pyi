from .config import GroupConfig as GroupConfig
from .config import LinearMapConfig as LinearMapConfig
from .config import ReadConfig as ReadConfig
from .kinds import Crosscoder as Crosscoder
from .kinds import CrossLayerTranscoder as CrossLayerTranscoder
from .kinds import Transcoder as Transcoder
from .linear_map import LinearMap as LinearMap
from .reads import normalized_read as normalized_read
