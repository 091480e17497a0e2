"""Ablation of subspaces, compared with explicit projections and plain torch hooks."""

import itertools

import pytest
import torch
from featurizers.errors import BasisError, ShapeError, SiteError, UsageError
from featurizers_causal_basis import ablate_subspace, derange, remove_subspace
from featurizers_causal_basis.inputs import derangement
from torch import nn

from tests.support.models import WIDTH, hooked, hooks_of, module_of, prompts, tiny_model


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def projector(a):
    """Return the d × d matrix that projects on the columns."""
    return a @ torch.linalg.pinv(a)


@pytest.mark.parametrize(("d", "k"), [(1, 1), (2, 1), (17, 5), (64, 63), (101, 11)])
def test_the_subspace_is_removed_and_the_rest_is_unchanged(d, k):
    u, a = 3 * normal(10, d, seed=1) + 2, normal(d, k)
    zero, mean = remove_subspace(u, a), remove_subspace(u, a, "mean")
    torch.testing.assert_close(zero @ a, torch.zeros(10, k, dtype=torch.float64))
    torch.testing.assert_close(mean @ a, (u @ a).mean(dim=0).expand(10, k))
    outside = torch.eye(d, dtype=torch.float64) - projector(a)
    for edited in (zero, mean):
        torch.testing.assert_close(edited @ outside, u @ outside)
    torch.testing.assert_close(zero, u @ outside)


def test_resample_gives_each_token_the_component_of_another():
    u, a = normal(4, 5, 16, seed=1), normal(16, 3)
    edited = remove_subspace(u, a, "resample", generator=generator(7))
    rows, seen = u.reshape(-1, 16), (edited @ a).reshape(-1, 3)
    distance = torch.cdist(seen, rows @ a)
    giver = distance.argmin(dim=1)
    assert distance.min(dim=1).values.max() < 1e-12
    assert sorted(giver.tolist()) == list(range(20))
    assert not (giver == torch.arange(20)).any()
    outside = torch.eye(16, dtype=torch.float64) - projector(a)
    torch.testing.assert_close(edited @ outside, u @ outside)
    assert torch.equal(edited, remove_subspace(u, a, "resample", generator=generator(7)))
    assert not torch.equal(edited, remove_subspace(u, a, "resample", generator=generator(8)))


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_an_orthonormal_basis_of_the_columns_removes_the_same(mode):
    u, a = normal(12, 32, seed=1, dtype=torch.float32), normal(32, 5, dtype=torch.float32)
    q = torch.linalg.qr(a.double()).Q.float()
    torch.testing.assert_close(
        remove_subspace(u, a, mode, generator=generator()),
        remove_subspace(u, q, mode, orthonormal=True, generator=generator()),
        rtol=0,
        atol=3e-6,
    )


def test_a_vector_of_any_length_is_a_matrix_of_one_column():
    u, v = normal(12, 8, seed=1), normal(8)
    torch.testing.assert_close(remove_subspace(u, v), remove_subspace(u, (5 * v)[:, None]))
    one = v / v.norm()
    torch.testing.assert_close(remove_subspace(u[0], v), u[0] - (u[0] @ one) * one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_matrix", [torch.float32, torch.float64])
def test_any_dtype_rounds_once(dtype, of_matrix):
    u, a = (10 * normal(6, 32, seed=1) + 1).to(dtype), normal(32, 4, dtype=of_matrix)
    for mode in ("zero", "mean"):
        edited = remove_subspace(u, a, mode)
        exact = remove_subspace(u.double(), a.double(), mode)
        assert edited.dtype == dtype
        torch.testing.assert_close(edited.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_masked_tokens_do_not_enter_the_mean_and_are_unchanged(mode):
    u, a = normal(2, 6, 8, seed=1), normal(8, 2)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    u[:, 0] *= 1e6
    edited = remove_subspace(u, a, mode, mask=mask, generator=generator())
    assert torch.equal(edited[mask == 0], u[mask == 0])
    alone = remove_subspace(u[mask == 1], a, mode, generator=generator())
    assert torch.equal(edited[mask == 1], alone)
    assert torch.equal(edited, remove_subspace(u, a, mode, mask=mask.bool(), generator=generator()))
    assert edited.abs().max() < 1e7


def test_gradients_reach_the_activations_and_the_columns():
    u, a = normal(4, 6, seed=1).requires_grad_(), normal(6, 2).requires_grad_()
    mask = torch.tensor([True, True, False, True])
    for mode in ("zero", "mean"):
        assert torch.autograd.gradcheck(lambda u, a, mode=mode: remove_subspace(u, a, mode, mask=mask), (u, a))


def test_wrong_input_is_refused_in_one_line():
    u, a = normal(6, 8), normal(8, 2)
    cases = [
        (BasisError, "linearly dependent", {"A": torch.stack([a[:, 0], 2 * a[:, 0]], dim=1)}),
        (BasisError, "linearly dependent", {"A": torch.stack([a[:, 0], a[:, 1], a[:, 0] + a[:, 1]], dim=1)}),
        (BasisError, "a column that is zero", {"A": torch.zeros(8)}),
        (BasisError, "not finite", {"A": torch.full((8,), float("nan"))}),
        (BasisError, "more columns than rows", {"A": normal(8, 9)}),
        (BasisError, "leave out orthonormal=True", {"A": a, "orthonormal": True}),
        (ShapeError, "width 8", {"A": normal(7, 2)}),
        (ShapeError, "a mask has one boolean", {"A": a, "mask": torch.ones(5, dtype=torch.bool)}),
        (ShapeError, "a mask has one boolean", {"A": a, "mask": torch.ones(6)}),
        (UsageError, "one of mean, resample, zero", {"A": a, "mode": "median"}),
        (UsageError, "generator", {"A": a, "mode": "resample"}),
        (UsageError, "2 tokens or more, got 1", {"A": a, "mode": "mean", "mask": torch.arange(6) == 3}),
        (UsageError, "2 tokens or more", {"A": a, "mode": "resample", "mask": torch.arange(6) == 3}),
    ]
    for error, words, arguments in cases:
        with pytest.raises(error, match=words):
            remove_subspace(u, **arguments)
    with pytest.raises(ShapeError, match="real"):
        remove_subspace(torch.ones(3, 8, dtype=torch.long), a)


def test_derangements_are_uniformly_distributed():
    draws = generator()
    orders = [tuple(derangement(4, draws).tolist()) for _ in range(3600)]
    allowed = [p for p in itertools.permutations(range(4)) if all(i != j for i, j in enumerate(p))]
    counts = [orders.count(p) for p in allowed]
    assert sum(counts) == 3600
    assert len(allowed) == 9
    assert min(counts) > 400 - 5 * 400**0.5
    assert max(counts) < 400 + 5 * 400**0.5
    rows = normal(9, 3)
    moved = derange(rows, generator())
    assert torch.equal(moved.sort(dim=0).values, rows.sort(dim=0).values)
    assert not (moved == rows).any()
    for n in (0, 1):
        with pytest.raises(UsageError, match="leaves no token in its place"):
            derangement(n, draws)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gpt_neo", "gemma3"])
@pytest.mark.parametrize(("kind", "layer"), [("resid.pre", 1), ("resid.post", 1), ("mlp.out", 2)])
def test_a_model_is_ablated_as_by_a_plain_hook(architecture, kind, layer):
    model, ids, a = tiny_model(architecture), prompts(3, 6), normal(WIDTH, 2, dtype=torch.float32)
    module, side = module_of(model, architecture, kind, layer)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 0] = False

    def by_hand(h):
        inside = projector(a)
        mean = h[:, 1:].flatten(0, 1).mean(dim=0)
        return torch.cat([h[:, :1], h[:, 1:] + (mean - h[:, 1:]) @ inside], dim=1)

    with torch.no_grad():
        clean = model(ids).logits
        with hooked(module, side, by_hand):
            expected = model(ids).logits
        with ablate_subspace(model, a, f"{kind}:{layer}", "mean", mask=mask) as same:
            ablated = model(ids).logits
        assert same is model
        assert torch.equal(model(ids).logits, clean)
    torch.testing.assert_close(ablated, expected, rtol=1e-4, atol=1e-4)
    assert (ablated - clean).abs().max() > 0.01
    assert torch.equal(ablated[:, 0], clean[:, 0])  # a masked token with no token before it


def test_a_module_that_returns_a_tuple_keeps_the_rest_of_it():
    class Two(nn.Module):
        def forward(self, hidden):
            return hidden + 1, "the rest"

    model, a, x = nn.Sequential(Two()), normal(WIDTH, 2), normal(2, 5, WIDTH, seed=1)
    with ablate_subspace(model, a, "module:0:output"):
        edited, rest = model(x)
    assert rest == "the rest"
    torch.testing.assert_close(edited, (x + 1) @ (torch.eye(WIDTH, dtype=torch.float64) - projector(a)))


def test_hooks_are_removed_however_the_context_ends():
    model, ids, a = tiny_model("gpt2"), prompts(2, 5), normal(WIDTH, dtype=torch.float32)
    before = hooks_of(model)
    with pytest.raises(ShapeError), ablate_subspace(model, a[1:], "resid.post:1"):
        model(ids)
    with pytest.raises(SiteError, match="3 layers"), ablate_subspace(model, a, "resid.post:3"):
        pass
    assert hooks_of(model) == before


def test_a_model_that_has_run_compiled_is_ablated_too():
    model, ids = tiny_model("llama"), prompts(2, 4)
    basis = torch.eye(WIDTH)[:, :2]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        with ablate_subspace(model, basis, "resid.post:0", mode="zero"):
            expected = model(ids).logits
        clean = compiled(ids).logits
        with ablate_subspace(model, basis, "resid.post:0", mode="zero"):
            torch.testing.assert_close(compiled(ids).logits, expected)
    assert not torch.allclose(clean, expected)
