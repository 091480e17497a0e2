"""Lowered operations against formulas written out by hand, and against the operations themselves."""

from __future__ import annotations

from typing import Any

import featurizers
import pytest
import torch
from featurizers import Ablate, Collect, Interchange, Mask, SigmoidGate, Steer, lower
from featurizers.errors import LoweringError
from featurizers_causal_basis import BasisRecord, CausalBasisFeaturizer
from featurizers_derived_scalars.featurize.diagonal import DiagonalFeaturizer
from featurizers_subspace import StandardizeFeaturizer
from torch import Tensor

from tests.support.dictionaries import RULES, dictionary, weights
from tests.support.models import WIDTH, fresh_model, hooked, module_of, prompts

D = 8
GATED = ("relu", "jumprelu", "jump", "gated", "identity")
INDICES = [5, 0, 17]


def batch(*shape: int, seed: int = 1, width: int = D) -> Tensor:
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed))


def subspace(d_in: int = D) -> Any:
    return featurizers.create("subspace", d_in=d_in, n_features=4, seed=3)


def causal_basis() -> Any:
    record = BasisRecord(mode="mean", side="output", readout="logit-lens", n_tokens=100)
    basis = torch.linalg.qr(batch(D))[0][:, :3]
    return CausalBasisFeaturizer.of(basis, torch.tensor([0.5, 0.2, 0.1]), batch(1)[0], record)


def standardize() -> Any:
    return StandardizeFeaturizer.from_statistics(batch(1)[0], torch.arange(1.0, D + 1))


LINEAR = {
    "identity": lambda: featurizers.create("identity", d_in=D),
    "subspace": subspace,
    "standardize": standardize,
    "causal-basis": causal_basis,
    "diagonal": lambda: DiagonalFeaturizer.from_gain(torch.tensor([2.0, 0.0, -1, 3, 1, 1, 0.5, 1])),
    "standardize >> subspace": lambda: standardize() >> subspace(),
    "standardize >> subspace >> dictionary": lambda: standardize() >> subspace() >> dictionary("jumprelu", d_in=4),
}
FEATURIZERS = {
    **LINEAR,
    **{rule: lambda rule=rule: dictionary(rule) for rule in GATED},
    "pre-bias": lambda: dictionary("jumprelu", pre_bias=True),
    "scaled": lambda: dictionary("gated", normalize="scale", input_scale=2.5, pre_bias=True),
    "decoder-norm": lambda: dictionary("jump").in_units("decoder-norm"),
    "folded": lambda: dictionary("jumprelu").in_units("folded"),
    "slice": lambda: dictionary("relu").take([17, 3, 0, 5, 8]),
    "double": lambda: dictionary("relu", dtype=torch.float64),
}


def operations(f: Any) -> dict[str, Any]:
    chosen = INDICES if f.n_features > 17 or getattr(f.config, "slice_of", None) else [2, 0]
    some, every = batch(1, width=len(chosen))[0], batch(1, width=f.n_features)[0]
    source = batch(1, seed=4).to(f.collect(batch(1).to(next(iter(f.parameters()), batch(1)).dtype)).dtype)
    gate = SigmoidGate(f.n_features).eval()
    with torch.no_grad():
        gate.logits.copy_(every)
    return {
        "steer": Steer(f, delta=some, indices=chosen),
        "steer all": Steer(f, delta=0.5),
        "ablate": Ablate(f, value=some, indices=chosen),
        "ablate all": Ablate(f),
        "interchange": Interchange(f, source=source, indices=chosen),
        "interchange all": Interchange(f, source=source),
        "mask": Mask(f, source=source, gate=every.sigmoid()),
        "mask of a module": Mask(f, source=source, gate=gate),
    }


@pytest.mark.parametrize("name", FEATURIZERS)
def test_a_program_gives_what_the_operation_gives(name: str) -> None:
    f = FEATURIZERS[name]()
    x = batch(5, 40, seed=7)
    for what, operation in operations(f).items():
        source = operation.source.expand_as(x) if isinstance(operation, Interchange | Mask) else None
        expected = operation.apply(x, source)
        found = lower(operation).apply(x)
        assert found.dtype == x.dtype
        expected = expected.detach()
        scale = float((expected - x).abs().max())
        assert scale > 0.1, what
        assert float((found - expected).abs().max()) < 3e-6 * max(scale, 10), what


def by_hand(rule: str, x: Tensor, value: Tensor) -> Tensor:
    """Features `INDICES` set to values, in the formulas of the papers."""
    t = weights(rule)
    w_enc, w_dec = t["W_enc"][INDICES], t["W_dec"][INDICES]
    u = x @ w_enc.T
    if rule == "gated":
        f = torch.relu(t["r_mag"][INDICES].exp() * u + t["b_mag"][INDICES]) * (u + t["b_gate"][INDICES] > 0)
    else:
        h = u + t["b_enc"][INDICES]
        f = h.relu() * (h > t["threshold"][INDICES]) if rule == "jumprelu" else h.relu()
    return x + (value - f) @ w_dec


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "gated"])
def test_setting_features_of_a_dictionary_is_its_formula(rule: str) -> None:
    x, value = batch(200, seed=9), torch.tensor([1.0, -2.0, 0.5])
    program = lower(Ablate(dictionary(rule), value=value, indices=INDICES))
    torch.testing.assert_close(program.apply(x), by_hand(rule, x, value), rtol=1e-5, atol=1e-5)
    assert program.vector is None
    assert program.affine is None


def test_steering_is_one_vector_whatever_the_rule() -> None:
    for rule in RULES:
        program = lower(Steer(dictionary(rule), delta=torch.tensor([1.0, 2.0, 3.0]), indices=INDICES))
        expected = torch.tensor([1.0, 2.0, 3.0]) @ weights(rule)["W_dec"][INDICES]
        assert program.vector is not None
        torch.testing.assert_close(program.vector, expected)
        torch.testing.assert_close(program.apply(batch(9)), batch(9) + expected)


@pytest.mark.parametrize("name", [name for name in LINEAR if "dictionary" not in name])
def test_linear_kinds_are_affine(name: str) -> None:
    x = batch(30, seed=2)
    for operation in operations(LINEAR[name]()).values():
        program = lower(operation)
        assert program.affine is not None
        a, b, c = program.affine
        torch.testing.assert_close(x + x @ a @ b + c, program.apply(x), rtol=1e-5, atol=1e-5)


def test_the_affine_form_of_a_subspace_is_a_projection() -> None:
    f, x = subspace(), batch(6)
    basis = f.orthonormal_basis().detach()
    a, b, c = lower(Ablate(f)).affine or ()
    torch.testing.assert_close(x + x @ a @ b + c, x - x @ basis @ basis.T)


def test_a_hook_that_applies_a_program_generates_what_intervene_generates() -> None:
    f = dictionary("jumprelu", d_in=WIDTH)
    f.site = featurizers.Site.parse("resid.post:1")
    model, ids = fresh_model("llama").eval(), prompts(2, 5)
    operation = Ablate(f, value=4.0, indices=[0, 3, 9])
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with featurizers.intervene(model, {f.site: operation}):
        expected = model.generate(ids, **options)
    program = lower(operation)
    assert (program.site, program.positions) == (f.site, None)
    with hooked(*module_of(model, "llama", "resid.post", 1), program.apply):
        found = model.generate(ids, **options)
    clean = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert not torch.equal(clean.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_half_precision_is_computed_in_single_and_rounded_once() -> None:
    f = dictionary("relu", dtype=torch.bfloat16)
    program = lower(Steer(f, delta=3.0, indices=INDICES))
    x = batch(50, seed=3).bfloat16()
    expected = x.float() + 3.0 * f.W_dec[INDICES].float().sum(0)
    assert program.rows.write.dtype == torch.float32
    assert torch.equal(program.apply(x), expected.bfloat16())


def test_a_program_keeps_positions_and_special_tokens_and_no_gradient() -> None:
    f = dictionary("relu", special_tokens=[1, 2]).requires_grad_()
    program = lower(Steer(f, delta=1.0, indices=[3], positions=torch.tensor([0, -1])))
    assert (program.positions, program.special_tokens) == ((0, -1), (1, 2))
    assert not program.rows.write.requires_grad
    with torch.no_grad():
        f.W_dec += 1.0
    assert not torch.equal(program.rows.write[0], f.W_dec[3])


@pytest.mark.parametrize(
    ("operation", "problem"),
    [
        (lambda: Ablate(dictionary("topk"), indices=[1]), "no gate of their own"),
        (lambda: Steer(dictionary(normalize="layer-norm"), delta=1.0), "normalises each token by its own layer-norm"),
        (lambda: Ablate(subspace(), value="mean"), "depends on the batch"),
        (lambda: Collect(subspace()), "has no fixed form; lower Steer, Ablate, Interchange or Mask"),
        (lambda: Interchange(subspace(), source={"input_ids": prompts(1, 3)}), "featurizers.collect"),
        (lambda: Interchange(subspace(), source=batch(2)), r"a source of shape \(2, 8\)"),
        (lambda: Steer(subspace(), delta=1.0, indices=[[0], [1]]), "other features for each example"),
        (lambda: Steer(subspace(), delta=1.0, positions=[[0], [1]]), "one list of integers for all"),
        (lambda: Steer(subspace(), delta=1.0, positions=[]), "one list of integers for all"),
        (lambda: Steer(subspace(), delta=torch.ones(2, 4)), "one number for each feature"),
        (lambda: Steer(featurizers.create("identity"), delta=1.0), "create it with d_in"),
        (lambda: Ablate(dictionary(n_features=4) >> subspace(4)), "stands before another stage and is not affine"),
    ],
)
def test_what_is_no_fixed_edit_is_refused_with_the_reason(operation: Any, problem: str) -> None:
    with pytest.raises(LoweringError, match=problem):
        lower(operation())


def test_a_kind_that_says_nothing_of_its_rows_is_refused() -> None:
    class Tripled(featurizers.Featurizer[Any]):
        kind = "tripled"

        def __init__(self) -> None:
            super().__init__(featurizers.create("identity", d_in=3).config)
            self.d_in = self.n_features = 3

        def featurize(self, x: Tensor) -> tuple[Tensor, None]:
            return 3 * x, None

        def inverse_featurize(self, features: Tensor, error: Any) -> Tensor:
            return features / 3

    with pytest.raises(LoweringError, match=r"the features of 'tripled' \(tripled\) are not known as rows"):
        lower(Steer(Tripled(), delta=1.0))
