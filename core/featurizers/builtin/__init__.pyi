from .composition import Composition as Composition
from .composition import compose as compose
from .dictionary import DictionaryFeaturizer as DictionaryFeaturizer
from .normalization import denormalize as denormalize
from .normalization import normalize as normalize
