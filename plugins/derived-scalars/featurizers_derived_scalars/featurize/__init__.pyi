from .diagonal import DiagonalConfig as DiagonalConfig
from .diagonal import DiagonalFeaturizer as DiagonalFeaturizer
from .reverse import Reverse as Reverse
