from .ranking import Ranked as Ranked
from .scalar import Scalar as Scalar
from .scalars import Scalars as Scalars
