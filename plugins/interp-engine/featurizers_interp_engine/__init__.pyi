from .points import point_of as point_of
from .specs import to_specs as to_specs

__all__ = ["point_of", "to_specs"]
