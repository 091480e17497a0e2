"""Search for the orthonormal directions of greatest energy at a layer.

In reading order: `processes`, `energy`, its two computations `exact` and `differentiated`, `layers`, `candidates`,
`solver`, `options`, `runs`, `extraction`. This room imports `lens` and the files `inputs`, `featurizer` and `record`.
"""

from featurizers_causal_basis.solve.extraction import NoDirectionWarning, extract_causal_bases, iterate_causal_bases
from featurizers_causal_basis.solve.options import ExtractionOptions, Progress
from featurizers_causal_basis.solve.solver import PRESETS, Preset

__all__ = [
    "PRESETS",
    "ExtractionOptions",
    "NoDirectionWarning",
    "Preset",
    "Progress",
    "extract_causal_bases",
    "iterate_causal_bases",
]
