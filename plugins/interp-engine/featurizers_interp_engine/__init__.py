"""Models and steering specs of interp-engine.

`featurizers.intervene`, `collect` and `attach` take its eager models and the names of its points; `to_specs` turns
fixed edits into its steering specs, which its vLLM models take too.
"""

import lazy_loader

# interp-engine imports transformers, and so is not imported with the plugin
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
