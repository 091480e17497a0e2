"""Methods, gates and objectives against closed forms."""

from __future__ import annotations

import math
from typing import Any

import featurizers
import pytest
import torch
from featurizers import SigmoidGate
from featurizers.errors import UsageError
from featurizers_training import (
    DAS,
    DASDBM,
    DBM,
    METHODS,
    PCA,
    Answers,
    BoundaryGate,
    BoundlessDAS,
    FullVector,
    RandomSubspace,
    cross_entropy,
    logit_difference,
)
from featurizers_training.search.objectives import named_objective
from torch import Tensor

SEARCHES = [DAS(n_features=3), DBM(), DASDBM(n_features=4), BoundlessDAS()]


def tensors(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    base, source = (torch.randn(*shape, generator=generator) for _ in range(2))
    return base, source


def test_das_swaps_the_part_in_the_subspace() -> None:
    searched = DAS(n_features=3).search(8, seed=0, through=None)
    basis, (base, source) = searched.featurizer.basis.detach(), tensors(5, 2, 8)
    torch.testing.assert_close(searched(base, source), base + (source - base) @ basis @ basis.T)
    assert searched.learned == [searched.featurizer.basis]


def test_the_gradient_of_das_is_that_of_the_closed_form_along_the_manifold() -> None:
    searched = DAS(n_features=3).search(8, seed=0, through=None)
    base, source = tensors(5, 8)
    target = torch.ones(5, 8)
    (searched(base, source) - target).square().sum().backward()
    basis = searched.featurizer.basis
    q = basis.detach().clone().requires_grad_()
    (base + (source - base) @ q @ q.T - target).square().sum().backward()
    along = q.detach().T @ q.grad
    torch.testing.assert_close(basis.grad, q.grad - q.detach() @ (along + along.T) / 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_soft_mask_and_its_gradient_are_the_closed_form(temperature: float) -> None:
    searched = DBM(temperature=(temperature, temperature)).search(6, seed=0, through=None)
    base, source = tensors(4, 6)
    logits = torch.tensor([-2.0, -0.5, 0.0, 0.1, 1.0, 3.0])
    searched.gate.logits.data.copy_(logits)
    gate = 1 / (1 + torch.exp(-logits / temperature))
    edited = searched(base, source)
    torch.testing.assert_close(edited, base + gate * (source - base))
    edited.sum().backward()
    wanted = (source - base).sum(0) * gate * (1 - gate) / temperature
    torch.testing.assert_close(searched.gate.logits.grad, wanted)
    searched.gate.hard = True
    hard = searched(base, source)
    assert torch.equal(hard[:, 3:], source[:, 3:])
    assert torch.equal(hard[:, :3], base[:, :3])  # a logit of zero is not selected
    assert searched.found().feature_sets["selected"].tolist() == [3, 4, 5]
    assert torch.equal(searched.found().feature_sets["gate_logits"], logits)


def test_the_penalty_is_the_expected_number_of_features() -> None:
    method = DBM(sparsity=0.5)
    searched = method.search(6, seed=0, through=None)
    assert float(method.penalty(searched).detach()) == pytest.approx(0.5 * 6 * 0.5)
    method.penalty(searched).backward()
    torch.testing.assert_close(searched.gate.logits.grad, torch.full((6,), 0.5 * 0.25))


def test_the_temperature_falls_in_geometric_steps_and_then_stays() -> None:
    method = DBM(temperature=(1.0, 0.01), annealing=0.5)
    searched = method.search(4, seed=0, through=None)
    for progress, wanted in ((0.0, 1.0), (0.25, 0.1), (0.5, 0.01), (0.9, 0.01)):
        method.anneal(searched, progress)
        assert searched.gate.temperature == pytest.approx(wanted)
    boundless = BoundlessDAS(temperature=(50.0, 0.5))
    searched = boundless.search(4, seed=0, through=None)
    boundless.anneal(searched, 0.5)
    assert searched.gate.temperature == pytest.approx(5.0)


def test_a_tied_mask_takes_all_or_nothing() -> None:
    searched = DBM(tied=True).search(6, seed=0, through=None)
    base, source = tensors(4, 6)
    assert searched.gate.logits.shape == (1,)
    torch.testing.assert_close(searched(base, source), (base + source) / 2)
    searched.gate.hard = True
    assert torch.equal(searched(base, source), base)
    assert searched.found().feature_sets["selected"].tolist() == []
    searched.gate.logits.data.fill_(0.1)
    assert torch.equal(searched(base, source), source)
    assert searched.found().feature_sets["selected"].tolist() == list(range(6))
    assert float(searched.gate.sparsity_loss().detach()) == pytest.approx(6 / (1 + math.exp(-0.1)))


def test_a_boundary_takes_the_features_before_it() -> None:
    gate = BoundaryGate(10, share=0.42, temperature=2.0)
    wanted = [1 / (1 + math.exp(-(4.2 - i - 0.5) / 2)) for i in range(10)]
    torch.testing.assert_close(gate(), torch.tensor(wanted))
    gate().sum().backward()
    g = torch.tensor(wanted)
    torch.testing.assert_close(gate.boundary.grad, (g * (1 - g) / 2 * 10).sum().unsqueeze(0))
    gate.hard = True
    assert gate().tolist() == [1.0] * 4 + [0.0] * 6
    for share, count in ((0.42, 4), (0.45, 4), (0.46, 5), (0.0, 0), (-3.0, 0), (1.0, 10), (7.0, 10)):
        gate.boundary.data.fill_(share)
        assert gate.selected().tolist() == list(range(count)) == gate().nonzero().squeeze(-1).tolist(), share


def test_boundless_das_swaps_the_first_coordinates_of_a_rotation() -> None:
    searched = BoundlessDAS(start=0.5, temperature=(1e-3, 1e-3)).search(8, seed=0, through=None)
    basis, (base, source) = searched.featurizer.basis.detach(), tensors(5, 8)
    assert basis.shape == (8, 8)
    first = basis[:, :4]
    torch.testing.assert_close(searched(base, source), base + (source - base) @ first @ first.T)
    assert searched.found().feature_sets["selected"].tolist() == [0, 1, 2, 3]


def test_a_search_through_a_featurizer_is_made_in_its_features() -> None:
    through = featurizers.create("subspace", d_in=8, n_features=5, seed=9)
    base, source = tensors(4, 8)
    outer = through.basis.detach()
    searched = DAS(n_features=2).search(8, seed=0, through=through)
    inner = searched.learned[0].detach()
    assert inner.shape == (5, 2)
    both = outer @ inner
    torch.testing.assert_close(searched(base, source), base + (source - base) @ both @ both.T)
    assert [group["params"] for group in DAS(n_features=2).groups([searched])] == [searched.learned]
    masked = DBM().search(8, seed=0, through=through)
    torch.testing.assert_close(masked(base, source), base + (source - base) @ outer @ outer.T / 2)
    assert masked.learned == []


def test_das_and_dbm_at_once_train_both() -> None:
    method = DASDBM(n_features=3, lr=0.2, gate_lr=0.3)
    searched = method.search(8, seed=0, through=None)
    assert [group["lr"] for group in method.groups([searched])] == [0.2, 0.3]
    base, source = tensors(5, 8)
    q = searched.featurizer.basis.detach()
    torch.testing.assert_close(searched(base, source), base + (source - base) @ q @ q.T / 2)


def test_baselines_train_nothing() -> None:
    base, source = tensors(5, 8)
    for method in (FullVector(), RandomSubspace(n_features=3)):
        assert method.groups([method.search(8, seed=0, through=None)]) == []
    assert torch.equal(FullVector().search(8, 0, None)(base, source), source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "method", [DAS(n_features=3), DBM(), DASDBM(n_features=4), BoundlessDAS()], ids=lambda m: m.name
)
def test_activations_of_half_precision_get_an_edit_that_is_computed_in_single(method: Any, dtype: torch.dtype) -> None:
    searched = method.search(8, seed=0, through=None)
    base, source = (x.to(dtype) for x in tensors(5, 8))
    edited = searched(base, source)
    assert edited.dtype == dtype
    torch.testing.assert_close(edited, searched(base.float(), source.float()).to(dtype), atol=2e-2, rtol=2e-2)
    assert torch.equal(searched(base, base), base)
    edited.float().sum().backward()
    for group in method.groups([searched]):
        assert all(p.grad is not None and p.grad.isfinite().all() and p.dtype == torch.float32 for p in group["params"])


def test_several_tokens_are_edited_each_by_itself() -> None:
    base, source = tensors(2, 3, 8)
    for method in (DAS(n_features=3), DBM(), BoundlessDAS()):
        searched = method.search(8, seed=0, through=None)
        each = torch.stack([searched(base[:, i], source[:, i]) for i in range(3)], dim=1)
        torch.testing.assert_close(searched(base, source), each)


def test_a_mask_through_an_over_complete_dictionary_has_a_gate_for_each_feature() -> None:
    torch.manual_seed(0)
    wide = featurizers.DictionaryFeaturizer.from_tensors(torch.randn(40, 8), torch.randn(40, 8), rule="relu")
    searched = DBM().search(8, seed=0, through=wide)
    assert searched.gate.logits.shape == (40,)
    base, source = tensors(5, 8)
    gate = torch.zeros(40)
    gate[[3, 33]] = 1.0
    searched.gate.logits.data.copy_(gate * 2 - 1)
    searched.gate.hard = True
    wanted = base + ((torch.relu(source @ wide.W_enc.T) - torch.relu(base @ wide.W_enc.T)) * gate) @ wide.W_dec
    torch.testing.assert_close(searched(base, source), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: DBM(temperature=(1.0, 0.0)), "temperatures of a gate are positive"),
        (lambda: DBM(annealing=0.0), "annealing is the share"),
        (lambda: BoundlessDAS(temperature=(-1.0, 0.1)), "temperatures of a gate are positive"),
        (lambda: BoundlessDAS(start=0.0), "start is a share"),
        (lambda: DAS(n_features=9).search(8, 0, None), "do not fit into 8 dimensions"),
        (lambda: DBM().search(8, 0, featurizers.create("identity")), "create 'identity' with d_in"),
        (lambda: DAS(n_features=2).search(8, 0, featurizers.create("identity")), "create the featurizer with d_in"),
        (lambda: named_objective("cross entropy"), "is one of cross-entropy, logit-difference"),
        (lambda: setattr(BoundaryGate(3), "temperature", 0.0), "is positive"),
        (lambda: setattr(SigmoidGate(3), "temperature", -1.0), "is positive"),
    ],
)
def test_invalid_methods_are_refused(make: Any, problem: str) -> None:
    with pytest.raises((UsageError, featurizers.errors.ConfigError), match=problem):
        make()


def test_methods_have_their_names() -> None:
    assert list(METHODS) == ["das", "dbm", "das+dbm", "boundless"]


def answers(label: list[list[int]], there: list[list[int]], base: list[list[int]] | None = None) -> Answers:
    def base_labels() -> tuple[Tensor, Tensor]:
        assert base is not None
        return torch.tensor(base), torch.ones(len(base), len(base[0]), dtype=torch.bool)

    return Answers(torch.tensor(label), torch.tensor(there).bool(), base_labels)


def test_cross_entropy_is_the_mean_of_the_tokens_that_are_there() -> None:
    logits = torch.randn(2, 3, 7)
    found = cross_entropy(logits, answers([[1, 2, 3], [4, 0, 0]], [[1, 1, 1], [1, 0, 0]]))
    logs = logits.log_softmax(-1)
    wanted = torch.stack([-(logs[0, 0, 1] + logs[0, 1, 2] + logs[0, 2, 3]) / 3, -logs[1, 0, 4]])
    torch.testing.assert_close(found, wanted)


def test_the_logit_difference_is_of_the_first_tokens() -> None:
    logits = torch.randn(2, 2, 7)
    found = logit_difference(logits, answers([[1, 2], [4, 0]], [[1, 1], [1, 0]], [[5], [6]]))
    torch.testing.assert_close(
        found, torch.stack([logits[0, 0, 5] - logits[0, 0, 1], logits[1, 0, 6] - logits[1, 0, 4]])
    )


def test_what_a_search_found_does_not_move_when_the_training_goes_on() -> None:
    searched = DBM().search(4, seed=0, through=None)
    assert searched.gate is not None
    with torch.no_grad():
        searched.gate.logits.copy_(torch.tensor([1.0, -1.0, 2.0, -2.0]))
    found = searched.found()
    with torch.no_grad():
        searched.gate.logits.neg_()
    assert found.feature_sets["gate_logits"].tolist() == [1.0, -1.0, 2.0, -2.0]
    assert found.feature_sets["selected"].tolist() == [0, 2]
    assert not any(kept.requires_grad for kept in found.feature_sets.values())


def test_principal_components_need_activations() -> None:
    with pytest.raises(UsageError, match="need the activations of the pairs"):
        PCA(n_features=1).search(4, seed=0, through=None)
    x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found = PCA(n_features=1).search(2, seed=0, through=None, activations=lambda: x).found()
    torch.testing.assert_close(found.steer(torch.zeros(1, 2), 1.0).abs(), torch.tensor([[1.0, 0.0]]))
