"""Settings of all tests: one thread, because the tensors are tiny; shapes in signatures are checked at run time."""

import pytest
import torch
from beartype import beartype
from hypothesis import HealthCheck, settings
from jaxtyping import jaxtyped

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # no test fails because the machine is busy

if not hasattr(torch.nn.functional, "grouped_mm"):  # torch before 2.10
    # torch 2.8 has grouped_mm under another name, but not on the CPU; transformers 5.9 takes it for a kernel that runs
    # there, and can run no mixture of experts. With this it uses its own fallback.
    from transformers.integrations import moe

    moe._can_use_grouped_mm = lambda *_: False

collect_ignore_glob = ["fixtures/*/make*.py"]  # these need packages that the tests do not


@pytest.fixture(scope="session", autouse=True)
def _shapes_are_checked():
    """Make the maps of each kind raise if a tensor does not have the shape in the signature."""
    from featurizers.builtin.composition import Composition
    from featurizers.builtin.dictionary import DictionaryFeaturizer
    from featurizers_causal_basis import CausalBasisFeaturizer
    from featurizers_identity import IdentityFeaturizer
    from featurizers_subspace import StandardizeFeaturizer, SubspaceFeaturizer

    checked = (CausalBasisFeaturizer, Composition, DictionaryFeaturizer, IdentityFeaturizer)
    for cls in (*checked, StandardizeFeaturizer, SubspaceFeaturizer):
        for name in ("featurize", "inverse_featurize", "encode", "apply_edit"):
            setattr(cls, name, jaxtyped(typechecker=beartype)(getattr(cls, name)))
