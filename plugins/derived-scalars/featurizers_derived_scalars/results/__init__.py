"""Results: derived scalars of one sequence, summed, ranked, checked for completeness, saved and loaded.

This room imports `featurizers_derived_scalars.nodes` and the rooms below it, and knows nothing of quantities.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
