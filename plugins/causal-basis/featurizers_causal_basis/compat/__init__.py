"""The names, signatures and field order of tuned-lens 0.2.0, with the computation of this package.

``from featurizers_causal_basis import compat as causal`` replaces ``from tuned_lens import causal``. Differences fix
faults: any floating-point dtype and tuned lenses work, blocks may return tensors, ``resample`` uses one derangement
for a whole layer, and the parameters of a lens are left as they are. As in tuned-lens, the randomness of ablation is
torch's global generator, and no token is left out. New programs call `featurizers_causal_basis.extract_causal_bases`.

`white_box` has the names of the first publication. This room imports `ablation`, `inputs`, `lens` and `solve`.
"""

from featurizers_causal_basis.compat.tuned_lens import (
    CausalBasis,
    ablate_subspace,
    derange,
    extract_causal_bases,
    remove_subspace,
    sample_derangement,
)

__all__ = [
    "CausalBasis",
    "ablate_subspace",
    "derange",
    "extract_causal_bases",
    "remove_subspace",
    "sample_derangement",
]
