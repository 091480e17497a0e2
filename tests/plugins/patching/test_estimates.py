"""Estimates against autograd by hand with plain hooks, closed forms, and exact runs."""

from __future__ import annotations

import math
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import UsageError
from featurizers_patching import patch
from torch import Tensor, nn

from tests.support.models import fresh_model
from tests.support.patching import activations, packable, plain_hook

BASE, SOURCE = [5, 9, 3, 7, 11, 2], [6, 2, 14, 3, 9, 7]
SHORT, SHORT_SOURCE = [8, 1, 4, 6], [3, 12, 5, 1]
METRIC: dict[str, Any] = {"metric": ("logit_difference", 7, 9), "normalize": False}
SITES = ["embed", "resid.pre", "attn.q:1:2", "attn.k:1", "attn.z:*:*", "attn.out:0", "mlp.act:2", "resid.post:1"]


def gradient_by_hand(model: nn.Module, tokens: list[int], site: Any) -> Tensor:
    """Return the gradient ``(tokens, width)`` of a logit difference by a plain hook that adds a zero."""
    zero = torch.zeros_like(activations(model, tokens, site), requires_grad=True)
    with plain_hook(model, site, lambda hidden: hidden + zero):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return torch.autograd.grad(logits[7] - logits[9], zero)[0][0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_the_estimate_is_the_change_times_the_gradient(name: str) -> None:
    model: Any = packable(name)
    prompts = [(BASE, SOURCE), (SHORT, SHORT_SOURCE)]
    sites = [site for site in SITES if not (name == "gpt_neox" and site == "attn.k:1")]
    grid = patch(model, [b for b, _ in prompts], [s for _, s in prompts], sites, method="gradient", **METRIC)
    assert not grid.exact.any()
    assert grid.values.isnan().sum() == 2 * len(grid.sites)
    for b, (base, source) in enumerate(prompts):
        for s, site in enumerate(grid.sites):
            change = activations(model, source, site) - activations(model, base, site)
            products = (change[0] * gradient_by_hand(model, base, site)).sum(-1)
            found = (grid.raw - grid.base[0, b])[0, s, b, : len(base)]
            torch.testing.assert_close(found, products, rtol=0, atol=1e-6 if name == "gemma2" else 1e-10)


def test_spans_featurizers_and_operations_are_estimated() -> None:
    model: Any = packable("llama")
    f = featurizers.create("subspace", d_in=32, n_features=8, seed=0).double()
    site = "resid.post:1"
    gradient = gradient_by_hand(model, BASE, site)
    base, source = (activations(model, tokens, site)[0] for tokens in (BASE, SOURCE))
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({"featurizer": f}, f.interchange(base[:, None], source[:, None])[:, 0] - base),
        ({"featurizer": f, "indices": [1, 4]}, f.interchange(base[:, None], source[:, None], [1, 4])[:, 0] - base),
        ({"featurizer": f, "operation": "ablate"}, f.ablate(base[:, None], None, 0.0)[:, 0] - base),
        ({"operation": lambda b, s: b + (s - b) * 0.3}, (source - base) * 0.3),
        ({"operation": "ablate"}, -base),
    ]
    for options, change in cases:
        grid = patch(model, BASE, SOURCE, site, positions=[[1, 3], "all", -1], method="gradient", **METRIC, **options)
        products = (change * gradient).sum(-1)
        expected = torch.stack([products[1] + products[3], products.sum(), products[-1]])
        torch.testing.assert_close((grid.raw - grid.base[0, 0])[0, 0, 0], expected.double(), rtol=0, atol=1e-8)


def test_estimates_are_exact_where_the_model_is_linear() -> None:
    """With attention and MLPs frozen what is left is the final norm, which this test takes out."""
    model: Any = fresh_model("llama").double().requires_grad_(False)
    model.model.norm = nn.Identity()
    options: dict[str, Any] = {"freeze": ("attn.out", "mlp.out"), "positions": [-1, 2], **METRIC}
    sites = ["resid.pre", "attn.z:1:*", "mlp.out:0", "mlp.act:2"]
    exact = patch(model, BASE, SOURCE, sites, **options)
    estimate = patch(model, BASE, SOURCE, sites, method="gradient", **options)
    torch.testing.assert_close(estimate.raw, exact.raw, rtol=0, atol=1e-9)
    assert float((exact.raw - exact.base[0, 0]).abs().max()) > 1e-2
    free = patch(model, BASE, SOURCE, sites, method="gradient", positions=[-1, 2], **METRIC)
    assert not torch.allclose(free.raw, exact.raw, atol=1e-3)


def test_integrated_gradients_are_complete() -> None:
    model: Any = packable("llama")
    for metric in (("logit_difference", 7, 9), ("probability", 7), "kl"):
        grid = patch(
            model, BASE, SOURCE, "embed", metric=metric, normalize=False, method="integrated", steps=400,
            positions=["all", *range(6)],
        )  # fmt: skip
        effects = (grid.raw - grid.base[0, 0])[0, 0, 0]
        assert math.isclose(effects[0], effects[1:].sum(), abs_tol=1e-10)
        whole = float(grid.source[0, 0] - grid.base[0, 0])
        assert math.isclose(effects[0], whole, rel_tol=2e-2, abs_tol=1e-4), metric


def test_integrated_gradients_are_a_mean_over_midpoints() -> None:
    model: Any = packable("gpt2")
    grid = patch(model, BASE, SOURCE, ["mlp.out:1", "attn.z:2:0"], method="integrated", steps=3, **METRIC)
    ends = [activations(model, tokens, "embed") for tokens in (BASE, SOURCE)]
    for s, site in enumerate(grid.sites):
        total = 0
        for share in (1 / 6, 3 / 6, 5 / 6):
            with plain_hook(model, "embed", lambda _, share=share: ends[0] * (1 - share) + ends[1] * share):
                total = total + gradient_by_hand(model, BASE, site)
        change = activations(model, SOURCE, site) - activations(model, BASE, site)
        expected = (change[0] * total / 3).sum(-1)  # type: ignore[operator]
        torch.testing.assert_close((grid.raw - grid.base[0, 0])[0, s, 0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", [None, "integrated"])
def test_a_screen_runs_the_largest_cells(method: str | None, tmp_path: Any) -> None:
    model: Any = packable("llama")
    prompts: dict[str, Any] = {"base": [BASE, SHORT], "source": [SOURCE, SHORT_SOURCE]}
    sites, metric = ["resid.pre", "attn.z:1:*"], ("logit_difference", 7, 9)
    exact = patch(model, **prompts, sites=sites, metric=metric)
    estimate = patch(model, **prompts, sites=sites, metric=metric, method=method or "gradient")
    grid = patch(model, **prompts, sites=sites, metric=metric, method=method, screen=7)
    assert int(grid.exact.sum()) == 7
    largest = estimate.mean()[0].abs().nan_to_num(-1).flatten().topk(7).indices
    assert sorted(largest.tolist()) == grid.exact.flatten().nonzero().flatten().tolist()
    known = grid.exact[None, :, None, :].expand_as(grid.values)
    torch.testing.assert_close(grid.values[known], exact.values[known], rtol=0, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(grid.values[~known], estimate.values[~known], rtol=0, atol=1e-10, equal_nan=True)
    errors = (estimate.values - exact.values)[known]
    torch.testing.assert_close(grid.errors()[known], errors, rtol=0, atol=1e-9, equal_nan=True)
    assert grid.errors()[~known].isnan().all()
    there = ~errors.isnan()
    assert math.isclose(grid.relative_error(), errors[there].norm() / exact.values[known][there].norm(), rel_tol=1e-6)
    assert f"7 of {grid.exact.numel()} cells were run" in repr(grid)
    assert {cell.exact for cell in grid.top(20)} == {True, False}
    assert sum(row["exact"] for row in grid.rows()) == int((~grid.values[known].isnan()).sum())
    again = featurizers.load_grid(grid.save(tmp_path / "grid.safetensors"))
    assert torch.equal(again.exact, grid.exact)
    assert torch.equal(again.errors().nan_to_num(-9), grid.errors().nan_to_num(-9))
    assert len(grid.plot().collections) == 1  # the dots on estimates
    assert not exact.plot().collections


def test_an_estimate_leaves_the_model_as_it_was() -> None:
    model: Any = fresh_model("gpt2")
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.inference_mode():
        grid = patch(model, BASE, SOURCE, "mlp.out", method="integrated", **METRIC)
    assert not grid.raw.isnan().any()
    assert learning
    assert all(parameter.requires_grad and parameter.grad is None for parameter in learning)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"metric": ("accuracy", 7)}, "the metric has no gradient"),
    ({"metric": "kl"}, "zero at the base"),
    ({"metric": lambda logits: logits.detach()[:, 0]}, "the metric has no gradient"),
    ({"freeze": "attn.pattern"}, "freeze='attn.pattern' does not go with"),
    ({"method": "integrated", "freeze": "mlp.out"}, "freeze='mlp.out' does not go with"),
    ({"method": "integrated", "operation": "ablate"}, "goes from the base to the source"),
    ({"method": "integrated", "source": SOURCE[1:], "positions": [-1]}, "prompts of equal length"),
    ({"method": "gradients"}, "no method 'gradients'"),
    ({"method": "exact", "screen": 3}, "screen is a number"),
    ({"screen": 0}, "screen is a number"),
    ({"method": "integrated", "steps": 0}, "steps is a number"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_cannot_be_estimated_is_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"base": BASE, "source": SOURCE, "method": "gradient", **METRIC, **options}
    with pytest.raises(UsageError, match=message):
        patch(packable("llama"), **given)


def test_a_router_has_no_gradient() -> None:
    with pytest.raises(UsageError, match=r"mlp.router:0: experts are chosen"):
        patch(packable("Mixtral"), BASE, SOURCE, "mlp.router", method="gradient", **METRIC)
