"""Settings of every test: one thread, for the tensors are tiny; shapes in signatures are checked at run time."""

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped

torch.set_num_threads(1)

collect_ignore_glob = ["fixtures/*/make.py"]  # they need the packages whose numbers they keep


@pytest.fixture(scope="session", autouse=True)
def _shapes_are_checked():
    """Calls of the methods that a kind gives fail if a tensor does not have the shape that its signature names."""
    from featurizers.builtin.composition import Composition
    from featurizers.builtin.dictionary import DictionaryFeaturizer
    from featurizers_causal_basis import CausalBasisFeaturizer
    from featurizers_identity import IdentityFeaturizer
    from featurizers_subspace import StandardizeFeaturizer, SubspaceFeaturizer

    checked = (CausalBasisFeaturizer, Composition, DictionaryFeaturizer, IdentityFeaturizer)
    for cls in (*checked, StandardizeFeaturizer, SubspaceFeaturizer):
        for name in ("featurize", "inverse_featurize", "encode", "apply_edit"):
            setattr(cls, name, jaxtyped(typechecker=beartype)(getattr(cls, name)))
