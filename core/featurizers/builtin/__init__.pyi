from .composition import Composition as Composition
from .composition import compose as compose
from .dictionary import DictionaryFeaturizer as DictionaryFeaturizer
from .linear_decoder import LinearDecoderFeaturizer as LinearDecoderFeaturizer
from .normalization import Normalization as Normalization
from .normalization import normalize as normalize
