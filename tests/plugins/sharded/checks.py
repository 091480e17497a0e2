"""Checks of dictionaries on a mesh; each runs in every process, beside the whole dictionary of the same file."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import featurizers
import featurizers_sharded
import pytest
import torch
import torch.distributed as dist
from featurizers import errors
from featurizers.errors import OtherRankError
from featurizers.testing import FeaturizerContract
from featurizers_sharded import ShardedDictionary
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.support.dictionaries import dictionary

CASES = [
    *[(rule, 64, {}) for rule in ("relu", "jumprelu", "jump", "gated", "topk", "abstopk", "groupmax", "identity")],
    *[(rule, 61, {}) for rule in ("relu", "jumprelu", "gated", "topk", "abstopk")],
    ("groupmax", 63, {"k": 7}),  # the groups do not divide evenly, and are not cut
    ("groupmax", 64, {"k": 1}),  # the group is cut
    ("topk", 61, {"k": 40}),  # more than a process holds
    ("topk", 61, {"pre_bias": True, "normalize": "layer-norm"}),
    ("relu", 61, {"pre_bias": True, "normalize": "constant-norm"}),
    ("jumprelu", 61, {"normalize": "scale", "input_scale": 2.5, "units": "decoder-norm"}),
    ("topk", 61, {"units": "decoder-norm"}),
    ("relu", 64, {"units": "folded"}),
    ("llamascopium.topk", 61, {}),  # compares all features by a norm of its own
]
UNEVEN = [case for case in CASES if case[1] != 64]
SHAPES = [(7,), (1,), (0,), (2, 3), ()]
SHAPED = [("relu", 61, {"pre_bias": True, "normalize": "constant-norm"}), ("topk", 61, {"units": "decoder-norm"})]
"""Cases with activations of all shapes; the others have one."""


def mesh_of(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size,), mesh_dim_names=("features",))


def whole_of(rule: str, n_features: int, options: dict[str, Any], **more: Any) -> Any:
    options = {"n_features": n_features, **options, **more}
    units = options.pop("units", "raw")
    if rule == "llamascopium.topk":
        rows = dictionary("relu", **options)
        state = dict(rows.state_dict())
        norm = torch.rand(n_features) + 0.5
        whole = featurizers.DictionaryFeaturizer.from_tensors(**state, rule=rule, rule_options={"k": 5}, norm=norm)
    else:
        whole = dictionary(rule, **options)
    return whole.in_units(units).eval()


def both(rank: int, mesh: DeviceMesh, folder: Path, whole: Any) -> tuple[Any, ShardedDictionary]:
    """Return the whole dictionary, loaded, and the one on the mesh of the same folder."""
    path = folder / f"dictionary-{both.count}"  # type: ignore[attr-defined]
    both.count += 1  # type: ignore[attr-defined]
    if rank == 0:
        whole.save_pretrained(path)
    dist.barrier()
    sharded = featurizers.load(path, mesh=mesh)
    assert isinstance(sharded, ShardedDictionary)
    return featurizers.load(path), sharded


both.count = 0  # type: ignore[attr-defined]


def of_two(check: Any) -> Any:
    """Run a check in two processes alone: more would tell nothing new, and take seconds to import what it needs."""
    return functools.wraps(check)(lambda rank, size, folder: None if size > 2 else check(rank, size, folder))


def activations(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    if expected.numel():  # torch.testing imports sympy once there is a process group, which takes seconds
        difference = float((found.detach() - expected.detach()).abs().max())
        assert difference <= 2e-6 * max(1.0, float(expected.detach().abs().max())), f"{what}: {difference}"


def check_every_rule_gives_the_features_and_edits_of_the_whole(rank: int, size: int, folder: Path) -> None:
    mesh = mesh_of(size)
    for rule, n_features, options in CASES if size == 2 else UNEVEN:
        whole, f = both(rank, mesh, folder, whole_of(rule, n_features, options))
        about = f"{rule} {n_features} {options}"
        for shape in SHAPES if (rule, n_features, options) in SHAPED else [(7,)]:
            x, y = activations(*shape, 8), activations(*shape, 8, seed=2)
            expected = whole.encode(x)
            assert torch.equal(f.encode(x) != 0, expected != 0), about
            close(f.encode(x), expected, about)
            some = torch.tensor([n_features - 1, 0, n_features // 2, 5])
            close(f.encode(x, some), whole.encode(x, some), about)
            close(f.decode(expected), whole.decode(expected), about)
            sparse, expected_sparse = f.encode_sparse(x), whole.encode_sparse(x)
            assert torch.equal(sparse.indices, expected_sparse.indices), about
            close(sparse.values, expected_sparse.values, about)
            close(f.decode_sparse(sparse), whole.decode_sparse(expected_sparse), about)
            for one, other in zip(f.encode_active(x), whole.encode_active(x), strict=True):
                close(one, other, about)
            found, error = f.featurize(x)
            close(f.inverse_featurize(found, error), x, about)
            for one, other in zip(f.reconstruct(x), whole.reconstruct(x), strict=True):
                close(one, other, about)
            for indices in (some.tolist(), None, list(range(n_features)), []):
                at = f"{about} {shape} {indices}"
                close(f.interchange(x, y, indices), whole.interchange(x, y, indices), at)
                close(f.steer(x, 1.5, indices), whole.steer(x, 1.5, indices), at)
                close(f.ablate(x, indices, 0.5), whole.ablate(x, indices, 0.5), at)
                close(f.collect(x, indices), whole.collect(x, indices), at)
            assert torch.equal(f.interchange(x, x), x), about
            assert torch.equal(f.steer(x, 0.0), x), about
            gate = torch.linspace(0, 1, n_features)
            close(f.mask(x, y, gate), whole.mask(x, y, gate), about)
            close(f.mask(x, y, gate > 0.5), whole.mask(x, y, gate > 0.5), about)
            if rule not in ("topk", "abstopk", "groupmax", "llamascopium.topk"):
                assert torch.equal(f.interchange(x, y, some), whole.interchange(x, y, some)), f"{about}: not exact"
                part = f.take(some)
                assert torch.equal(part.interchange(x, y, some), whole.take(some).interchange(x, y, some)), about


def check_other_features_for_each_example(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, mesh_of(size), folder, whole_of("topk", 61, {}))
    x, y, indices = activations(2, 8), activations(2, 8, seed=2), [[0, 60], [3]]
    close(f.interchange(x, y, indices), whole.interchange(x, y, indices))
    close(f.steer(x, 2.0, indices), whole.steer(x, 2.0, indices))
    close(f.interchange(x, y[:1], None), whole.interchange(x, y[:1], None))


def check_more_features_than_are_fetched(rank: int, size: int, folder: Path) -> None:
    from featurizers_sharded import dictionary as module

    kept, module.FETCHED = module.FETCHED, 3
    try:
        for rule, options in (("relu", {}), ("jumprelu", {"units": "decoder-norm"}), ("topk", {})):
            whole, f = both(rank, mesh_of(size), folder, whole_of(rule, 61, options))
            x, y, indices = activations(5, 8), activations(5, 8, seed=2), [60, 0, 31, 5, 17]
            close(f.interchange(x, y, indices), whole.interchange(x, y, indices))
            close(f.collect(x, indices), whole.collect(x, indices))
            close(f.steer(x, 2.0, indices), whole.steer(x, 2.0, indices))
            x = x.requires_grad_()
            (found,) = torch.autograd.grad(f.steer(x, 2.0, indices).square().sum() + f.collect(x, indices).sum(), x)
            (expected,) = torch.autograd.grad(
                whole.steer(x, 2.0, indices).square().sum() + whole.collect(x, indices).sum(), x
            )
            close(found, expected)
    finally:
        module.FETCHED = kept


def check_a_large_batch_is_decoded_by_its_active_features_alone(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, mesh_of(size), folder, whole_of("topk", 2048, {"d_in": 64, "k": 4}))
    x, y = activations(300, 64), activations(300, 64, seed=2)
    close(f.decode(f.encode(x)), whole.decode(whole.encode(x)))
    close(f.interchange(x, y), whole.interchange(x, y))


def check_gradients_are_those_of_the_whole(rank: int, size: int, folder: Path) -> None:
    mesh = mesh_of(size)
    target = activations(7, 8, seed=3)
    for rule, n_features, options in CASES if size == 2 else UNEVEN:
        whole, f = both(rank, mesh, folder, whole_of(rule, n_features, options))
        whole.requires_grad_()
        f.requires_grad_()
        found, expected = [gradients(each, n_features, target) for each in (f, whole)]
        for name, gradient in expected.items():
            if name in found:
                close(found[name], gradient, f"{rule} {n_features} {options}: {name}")
        for name, parameter in whole.named_parameters():
            own = f.share.get_parameter(name)
            assert (own.grad is None) == (parameter.grad is None), name
            if own.grad is not None and parameter.grad is not None:
                rows = f.share.rows().get(name, slice(None))
                close(own.grad, parameter.grad[rows], f"{rule} {n_features} {options}: {name}")


def gradients(f: Any, n_features: int, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return gradients of a loss of many operations; those of the weights stay on them."""
    x, y = activations(7, 8).requires_grad_(), activations(7, 8, seed=2).requires_grad_()
    gate = torch.linspace(0.1, 0.9, n_features).requires_grad_()
    delta = torch.ones(3).requires_grad_()
    some = [n_features - 1, 0, 5]
    features = f.encode(x)
    loss = (features * torch.linspace(-1, 1, n_features)).sum()
    loss = loss + (f.decode(features) * target).sum()
    loss = loss + (f.mask(x, y, gate) - target).square().sum()
    loss = loss + (f.interchange(x, y) * target).sum() + (f.interchange(x, y, some) - target).square().sum()
    loss = loss + (f.steer(x, delta, some) - target).square().sum()
    loss.backward()
    return {"x": x.grad, "y": y.grad, "gate": gate.grad, "delta": delta.grad}  # type: ignore[dict-item]


@of_two
def check_sparse_features_have_gradients(rank: int, size: int, folder: Path) -> None:
    for rule in ("relu", "jumprelu", "topk", "groupmax"):
        whole, f = both(rank, mesh_of(size), folder, whole_of(rule, 64, {}))
        found = []
        for each in (f, whole):
            x = activations(7, 8).requires_grad_()
            sparse = each.encode_sparse(x)
            loss = (sparse.values * sparse.indices).sum() + each.decode_sparse(sparse).square().sum()
            loss.backward()
            found.append(x.grad)
        close(found[0], found[1], rule)


@of_two
def check_derivatives_of_the_maps(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, mesh_of(size), folder, whole_of("topk", 61, {"pre_bias": True}))
    x, tangent = activations(7, 8), activations(7, 8, seed=4)
    cotangent = activations(7, 61, seed=5)
    close(f.encode_jvp(x, tangent), whole.encode_jvp(x, tangent))
    close(f.encode_vjp(x, cotangent), whole.encode_vjp(x, cotangent))
    features, error = whole.featurize(x)
    close(f.decode_jvp(features, error, cotangent), whole.decode_jvp(features, error, cotangent))
    close(f.decode_vjp(features, error, tangent), whole.decode_vjp(features, error, tangent))
    seen: list[torch.Tensor] = []
    x.requires_grad_()
    f.splice(x, lambda z: (z.retain_grad(), seen.append(z))[1]).square().sum().backward()
    whole.splice(x, lambda z: (z.retain_grad(), seen.append(z))[1]).square().sum().backward()
    close(seen[0].grad, seen[1].grad)  # type: ignore[arg-type]


def check_a_save_has_the_bytes_of_the_whole(rank: int, size: int, folder: Path) -> None:
    from featurizers_sharded import saving

    kept, saving.PIECE_BYTES = saving.PIECE_BYTES, 200  # several pieces of each process
    try:
        for number, (rule, options) in enumerate(
            [("topk", {}), ("jumprelu", {"units": "decoder-norm"}), ("gated", {}), ("relu", {"units": "folded"})]
        ):
            whole = whole_of(rule, 61, options)
            whole.feature_sets, whole.site = {"some": torch.tensor([60, 2])}, featurizers.Site("resid.post", 3)
            whole.labels = [featurizers.Label(60, "the last one", author="someone")]
            whole.metadata = {"seed": 3}
            whole, f = both(rank, mesh_of(size), folder, whole)
            assert f.feature_sets["some"].tolist() == [60, 2]
            path = folder / f"saved-{number}"
            assert f.save_pretrained(path) == path
            dist.barrier()
            original = folder / f"dictionary-{both.count - 1}"  # type: ignore[attr-defined]
            for name in ("model.safetensors", "feature_labels.jsonl"):
                assert (path / name).read_bytes() == (original / name).read_bytes(), (rule, name)
            again = featurizers.load(path, verify=True)
            assert again.config == whole.config
            assert (again.site, again.metadata, again.labels) == (whole.site, whole.metadata, whole.labels)
            dist.barrier()
    finally:
        saving.PIECE_BYTES = kept


def check_a_save_that_fails_fails_everywhere(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, mesh_of(size), folder, whole_of("relu", 61, {}))
    path = folder / "not-an-artefact"
    if rank == 0:
        path.mkdir()
        (path / "notes.txt").write_text("kept")
    dist.barrier()
    with pytest.raises(errors.ArtefactError if rank == 0 else OtherRankError, match="not an artefact"):
        f.save_pretrained(path)
    with torch.no_grad():
        if rank == size - 1:
            f.share.W_dec[0, 0] = torch.nan
    with pytest.raises(errors.WeightsError if rank == size - 1 else OtherRankError, match="NaN"):
        f.save_pretrained(folder / "never")
    assert not (folder / "never").exists()
    with pytest.raises(errors.UsageError, match="in every process"):
        featurizers.save_collection({"one": f}, folder / f"collection-{rank}")
    x = activations(3, 8)
    f = featurizers.load(folder / f"dictionary-{both.count - 1}", mesh=mesh_of(size))  # type: ignore[attr-defined]
    close(f.encode(x), whole.encode(x))


def check_one_ranks_wrong_input_is_an_error_of_all(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, mesh_of(size), folder, whole_of("topk", 61, {}))
    x, wrong, last = activations(3, 8), activations(3, 9), size - 1
    gate = torch.ones(61)
    cases: list[tuple[Any, Any, type[Exception]]] = [
        (lambda: f.encode(x), lambda: f.encode(wrong), errors.ShapeError),
        (lambda: f.interchange(x, x, [1]), lambda: f.interchange(wrong, x, [1]), errors.ShapeError),
        (lambda: f.interchange(x, x, [1]), lambda: f.interchange(x, wrong, [1]), errors.ShapeError),
        (lambda: f.interchange(x, x, [1]), lambda: f.interchange(x, x, [61]), errors.FeatureIndexError),
        (lambda: f.mask(x, x, gate), lambda: f.mask(x, x, gate[:60]), errors.ShapeError),
        (lambda: f.steer(x, 1.0, [1, 2]), lambda: f.steer(x, torch.ones(3), [1, 2]), errors.ShapeError),
        (lambda: f.decode(whole.encode(x)), lambda: f.decode(x), errors.ShapeError),
        (lambda: f.collect(x), lambda: f.collect(x.long()), errors.ShapeError),
    ]
    for right, of_last, error in cases:
        with pytest.raises(error if rank == last else OtherRankError, match=f"rank {last} of" if rank != last else ""):
            (of_last if rank == last else right)()
    close(f.encode(x), whole.encode(x))


def check_ranks_with_other_tensors_are_refused_everywhere(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, mesh_of(size), folder, whole_of("relu", 61, {}))
    x, own = activations(3, 8), activations(3, 8, seed=10 + rank)
    for call in (
        lambda: f.encode(own),
        lambda: f.encode_sparse(own),
        lambda: f.interchange(x, own),
        lambda: f.interchange(x, own, [1]),
        lambda: f.collect(x, [rank]),
        lambda: f.steer(x, float(rank), [1]),
        lambda: f.mask(x, activations(3, 8, seed=2), torch.full((61,), rank / size)),
        lambda: f.take([rank]),
        lambda: f.encode(x[: 1 + rank]),
        lambda: f.encode(x.requires_grad_(rank == 0)),
        lambda: f.encode(x) if rank else f.decode(whole.encode(x)),
    ):
        with pytest.raises(errors.UsageError, match="ranks 0 and 1 of the mesh"):
            call()
    x = activations(3, 8)
    close(f.encode(x), whole.encode(x))
    nearly = x * (1 + 1e-7 * rank)
    close(f.encode(nearly), whole.encode(x))


def check_one_ranks_bad_file_is_an_error_of_all(rank: int, size: int, folder: Path) -> None:
    mesh = mesh_of(size)
    own, last = folder / f"own-{rank}", size - 1
    whole = whole_of("relu", 61, {})
    whole.save_pretrained(own)
    weights = own / "model.safetensors"
    good = weights.read_bytes()
    if rank == last:
        weights.write_bytes(good[:-8])
    with pytest.raises(errors.WeightsError if rank == last else OtherRankError, match="promises"):
        featurizers.load(own, mesh=mesh)
    weights.write_bytes(good)
    with pytest.raises(errors.FeaturizerError, match="nowhere" if rank == last else f"rank {last} of"):
        featurizers.load(own if rank != last else folder / "nowhere", mesh=mesh)
    other = whole_of("relu", 61, {}, seed=rank)
    other.save_pretrained(own)
    with pytest.raises(errors.UsageError, match="ranks 0 and 1 of the mesh gave load"):
        featurizers.load(own, mesh=mesh)


def check_what_cannot_be_divided_is_refused(rank: int, size: int, folder: Path) -> None:
    mesh = mesh_of(size)
    whole, _ = both(rank, mesh, folder, whole_of("relu", 61, {}))
    path = folder / f"dictionary-{both.count - 1}"  # type: ignore[attr-defined]
    with pytest.raises(errors.UsageError, match="mesh= or indices="):
        featurizers.load(path, mesh=mesh, indices=[1])
    with pytest.raises(errors.UsageError, match="mesh is a DeviceMesh"):
        featurizers.load(path, mesh=size)
    with pytest.raises(errors.UsageError, match="device"):
        featurizers.load(path, mesh=mesh, device="cuda")
    with pytest.raises(errors.UsageError, match="name the one"):
        featurizers.load(path, mesh=init_device_mesh("cpu", (1, size)))
    subspace = featurizers.create("subspace", d_in=8, n_features=4)
    for number, (other, match) in enumerate(
        [
            (subspace, "only dictionaries, transcoders and"),
            (whole.take([1, 2, 3, 4, 5]), "is a slice"),
            (small(), "cannot be divided"),
        ]
    ):
        if rank == 0:
            other.save_pretrained(folder / f"undivided-{number}")
        dist.barrier()
        with pytest.raises(errors.UsageError, match=match):
            featurizers.load(folder / f"undivided-{number}", mesh=mesh)


def small() -> Any:
    return featurizers.DictionaryFeaturizer.from_tensors(torch.ones(1, 8), torch.ones(1, 8))


@of_two
def check_files_of_another_library_are_divided_once_they_are_loaded(rank: int, size: int, folder: Path) -> None:
    from safetensors.torch import save_file

    path = folder / "sae-lens"
    if rank == 0:
        path.mkdir()
        site = {"hook_name": "blocks.1.hook_resid_post"}
        cfg = {"architecture": "standard", "d_in": 8, "d_sae": 61, "metadata": site}
        (path / "cfg.json").write_text(json.dumps(cfg))
        w = {
            "W_enc": activations(8, 61),
            "b_enc": activations(61),
            "W_dec": activations(61, 8),
            "b_dec": activations(8),
        }
        save_file(w, path / "sae_weights.safetensors")
    dist.barrier()
    with pytest.raises(errors.UsageError, match="save_pretrained"):
        featurizers.load(path, mesh=mesh_of(size))
    whole = featurizers.load(path)
    f = featurizers_sharded.shard(whole, mesh_of(size))
    assert str(f.site) == "resid.post:1"
    close(f.encode(activations(3, 8)), whole.encode(activations(3, 8)))


def check_it_is_copied_and_not_pickled(rank: int, size: int, folder: Path) -> None:
    whole, f = both(rank, mesh_of(size), folder, whole_of("relu", 61, {}))
    x = activations(3, 8)
    close(copy.deepcopy(f).encode(x), whole.encode(x))
    with pytest.raises(errors.UsageError, match="load it in each process"):
        pickle.dumps(f)
    with pytest.raises(AttributeError, match="some rows of 'W_dec'"):
        _ = f.W_dec
    rows = f.share.W_dec
    assert torch.equal(rows, whole.W_dec[f.share.start : f.share.stop])
    assert len(rows) in (61 // size, 61 // size + 1)


def check_one_axis_of_a_mesh_with_several(rank: int, size: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "features"))
    whole, f = both(rank, mesh, folder, whole_of("topk", 61, {}))
    assert f.ranks.size == size // 2
    x = activations(3, 8, seed=rank // (size // 2))  # each group has its own data
    close(f.encode(x), whole.encode(x))
    close(f.interchange(x, x + 1), whole.interchange(x, x + 1))


@of_two
def check_half_precision(rank: int, size: int, folder: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        whole, f = both(rank, mesh_of(size), folder, whole_of("relu", 61, {}, dtype=dtype))
        x, y = activations(3, 8).to(dtype), activations(3, 8, seed=2).to(dtype)
        torch.testing.assert_close(f.encode(x), whole.encode(x), atol=0.05, rtol=0.02)
        assert torch.equal(f.interchange(x, y, [1, 60]), whole.interchange(x, y, [1, 60]))
        torch.testing.assert_close(f.interchange(x, y), whole.interchange(x, y), atol=0.3, rtol=0.05)
        assert torch.equal(f.interchange(x, x), x)


@of_two
def check_lowered_edits(rank: int, size: int, folder: Path) -> None:
    for rule, value in (("relu", None), ("jumprelu", 0.5), ("topk", None)):
        whole, f = both(rank, mesh_of(size), folder, whole_of(rule, 61, {}))
        x = activations(5, 8)
        edits = [
            featurizers.Steer(each, delta=2.0, indices=[60, 3])
            if value is None
            else featurizers.Ablate(each, value=value, indices=[60, 3])
            for each in (f, whole)
        ]
        programs = [featurizers.lower(edit) for edit in edits]
        close(programs[0].apply(x), programs[1].apply(x))
        with pytest.raises(errors.LoweringError, match="divided over a mesh"):
            featurizers.lower(featurizers.Steer(f, delta=2.0))


@of_two
def check_interventions_in_a_model(rank: int, size: int, folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).eval()
    base, source = ({"input_ids": torch.arange(start, start + 6).reshape(1, 6)} for start in (0, 9))
    whole = whole_of("topk", 61, {})
    whole.site = "resid.post:0"
    whole, f = both(rank, mesh_of(size), folder, whole)
    found = []
    for each in (f, whole):
        edits = [
            featurizers.Interchange(each, source=source, positions=[-1]),
            featurizers.Steer(each, delta=3.0, indices=[60]),
            featurizers.Ablate(each, value="mean", indices=[0, 1]),
            featurizers.Collect(each),
        ]
        with torch.no_grad(), featurizers.intervene(model, {each.site: edits}) as collected:
            logits = model(**base).logits
        found.append((logits, next(iter(collected.values()))))
        kept = featurizers.collect(model, base, {each.site: each}, sparse=True)
        found[-1] = (*found[-1], next(iter(kept.values())).values)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@of_two
def check_the_laws_of_featurizers(rank: int, size: int, folder: Path) -> None:
    laws = [
        name
        for name, law in vars(FeaturizerContract).items()
        if name.startswith("test_")
        and name != "test_a_copy_and_a_state_dict_are_the_same_featurizer"  # it is built from its config alone
        and list(inspect.signature(law).parameters) == ["self", "featurizer", "activations"]
    ]
    assert len(laws) > 15
    torch.manual_seed(0)
    for rule in ("jumprelu", "topk"):
        path = folder / f"laws-{rule}"
        if rank == 0:
            whole_of(rule, 61, {}).save_pretrained(path)
        dist.barrier()
        for name in laws:
            law = getattr(FeaturizerContract, name)
            contract = type("Contract", (FeaturizerContract,), {})()
            law(contract, featurizers.load(path, mesh=mesh_of(size)), activations(12, 8))
