"""Models and steering specs of interp-engine.

`featurizers.intervene`, `collect` and `attach` take its eager models and the names of its points; `to_specs` turns
fixed edits into its steering specs, which its vLLM models take too.
"""

from featurizers_interp_engine.points import point_of
from featurizers_interp_engine.specs import to_specs

__all__ = ["point_of", "to_specs"]
