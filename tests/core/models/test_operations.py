"""What each operation does against closed forms, how operations combine, and what hooks and gradients they leave."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import featurizers
import pytest
import torch
from featurizers import Ablate, Collect, Interchange, Mask, SigmoidGate, Steer, collect, intervene
from featurizers.errors import FeatureIndexError, FeaturizerError, ShapeError, SiteError, UsageError
from featurizers.models.operations import Operation
from torch import Tensor, nn

from tests.support.models import LAYERS, WIDTH, fresh_model, hooked, hooks_of, module_of, prompts, read, tiny_model

torch.set_num_threads(1)

SITE, ARCHITECTURE = "resid.post:1", "llama"
K = 6
BASE = {"input_ids": prompts(3, 5, seed=1)}
SOURCE = {"input_ids": prompts(3, 5, seed=2)}


def identity() -> featurizers.Featurizer:
    return featurizers.create("identity", d_in=WIDTH)


def subspace() -> featurizers.Featurizer:
    return featurizers.create("subspace", d_in=WIDTH, n_features=K, seed=1)


def at(inputs: dict[str, Tensor], layer: int = 1) -> Tensor:
    model = tiny_model(ARCHITECTURE)
    return read(model, *module_of(model, ARCHITECTURE, "resid.post", layer), **inputs)


def edited(*operations: Operation) -> Tensor:
    """The activations at the site that the next block is given."""
    model = tiny_model(ARCHITECTURE)
    with intervene(model, {SITE: operations}):
        return read(model, *module_of(model, ARCHITECTURE, "resid.pre", 2), **BASE)


def projected(change: Callable[[Tensor], Tensor], f: featurizers.Featurizer) -> Tensor:
    """Base plus Q times what ``change`` adds to the coordinates Qᵀ base."""
    basis = f.orthonormal_basis().detach()
    features = at(BASE) @ basis
    return at(BASE) + (change(features) - features) @ basis.T


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found - at(BASE)).abs().max() > 1e-3, "the edit does nothing, so that this comparison is empty"
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


# ---- closed forms


def test_interchange_swaps_the_chosen_coordinates():
    f, basis = subspace(), subspace().orthonormal_basis().detach()
    base, source = at(BASE), at(SOURCE)
    close(edited(Interchange(f, source=SOURCE)), base + ((source - base) @ basis) @ basis.T)
    some = basis[:, [4, 0]]
    close(edited(Interchange(f, source=SOURCE, indices=[4, 0])), base + ((source - base) @ some) @ some.T)


def test_interchange_through_the_identity_swaps_neurons_bit_for_bit():
    wanted = at(BASE)
    wanted[..., [3, 30]] = at(SOURCE)[..., [3, 30]]
    assert torch.equal(edited(Interchange(identity(), source=SOURCE, indices=[30, 3])), wanted)


@pytest.mark.parametrize("hard", [False, True])
def test_mask_moves_each_feature_by_its_gate(hard):
    f, target = subspace(), at(SOURCE) @ subspace().orthonormal_basis().detach()
    gate = SigmoidGate(K, temperature=0.5, hard=hard)
    gate.logits.data = torch.tensor([-3.0, -0.2, 0.0, 0.1, 0.7, 4.0])
    weights = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]) if hard else 1 / (1 + torch.exp(-gate.logits.data / 0.5))
    wanted = projected(lambda features: (1 - weights) * features + weights * target, f)
    close(edited(Mask(f, source=SOURCE, gate=gate)).detach(), wanted)
    close(edited(Mask(f, source=SOURCE, gate=weights)), wanted)


def test_a_gate_of_zeros_keeps_the_base_and_one_of_ones_swaps_it():
    assert torch.equal(edited(Mask(identity(), source=SOURCE, gate=torch.zeros(WIDTH))), at(BASE))
    assert torch.equal(edited(Mask(identity(), source=SOURCE, gate=torch.ones(WIDTH))), at(SOURCE))


def test_whether_a_gate_is_hard_does_not_follow_training():
    gate = SigmoidGate(2)
    gate.logits.data = torch.tensor([1.0, -1.0])
    assert torch.equal(gate.train()(), gate.eval()())
    gate.hard = True
    assert gate.train()().tolist() == gate.eval()().tolist() == [1.0, 0.0]
    assert torch.equal(gate.sparsity_loss(), torch.sigmoid(gate.logits).sum())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(UsageError, match="temperature"):
        SigmoidGate(2, temperature=temperature)


@pytest.mark.parametrize("delta", [1.5, torch.tensor([2.0, -1.0])], ids=["number", "tensor"])
def test_steer_adds_to_the_chosen_features(delta):
    f = subspace()
    step = torch.zeros(K)
    step[[5, 2]] = torch.as_tensor(delta)
    close(edited(Steer(f, delta=delta, indices=[5, 2])), at(BASE) + f.orthonormal_basis().detach() @ step)


@pytest.mark.parametrize("value", [0.0, -2.5, torch.tensor([3.0, 7.0])], ids=["zero", "number", "tensor"])
def test_ablate_sets_the_chosen_features(value):
    def change(features: Tensor) -> Tensor:
        features = features.clone()
        features[..., [5, 2]] = torch.as_tensor(value)
        return features

    f = subspace()
    close(edited(Ablate(f, value=value, indices=[5, 2])), projected(change, f))


def test_ablate_sets_zero_unless_told_otherwise():
    assert not edited(Ablate(identity())).any()


def test_ablate_mean_sets_the_mean_over_examples_and_chosen_positions():
    wanted = at(BASE)
    wanted[:, [0, 3], 4] = at(BASE)[:, [0, 3], 4].mean()
    wanted[:, [0, 3], 1] = at(BASE)[:, [0, 3], 1].mean()
    close(edited(Ablate(identity(), value="mean", indices=[4, 1], positions=[0, -2])), wanted)


def test_collect_keeps_features_in_the_order_wanted_and_edits_nothing():
    model, f = tiny_model(ARCHITECTURE), subspace()
    features = at(BASE) @ f.orthonormal_basis().detach()
    with torch.no_grad(), intervene(model, {SITE: Collect(f, indices=[3, 0], positions=[-1, 1])}) as seen:
        logits = model(**BASE).logits
    torch.testing.assert_close(seen[SITE], features[:, [-1, 1]][..., [3, 0]])
    with torch.no_grad():
        assert torch.equal(model(**BASE).logits, logits)


@pytest.mark.parametrize(
    ("indices", "wanted"),
    [
        ([[0], [1, 2], []], [[0], [1, 2], []]),
        (torch.tensor([[0, 3], [4, 1], [2, 5]]), [[0, 3], [4, 1], [2, 5]]),
        (torch.tensor([True, False, True, False, False, False]), [[0, 2]] * 3),
        (torch.eye(3, K) > 0, [[0], [1], [2]]),
        (slice(1, 4), [[1, 2, 3]] * 3),
    ],
    ids=["lists", "tensor", "boolean", "boolean by example", "slice"],
)
@pytest.mark.parametrize("positions", [None, [0, 2]], ids=["all", "two"])
def test_indices_may_differ_by_example(indices, wanted, positions):
    f, basis = subspace(), subspace().orthonormal_basis().detach()
    chosen, base, source = torch.zeros(3, 1, K), at(BASE), at(SOURCE)
    for row, columns in enumerate(wanted):
        chosen[row, 0, columns] = 1
    here = torch.zeros(5, 1)
    here[positions if positions is not None else slice(None)] = 1
    swapped = base + here * ((((source - base) @ basis) * chosen) @ basis.T)
    close(edited(Interchange(f, source=SOURCE, indices=indices, positions=positions)), swapped)
    cleared = base - here * (((base @ basis) * chosen) @ basis.T)
    close(edited(Ablate(f, indices=indices, positions=positions)), cleared)


def test_no_index_is_no_edit():
    todo = [
        Interchange(subspace(), source=SOURCE, indices=[]),
        Steer(subspace(), delta=1.0, indices=[]),
        Ablate(subspace(), indices=[[], [], []]),
        Ablate(subspace(), indices=torch.zeros(K, dtype=torch.bool)),
    ]
    assert torch.equal(edited(*todo), at(BASE))


# ---- sources


@pytest.mark.parametrize("positions", [None, [1, -1], [[0], [2], [4]]], ids=["all", "two", "its own"])
def test_inputs_and_their_activations_are_the_same_source(positions):
    activations = collect(tiny_model(ARCHITECTURE), SOURCE, [SITE], positions=positions)[SITE]
    of_inputs = edited(Interchange(subspace(), source=SOURCE, positions=positions))
    assert torch.equal(of_inputs, edited(Interchange(subspace(), source=activations, positions=positions)))


def test_source_positions_say_what_is_read():
    wanted = at(BASE)
    wanted[:, [4, 0]] = at(SOURCE)[:, [1, 2]]
    assert torch.equal(
        edited(Interchange(identity(), source=SOURCE, positions=[4, 0], source_positions=[1, 2])), wanted
    )


@pytest.mark.parametrize("shape", [(3, 1, WIDTH), (3, WIDTH), (1, 1, WIDTH), (1, WIDTH), (WIDTH,)])
def test_one_position_or_one_example_of_a_source_may_stand_for_all(shape):
    source = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = at(BASE)
    wanted[:, 2] = source.reshape(-1, WIDTH)
    assert torch.equal(edited(Interchange(identity(), source=source, positions=[2])), wanted)


@pytest.mark.parametrize("shape", [(2, 1, WIDTH), (3, 4, WIDTH), (3, 5, 7)])
def test_a_source_of_another_shape_is_refused(shape):
    with pytest.raises(ShapeError):
        edited(Interchange(identity(), source=torch.zeros(shape)))


def test_a_source_of_one_position_for_each_example_is_refused_at_as_many_positions():
    with pytest.raises(ShapeError):
        edited(Interchange(identity(), source=torch.zeros(3, WIDTH), positions=[0, 1, 2]))


@contextmanager
def counted(module: nn.Module) -> Iterator[list[None]]:
    calls: list[None] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("positions", [None, [-1]])
def test_sites_that_share_inputs_cost_one_source_pass(positions):
    model = tiny_model(ARCHITECTURE)
    todo = {site: Interchange(identity(), source=SOURCE, positions=positions) for site in ("resid.post:0", "mlp.out:1")}
    with counted(model) as calls, intervene(model, todo):
        assert len(calls) == 1


def test_sites_that_share_inputs_and_equal_positions_cost_one_source_pass():
    model = tiny_model(ARCHITECTURE)
    todo = {site: Interchange(identity(), source=SOURCE, positions=[-1]) for site in ("resid.post:0", "mlp.out:1")}
    with counted(model) as calls, intervene(model, todo):
        assert len(calls) == 1


def test_sites_that_share_inputs_read_their_own_positions():
    model = tiny_model(ARCHITECTURE)
    todo = {
        SITE: [
            Interchange(identity(), source=SOURCE, positions=[0]),
            Interchange(identity(), source=SOURCE, positions=[3], source_positions=[1]),
        ]
    }
    wanted = at(BASE)
    wanted[:, 0], wanted[:, 3] = at(SOURCE)[:, 0], at(SOURCE)[:, 1]
    with intervene(model, todo):
        assert torch.equal(read(model, *module_of(model, ARCHITECTURE, "resid.pre", 2), **BASE), wanted)


def test_a_source_is_read_before_any_edit_and_without_gradient():
    model, seen = tiny_model(ARCHITECTURE), []
    todo = {
        "resid.post:0": Steer(identity(), delta=1.0),
        SITE: Interchange(identity(), source=SOURCE, positions=[-1]),
    }
    module, side = module_of(model, ARCHITECTURE, "resid.pre", 2)
    with intervene(model, todo), hooked(module, side, lambda hidden: seen.append(hidden) or hidden):
        model(**BASE)
    assert torch.equal(seen[0][:, -1], at(SOURCE)[:, -1])
    assert not torch.equal(seen[0][:, 0], at(BASE)[:, 0])
    embeddings = model.get_submodule("model.embed_tokens").weight
    assert not torch.autograd.grad(seen[0][:, -1].sum(), [embeddings], retain_graph=True)[0].any()
    assert torch.autograd.grad(seen[0][:, 0].sum(), [embeddings])[0].any()


# ---- combining


def test_operations_at_one_site_act_in_their_order():
    double = Steer(identity(), delta=1.0), Ablate(identity(), value=4.0)
    assert torch.equal(edited(*double), torch.full_like(at(BASE), 4.0))
    assert torch.equal(edited(*reversed(double)), torch.full_like(at(BASE), 5.0))


def test_collect_sees_the_operations_before_it_and_not_those_after():
    model = tiny_model(ARCHITECTURE)
    todo = [Ablate(identity(), value=4.0), Collect(identity()), Ablate(identity(), value=9.0)]
    with torch.no_grad(), intervene(model, {SITE: todo}) as seen:
        model(**BASE)
    assert torch.equal(seen[SITE], torch.full((3, 5, WIDTH), 4.0))


def test_the_last_of_several_collects_is_kept():
    model = tiny_model(ARCHITECTURE)
    todo = [Collect(identity()), Ablate(identity(), value=9.0), Collect(identity(), positions=[0])]
    with torch.no_grad(), intervene(model, {SITE: todo}) as seen:
        model(**BASE)
    assert torch.equal(seen[SITE], torch.full((3, 1, WIDTH), 9.0))


def test_several_sites_are_edited_in_one_pass():
    model = tiny_model(ARCHITECTURE)
    todo = {
        "embed": Steer(identity(), delta=0.5),
        featurizers.Site("mlp.out", 0): Ablate(identity(), indices=[1]),
        "attn.z:2:1": Steer(featurizers.create("identity", d_in=8), delta=1.0, positions=[-1]),
    }

    def head(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, -1, 8:16] += 1
        return hidden

    with (
        torch.no_grad(),
        hooked(*module_of(model, ARCHITECTURE, "embed"), lambda hidden: hidden + 0.5),
        hooked(
            *module_of(model, ARCHITECTURE, "mlp.out", 0), lambda hidden: hidden.index_fill(-1, torch.tensor([1]), 0)
        ),
        hooked(*module_of(model, ARCHITECTURE, "attn.z", 2), head),
    ):
        wanted = model(**BASE).logits
    with torch.no_grad(), intervene(model, todo):
        assert torch.equal(model(**BASE).logits, wanted)


def test_collected_activations_are_given_by_the_sites_that_were_asked_for():
    model, site = tiny_model(ARCHITECTURE), featurizers.Site("resid.post", 0)
    with torch.no_grad(), intervene(model, {site: Collect(identity()), SITE: Collect(identity())}) as seen:
        assert not seen
        model(**BASE)
    assert set(seen) == {site, SITE}
    assert torch.equal(seen[site], at(BASE, 0))
    assert torch.equal(collect(model, BASE, [site, SITE])[site], at(BASE, 0))


def test_what_was_collected_does_not_change_afterwards():
    model = tiny_model(ARCHITECTURE)
    module = model.get_submodule("model.layers.2")
    handle = module.register_forward_pre_hook(lambda _, args: (args[0].zero_(),))
    try:
        with torch.no_grad(), intervene(model, {SITE: Collect(identity())}) as seen:
            model(**BASE)
        by_collect = collect(model, BASE, [SITE, "resid.post:2"])[SITE]
        by_featurizer = collect(model, BASE, {SITE: identity(), "resid.post:2": identity()})[SITE]
    finally:
        handle.remove()
    for found in (seen[SITE], by_collect, by_featurizer):
        assert torch.equal(found, at(BASE))


def test_nested_contexts_both_act_the_outer_first():
    model = tiny_model(ARCHITECTURE)
    before = hooks_of(model)
    outer, inner = Ablate(identity(), value=4.0), Steer(identity(), delta=1.0)
    with intervene(model, {SITE: outer}):
        with intervene(model, {SITE: inner}):
            together = read(model, *module_of(model, ARCHITECTURE, "resid.pre", 2), **BASE)
        alone = read(model, *module_of(model, ARCHITECTURE, "resid.pre", 2), **BASE)
    assert torch.equal(together, torch.full_like(together, 5.0))
    assert torch.equal(alone, torch.full_like(alone, 4.0))
    assert hooks_of(model) == before


def test_reading_a_source_does_not_replace_what_an_outer_context_collected():
    model = tiny_model(ARCHITECTURE)
    with intervene(model, {SITE: Collect(identity())}) as seen:
        model(**BASE)
        with intervene(model, {"resid.post:2": Interchange(identity(), source=SOURCE)}):
            assert torch.equal(seen[SITE], at(BASE))


# ---- hooks


def test_hooks_go_when_the_context_ends():
    model = fresh_model(ARCHITECTURE)
    with intervene(model, {SITE: Steer(identity(), delta=1.0)}):
        assert hooks_of(model)
    assert not hooks_of(model)


def test_hooks_go_when_the_model_fails():
    model = fresh_model(ARCHITECTURE)
    with pytest.raises(ShapeError), intervene(model, {SITE: Steer(identity(), delta=torch.zeros(3))}):
        model(**BASE)
    assert not hooks_of(model)
    with pytest.raises(IndexError), intervene(model, {SITE: Steer(identity(), delta=1.0)}):
        model(input_ids=torch.tensor([[1000]]))
    assert not hooks_of(model)


@pytest.mark.parametrize(
    "todo",
    [
        {SITE: Steer(identity(), delta=1.0), "resid.pots:1": Steer(identity(), delta=1.0)},
        {SITE: Steer(identity(), delta=1.0), "resid.post:9": Steer(identity(), delta=1.0)},
        {SITE: Interchange(identity(), source={"input_ids": torch.tensor([[1000]])})},
        {SITE: Interchange(identity(), source=SOURCE, positions=[9])},
    ],
    ids=["misspelt", "too deep", "source fails", "source too short"],
)
def test_hooks_go_when_entering_fails(todo):
    model = fresh_model(ARCHITECTURE)
    with pytest.raises((SiteError, IndexError)), intervene(model, todo):
        pass
    assert not hooks_of(model)


@pytest.mark.parametrize("failing", ["a site", "a featurizer", "a position", "the model"])
def test_hooks_go_when_collect_fails(failing):
    model = fresh_model(ARCHITECTURE)
    narrow = featurizers.create("identity", d_in=3)
    calls = {
        "a site": (BASE, {SITE: identity(), "nowhere": identity()}, None),
        "a featurizer": (BASE, {SITE: narrow}, None),
        "a position": (BASE, {SITE: identity()}, [9]),
        "the model": ({"input_ids": torch.tensor([[1000]])}, {SITE: identity()}, None),
    }
    inputs, sites, positions = calls[failing]
    with pytest.raises((FeaturizerError, IndexError)):
        collect(model, inputs, sites, positions=positions)
    assert not hooks_of(model)


def test_hooks_of_others_are_called_and_stay():
    model, called = fresh_model(ARCHITECTURE), []
    block = model.get_submodule("model.layers.1")
    block.register_forward_hook(lambda *_: called.append("forward"))
    block.register_forward_pre_hook(lambda *_: called.append("before"))
    block.register_full_backward_hook(lambda *_: called.append("backward"))
    before = hooks_of(model)
    with intervene(model, {SITE: Steer(identity(), delta=1.0), "resid.pre:1": Steer(identity(), delta=1.0)}):
        model(**BASE).logits.sum().backward()
    assert called == ["before", "forward", "backward"]
    collect(model, BASE, ["resid.post:1", "resid.post:2"])
    assert called == ["before", "forward", "backward", "before", "forward"]
    assert hooks_of(model) == before


def test_hooks_of_others_that_come_within_the_context_stay_after_it():
    model, called = fresh_model(ARCHITECTURE), []
    with intervene(model, {SITE: Steer(identity(), delta=1.0)}):
        model.get_submodule("model.layers.1").register_forward_hook(lambda *_: called.append(None))
    with torch.no_grad():
        model(**BASE)
    assert len(called) == 1


# ---- collect


@pytest.mark.parametrize(
    ("sites", "blocks"), [(["embed"], 0), (["resid.pre:1"], 1), (["attn.out:0", SITE], 2), (["norm.out"], LAYERS)]
)
def test_collect_stops_after_the_last_site(sites, blocks):
    model, ran = fresh_model(ARCHITECTURE), []
    for block in model.get_submodule("model.layers"):
        block.register_forward_hook(lambda *_: ran.append(None))
    model.get_submodule("lm_head").register_forward_hook(lambda *_: pytest.fail("the head ran"))
    collect(model, BASE, sites)
    assert len(ran) == blocks


def test_collect_gives_features_through_featurizers():
    f = subspace()
    found = collect(tiny_model(ARCHITECTURE), BASE, {SITE: f, "resid.post:0": identity()})
    torch.testing.assert_close(found[SITE], at(BASE) @ f.orthonormal_basis())
    assert torch.equal(found["resid.post:0"], at(BASE, 0))


def test_collect_keeps_a_graph_only_where_asked():
    model = fresh_model(ARCHITECTURE)
    assert not collect(model, BASE, [SITE])[SITE].requires_grad
    with torch.no_grad():
        assert torch.equal(collect(model, BASE, [SITE], grad=True)[SITE], at(BASE))
        assert not collect(model, BASE, [SITE], grad=True)[SITE].requires_grad
    assert torch.is_grad_enabled()
    collect(model, BASE, [SITE], grad=True)[SITE].square().sum().backward()
    gradient = model.get_submodule("model.embed_tokens").weight.grad
    assert gradient[BASE["input_ids"]].abs().amax(-1).min() > 0
    assert model.get_submodule("model.layers.2").self_attn.o_proj.weight.grad is None


def test_collect_says_what_was_never_reached():
    model = tiny_model(ARCHITECTURE)
    model.add_module("idle", nn.Linear(2, 2))
    try:
        with pytest.raises(UsageError, match="without passing through module:idle:output"):
            collect(model, BASE, ["embed", "module:idle:output"])
    finally:
        del model.idle


def test_collect_takes_a_list_of_sites():
    with pytest.raises(UsageError, match=r"\['resid.post:1'\]"):
        collect(tiny_model(ARCHITECTURE), BASE, SITE)


# ---- gradients


def _loss(logits: Tensor) -> Tensor:
    weights = torch.randn(logits.shape[-2:], generator=torch.Generator().manual_seed(3))
    return (logits * weights).sum()


@pytest.mark.parametrize("positions", [None, [-1, 1]], ids=["all", "two"])
def test_the_gradient_in_the_basis_is_that_of_the_closed_form(positions):
    model, f = tiny_model(ARCHITECTURE), subspace()
    source, columns = at(SOURCE), slice(None) if positions is None else positions
    with intervene(model, {SITE: Interchange(f, source=SOURCE, positions=positions)}):
        (found,) = torch.autograd.grad(_loss(model(**BASE).logits), [f.basis])

    basis = f.basis.detach().clone().requires_grad_()

    def edit(hidden: Tensor) -> Tensor:
        out = hidden.clone()
        out[:, columns] = hidden[:, columns] + ((source - hidden)[:, columns] @ basis) @ basis.T
        return out

    with hooked(*module_of(model, ARCHITECTURE, "resid.post", 1), edit):
        (euclidean,) = torch.autograd.grad(_loss(model(**BASE).logits), [basis])
    along = basis.detach().T @ euclidean
    wanted = euclidean - basis.detach() @ (along + along.T) / 2  # along the manifold of orthonormal bases
    assert wanted.abs().max() > 1
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_gradient_in_the_gate_is_that_of_the_closed_form():
    model, gate = tiny_model(ARCHITECTURE), SigmoidGate(WIDTH, temperature=0.7)
    gate.logits.data = torch.linspace(-2, 2, WIDTH)
    source = at(SOURCE)
    with intervene(model, {SITE: Mask(identity(), source=SOURCE, gate=gate, positions=[-1])}):
        (found,) = torch.autograd.grad(_loss(model(**BASE).logits), [gate.logits])

    logits = torch.linspace(-2, 2, WIDTH).requires_grad_()

    def edit(hidden: Tensor) -> Tensor:
        out, weight = hidden.clone(), torch.sigmoid(logits / 0.7)
        out[:, -1] = (1 - weight) * hidden[:, -1] + weight * source[:, -1]
        return out

    with hooked(*module_of(model, ARCHITECTURE, "resid.post", 1), edit):
        (wanted,) = torch.autograd.grad(_loss(model(**BASE).logits), [logits])
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_hard_gate_has_no_gradient():
    model, gate = tiny_model(ARCHITECTURE), SigmoidGate(WIDTH, hard=True)
    with intervene(model, {SITE: Mask(identity(), source=SOURCE, gate=gate)}):
        loss = _loss(model(**BASE).logits)
    assert torch.autograd.grad(loss, [gate.logits], allow_unused=True) == (None,)


@pytest.mark.parametrize("positions", [None, [-1]], ids=["all", "last"])
def test_the_gradient_in_the_activations_before_is_that_of_the_closed_form(positions):
    model, f = tiny_model(ARCHITECTURE), subspace()
    basis, source = f.orthonormal_basis().detach(), at(SOURCE)
    columns = slice(None) if positions is None else positions
    embeddings = model.get_submodule("model.embed_tokens").weight

    def edit(hidden: Tensor) -> Tensor:
        out = hidden.clone()
        out[:, columns] = hidden[:, columns] + ((source - hidden)[:, columns] @ basis) @ basis.T
        return out

    with intervene(model, {SITE: Interchange(f, source=SOURCE, positions=positions)}):
        (found,) = torch.autograd.grad(_loss(model(**BASE).logits), [embeddings])
    with hooked(*module_of(model, ARCHITECTURE, "resid.post", 1), edit):
        (wanted,) = torch.autograd.grad(_loss(model(**BASE).logits), [embeddings])
    plain = torch.autograd.grad(_loss(model(**BASE).logits), [embeddings])[0]
    assert (plain - wanted).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_gradient_in_a_source_given_as_activations_reaches_it():
    model = tiny_model(ARCHITECTURE)
    source = torch.zeros(3, 1, WIDTH, requires_grad=True)
    with intervene(model, {"norm.out": Interchange(identity(), source=source, positions=[-1])}):
        model(**BASE).logits[:, -1, 7].sum().backward()
    assert torch.allclose(source.grad[:, 0], model.get_submodule("lm_head").weight[7].expand(3, -1))


# ---- errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Steer("identity", delta=1.0), UsageError, "Steer needs a Featurizer or a SiteMap first, got str"),
        (lambda: Interchange(identity(), source=3), UsageError, "not int"),
        (lambda: Interchange(identity(), source=torch.tensor([[1]])), UsageError, "source={'input_ids': ids}"),
        (lambda: Ablate(identity(), value="median"), UsageError, "'median'"),
        (lambda: Interchange(identity(), source=SOURCE).apply(at(BASE), None), UsageError, "only `intervene`"),
        (lambda: edited(Interchange(identity(), source=SOURCE, indices=[WIDTH])), FeatureIndexError, "out of range"),
        (lambda: edited(Steer(identity(), delta=1.0, indices=[[0], [1]])), FeatureIndexError, "2 examples"),
        (lambda: edited(Steer(identity(), delta=torch.ones(3), indices=[0, 1])), ShapeError, "do not fit"),
        (lambda: edited(Mask(identity(), source=SOURCE, gate=torch.ones(3))), ShapeError, "gate has shape"),
        (lambda: edited(Ablate(featurizers.create("identity", d_in=4))), ShapeError, "width 4"),
        (lambda: edited(Collect(identity(), indices=[[0], [1], [2]])), UsageError, "same indices"),
    ],
)
def test_a_wrong_operation_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "todo",
    [
        ["steer"],
        "steer",
        identity(),
        None,
    ],
    ids=["list of strings", "string", "featurizer", "None"],
)
def test_what_is_no_operation_is_refused(todo):
    with pytest.raises(UsageError, match="expected an operation"), intervene(tiny_model(ARCHITECTURE), {SITE: todo}):
        pass


def test_positions_of_a_module_whose_output_has_other_axes_are_refused():
    with pytest.raises(FeaturizerError):
        collect(tiny_model("qwen3"), BASE, ["module:model.layers.0.self_attn.q_norm:output"], positions=[-1])


@pytest.mark.parametrize("inputs", ["text", None, ["text"], torch.ones(1, 3, dtype=torch.long)], ids=str)
def test_inputs_that_are_no_arguments_of_the_model_are_refused(inputs):
    with pytest.raises(UsageError, match=f"keyword arguments of the model, .* not {type(inputs).__name__}"):
        collect(tiny_model("gpt2"), inputs, ["resid.post:0"])


@pytest.mark.parametrize("operation", [Interchange, Collect, Mask, Steer, Ablate])
def test_options_of_every_operation_are_given_by_name(operation):
    """So that a positional argument keeps its meaning when an option is added."""
    parameters = inspect.signature(operation).parameters
    assert {parameters[name].kind for name in ("positions", "later", "writes")} == {inspect.Parameter.KEYWORD_ONLY}
