from .dictionary import ShardedDictionary as ShardedDictionary
from .leading import led as led
from .loading import load_share as load_share
from .loading import shard as shard
from .site_map import ShardedMap as ShardedMap
