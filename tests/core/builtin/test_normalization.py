"""Normalisations of small activations, and the strictness of a composition's configuration."""

from __future__ import annotations

import math

import featurizers
import pytest
import torch
from featurizers.builtin.composition import CompositionConfig
from featurizers.builtin.normalization import denormalize, normalize
from pydantic import ValidationError


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
def test_a_constant_norm_is_the_root_of_the_width_whatever_the_size(size: float) -> None:
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)) * size
    z, statistics = normalize(x, "constant-norm", 1.0)
    torch.testing.assert_close(z.norm(dim=-1), torch.full((5,), math.sqrt(9)))
    torch.testing.assert_close(denormalize(z, "constant-norm", 1.0, statistics), x)


def test_the_stages_of_a_composition_are_a_list() -> None:
    f = featurizers.create("identity", d_in=4) >> featurizers.create("subspace", d_in=4, n_features=2, seed=0)
    written = f.config.model_dump()
    assert CompositionConfig.model_validate(written).model_dump() == written
    with pytest.raises(ValidationError, match="stages"):
        CompositionConfig.model_validate({"stages": tuple(written["stages"])})
