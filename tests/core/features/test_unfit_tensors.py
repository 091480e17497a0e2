"""Tensors that a featurizer cannot take, for each kind: an error of this library, or the empty result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from featurizers import Ablate, Featurizer, Interchange, Mask, Steer, collect, create, intervene
from featurizers.errors import FeaturizerError, ShapeError, UsageError
from torch import Tensor

from tests.plugins.causal_basis.test_featurizer import basis
from tests.support.dictionaries import RULES, dictionary
from tests.support.models import WIDTH, prompts, tiny_model

D = 8
KINDS: dict[str, Callable[[], Featurizer[Any]]] = {
    "identity": lambda: create("identity", d_in=D),
    "subspace": lambda: create("subspace", d_in=D, n_features=3),
    "standardize": lambda: create("standardize", d_in=D),
    "composition": lambda: create("standardize", d_in=D) >> create("subspace", d_in=D, n_features=3),
    "matching pursuit": lambda: create("sae-lens.matching-pursuit", d_in=D, n_features=3),
    "causal basis": lambda: basis(D, 3),
    **{rule: (lambda rule=rule: dictionary(rule)) for rule in RULES},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def operations(f: Featurizer[Any], x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every operation on x, with itself as the source."""
    gate = torch.full((f.n_features or D,), 0.5)
    return {
        "round trip": lambda: f.inverse_featurize(*f.featurize(x)),
        "interchange": lambda: f.interchange(x, x),
        "interchange of one": lambda: f.interchange(x, x, [0]),
        "mask": lambda: f.mask(x, x, gate),
        "steer": lambda: f.steer(x, 1.0),
        "steer one": lambda: f.steer(x, 1.0, [0]),
        "ablate": lambda: f.ablate(x),
        "mean": lambda: Ablate(f, value="mean").apply(x, None),
        "splice": lambda: f.splice(x, lambda z: z + 1),
    }


@kinds
@pytest.mark.parametrize("shape", [(0, 5, D), (2, 0, D), (0, D), (0, 0, D)], ids=str)
def test_no_activations_give_no_activations(kind: str, shape: tuple[int, ...]) -> None:
    f, x = KINDS[kind](), torch.zeros(shape)
    for result in (operation() for operation in operations(f, x).values()):
        assert result.shape == shape
    n = f.n_features or D
    assert f.encode(x).shape == f.collect(x).shape == (*shape[:-1], n)
    assert f.collect(x, [0]).shape == (*shape[:-1], 1)


@kinds
@pytest.mark.parametrize("shape", [(2, 5, 0), (2, 0), (0,), (2, 3, 7), (2, 1)], ids=str)
def test_another_width_is_a_shape_error(kind: str, shape: tuple[int, ...]) -> None:
    f, x = KINDS[kind](), torch.zeros(shape)
    if kind == "identity":  # its maps take any width
        uses = operations(f, x)
        uses.pop("round trip")
    else:
        uses = {**operations(f, x), "encode": lambda: f.encode(x)}
    for use in (*uses.values(), lambda: f.collect(x)):
        with pytest.raises(ShapeError):
            use()


@pytest.mark.parametrize("kind", ["subspace", "standardize", "composition", "causal basis"])
def test_features_of_another_width_are_a_shape_error(kind: str) -> None:
    f = KINDS[kind]()
    _, error = f.featurize(torch.zeros(2, D))
    for width in (0, 1, 7):
        with pytest.raises(ShapeError, match="features of width"):
            f.inverse_featurize(torch.zeros(2, width), error)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_a_featurizer_on_meta_says_so(kind: str) -> None:
    f = copy.deepcopy(KINDS[kind]()).to("meta")
    x = torch.randn(2, 5, D)
    for use in (*operations(f, x).values(), lambda: f.encode(x), lambda: f.collect(x)):
        with pytest.raises(UsageError, match="on the device 'meta', so its tensors have no values"):
            use()


def test_a_featurizer_on_meta_in_a_model() -> None:
    f = create("subspace", d_in=WIDTH, n_features=3).to("meta")
    model, ids = tiny_model("llama"), prompts(2, 4)
    with pytest.raises(UsageError, match="have no values"), intervene(model, {"resid.post:1": Steer(f, delta=1.0)}):
        model(ids)
    with pytest.raises(UsageError, match="have no values"):
        collect(model, {"input_ids": ids}, {"resid.post:1": f})


@kinds
@pytest.mark.parametrize("shape", [(3, 5, D), (2, 4, D), (1, 2, 5, D), (5, 2, D)], ids=str)
def test_a_source_that_does_not_broadcast_is_a_shape_error(kind: str, shape: tuple[int, ...]) -> None:
    f, base, source = KINDS[kind](), torch.zeros(2, 5, D), torch.zeros(shape)
    n = f.n_features or D
    with pytest.raises(RuntimeError):
        source.expand_as(base)
    for indices in (None, [0], [0, 1, 2], [[0], [1]], torch.ones(n, dtype=torch.bool)):
        with pytest.raises(ShapeError, match="does not broadcast to"):
            f.interchange(base, source, indices)
    with pytest.raises(ShapeError, match="does not broadcast to"):
        f.mask(base, source, torch.ones(n))


@kinds
def test_what_broadcasts_is_as_if_it_were_expanded(kind: str) -> None:
    f, base = KINDS[kind](), torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
    n = f.n_features or D
    for shape in ((D,), (5, D), (1, 5, D), (2, 1, D)):
        source = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(f.interchange(base, source), f.interchange(base, source.expand_as(base)))
    gate = torch.linspace(0, 1, n).expand(2, 1, n)
    torch.testing.assert_close(f.mask(base, -base, gate), f.mask(base, -base, gate.expand(2, 5, n)))
    for unfit in (torch.ones(3, 1, n), torch.ones(1, 2, 5, n)):
        with pytest.raises(ShapeError, match=r"gate of shape .* does not broadcast to"):
            f.mask(base, base, unfit)


@pytest.mark.parametrize(
    "value", ["1", None, {"a": 1}, object(), 1j, [1.0, "x"]], ids=lambda value: type(value).__name__
)
def test_values_that_are_no_numbers_are_refused(value: Any) -> None:
    f, x = create("subspace", d_in=D, n_features=3), torch.zeros(2, D)
    for use in (lambda: f.steer(x, value), lambda: f.ablate(x, value=value), lambda: f.mask(x, x, value)):
        with pytest.raises(UsageError):
            use()
    for make in (
        lambda: Steer(f, delta=value),
        lambda: Ablate(f, value=value),
        lambda: Mask(f, source=x, gate=value),
        lambda: Interchange(f, source=value) if not isinstance(value, dict) else Steer(f, delta=value),
    ):
        with pytest.raises(UsageError):
            make()


def test_numbers_and_tensors_are_taken() -> None:
    f, x = create("subspace", d_in=D, n_features=3), torch.zeros(2, D)
    for value in (1, 1.0, True, torch.tensor(1), torch.ones(3)):
        assert torch.equal(Steer(f, delta=value).apply(x, None), f.steer(x, 1.0))
        assert torch.equal(Ablate(f, value=value).apply(x, None), f.ablate(x, value=1.0))


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "last"},
        {"positions": 0},
        {"positions": {0}},
        {"positions": [0.5]},
        {"positions": [[0], [0, 1]]},
        {"indices": "0"},
        {"indices": {0: 1}},
        {"indices": 0},
        {"indices": [None]},
        {"indices": [0.5]},
    ],
    ids=str,
)
def test_positions_and_indices_of_another_form_are_refused(options: dict[str, Any]) -> None:
    f, model, ids = create("identity", d_in=WIDTH), tiny_model("llama"), prompts(2, 4)
    for make in (lambda: Steer(f, delta=1.0, **options), lambda: Interchange(f, source={"input_ids": ids}, **options)):
        with pytest.raises(FeaturizerError), intervene(model, {"resid.post:1": make()}):
            model(ids)
