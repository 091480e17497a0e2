"""Checks of maps between sites on a mesh; each runs in every process, beside the whole map of the same file."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import featurizers
import featurizers_sharded
import pytest
import torch
import torch.distributed as dist
from featurizers import Ablate, Collect, Interchange, Mask, Steer, errors
from featurizers.errors import OtherRankError
from featurizers.features import Edit
from featurizers.testing import SiteMapContract
from featurizers_sharded import ShardedMap
from featurizers_transcoder import Crosscoder, CrossLayerTranscoder, LinearMapConfig, Transcoder

from tests.plugins.sharded.checks import activations, close, mesh_of, of_two

WIDTH = 16
LAYERS = range(3)
CROSS_LAYER = {
    "layer-0": (["in-0"], ["out-0", "out-1", "out-2"], 13, "jumprelu", {}),
    "layer-1": (["in-1"], ["out-1", "out-2"], 8, "topk", {"k": 3}),
    "layer-2": (["in-2"], ["out-2"], 5, "relu", {}),
}
SITES = [f"site-{i}" for i in LAYERS]


def map_of(
    cls: Any,
    groups: dict[str, Any],
    *,
    skips: dict[str, list[str]] | None = None,
    read: dict[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Build a map with random weights.

    Args:
        cls: its class.
        groups: by name, the reads, the writes, the number of features, the rule and its options.
        skips: reads of each write's skip connections.
        read: options of every read.
        seed: of the weights.
        options: fields of the config.
    """
    reads = dict.fromkeys(name for own, *_ in groups.values() for name in own)
    writes = dict.fromkeys(name for _, own, *_ in groups.values() for name in own)
    names = ("reads", "writes", "n_features", "rule", "rule_options")
    config = LinearMapConfig(
        reads={name: {"width": WIDTH, **(read or {})} for name in reads},  # type: ignore[misc]
        writes=dict.fromkeys(writes, WIDTH),
        groups={name: dict(zip(names, own, strict=True)) for name, own in groups.items()},  # type: ignore[misc]
        skips=skips or {},
        **options,
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
    tensors = {name: activations(*shape, seed=seed + n) / 3 for n, (name, shape) in enumerate(shapes.items())}
    positive = ("rule_tensors.threshold", "rule_tensors.norm")
    return cls.from_tensors(config, {n: t.abs() + 0.05 if n.startswith(positive) else t for n, t in tensors.items()})


def transcoder(rule: str, n: int, options: dict[str, Any] | None = None, *, skip: bool = False, **more: Any) -> Any:
    skips = {"out": ["in"]} if skip else None
    return map_of(Transcoder, {"features": (["in"], ["out"], n, rule, options or {})}, skips=skips, **more)


def cross_layer(**more: Any) -> Any:
    f = map_of(CrossLayerTranscoder, CROSS_LAYER, skips={f"out-{i}": [f"in-{i}"] for i in LAYERS}, **more)
    f.reads, f.writes = ({f"{side}-{i}": f"mlp.{side}:{i}" for i in LAYERS} for side in ("in", "out"))
    return f


def crosscoder(*, causal: bool, rule: str = "jumprelu", **more: Any) -> Any:
    own = {f"layer-{i}": ([SITES[i]], SITES[i:], 9, rule, {}) for i in LAYERS}
    f = map_of(Crosscoder, own if causal else {"all": (SITES, SITES, 23, rule, {})}, **more)
    f.reads = f.writes = {f"site-{i}": f"resid.post:{i}" for i in LAYERS}
    return f


CASES = {
    "skip": lambda: transcoder("relu", 61, skip=True, read={"normalize": "rms", "centre": True}),
    "even": lambda: transcoder("jumprelu", 64, read={"normalize": "scale", "input_scale": 2.5}),
    "gated": lambda: transcoder("gated", 61),
    "topk": lambda: transcoder("topk", 61, {"k": 5}, skip=True, read={"normalize": "layer-norm"}),
    "topk of more than a process holds": lambda: transcoder("topk", 61, {"k": 40}),
    "groupmax": lambda: transcoder("groupmax", 63, {"k": 7}),
    "a rule that compares all": lambda: transcoder("llamascopium.topk", 61, {"k": 5}),
    "cross-layer": cross_layer,
    "causal crosscoder": lambda: crosscoder(causal=True),
    "acausal crosscoder": lambda: crosscoder(causal=False),
}
FEW = ("skip", "topk", "cross-layer", "acausal crosscoder")
"""Cases for more than two processes."""
SHAPED = ("skip", "topk", "cross-layer")
"""Cases with activations of all shapes; the others have one."""


def both(rank: int, size: int, folder: Path, whole: Any) -> tuple[Any, ShardedMap]:
    """Return the whole map, loaded, and the one on the mesh of the same folder."""
    path = folder / f"map-{both.count}"  # type: ignore[attr-defined]
    both.count += 1  # type: ignore[attr-defined]
    if rank == 0:
        whole.save_pretrained(path)
    dist.barrier()
    sharded = featurizers.load(path, mesh=mesh_of(size))
    assert isinstance(sharded, ShardedMap)
    return featurizers.load(path), sharded


both.count = 0  # type: ignore[attr-defined]


def given(f: Any, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return activations at the reads and at the writes."""
    x = {name: activations(*shape, WIDTH, seed=n + 1).to(dtype) for n, name in enumerate(f.read_widths)}
    return x, {name: activations(*shape, WIDTH, seed=n + 50).to(dtype) for n, name in enumerate(f.write_widths)}


def some_of(n: int) -> torch.Tensor:
    return torch.tensor([n - 1, 0, n // 2])


def edits_of(f: Any, x: dict[str, Any]) -> list[dict[str, Edit]]:
    """Return edits of all features, of some, and of all of one group with some of the others."""
    n = {name: group.n_features for name, group in f.groups.items()}
    z = {name: f.encode(name, x) for name in n}
    all_ = {name: Edit(z[name], z[name] + torch.linspace(-1, 1, n[name]), None) for name in n}
    some = {
        name: Edit(z[name][..., c], z[name][..., c] + torch.linspace(-1, 1, 3), c)
        for name, c in ((name, some_of(own)) for name, own in n.items())
    }
    first = next(iter(n))
    return [some, all_, {**some, first: all_[first]}]


def check_maps_give_the_features_and_edits_of_the_whole(rank: int, size: int, folder: Path) -> None:
    for about in CASES if size == 2 else FEW:
        whole, f = both(rank, size, folder, CASES[about]())
        assert (f.kind, f.id, f.config, f.groups) == (whole.kind, whole.id, whole.config, whole.groups)
        for shape in [(2, 5), (), (0,)] if about in SHAPED else [(7,)]:
            x, y = given(f, *shape)
            for name, group in whole.groups.items():
                expected = whole.encode(name, x)
                found = f.encode(name, x)
                assert torch.equal(found != 0, expected != 0), about
                close(found, expected, about)
                columns = some_of(group.n_features)
                close(f.encode(name, x, columns), whole.encode(name, x, columns), about)
                for one, other in zip(f.encode_active(name, x), whole.encode_active(name, x), strict=True):
                    close(one, other, about)
                for write in sorted(write for each, write in whole.decoders if each == name):
                    close(f.decode_change(write, name, expected), whole.decode_change(write, name, expected), about)
                    part = expected[..., columns]
                    found = f.decode_change(write, name, part, columns)
                    assert torch.equal(found, whole.decode_change(write, name, part, columns)), about
            features, error = whole.featurize(x, y)
            for one, other in zip(f.featurize(x, y), (features, error), strict=True):
                for name in other:
                    close(one[name], other[name], about)
            again = f.inverse_featurize(features, error, x)
            for write in y:
                close(again[write], y[write], about)
                close(f.decode(write, features, x), whole.decode(write, features, x), about)
            for edits in edits_of(whole, x):
                for write, base in y.items():
                    close(f.apply_edit(write, base, edits), whole.apply_edit(write, base, edits), about)
                    same = {name: edit._replace(edited=edit.features.clone()) for name, edit in edits.items()}
                    assert torch.equal(f.apply_edit(write, base, same), base), about


def check_more_features_of_a_map_than_are_fetched(rank: int, size: int, folder: Path) -> None:
    from featurizers_sharded import site_map as module

    kept, module.FETCHED = module.FETCHED, 2
    try:
        for about in FEW:
            whole, f = both(rank, size, folder, CASES[about]())
            x, y = given(f, 7)
            for name, group in whole.groups.items():
                columns = some_of(group.n_features)
                close(f.encode(name, x, columns), whole.encode(name, x, columns), about)
            for edits in edits_of(whole, x):
                for write, base in y.items():
                    close(f.apply_edit(write, base, edits), whole.apply_edit(write, base, edits), about)
            compare_gradients(f, whole, about)
    finally:
        module.FETCHED = kept


def check_gradients_of_maps_are_those_of_the_whole(rank: int, size: int, folder: Path) -> None:
    for about in CASES if size == 2 else FEW:
        whole, f = both(rank, size, folder, CASES[about]())
        compare_gradients(f, whole, about)


def compare_gradients(f: Any, whole: Any, about: str) -> None:
    """Compare the gradients of a loss of many calls, of activations and of weights."""
    found, expected = (gradients(each.requires_grad_()) for each in (f, whole))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close(found[name], gradient, f"{about}: {name}")
    rows = f.rows()
    for name, parameter in whole.named_parameters():
        own = f.share.get_parameter(name)
        assert (own.grad is None) == (parameter.grad is None), f"{about}: {name}"
        if own.grad is not None:
            close(own.grad, parameter.grad[rows.get(name, slice(None))], f"{about}: {name}")


def gradients(f: Any) -> dict[str, Any]:
    """Return gradients of activations and features; those of the weights stay on them."""
    x, y = given(f, 7)
    leaves = {name: value.requires_grad_() for name, value in {**x, **{f"y-{n}": v for n, v in y.items()}}.items()}
    loss = torch.zeros(())
    edits = {}
    features = {}
    for number, (name, group) in enumerate(f.groups.items()):
        columns = some_of(group.n_features)
        features[name] = f.encode(name, x)
        loss = loss + (features[name] * torch.linspace(-1, 1, group.n_features)).sum()
        loss = loss + f.encode(name, x, columns).square().sum() + f.encode_active(name, x).values.square().sum()
        changed = leaves[f"changed-{name}"] = torch.linspace(-1, 1, 3).requires_grad_()
        edit = Edit(features[name][..., columns], features[name][..., columns] * 0.5 + changed, columns)
        edits[name] = edit if number % 2 == 0 else Edit(features[name], features[name] * 0.5, None)
    for number, write in enumerate(f.write_widths):
        target = activations(7, WIDTH, seed=90 + number)
        loss = loss + (f.decode(write, features, x) - target).square().sum()
        loss = loss + (f.apply_edit(write, y[write], edits) * target).square().sum()
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def check_a_saved_map_has_the_bytes_of_the_whole(rank: int, size: int, folder: Path) -> None:
    from featurizers_sharded import saving

    kept, saving.PIECE_BYTES = saving.PIECE_BYTES, 200  # several pieces of each process
    try:
        for build in (CASES["skip"], CASES["gated"], cross_layer):
            whole = build()
            whole.feature_sets = {"some": torch.tensor([3, 2])}
            whole.labels = [featurizers.Label(4, "the last one", group=list(whole.groups)[-1], author="someone")]
            whole, f = both(rank, size, folder, whole)
            path = folder / f"saved-map-{both.count}"  # type: ignore[attr-defined]
            f.save_pretrained(path)
            dist.barrier()
            original = folder / f"map-{both.count - 1}"  # type: ignore[attr-defined]
            for name in ("model.safetensors", "feature_labels.jsonl"):
                assert (path / name).read_bytes() == (original / name).read_bytes(), name
            again = featurizers.load(path, verify=True)
            assert (type(again), again.config, again.sites) == (type(whole), whole.config, whole.sites)
            assert f.feature_sets["some"].tolist() == [3, 2]
            dist.barrier()
    finally:
        saving.PIECE_BYTES = kept
    if rank == size - 1:
        f.share.b_dec["out-0"].data[0] = torch.nan
    with pytest.raises(errors.WeightsError if rank == size - 1 else OtherRankError, match="NaN"):
        f.save_pretrained(folder / "never-a-map")
    assert not (folder / "never-a-map").exists()
    with pytest.raises(errors.UsageError, match="in every process"):
        featurizers.save_collection({"one": f}, folder / f"maps-{rank}")
    with pytest.raises(errors.UsageError, match="no process has it whole"):
        featurizers.convert(f, folder / f"converted-{rank}", to="sparsify")


def check_some_features_of_a_map_are_taken(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, size, folder, cross_layer())
    for indices in ({"layer-0": [12, 1], "layer-1": None}, {"layer-2": [4, 0]}, None):
        part, expected = f.take(indices), whole.take(indices)
        assert (type(part), part.config, part.sites) == (type(expected), expected.config, expected.sites)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(part.state_dict()[name], tensor), name
    with pytest.raises(errors.UsageError, match="compares all features"):
        f.take({"layer-1": [0]})
    whole, f = both(rank, size, folder, CASES["skip"]())
    assert torch.equal(
        f.take([60, 3]).encode("features", given(f, 7)[0]), whole.take([60, 3]).encode("features", given(f, 7)[0])
    )


def check_maps_that_every_process_holds_are_divided(rank: int, size: int, folder: Path) -> None:
    whole = cross_layer()
    whole.metadata = {"seed": 3}
    f = featurizers_sharded.shard(whole, mesh_of(size))
    assert isinstance(f, ShardedMap)
    assert (f.sites, f.metadata, f.special_tokens) == (whole.sites, {"seed": 3}, whole.special_tokens)
    x, _ = given(f, 7)
    for name in f.groups:
        close(f.encode(name, x), whole.encode(name, x))
    for name, group in whole.groups.items():
        rows = f.share.get_parameter(f"W_dec.{name}.out-2")
        start, stop = f.divided[name].start, f.divided[name].stop
        assert torch.equal(rows, whole.get_parameter(f"W_dec.{name}.out-2")[start:stop])
        assert stop - start in (group.n_features // size, group.n_features // size + 1)
        assert rows.untyped_storage().nbytes() == rows.nbytes  # the rows of the others are not kept


def check_one_ranks_wrong_input_to_a_map_is_an_error_of_all(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, size, folder, cross_layer())
    x, y = given(f, 3)
    wrong, last = {**x, "in-0": activations(3, WIDTH + 1)}, size - 1
    features = {name: whole.encode(name, x) for name in whole.groups}
    short = {**features, "layer-1": features["layer-1"][..., :-1]}
    (some, *_) = edits_of(whole, x)
    short_edit = {**some, "layer-0": some["layer-0"]._replace(columns=torch.tensor([0, 1]))}
    cases: list[tuple[Any, Any, type[Exception]]] = [
        (lambda: f.encode("layer-0", x), lambda: f.encode("layer-0", wrong), errors.ShapeError),
        (lambda: f.encode_active("layer-0", x), lambda: f.encode_active("layer-0", {}), errors.ShapeError),
        (lambda: f.featurize(x, y), lambda: f.featurize(wrong, y), errors.ShapeError),
        (lambda: f.decode("out-2", features, x), lambda: f.decode("out-2", short, x), errors.ShapeError),
        (lambda: f.decode("out-2", features, x), lambda: f.decode("out-2", features, {}), errors.UsageError),
        (
            lambda: f.apply_edit("out-2", y["out-2"], some),
            lambda: f.apply_edit("out-2", y["out-2"], short_edit),
            errors.ShapeError,
        ),
        (lambda: f.encode("layer-0", x), lambda: f.select("layer-0", [13], x["in-0"]), errors.FeatureIndexError),
        (lambda: f.encode("layer-0", x), lambda: f.by_group({"layer-9": [1]}), errors.UsageError),
        (lambda: f.take({"layer-0": [1]}), lambda: f.take({"layer-0": [13]}), errors.FeatureIndexError),
    ]
    for right, of_last, error in cases:
        with pytest.raises(
            error if rank == last else OtherRankError, match=f"rank {last} of" if rank != last else "\\w"
        ):
            (of_last if rank == last else right)()
    with pytest.raises(errors.FeatureIndexError, match="and 13 is none"):
        f.encode("layer-0", x, torch.tensor([0, 13]))
    close(f.encode("layer-0", x), whole.encode("layer-0", x))


def check_ranks_that_give_a_map_other_tensors_are_refused_everywhere(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, size, folder, crosscoder(causal=False))
    x, y = given(f, 3)
    other = {**x, SITES[2]: activations(3, WIDTH, seed=10 + rank)}
    z = whole.encode("all", x)
    for call in (
        lambda: f.encode("all", other),
        lambda: f.encode_active("all", other),
        lambda: f.encode("all", x, torch.tensor([rank])),
        lambda: f.decode(SITES[0], {"all": z + rank}, x),
        lambda: f.decode_change(SITES[rank % 2], "all", z),
        lambda: f.apply_edit(SITES[0], y[SITES[0]], {"all": Edit(z, z + rank, None)}),
        lambda: f.take([rank]),
        lambda: f.encode("all", x) if rank else f.encode_active("all", x),
    ):
        with pytest.raises(errors.UsageError, match="ranks 0 and 1 of the mesh"):
            call()
    close(f.encode("all", x), z)


def check_a_map_of_many_reads(rank: int, size: int, folder: Path) -> None:
    """The record of a call with many tensors is longer than most."""
    names = [f"site-{i}" for i in range(24)]
    whole, f = both(rank, size, folder, map_of(Crosscoder, {"all": (names, names, 23, "relu", {})}))
    x, _ = given(f, 3)
    close(f.encode("all", x), whole.encode("all", x))
    other = {**x, "site-23": x["site-23"] + rank}
    with pytest.raises(errors.UsageError, match="ranks 0 and 1 of the mesh gave encode"):
        f.encode("all", other)
    close(
        f.decode(names[-1], {"all": whole.encode("all", x)}, x),
        whole.decode(names[-1], {"all": whole.encode("all", x)}, x),
    )


def check_maps_that_cannot_be_divided_are_refused(rank: int, size: int, folder: Path) -> None:
    mesh = mesh_of(size)
    few = {**CROSS_LAYER, "layer-2": (["in-2"], ["out-2"], 1, "relu", {})}
    whole = transcoder("relu", 61)
    cases = [
        (whole.take([1, 2, 3, 4, 5]), "is a slice of a map"),
        (map_of(CrossLayerTranscoder, few), f"group 'layer-2': 1 features cannot be divided over the {size} ranks"),
    ]
    for number, (other, match) in enumerate(cases):
        if rank == 0:
            other.save_pretrained(folder / f"undivided-map-{number}")
        dist.barrier()
        with pytest.raises(errors.UsageError, match=match):
            featurizers.load(folder / f"undivided-map-{number}", mesh=mesh)
        with pytest.raises(errors.UsageError, match=match):
            featurizers_sharded.shard(other, mesh)
    own = folder / f"own-map-{rank}"
    transcoder("relu", 61, seed=rank).save_pretrained(own)
    with pytest.raises(errors.UsageError, match="ranks 0 and 1 of the mesh gave load"):
        featurizers.load(own, mesh=mesh)


def check_a_map_is_copied_and_not_pickled(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, size, folder, cross_layer())
    x, _ = given(f, 3)
    again = copy.deepcopy(f)
    close(again.encode("layer-1", x), whole.encode("layer-1", x))
    with pytest.raises(errors.UsageError, match="load it in each process"):
        pickle.dumps(f)
    with pytest.raises(AttributeError, match="some rows of 'W_dec'"):
        _ = f.W_dec
    with torch.no_grad():
        again.share.b_dec["out-0"].zero_()
    path = folder / "saved-copy"
    again.save_pretrained(path)  # of the copy's own tensors
    dist.barrier()
    assert not featurizers.load(path).b_dec["out-0"].any()


@of_two
def check_half_precision_of_maps(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, size, folder, cross_layer().to(torch.bfloat16))
    x, y = given(f, 3, dtype=torch.bfloat16)
    for name in f.groups:
        torch.testing.assert_close(f.encode(name, x), whole.encode(name, x), atol=0.05, rtol=0.02)
    some, every, _ = edits_of(whole, x)
    assert torch.equal(f.apply_edit("out-2", y["out-2"], some), whole.apply_edit("out-2", y["out-2"], some))
    torch.testing.assert_close(
        f.apply_edit("out-2", y["out-2"], every), whole.apply_edit("out-2", y["out-2"], every), atol=0.1, rtol=0.05
    )


@of_two
def check_edits_of_a_model_through_maps(rank: int, size: int, folder: Path) -> None:
    from tests.support.site_maps import model

    gpt2 = model("gpt2")
    ids, other = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]]), torch.tensor([[6, 6, 2, 6, 0, 7]])
    one = transcoder("relu", 61, skip=True, special_tokens=[4])
    one.reads, one.writes, one.feature_sets = (
        {"in": "mlp.in:1"},
        {"out": "mlp.out:1"},
        {"selected": torch.tensor([60, 2])},
    )
    of_many = [{"writes": "additive"}, {"writes": "pinned"}, {"writes": "pinned-everywhere", "later": "frozen"}]
    cases = [
        (one, [{}]),
        (cross_layer(), of_many),
        (crosscoder(causal=False), of_many[2:]),
        (crosscoder(causal=True), of_many),
    ]
    for build, choices in cases:
        whole, f = both(rank, size, folder, build)
        first, n = next((name, group.n_features) for name, group in whole.groups.items())
        for options in choices:
            found = []
            for each in (f, whole):
                operations = [
                    Interchange(each, source={"input_ids": other}, positions=[-1], **options),
                    Steer(each, delta=0.7, indices={first: [0, n - 1]}, **options),
                    Ablate(each, value=0.3, indices={first: [1]}, **options),
                    Mask(each, source={"input_ids": other}, gate={first: torch.linspace(0, 1, n)}, **options),
                    Collect(each, **({"later": "frozen"} if "later" in options else {})),
                ]
                with torch.no_grad(), featurizers.intervene(gpt2, operations) as collected:
                    logits = gpt2(ids).logits
                seen = collected[operations[-1]]
                found.append({"logits": logits, **(seen if isinstance(seen, dict) else {first: seen})})
            for name, expected in found[1].items():
                torch.testing.assert_close(found[0][name], expected, atol=1e-5, rtol=1e-4)
            some = {first: [0, n - 1]}
            exact = []
            for each in (f, whole):
                with torch.no_grad(), featurizers.intervene(gpt2, [Steer(each, delta=0.7, indices=some, **options)]):
                    exact.append(gpt2(ids).logits)
            assert torch.equal(*exact)


@of_two
def check_replaced_and_attached_maps(rank: int, size: int, folder: Path) -> None:
    from tests.support.site_maps import model

    gpt2 = model("gpt2")
    ids, other = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([[6, 6, 2, 6, 0, 7]])
    whole, f = both(rank, size, folder, cross_layer())
    for error in ("dropped", "kept"):
        found = []
        for each in (f, whole):
            embeddings = gpt2.get_input_embeddings()(ids).detach().requires_grad_()
            with featurizers.replaced(gpt2, each, error=error):
                logits = gpt2(inputs_embeds=embeddings).logits
            logits.square().sum().backward()
            found.append((logits, embeddings.grad))
        for one, expected in zip(*found, strict=True):
            torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)
    one_site = transcoder("topk", 61, {"k": 5})
    one_site.reads, one_site.writes = {"in": "mlp.in:1"}, {"out": "mlp.out:1"}
    one_site.feature_sets = {"selected": torch.tensor([60, 2])}
    whole, f = both(rank, size, folder, one_site)
    with torch.no_grad():
        found = [each.attach(gpt2)({"input_ids": ids}, {"input_ids": other}).logits for each in (f, whole)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@of_two
def check_the_laws_of_maps(rank: int, size: int, folder: Path) -> None:
    laws = [
        name
        for name, law in vars(SiteMapContract).items()
        if name.startswith("test_")
        and set(inspect.signature(law).parameters) <= {"self", "site_map", "x", "y"}
        and name not in ("test_a_copy_is_the_same_map", "test_unknown_configuration_is_refused")  # built from a config
    ]
    assert len(laws) > 7
    torch.manual_seed(0)
    for about in FEW:
        path = folder / f"map-laws-{about.replace(' ', '-')}"
        if rank == 0:
            whole = CASES[about]()
            whole.reads = whole.writes = {}
            whole.save_pretrained(path)
        dist.barrier()
        for name in laws:
            law = getattr(SiteMapContract, name)
            f = featurizers.load(path, mesh=mesh_of(size))
            x, y = given(f, 2, 5)
            parameters = inspect.signature(law).parameters
            law(SiteMapContract(), **{n: v for n, v in {"site_map": f, "x": x, "y": y}.items() if n in parameters})
