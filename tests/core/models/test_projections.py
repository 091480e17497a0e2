"""Weights of projections in one orientation."""

import pytest
import torch
from featurizers.errors import SiteError
from featurizers.models import Anatomy, collect, projection
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.support.models import ARCHITECTURES, HEAD_WIDTH, HEADS, fresh_model, prompts, read, tiny_model


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


class Packed(nn.Module):
    """A linear layer whose weight is packed, as bitsandbytes does it, or has another name, as GPTQ does it."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = linear.weight.detach().reshape(-1, 1).view(torch.uint8)
        self.register_parameter(name, nn.Parameter(packed, requires_grad=False))
        self._name = name

    def forward(self, x):
        weight = self._parameters[self._name].view(torch.float32).view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight)


@pytest.mark.parametrize("name", ["weight", "qweight"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_heads_of_a_packed_projection_are_those_of_the_model_before_it_was_packed(architecture, name):
    plain, packed = tiny_model(architecture), fresh_model(architecture)
    for block in packed.model.layers:
        block.self_attn.o_proj = Packed(block.self_attn.o_proj, name)
        block.mlp.down_proj = Packed(block.mlp.down_proj, name)
    inputs, width = {"input_ids": prompts(2, 4)}, HEAD_WIDTH[architecture]
    known = read(plain, plain.model.layers[1].self_attn.o_proj, "input", **inputs)
    found = collect(packed, inputs, [f"attn.z:1:{head}" for head in range(HEADS)])
    for head in range(HEADS):
        assert torch.equal(found[f"attn.z:1:{head}"], known[..., head * width : (head + 1) * width])
    neurons = collect(packed, inputs, ["mlp.act:1"])["mlp.act:1"]
    assert torch.equal(neurons, read(plain, plain.model.layers[1].mlp.down_proj, "input", **inputs))
