"""Weights of projections in one orientation."""

import pytest
import torch
from featurizers.errors import SiteError
from featurizers.models import Anatomy, projection
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.support.models import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("module", [nn.Linear(3, 5), nn.Linear(3, 5, bias=False), Conv1D(5, 3)])
def test_a_product_with_the_weight_is_what_the_module_computes(module):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    weight, bias = projection(module)
    assert weight.shape == (3, 5)
    assert not weight.requires_grad
    assert torch.allclose(x @ weight + (0 if bias is None else bias), module(x), atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", ["attn.z:1", "mlp.act:1"])
def test_projections_of_each_architecture(architecture, site):
    module = Anatomy(tiny_model(architecture)).place(site).module
    weight, bias = projection(module)
    x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(x @ weight + (0 if bias is None else bias), module(x), atol=1e-5)


@pytest.mark.parametrize(
    ("stored", "returned"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_weights_are_in_float32_or_better(stored, returned):
    module = nn.Linear(3, 5).to(stored)
    weight, bias = projection(module)
    assert weight.dtype == bias.dtype == returned
    assert (weight.data_ptr() == module.weight.data_ptr()) == (stored == returned)


@pytest.mark.parametrize("module", [nn.GELU(), nn.LayerNorm(3), nn.Conv1d(3, 5, 1)])
def test_a_module_without_such_a_weight_is_refused(module):
    with pytest.raises(SiteError, match=rf"{type(module).__name__} has no weight of two axes .* point\. Do that\.$"):
        projection(module, "Do that.")
    with pytest.raises(SiteError, match=r"in floating point\.$"):
        projection(module)
