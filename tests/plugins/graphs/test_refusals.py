"""What cannot be right is one clear error before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import FeaturizerError, ShapeError, SiteError, UsageError
from featurizers_derived_scalars import Circuit
from featurizers_graphs.collection import Collection
from featurizers_graphs.local_model import LocalModel
from featurizers_graphs.sources import Sources
from featurizers_transcoder import Crosscoder, Transcoder

from tests.support.attribution_graphs import PROMPT, llama, random_cross_layer, random_transcoders

LAYERS, D, N = 3, 32, 16


def crosscoder() -> Crosscoder:
    sites = {"a": D, "b": D}
    config = {
        "reads": {name: {"width": width} for name, width in sites.items()},
        "writes": sites,
        "groups": {"features": {"reads": ["a", "b"], "writes": ["a", "b"], "n_features": 4}},
    }
    tensors = {f"{part}.features.{name}": torch.ones(4, D) for part in ("W_enc", "W_dec") for name in sites}
    f = Crosscoder.from_tensors(config, tensors)
    f.reads = f.writes = {"a": "resid.post:0", "b": "resid.post:1"}
    return f


def at(reads: str, writes: str) -> Transcoder:
    f = Transcoder.from_weights(torch.ones(4, D), torch.ones(4, D))
    f.reads, f.writes = {"in": reads}, {"out": writes}
    return f


def special() -> Transcoder:
    f = Transcoder.from_weights(torch.ones(4, D), torch.ones(4, D), special_tokens=[2])
    f.reads, f.writes = {"in": "mlp.in:0"}, {"out": "mlp.out:0"}
    return f


@pytest.mark.parametrize(
    ("maps", "error", "says"),
    [
        ([], UsageError, "at least one transcoder"),
        (3, UsageError, "transcoders that were loaded"),
        ("owner/name", UsageError, "transcoders that were loaded"),
        ([crosscoder()], SiteError, "several reads"),
        ([featurizers.create("identity", d_in=D)], UsageError, "linear encoders"),
        ([Transcoder.from_weights(torch.ones(4, D), torch.ones(4, D))], SiteError, "has no sites"),
        ([at("mlp.in:1", "mlp.out:0")], SiteError, "before it reads"),
        ([at("attn.out:1", "mlp.out:1")], SiteError, "read resid.pre"),
        ([at("mlp.in:1", "resid.post:1")], SiteError, "write mlp.out"),
        ([at("resid.post:2", "mlp.out:2")], SiteError, "after every MLP"),
        ([at("mlp.in:7", "mlp.out:7")], SiteError, "another model's map"),
        ([at("mlp.in:1", "mlp.out:1"), at("resid.mid:1", "mlp.out:1")], UsageError, "both read layer 1"),
        ([special()], UsageError, "special token"),
    ],
)
def test_maps(maps: Any, error: type[FeaturizerError], says: str) -> None:
    with pytest.raises(error, match=says):
        featurizers.graph(llama(), PROMPT, maps)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nodes": -1}, "nodes is a number"),
        ({"nodes": True}, "nodes is a number"),
        ({"keep": 0}, "keep is a share"),
        ({"keep": 1.5}, "keep is a share"),
        ({"keep": "all"}, "keep is a share"),
        ({"targets": (1, 2, None)}, "targets are token ids"),
        ({"memory": "2 parrots"}, "memory is a number of bytes"),
        ({"memory": 10_000}, "one row of this graph takes"),
        ({"first": 8}, "first is a number"),
        ({"first": True}, "first is a number"),
        ({"targets": []}, "no targets"),
        ({"targets": [100]}, "not in the vocabulary"),
        ({"targets": [5, 5]}, "twice"),
        ({"targets": [" Paris"]}, "give the tokenizer"),
        ({"targets": [(9, 0, 0)]}, "no map reads layer 9"),
        ({"targets": [(1, 99, 0)]}, "8 tokens"),
        ({"targets": [(1, 2, 99)]}, "has no feature 99"),
        ({"targets": 2.5}, "targets are token ids"),
        ({"targets": lambda logits: 3.0}, "one number that depends"),
        ({"targets": lambda logits: logits[-1, 0] * 0}, "zero or not finite"),
    ],
)
def test_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        featurizers.graph(llama(), PROMPT, random_transcoders(LAYERS, D, N), **options)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a text", "give the tokenizer"),
        ([], "one sequence"),
        ([[1, 2], [3, 4]], "one sequence"),
        ([1.5, 2.0], "one sequence"),
        ([1, 100], "not in the vocabulary"),
        ([1], "ends before the first token that is traced"),
        (object(), "a text or token ids"),
    ],
)
def test_prompts(prompt: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        featurizers.graph(llama(), prompt, random_transcoders(LAYERS, D, N))


def test_a_map_of_another_width() -> None:
    with pytest.raises(ShapeError, match="has width 16"):
        featurizers.graph(llama(), PROMPT, random_transcoders(LAYERS, D // 2, N))


@pytest.mark.parametrize("name", ["W_enc.features.in", "b_enc.features", "W_dec.features.out", "b_dec.out"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_damaged_after_loading(name: str, value: float) -> None:
    maps = random_transcoders(LAYERS, D, N)
    maps[1].get_parameter(name).flatten()[:: max(1, D // 2)] = value
    with pytest.raises(UsageError, match="gives NaN or infinity"):
        featurizers.graph(llama(), PROMPT, maps)


def test_a_skip_connection_that_is_damaged_after_loading() -> None:
    maps = random_cross_layer(LAYERS, D, N, skip=True)
    maps.get_parameter("W_skip.out-1.in-1")[3, 4] = float("nan")
    with pytest.raises(UsageError, match="gives NaN or infinity"):
        featurizers.graph(llama(), PROMPT, maps)


def test_a_read_that_is_not_what_was_found_before_it() -> None:
    circuit = Circuit(llama())
    collection = Collection.of(circuit, random_transcoders(LAYERS, D, N))
    reader = collection.readers[1]
    collection.readers[1] = replace(reader, read=replace(reader.read, norm=None))  # mlp.in is behind a norm
    local = LocalModel(circuit, torch.tensor(PROMPT), 2**30)
    with pytest.raises(SiteError, match="not the residual stream or a norm of it"):
        Sources(local, collection, 1, 2**30)


def test_attention_that_its_matrices_do_not_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    found = LocalModel._value_matrix
    monkeypatch.setattr(LocalModel, "_value_matrix", lambda *args: 1.01 * found(*args))
    with pytest.raises(SiteError, match="not linear in its values"):
        featurizers.graph(llama(), PROMPT, random_transcoders(LAYERS, D, N))


def test_a_model_that_computes_nan() -> None:
    model = llama()
    model.model.layers[1].mlp.down_proj.weight[0] = float("nan")
    with pytest.raises(UsageError, match=r"layers\.1 computes NaN"):
        featurizers.graph(model, PROMPT, random_transcoders(LAYERS, D, N))


def test_nodes_and_rows() -> None:
    graph = featurizers.graph(llama(), PROMPT, random_cross_layer(LAYERS, D, N))
    foreign = graph.top(1)[0]._replace(number=graph.n_nodes)
    for wrong in (-1, graph.n_nodes, True, "3", (0, 0), (9, 0, 0), ("a", 1, 2), (1.5, 0, 0), foreign):
        with pytest.raises(UsageError):
            graph.node(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no reader"):
        graph.edges(into=graph.first_error)
    with pytest.raises(UsageError, match="give the node"):
        graph.edges()
    for shares in ({"nodes": 0}, {"edges": 1.5}, {"nodes": "most"}):
        with pytest.raises(UsageError, match="share above 0"):
            graph.prune(**shares)
    named = graph.group("first", [0, 1])
    with pytest.raises(UsageError, match="in the group"):
        named.group("second", [1])
    with pytest.raises(UsageError, match="has no nodes"):
        named.group("none", [])


def test_the_model_is_left_as_it_was() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    ids = torch.tensor([PROMPT])
    before, implementation = model(ids).logits, model.config._attn_implementation
    featurizers.graph(model, PROMPT, maps)
    with pytest.raises(UsageError):
        featurizers.graph(model, PROMPT, maps, memory=10_000)
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_edits_around_the_call_do_not_enter() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    plain = featurizers.graph(model, PROMPT, maps)
    edit = featurizers.Ablate(featurizers.create("identity", d_in=D), value=3.0)
    with featurizers.intervene(model, {"resid.post:0": edit}):
        inside = featurizers.graph(model, PROMPT, maps)
    assert torch.equal(inside.influence, plain.influence)
