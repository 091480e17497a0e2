"""`train`, from the pairs to the artefact: against a planted subspace, and against a training loop written by hand."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ArtefactError, FeaturizerError, ManifestError, UsageError, WeightsError
from featurizers_training import (
    DAS,
    DASDBM,
    DBM,
    BoundlessDAS,
    FullVector,
    Pairs,
    RandomSubspace,
    Settings,
    cross_entropy,
    evaluate,
    train,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.models import WIDTH, fresh_model, hooks_of, tiny_model
from tests.support.planted import PLANTED, SITE, SIZE, model, overlap, planted_pairs

TRAIN, TEST = planted_pairs(320), planted_pairs(100, seed=1)
FEW = TRAIN[:24]


def quick(method: Any = DAS(n_features=2), pairs: Pairs = FEW, **options: Any) -> Any:  # noqa: B008  # it is frozen
    settings = Settings(**{"epochs": 2, "batch_size": 8, **options.pop("settings", {})})
    return train(options.pop("model", model()), pairs, options.pop("sites", SITE), method, settings=settings, **options)


def basis_of(found: Any) -> Tensor:
    return found.featurizer.basis.detach()


# ---------------------------------------------------------------------- results


def test_das_finds_the_planted_subspace() -> None:
    settings = Settings(epochs=20, batch_size=32)
    found = train(model(), TRAIN, SITE, DAS(n_features=SIZE, lr=0.05), validation=TEST, settings=settings)
    random = featurizers.create("subspace", d_in=WIDTH, n_features=SIZE, seed=0).basis.detach()
    assert overlap(basis_of(found)) > 0.85
    assert overlap(random) < 0.5
    full = featurizers.create("identity", d_in=WIDTH)
    full.site = featurizers.Site.parse(SITE)
    assert found.accuracy["validation"].value > 0.6
    assert evaluate(model(), TEST, full).value < 0.3


def test_masks_find_which_of_the_given_features_matter() -> None:
    """Search in an orthonormal basis that begins with the planted subspace: the mask selects the beginning."""
    rest = torch.linalg.qr(torch.cat([PLANTED, torch.eye(WIDTH)], dim=1)).Q[:, SIZE:WIDTH]
    through = type(featurizers.create("subspace", d_in=2, n_features=1)).from_basis(torch.cat([PLANTED, rest], dim=1))
    method = DBM(sparsity=0.02, gate_lr=0.1)
    found = train(model(), TRAIN, SITE, method, through=through, settings=Settings(epochs=6, batch_size=32))
    assert found.featurizer.feature_sets["selected"].tolist() == [0, 1, 2, 3]
    assert found.accuracy["train"].value == 1.0
    assert evaluate(model(), TEST, found.featurizer).value == 1.0


def test_the_boundary_is_learned() -> None:
    method = BoundlessDAS(lr=0.03, sparsity=2.0, gate_lr=0.02, temperature=(5.0, 0.1))
    found = train(model(), TRAIN, SITE, method, settings=Settings(epochs=12, batch_size=32))
    selected = found.featurizer.feature_sets["selected"]
    assert selected.tolist() == list(range(len(selected)))
    assert 2 <= len(selected) < WIDTH // 2
    assert found.accuracy["train"].value > 0.6
    assert overlap(basis_of(found)[:, selected]) > 0.5


def test_das_and_dbm_find_fewer_features_the_more_they_cost() -> None:
    counts = []
    for sparsity in (0.0, 0.3):
        found = quick(DASDBM(sparsity=sparsity, gate_lr=0.1), TRAIN, settings={"epochs": 3, "batch_size": 32})
        counts.append(len(found.featurizer.feature_sets["selected"]))
    assert counts[0] > 2 * counts[1]


# ---------------------------------------------------------------------- against a loop written by hand


def by_hand(steps: list[list[int]], rates: list[float], start: Tensor, pairs: Pairs) -> tuple[Tensor, list[float]]:
    """Run the same search with whole runs and a plain hook on one block; an SVD projects back to the manifold."""
    module = model().model.layers[1]
    basis = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([basis])
    losses = []
    for rows, rate in zip(steps, rates, strict=True):
        base, source = (torch.tensor([getattr(pairs[r], k) for r in rows]) for k in ("base", "sources"))
        label = torch.tensor([pairs[r].label[0] for r in rows])
        kept: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[:, -1]))
        with torch.no_grad():
            model()(source[:, 0])
        handle.remove()

        def edit(_: Any, __: Any, out: Tensor, kept: list[Tensor] = kept) -> Tensor:
            last = out[:, -1] + (kept[0] - out[:, -1]) @ basis @ basis.T
            return torch.cat([out[:, :-1], last.unsqueeze(1)], dim=1)

        handle = module.register_forward_hook(edit)
        loss = nn.functional.cross_entropy(model()(base).logits[:, -1], label)
        handle.remove()
        optimizer.zero_grad()
        loss.backward()
        along = basis.detach().T @ basis.grad
        basis.grad -= basis.detach() @ (along + along.T) / 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            u, _, v = torch.linalg.svd(basis, full_matrices=False)
            basis.copy_(u @ v)
        losses.append(float(loss.detach()))
    return basis.detach(), losses


def test_a_search_is_the_loop_written_by_hand() -> None:
    found = quick(DAS(n_features=3, lr=0.02), settings={"warmup": 0.25})
    steps = []
    for epoch in range(2):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch))
        steps += [rows.tolist() for rows in torch.split(order, 8)]
    progress = [(i + 1) / 6 for i in range(6)]
    rates = [0.02 * (p / 0.25 if p < 0.25 else 1 - 0.95 * (p - 0.25) / 0.75) for p in progress]
    start = featurizers.create("subspace", d_in=WIDTH, n_features=3, seed=0).basis.detach()
    basis, losses = by_hand(steps, rates, start, FEW)
    torch.testing.assert_close(basis_of(found), basis, atol=1e-4, rtol=1e-4)
    assert [h["loss"] for h in found.history] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-4)


def test_the_micro_batch_does_not_change_the_result() -> None:
    torch.testing.assert_close(basis_of(quick(settings={"micro_batch": 3})), basis_of(quick()), atol=1e-5, rtol=1e-4)


def test_the_size_of_the_cache_does_not_change_the_result() -> None:
    torch.testing.assert_close(basis_of(quick(settings={"cache_bytes": 0})), basis_of(quick()), atol=1e-4, rtol=1e-3)


def test_the_seed_decides_the_result() -> None:
    assert torch.equal(basis_of(quick()), basis_of(quick()))
    assert not torch.allclose(basis_of(quick(settings={"seed": 1})), basis_of(quick()), atol=1e-2)


def test_a_custom_objective_is_minimised() -> None:
    def certainty(logits: Tensor, answers: Any) -> Tensor:
        return logits[:, 0].softmax(-1).square().sum(-1)

    found = quick(objective=certainty, settings={"epochs": 6})
    assert found.history[-1]["loss"] < found.history[0]["loss"]
    assert found.settings["objective"] == "certainty"
    with pytest.raises(UsageError, match=r"a loss for each pair, \(8,\), not \(\)"):
        quick(objective=lambda logits, answers: logits.sum())


def test_the_logit_difference_is_trained() -> None:
    found = quick(objective="logit-difference", settings={"epochs": 6})
    assert found.history[-1]["loss"] < found.history[0]["loss"]
    without = Pairs.of([{"base": [1, 2], "source": [3, 4], "label": 5}])
    with pytest.raises(UsageError, match="a base_label a pair"):
        quick(pairs=without, objective="logit-difference")


def test_a_label_of_several_tokens_counts_only_as_a_whole() -> None:
    own = tiny_model("llama")
    with torch.no_grad():
        first = int(own(torch.tensor([[7, 8, 9]])).logits[0, -1].argmax())
        second = int(own(torch.tensor([[7, 8, 9, first]])).logits[0, -1].argmax())
    pairs = Pairs.of(
        [{"base": [7, 8, 9], "source": [7, 8, 9], "label": [first, label]} for label in (second, second + 1)]
    )
    f = featurizers.create("identity", d_in=WIDTH)
    f.site = featurizers.Site.parse(SITE)
    assert evaluate(own, pairs, f).hits == 1


# ---------------------------------------------------------------------- nothing else is changed


def test_a_search_changes_neither_the_model_nor_the_featurizer_it_goes_through() -> None:
    own = fresh_model("llama").train()
    through = featurizers.create("subspace", d_in=WIDTH, n_features=6, seed=2)
    before = {name: t.clone() for name, t in (*own.state_dict().items(), *through.state_dict().items())}
    hooks = hooks_of(own)
    for method in (DBM(), DAS(n_features=2)):
        found = quick(method, model=own, through=through)
        assert found.featurizer is not through
    assert own.training and all(m.training for m in own.modules()) and through.training  # noqa: PT018
    assert all(p.requires_grad and p.grad is None for p in (*own.parameters(), *through.parameters()))
    assert hooks_of(own) == hooks
    assert (through.site, through.metadata, through.feature_sets, through.id) == (None, {}, {}, "subspace")
    for name, tensor in (*own.state_dict().items(), *through.state_dict().items()):
        assert torch.equal(tensor, before[name]), name


def test_an_error_in_the_middle_does_not_change_the_model() -> None:
    own = fresh_model("llama").train()
    hooks = hooks_of(own)
    with pytest.raises(ZeroDivisionError):
        quick(model=own, objective=lambda logits, answers: logits / (1 // 0))
    assert own.training
    assert all(p.requires_grad for p in own.parameters())
    assert hooks_of(own) == hooks


# ---------------------------------------------------------------------- the artefact


@pytest.mark.parametrize(
    "method", [DAS(n_features=2), DBM(), DASDBM(n_features=5), BoundlessDAS()], ids=lambda method: method.name
)
def test_what_is_loaded_is_what_was_found(method: Any, tmp_path: Path) -> None:
    found = quick(method)
    found.save(tmp_path / "found")
    loaded = featurizers.load(tmp_path / "found", verify=True)
    assert evaluate(model(), FEW, loaded) == found.accuracy["train"] == evaluate(model(), FEW, found.featurizer)
    assert (loaded.site, loaded.site.position) == (featurizers.Site.parse(SITE), (-1,))
    training = loaded.metadata["training"]
    assert training["method"]["name"] == method.name
    assert training["accuracy"]["train"] == json.loads(json.dumps(found.accuracy["train"].record()))
    assert training["pairs"] == {"count": 24, "sha256": FEW.digest()}
    assert len(training["history"]) == 2
    if "selected" in found.featurizer.feature_sets:
        assert training["selected"] == len(found.featurizer.feature_sets["selected"])
    base, source = ({"input_ids": torch.tensor([getattr(p, k) for p in FEW])} for k in ("base", "sources"))
    source = {"input_ids": source["input_ids"][:, 0]}
    with torch.no_grad():
        said = loaded.attach(model())(base, source).logits[:, -1].argmax(-1)
    hits = int((said == torch.tensor([p.label[0] for p in FEW])).sum())
    assert hits == found.accuracy["train"].hits


def test_several_sites_are_searched_together_and_saved_as_a_collection(tmp_path: Path) -> None:
    sites = ["attn.z:0:1", SITE, "mlp.out:2"]
    found = quick(sites=sites)
    assert [f.d_in for f in found.featurizers] == [8, WIDTH, WIDTH]
    found.save(tmp_path / "found")
    assert sorted(featurizers.list_artefacts(tmp_path / "found")) == ["attn.z-0-1", "mlp.out-2", "resid.post-1"]
    names = ["attn.z-0-1", "resid.post-1", "mlp.out-2"]
    loaded = [featurizers.load(tmp_path / "found", subfolder=name) for name in names]
    assert evaluate(model(), FEW, loaded) == found.accuracy["train"]
    with pytest.raises(UsageError, match="the search had 3 sites"):
        _ = found.featurizer


def test_two_positions_of_one_site_have_their_own_features(tmp_path: Path) -> None:
    pairs = FEW.at(0, -1)
    found = quick(pairs=pairs, sites=[SITE, SITE])
    assert [f.site.position for f in found.featurizers] == [(0,), (-1,)]
    assert not torch.allclose(*(f.basis for f in found.featurizers))
    found.save(tmp_path / "found")
    assert sorted(featurizers.list_artefacts(tmp_path / "found")) == ["resid.post-1", "resid.post-1-1"]
    assert evaluate(model(), pairs, found.featurizers) == found.accuracy["train"]


def test_baselines_are_measured_without_epochs() -> None:
    for method in (FullVector(), RandomSubspace(n_features=2)):
        found = quick(method)
        assert found.history == []
        assert evaluate(model(), found.pairs, found.featurizers) == found.accuracy["train"]


# ---------------------------------------------------------------------- stopping and resuming


def test_early_stopping_goes_back_to_the_best_epoch() -> None:
    found = quick(
        DAS(n_features=2, lr=0.5), TRAIN[:40], validation=TEST, settings={"epochs": 30, "patience": 2, "warmup": 0.0}
    )
    measured = [h["validation"] for h in found.history]
    assert len(measured) < 30
    best = max(measured)
    assert measured.index(best) == len(measured) - 3
    assert found.accuracy["validation"].value == best
    with pytest.raises(UsageError, match="patience needs validation pairs"):
        quick(settings={"patience": 2})


class Interrupted(Exception):
    """Raised by an objective to end a search in the middle."""


@pytest.mark.parametrize("method", [DAS(n_features=2), DASDBM(sparsity=0.01), BoundlessDAS()], ids=lambda m: m.name)
def test_an_interrupted_search_resumes_to_the_same_bits(method: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"settings": {"epochs": 4}, "validation": TEST[:20]}
    whole = quick(method, **options)
    calls = []

    def objective(logits: Tensor, answers: Any) -> Tensor:
        calls.append(None)
        if len(calls) == 8:  # in the third of four epochs of three steps
            raise Interrupted
        return cross_entropy(logits, answers)

    objective.__name__ = "cross-entropy"
    with pytest.raises(Interrupted):
        quick(method, objective=objective, checkpoints=tmp_path / "c", **options)
    again = quick(method, checkpoints=tmp_path / "c", **options)
    assert again.history == whole.history
    for one, other in zip(whole.featurizer.state_dict().values(), again.featurizer.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for name, tensor in whole.featurizer.feature_sets.items():
        assert torch.equal(tensor, again.featurizer.feature_sets[name])
    finished = quick(method, checkpoints=tmp_path / "c", **options)
    assert finished.history == whole.history


def test_a_loss_that_is_not_finite_is_kept_in_a_checkpoint(tmp_path: Path) -> None:
    def infinite(logits: Tensor, answers: Any) -> Tensor:
        return logits[:, 0, 0] * 0 + float("inf")

    whole = quick(objective=infinite, checkpoints=tmp_path / "c")
    assert [h["loss"] for h in whole.history] == [float("inf")] * 2
    assert quick(objective=infinite, checkpoints=tmp_path / "c").history == whole.history


def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    quick(checkpoints=tmp_path / "c")
    for change, problem in (
        ({"method": DAS(n_features=2, lr=0.5)}, "its method differ"),
        ({"settings": {"seed": 1}}, "its settings differ"),
        ({"pairs": FEW.with_shuffled_labels()}, "its pairs differ"),
        ({"sites": "resid.post:0"}, "its sites differ"),
    ):
        with pytest.raises(UsageError, match=problem):
            quick(checkpoints=tmp_path / "c", **change)


def test_a_checkpoint_holds_only_what_is_trained(tmp_path: Path) -> None:
    through, other = (featurizers.create("subspace", d_in=WIDTH, n_features=6, seed=seed) for seed in (2, 3))
    quick(checkpoints=tmp_path / "c", through=through)
    with safe_open(tmp_path / "c" / "search.safetensors", "pt") as file:
        names = set(file.keys())
        assert {name for name in names if name.startswith("search.")} == {"search.0"}
        assert file.get_slice("search.0").get_shape() == [6, 2]
    before = other.basis.detach().clone()
    with pytest.raises(UsageError, match="its through differ"):
        quick(checkpoints=tmp_path / "c", through=other)
    assert torch.equal(other.basis, before)


@pytest.mark.parametrize("method", [FullVector(), DBM(), BoundlessDAS(), DAS(n_features=2)], ids=lambda m: m.name)
def test_the_selection_of_an_earlier_search_is_ignored(method: Any) -> None:
    def found(**sets: Tensor) -> Any:
        through = featurizers.create("subspace", d_in=WIDTH, n_features=6, seed=2)
        through.feature_sets |= sets
        result = quick(method, through=through)
        assert through.feature_sets.keys() == sets.keys()
        return result

    plain = found()
    after = found(selected=torch.tensor([1]), gate_logits=torch.full((6,), -1.0))
    assert after.accuracy == plain.accuracy
    assert evaluate(model(), FEW, after.featurizer) == plain.accuracy["train"]
    assert after.featurizer.feature_sets.keys() == plain.featurizer.feature_sets.keys()


def test_a_tied_mask_keeps_a_logit_for_each_feature() -> None:
    found = quick(DBM(tied=True))
    assert found.featurizer.feature_sets["gate_logits"].shape == (WIDTH,)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    quick(checkpoints=tmp_path)
    file = tmp_path / "search.safetensors"
    state = file.read_bytes()
    file.write_bytes(state[:-1] + bytes([state[-1] ^ 1]))
    with pytest.raises(ArtefactError, match="its tensors are not those that were written"):
        quick(checkpoints=tmp_path)
    file.write_bytes(state[:-1])
    with pytest.raises(ArtefactError, match="header promises"):
        quick(checkpoints=tmp_path)
    file.write_bytes(state.replace(b"history", b"hystory"))
    with pytest.raises(ArtefactError, match="history"):
        quick(checkpoints=tmp_path)


def write_as_before(folder: Path) -> None:
    """Rewrite a checkpoint in its old form, as two files."""
    path = folder / "search.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a mapping
        about = json.loads(file.metadata()["featurizers"])
    names, rows = about["history"], tensors.pop("history").tolist()
    save_file(tensors, folder / "checkpoint.safetensors")
    state = {
        "search": about["search"],
        "history": [{**dict(zip(names, row, strict=True)), "epoch": int(row[0])} for row in rows],
        "best": about["best"],
        "optimizer": about["optimizer"],
        "scaler": about["scaler"],
        "sha256": hashlib.sha256((folder / "checkpoint.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "checkpoint.json").write_text(json.dumps(state, indent=2))
    path.unlink()


def test_an_old_checkpoint_of_two_files_resumes_to_the_same_bits(tmp_path: Path) -> None:
    calls: list[None] = []

    def objective(logits: Tensor, answers: Any) -> Tensor:
        calls.append(None)
        if len(calls) == 8:
            raise Interrupted
        return cross_entropy(logits, answers)

    objective.__name__ = "cross-entropy"
    through = featurizers.create("subspace", d_in=WIDTH, n_features=6, seed=2)
    options: dict[str, Any] = {"settings": {"epochs": 4}, "validation": TEST[:20], "through": through}
    whole = quick(DASDBM(sparsity=0.01), **options)
    with pytest.raises(Interrupted):
        quick(DASDBM(sparsity=0.01), objective=objective, checkpoints=tmp_path, **options)
    write_as_before(tmp_path)
    calls.clear()
    again = quick(DASDBM(sparsity=0.01), checkpoints=tmp_path, **options)
    assert again.history == whole.history
    for one, other in zip(whole.featurizer.state_dict().values(), again.featurizer.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert {path.name for path in tmp_path.iterdir()} == {"search.safetensors", ".lock"}


def test_a_damaged_old_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    quick(checkpoints=folder)
    write_as_before(folder)
    weights = (folder / "checkpoint.safetensors").read_bytes()
    (folder / "checkpoint.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(FeaturizerError, match="is not the one that"):
        quick(checkpoints=folder)
    (folder / "checkpoint.safetensors").write_bytes(weights[:-1])
    with pytest.raises(WeightsError):
        quick(checkpoints=folder)
    (folder / "checkpoint.safetensors").unlink()
    with pytest.raises(FeaturizerError):
        quick(checkpoints=folder)
    (folder / "checkpoint.json").write_text("{}")
    with pytest.raises(ManifestError, match="no checkpoint"):
        quick(checkpoints=folder)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises((UsageError, ArtefactError), match="something else than a checkpoint"):
        quick(checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ---------------------------------------------------------------------- precision, processes


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_finds_much_the_same(precision: str) -> None:
    found = quick(pairs=TRAIN[:96], settings={"precision": precision, "epochs": 3, "batch_size": 16})
    whole = quick(pairs=TRAIN[:96], settings={"epochs": 3, "batch_size": 16})
    assert basis_of(found).dtype == torch.float32
    assert found.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], abs=0.15)
    assert found.history[-1]["loss"] < found.history[0]["loss"]


def test_the_gradient_that_is_clipped_is_that_of_the_loss_in_float16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    clip = nn.utils.clip_grad_norm_

    def noted(*args: Any) -> Tensor:
        norms.append(float(clip(*args)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", noted)
    for precision in ("fp32", "fp16"):
        quick(pairs=FEW[:8], settings={"precision": precision, "epochs": 1, "clip": 1.0})
    assert len(norms) == 2
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_searched_with_a_basis_in_single(dtype: torch.dtype) -> None:
    half = fresh_model("llama").to(dtype)
    found = quick(model=half, pairs=TRAIN[:96], settings={"epochs": 3, "batch_size": 16})
    assert basis_of(found).dtype == torch.float32
    assert found.history[-1]["loss"] < found.history[0]["loss"]


SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
from tests.plugins.training.test_search import FEW, TEST, model
from featurizers_training import DASDBM, Settings, train
from accelerate import PartialState
settings = Settings(epochs=2, batch_size=7)
found = train(model(), FEW, "resid.post:1", DASDBM(n_features=6, sparsity=0.01), validation=TEST[:9], settings=settings,
              checkpoints=sys.argv[1] + "/checkpoint", progress=True)
state = PartialState()
assert state.num_processes == 2
if state.is_main_process:
    found.save(sys.argv[1] + "/found")
state.wait_for_everyone()
os._exit(0)  # when Python ends in the usual way, gloo's threads sometimes abort the process after its work is done
"""


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).parents[3]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, str(tmp_path / "script.py"), str(tmp_path)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,  # no limit of time: torch.distributed ends all processes when one ends badly
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = featurizers.load(tmp_path / "found")
    one = train(
        model(),
        FEW,
        SITE,
        DASDBM(n_features=6, sparsity=0.01),
        validation=TEST[:9],
        settings=Settings(epochs=2, batch_size=7),
    )
    torch.testing.assert_close(two.basis, one.featurizer.basis, atol=1e-5, rtol=1e-4)
    logits = one.featurizer.feature_sets["gate_logits"]
    torch.testing.assert_close(two.feature_sets["gate_logits"], logits, atol=1e-5, rtol=1e-4)
    for of_two, of_one in zip(two.metadata["training"]["history"], one.history, strict=True):
        assert of_two == pytest.approx(of_one, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"settings": {"epochs": 0}}, "epochs is a whole number, at least 1"),
        ({"settings": {"precision": "int8"}}, "precision is one of"),
        ({"settings": {"warmup": 1.0}}, "warmup is a share"),
        ({"objective": "nll"}, "is one of cross-entropy"),
        ({"through": {SITE: 3}}, "expected a Featurizer"),
        ({"method": featurizers.create("identity", d_in=8)}, "not IdentityFeaturizer; a featurizer to search in"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        quick(**options)


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(UsageError, match="the gradient is not finite"):
        quick(objective=lambda logits, answers: logits[:, 0, 0] * float("inf"))
