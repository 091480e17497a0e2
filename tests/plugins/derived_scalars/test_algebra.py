"""Layer maps, sources, derivers, scalars, reductions and the registry."""

from __future__ import annotations

import re
import weakref

import pytest
import torch
from featurizers import hookimpl
from featurizers.errors import ArtefactError, PluginError, ShapeError, SiteError, UsageError
from featurizers.registry.plugin_host import host
from featurizers_derived_scalars import ScalarSpec, deriver
from featurizers_derived_scalars.api import grouped, plan, scalars
from featurizers_derived_scalars.capturing import capture
from featurizers_derived_scalars.circuit import Circuit, Place
from featurizers_derived_scalars.errors import IncompleteError
from featurizers_derived_scalars.nodes import Basis, Node, pair_of
from featurizers_derived_scalars.quantities import (
    At,
    DerivedSource,
    Deriver,
    Fixed,
    MetricGrad,
    RawSource,
    Same,
    Unlayered,
    act_times_grad,
    minus_baseline,
    norm,
    ones,
    pairs,
    sum_channels,
    sum_heads,
    sum_keys,
    sum_nodes,
    sum_over,
    value,
    write,
    write_norm,
    write_to,
)
from featurizers_derived_scalars.registry import spec, specs
from featurizers_derived_scalars.results import Scalar, Scalars
from pydantic import BaseModel, ConfigDict

from tests.support.decoders import shared_decoder, tokens
from tests.support.derived_scalars import METRIC, POST_NORMS, captured, close, dictionary, forward, made_by_hand

HEADS, NEURONS = Basis("attn.probs"), Basis("mlp.neurons")


@pytest.fixture
def hand():
    return made_by_hand()


def double(_, x):
    return 2 * x


# ---- layer maps and sources


@pytest.mark.parametrize(
    ("at", "layer", "source", "results", "needed"),
    [
        (Same(), 2, 2, {0, 1, 2}, {2}),
        (At(1), 0, 1, None, {1}),
        (At(7), 0, 7, set(), {7}),
    ],
)
def test_layer_maps(at, layer, source, results, needed):
    assert at.source(layer) == source
    assert at.results([0, 1, 2]) == (None if results is None else frozenset(results))
    assert at.sources(frozenset({layer})) == frozenset(needed)


def test_unlayered_and_impossible_layers():
    assert Unlayered().source(4) is None
    assert Unlayered().results([None]) is None
    assert Unlayered().results([0]) == frozenset()
    with pytest.raises(UsageError, match="a layer from 0, not -1"):
        At(-1)


def test_what_the_model_has_once_serves_every_layer(hand):
    def plus(_, here, embedding):
        return here + embedding.sum()

    once = RawSource("resid.embed", at=Unlayered())
    made = Deriver("plus", (RawSource("mlp.neurons"), once), ("token", "neuron"), plus)
    assert torch.equal(made.tensor(hand, 1), 16 + torch.arange(6.0).reshape(2, 3))
    alone = Deriver("alone", (once,), ("token", "d_model"), double)
    assert list(alone.derive(hand)) == [("alone", None)]


def test_sources_compute_only_what_is_looked_up_and_constants_once(hand):
    calls = []

    def counted(name):
        def fn(context, x):
            calls.append((name, context.layer))
            return x

        return fn

    constant = Deriver(
        "constant", (RawSource("resid.embed", at=Unlayered()),), ("token", "d_model"), counted("constant")
    )
    layered = Deriver("layered", (RawSource("mlp.neurons"),), ("token", "neuron"), counted("layered"))
    both = layered.combine(DerivedSource(constant, Unlayered()), lambda _, x, y: x * y.sum(), name="both")
    twice = both.map(double, name="twice")
    found = twice.derive(hand)
    assert calls == []
    found["twice", 1]
    assert calls == [("layered", 1), ("constant", None)]
    found["twice", 2]
    assert calls == [("layered", 1), ("constant", None), ("layered", 2)]
    kept = found.computed()
    before = len(calls)
    assert torch.equal(kept["twice", 2], found["twice", 2])
    kept["twice", 2]
    assert len(calls) == before + 1


def test_nothing_that_was_captured_is_changed(hand):
    before = {key: tensor.clone() for key, tensor in hand.items()}
    tripled = value(NEURONS).map(lambda _, x: x * 3, name="tripled")
    tripled.derive(hand).topk(2)
    tripled.derive(hand).sum()
    assert set(hand) == set(before)
    assert all(torch.equal(hand[key], tensor) for key, tensor in before.items())


def test_maps_and_combinations_say_what_they_are(hand):
    made = value(NEURONS).map(lambda _, x: x.sum(-1), name="sums", axes=("token",), how="all")
    assert (made.name, made.axes, made.params["how"]) == ("sums", ("token",), "all")
    assert made.derive(hand)["sums", 1].tolist() == [21.0, 30.0]
    ratio = value(NEURONS).combine(made, lambda _, x, y: x / y[:, None], name="ratio")
    assert torch.allclose(ratio.tensor(hand, 1).sum(-1), torch.ones(2))
    assert made.renamed("total").derive(hand)["total", 0].tolist() == [3.0, 12.0]
    with pytest.raises(UsageError, match="has no sources"):
        Deriver("nothing", (), (), double)


def test_layers_that_are_chosen_twice_are_those_of_both_choices(hand):
    made = value(NEURONS)
    assert list(made.only([0, 1]).derive(hand)) == [("value:mlp.neurons", 0), ("value:mlp.neurons", 1)]
    for both in (made.only([0, 1]).without([1]), made.without([1]).only([0, 1]), made.only([0, 2]).only([1, 0])):
        assert [layer for _, layer in both.derive(hand)] == [0]


def test_what_was_not_captured_is_named(hand):
    with pytest.raises(SiteError, match=re.escape("capture mlp.neurons (backward)")):
        act_times_grad(NEURONS).derive(hand)
    with pytest.raises(SiteError, match=r"no result at layer 5.*Layers there are: 0, 1, 2"):
        value(NEURONS).derive(hand, [0, 5])
    with pytest.raises(SiteError, match="no place"):
        RawSource("mlp.act")
    with pytest.raises(SiteError, match="has 3 layers"):
        value(NEURONS).derive(captured("gpt2"), [8])


# ---- scalars


def made(*tensors, axes=("token", "neuron"), name="s", basis=NEURONS):
    entries = {(name, layer): (lambda tensor=tensor: tensor) for layer, tensor in enumerate(tensors)}
    return Scalars(entries, {name: Scalar(axes, basis)})


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("k", [1, 7, 100, 100000])
def test_topk_is_a_sort_of_everything(name, k):
    raw = captured(name)
    found = Scalars.union(write_to(basis).derive(raw) for basis in (HEADS, NEURONS, Basis("resid.embed", whole=True)))
    dense = torch.cat([tensor.flatten() for tensor in found.values()])
    top = found.topk(k)
    assert [entry.value for entry in top] == dense.sort(descending=True).values[:k].tolist()
    ends = found.topk(k, both_ends=True)
    assert [entry.value for entry in ends[len(top) :]] == dense.sort().values[:k].tolist()
    sizes = found.topk(k, absolute=True)
    assert [abs(entry.value) for entry in sizes] == dense.abs().sort(descending=True).values[:k].tolist()
    for entry in [*ends, *sizes][:50]:
        assert float(found[entry.name, entry.layer][entry.at]) == entry.value
        assert entry.node.layer == entry.layer
        assert entry.node.numbers() == entry.at


def test_topk_holds_one_layer_at_a_time():
    alive, most = 0, 0

    def entry(layer):
        nonlocal alive, most
        tensor = torch.randn(100, 10, generator=torch.Generator().manual_seed(layer))
        alive += 1
        most = max(most, alive)

        def gone():
            nonlocal alive
            alive -= 1

        weakref.finalize(tensor, gone)
        return tensor

    found = Scalars(
        {("s", layer): (lambda layer=layer: entry(layer)) for layer in range(6)},
        {"s": Scalar(("token", "neuron"), NEURONS)},
    )
    assert len(found.topk(5, both_ends=True)) == 10
    found.sum(keep=["neuron"])
    assert most <= 2


def test_ties_are_ranked_as_they_come():
    found = made(torch.tensor([[1.0, 3.0], [3.0, 2.0]]), torch.tensor([[3.0, 0.0], [3.0, 3.0]]))
    assert [(entry.layer, entry.at) for entry in found.topk(4)] == [(0, (0, 1)), (0, (1, 0)), (1, (0, 0)), (1, (1, 0))]


def test_topk_refuses_what_has_no_rank():
    found = made(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(UsageError, match="not a number"):
        found.topk(1)
    for k in (0, True, 1.5):
        with pytest.raises(UsageError, match="a number from 1"):
            found.topk(k)
    with pytest.raises(UsageError, match="smallest magnitudes"):
        found.topk(1, both_ends=True, absolute=True)
    with pytest.raises(SiteError, match="there is no scalar other"):
        found.topk(1, group=["other"])


def test_a_group_is_ranked_alone():
    raw = captured("gpt2")
    found = Scalars.union([write_to(NEURONS).derive(raw), write_norm(NEURONS).derive(raw)])
    assert {entry.name for entry in found.topk(20, group=["write_to:mlp.neurons"])} == {"write_to:mlp.neurons"}


def test_other_scalars_of_the_same_nodes_stand_beside():
    raw = captured("gpt2")
    made_ = [make(basis) for make in (write_to, act_times_grad, write_norm) for basis in (HEADS, NEURONS)]
    found = Scalars.union(one.derive(raw) for one in [*made_, pairs(value(HEADS))])
    top = found.topk(8, group=["write_to:attn.probs", "write_to:mlp.neurons"])
    assert {entry.node.basis.kind for entry in top} == {"attn.probs", "mlp.neurons"}
    for entry, values in zip(top, found.beside(top), strict=True):
        kind = entry.node.basis.kind
        assert set(values) == {f"{quantity}:{kind}" for quantity in ("write_to", "act_times_grad", "write_norm")}
        assert values[entry.name] == entry.value
        assert values[f"write_norm:{kind}"] == float(found[f"write_norm:{kind}", entry.layer][entry.at])


def test_nodes_of_reductions():
    raw = captured("gpt2")
    best = pairs(write_to(HEADS)).derive(raw).topk(1)[0]
    same = write_to(HEADS).derive(raw).topk(1)[0]
    assert best.node.numbers() == same.node.numbers()
    assert best.node.layer == same.node.layer
    summed = sum_keys(write_to(HEADS)).derive(raw).topk(1)[0].node
    assert summed.index[1] is None
    assert str(summed).startswith(f"attn.probs:{summed.layer}[token ")
    assert sum_nodes(act_times_grad(NEURONS)).derive(raw).topk(1)[0].node.index[1] is None
    assert norm(Basis("mlp.delta")).derive(raw).topk(1)[0].node.index[1] == 0
    assert ones(Basis("resid.embed")).derive(raw).topk(1)[0].node is None
    assert [pair_of(p) for p in range(6)] == [tuple(row) for row in torch.tril_indices(3, 3).T.tolist()]
    assert pair_of(10**16)[0] == 141421355


def test_sums_keep_what_is_asked():
    first, second = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)
    found = made(first, second)
    assert float(found.sum()) == 21
    assert found.sum(keep=["token"]).tolist() == [6, 15]
    assert found.sum(keep=["neuron"]).tolist() == [5, 7, 9]
    assert found.sum(keep=["layer"]).tolist() == [15, 6]
    assert found.sum(keep=["token", "layer"]).tolist() == [[3, 12], [3, 3]]
    both = Scalars.union([found, made(first, first, name="t")])
    assert both.sum(keep=["name"]).tolist() == [21, 30]
    assert both.sum(keep=["name", "layer"]).tolist() == [[15, 6], [15, 15]]
    with pytest.raises(UsageError, match="has no axis head"):
        found.sum(keep=["head"])
    with pytest.raises(ShapeError, match="axes to keep"):
        made(first, torch.ones(3, 3)).sum(keep=["token"])
    with pytest.raises(ShapeError, match="same layers"):
        Scalars.union([found, made(first, name="t")]).sum(keep=["name", "layer"])
    with pytest.raises(UsageError, match="nothing to sum"):
        Scalars({}, {}).sum()


def test_completeness_is_checked_in_both_directions():
    found = made(torch.tensor([[1.0, 2.0]]))
    found.check_complete(3.0)
    found.check_complete(torch.tensor(3.1), atol=0.2)
    for total in (3.1, 2.9):
        with pytest.raises(IncompleteError, match="is missing") as caught:
            found.check_complete(total)
        assert caught.value.residual == pytest.approx(total - 3)
    with pytest.raises(IncompleteError):
        made(torch.tensor([[float("nan"), 2.0]])).check_complete(2.0)
    with pytest.raises(IncompleteError):
        found.check_complete(float("nan"))


def test_sums_and_differences_of_scalars():
    first, second = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)
    one, other = made(first), made(second)
    assert torch.equal((one + other)["s", 0], first + 1)
    assert torch.equal((one - other)["s", 0], first - 1)
    with pytest.raises(ShapeError, match="only one side"):
        one + made(first, second)
    with pytest.raises(ShapeError, match=re.escape("is (2, 3) and (1, 3)")):
        (one - made(torch.ones(1, 3)))["s", 0]
    with pytest.raises(TypeError):
        one + 1
    with pytest.raises(UsageError, match="two scalars are named s"):
        Scalars.union([one, other])
    with pytest.raises(SiteError, match=r"there is no scalar \('s', 3\); there are \('s', 0\)"):
        one["s", 3]
    with pytest.raises(UsageError, match="nothing is known"):
        Scalars({("a", 0): lambda: first}, {})
    assert repr(one) == "Scalars(s at 1 layers)"


def test_scalars_are_saved_and_loaded(tmp_path):
    raw = captured("gpt2")
    latents = Basis("mlp.delta", {1: dictionary(32)})
    found = Scalars.union(
        d.derive(raw)
        for d in (pairs(write_to(HEADS)), act_times_grad(Basis("resid.embed", whole=True)), value(latents))
    )
    path = tmp_path / "s.safetensors"
    found.save(path)
    again = Scalars.load(path)
    assert list(again) == list(found)
    assert all(torch.equal(again[key], found[key]) for key in found)
    assert [about.axes for about in again.about.values()] == [about.axes for about in found.about.values()]
    assert again.about["write_to:attn.probs"].params["direction"] == "the metric's gradient at resid.final"
    assert again.about["value:mlp.delta features"].basis is None
    group = ["write_to:attn.probs"]
    assert str(again.topk(1, group=group)[0].node) == str(found.topk(1, group=group)[0].node)


def test_files_that_are_no_scalars_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "s.safetensors"
    with pytest.raises(ArtefactError, match="expected saved scalars"):
        Scalars.load(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(ArtefactError, match="expected saved scalars"):
        Scalars.load(path)
    header = '{"format":"featurizers-derived-scalars","version":1,"scalars":[%s]}'
    row = '{"name":"s","axes":["token"],"layers":[0],"basis":null,"params":{}}'
    for metadata, match in (
        ({}, "expected saved scalars.*no metadata 'featurizers'"),
        ({"featurizers": header.replace('"version":1', '"version":2') % row}, "expected saved scalars.*version 2"),
        ({"featurizers": header % row.replace('"token"', '"letters"')}, "expected saved scalars.*got 'letters'"),
        ({"featurizers": header % ""}, "not those of the header"),
        ({"featurizers": header % f"{row},{row}"}, "not those of the header"),
        ({"featurizers": header % row.replace('"token"', '"token","neuron"')}, "has 1 axes, not 2"),
        (
            {
                "featurizers": header
                % row.replace("null", '{"kind":"x","part":"features","via":null,"whole":false,"featurized":false}')
            },
            "there is no place 'x'",
        ),
        ({"featurizers": header % row.replace("[0]", "[0,0]")}, "not those of the header"),
        ({"featurizers": header % row.replace('"s"', '"\\u001b[31m"')}, "not printable"),
        ({"featurizers": header % row.replace("[0]", f"[{10**30}]")}, "not those of the header"),
        ({"featurizers": header % row.replace("[0]", "[1]"), "whole": ""}, "is torch.int64, not floating point"),
    ):
        tensor = torch.ones(2, dtype=torch.int64 if "whole" in metadata else torch.float32)
        save_file({"0/1" if "whole" in metadata else "0/0": tensor}, path, metadata=metadata)
        with pytest.raises(ArtefactError, match=match):
            Scalars.load(path)


# ---- reductions


def test_reductions_are_sums_of_axes():
    raw = captured("llama")
    full = write_to(HEADS).tensor(raw, 1)
    close(sum_keys(write_to(HEADS)).tensor(raw, 1), full.sum(1))
    close(sum_heads(write_to(HEADS)).tensor(raw, 1), full.sum(2)[..., None])
    close(sum_nodes(write_to(HEADS)).tensor(raw, 1), full.sum((1, 2))[:, None])
    close(sum_heads(pairs(write_to(HEADS))).tensor(raw, 1), full.sum(2)[torch.tril_indices(7, 7).unbind()][:, None])
    close(
        sum_channels(act_times_grad(Basis("resid.pre"))).tensor(raw, 1)[:, 0],
        act_times_grad(Basis("resid.pre")).tensor(raw, 1).sum(-1),
    )
    for deriver_ in (
        sum_keys(write_to(HEADS)),
        sum_nodes(write_to(HEADS)),
        pairs(write_to(HEADS)),
        sum_heads(pairs(write_to(HEADS))),
    ):
        assert deriver_.tensor(raw, 1).dim() == len(deriver_.axes)
        assert deriver_.name == "write_to:attn.probs"


def test_reductions_refuse_axes_that_are_not_there():
    for fault, match in (
        (lambda: sum_keys(write_to(NEURONS)), "has no axis key; its axes are token, neuron"),
        (lambda: sum_over(write_to(NEURONS)), "which axes"),
        (
            lambda: sum_over(write_to(NEURONS), "neuron", "neuron").tensor(captured("gpt2"), 0),
            "each summed once",
        ),
        (lambda: sum_channels(write_to(HEADS)), "of no vectors"),
        (lambda: pairs(write_to(NEURONS)), "not of pairs"),
    ):
        with pytest.raises(UsageError, match=match):
            fault()


def test_a_baseline_is_another_prompt():
    circuit = Circuit(shared_decoder("gpt2"))
    deriver_ = write_to(NEURONS)
    main = captured("gpt2")
    other = capture(circuit, tokens(7, 5), deriver_.needs(circuit), metric=METRIC, freeze_norms=POST_NORMS)[0]
    close(minus_baseline(deriver_, other).tensor(main, 1), deriver_.tensor(main, 1) - deriver_.tensor(other, 1))
    close(
        (deriver_.derive(main) - deriver_.derive(other))["write_to:mlp.neurons", 1],
        minus_baseline(deriver_, other).tensor(main, 1),
    )
    short = capture(circuit, tokens(5), deriver_.needs(circuit), metric=METRIC)[0]
    with pytest.raises(ShapeError, match="5 tokens, not 7"):
        minus_baseline(deriver_, short).tensor(main, 1)


# ---- names


class Options(BaseModel):
    """Options of a test's quantity."""

    model_config = ConfigDict(extra="forbid")
    kind: str
    power: int = 2


def power(options):
    return value(Basis(options.kind)).map(lambda _, x: x**options.power, name=f"power:{options.kind}")


@pytest.fixture
def plugin():
    """Registers a quantity as another plugin does."""
    manager = host()._manager
    host().load("derived-scalars")
    plugins = []

    def add(*specs):
        class Plugin:
            @hookimpl(optionalhook=True)
            def featurizers_scalars(self, register):
                for one in specs:
                    register(one)

        plugins.append(Plugin())
        manager.register(plugins[-1], f"test-{len(plugins)}")

    yield add
    for one in plugins:
        manager.unregister(one)


def test_another_plugin_adds_a_quantity(plugin):
    mine = ScalarSpec("mine.power", power, Options, "activation", "powers", ("mlp.neurons",), ("mine.square",))
    plugin(mine)
    assert spec("mine.square") is specs()["mine.power"] is mine
    raw = captured("gpt2")
    close(deriver("mine.power", kind="mlp.neurons", power=3).tensor(raw, 1), forward(raw, "mlp.neurons", 1) ** 3)
    found = scalars(shared_decoder("gpt2"), tokens(), ["mine.power", "mine.power:mlp.delta"])
    assert {name for name, _ in found} == {"power:mlp.neurons", "power:mlp.delta"}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (lambda: "write", "is no ScalarSpec"),
        (lambda: ScalarSpec("power", power, Options, "a", "b"), "needs the plugin's name before"),
        (lambda: ScalarSpec("mine.power", power, Options, "a", "b", (), ("square",)), "square of another plugin needs"),
        (lambda: ScalarSpec("mine.power", power, Options, "a", "b", (), ("mine.power",)), "registered twice"),
    ],
)
def test_a_faulty_quantity_is_refused(plugin, given, match):
    plugin(given())
    with pytest.raises(PluginError, match=match):
        specs()
    with pytest.raises(PluginError, match=match):
        spec("mine.other")
    assert spec("write_to").name == "write_to"  # ours go on


def test_a_spec_is_checked_when_it_is_made():
    with pytest.raises(PluginError, match="is no name of a scalar"):
        ScalarSpec("My Power", power, Options, "a", "b")
    with pytest.raises(PluginError, match="forbid"):
        ScalarSpec("power", power, BaseModel, "a", "b")


def test_names_that_are_wrong_say_what_is_like_them():
    with pytest.raises(UsageError, match=r"like it: .*write_norm"):
        spec("write_nrm")
    with pytest.raises(UsageError, match="a string, not 3"):
        spec(3)
    with pytest.raises(UsageError, match="It takes kind, featurizers, part, whole"):
        deriver("value", kind="mlp.neurons", bases=1)
    with pytest.raises(UsageError, match="kind: Field required"):
        deriver("value")
    with pytest.raises(UsageError, match=r"has no choice of a basis; leave ':mlp\.neurons' out"):
        plan(shared_decoder("gpt2"), "direction:mlp.neurons", metric=METRIC)
    with pytest.raises(UsageError, match="what is to be derived"):
        plan(shared_decoder("gpt2"), [])
    assert spec("WRITE_TO") is not None


def test_every_plain_name_can_be_asked_for():
    node = Node(NEURONS, 1, (6, 3))
    latents = {"attn.delta:1": dictionary(32), "mlp.delta": dictionary(32)}
    for name in (
        "value",
        "grad",
        "act_times_grad",
        "write_to",
        "write_norm",
        "write",
        "norm",
        "direction",
        "vocab_write",
        "ones",
        "weighted_value",
    ):
        found = scalars(shared_decoder("gpt2"), tokens(), name, metric=METRIC)
        assert len(found)
        assert all(tensor.isfinite().all() for tensor in found.values()), name
    for name in (
        "vocab_read",
        "node_vocab_write",
        "node_write",
        "node_write_to",
        "edge_to",
        "edge_from",
        "activation_from",
    ):
        found = scalars(shared_decoder("gpt2"), tokens(), name, metric=METRIC, node=node)
        assert len(found)
        assert all(tensor.isfinite().all() for tensor in found.values()), name
    found = scalars(shared_decoder("gpt2"), tokens(), "pair_attribution:attn.delta features", featurizers=latents)
    assert list(found) == [("pair_attribution:attn.delta features", 1)]
    assert scalars(shared_decoder("gpt2"), tokens(), value(NEURONS), layers=[2])["value:mlp.neurons", 2].shape == (
        7,
        40,
    )


def test_featurizers_are_grouped_by_kind():
    one, two = dictionary(32), dictionary(32, seed=1)
    assert grouped(None) == {}
    assert grouped({"mlp.delta:0": one, "mlp.delta:2": two}) == {"mlp.delta": {0: one, 2: two}}
    assert grouped({"mlp.delta": one}) == {"mlp.delta": one}
    assert grouped({"mlp.delta": {1: one}, "mlp.delta:2": two}) == {"mlp.delta": {1: one, 2: two}}
    for given, error, match in (
        ([one], UsageError, "does not say where it belongs"),
        ({"mlp.delta": one, "mlp.delta:1": two}, UsageError, "for every layer, and another"),
        ({"mlp.delta": {1: one}, Place("mlp.delta", 1): two}, UsageError, "two featurizers are at mlp.delta:1"),
        ({"mlp.delta:1": {1: one}}, UsageError, "is one place"),
        ({"attn.probs": one}, SiteError, "holds no vectors"),
        ({"mlp.middle": one}, SiteError, "there is no place"),
    ):
        with pytest.raises(error, match=match):
            grouped(given)
    with pytest.raises(SiteError, match="has 3 layers"):
        plan(shared_decoder("gpt2"), "value", featurizers={"mlp.delta:9": one})
    with pytest.raises(SiteError, match="has 3 layers"):
        plan(shared_decoder("gpt2"), "value", layers=[9])


def test_directions_refuse_what_is_none():
    raw = captured("gpt2")
    for fault, error, match in (
        (lambda: MetricGrad(Place("mlp.delta", 1)), SiteError, r"resid\.\*"),
        (lambda: Fixed(torch.zeros(2, 2, 2)), ShapeError, "a direction is"),
        (lambda: Fixed(torch.zeros(2, dtype=torch.long)), ShapeError, "real"),
        (lambda: write_to(NEURONS, Fixed(torch.zeros(5))).tensor(raw, 0), ShapeError, "this prompt takes"),
        (lambda: write_to(NEURONS, "up"), UsageError, "not 'up'"),
    ):
        with pytest.raises(error, match=match):
            fault()
    close(write_to(NEURONS, torch.ones(32)).tensor(raw, 0), write(NEURONS).tensor(raw, 0).sum(-1))
