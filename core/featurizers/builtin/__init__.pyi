from .composition import Composition as Composition
from .composition import compose as compose
from .dictionary import DictionaryFeaturizer as DictionaryFeaturizer
from .export import fold_input_scale as fold_input_scale
from .export import lost_settings as lost_settings
from .export import plain_weights as plain_weights
from .linear_decoder import LinearDecoderFeaturizer as LinearDecoderFeaturizer
from .normalization import normalize as normalize
