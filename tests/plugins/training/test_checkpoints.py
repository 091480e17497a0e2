"""Checkpoints of searches: long ones, ones with NaN, and each way in which a damaged or hostile one is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from featurizers.errors import ArtefactError, FeaturizerError
from featurizers.format import fingerprint
from featurizers_training import DAS, Settings, cross_entropy, train
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.support.planted import SITE, model, planted_pairs

PAIRS, VALIDATION = planted_pairs(8), planted_pairs(4, seed=1)
NAME = "search.safetensors"


class Interrupted(Exception):
    pass


def search(folder: Path, epochs: int = 2, objective: Any = cross_entropy, **options: Any) -> Any:
    settings = Settings(epochs=epochs, batch_size=8, **options)
    method = DAS(n_features=2)
    return train(
        model(), PAIRS, SITE, method, validation=VALIDATION, objective=objective, settings=settings, checkpoints=folder
    )


def interrupted(folder: Path, epochs: int = 2, **options: Any) -> None:
    """Search for one epoch of several."""
    calls: list[None] = []

    def stopping(logits: Tensor, answers: Any) -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise Interrupted
        return cross_entropy(logits, answers)

    stopping.__name__ = cross_entropy.__name__
    with pytest.raises(Interrupted):
        search(folder, epochs, stopping, **options)


def test_a_second_search_in_a_folder_is_refused_and_the_first_one_goes_on(tmp_path: Path) -> None:
    refused: list[str] = []

    def objective(logits: Tensor, answers: Any) -> Tensor:
        if len(refused) < 2:
            with pytest.raises(ArtefactError, match="another program is writing to it") as caught:
                search(tmp_path / "busy", epochs=3)
            refused.append(str(caught.value))
        return cross_entropy(logits, answers)

    objective.__name__ = cross_entropy.__name__
    first = search(tmp_path / "busy", objective=objective)
    alone = search(tmp_path / "alone")
    assert torch.equal(first.featurizer.basis, alone.featurizer.basis)
    assert search(tmp_path / "busy").history == alone.history  # the lock is released, and the checkpoint is whole
    assert len(refused) == 2


def rewrite(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any], *, signed: bool = True) -> None:
    """Change the tensors and the JSON of a checkpoint, and its fingerprint with them."""
    path = folder / NAME
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no mapping
        about = json.loads(file.metadata()["featurizers"])
    change(tensors, about)
    if signed:
        about["fingerprint"] = fingerprint(dict(sorted(tensors.items())))
    save_file(tensors, path, {"featurizers": json.dumps(about)})


def test_a_search_of_many_thousand_epochs_with_nan_losses_is_resumed(tmp_path: Path) -> None:
    epochs = 30_000
    interrupted(tmp_path, epochs)

    def lengthen(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        rows = tensors["history"].repeat(epochs - 1, 1)
        rows[:, 0] = torch.arange(1, epochs)
        rows[5, 1] = float("nan")
        tensors["history"] = rows

    rewrite(tmp_path, lengthen)
    history = search(tmp_path, epochs).history
    assert [record["epoch"] for record in history] == list(range(1, epochs + 1))
    assert [i for i, record in enumerate(history) if record["loss"] != record["loss"]] == [5]


def test_a_search_in_half_precision_is_resumed_with_its_scaler(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", precision="fp16")
    interrupted(tmp_path / "c", precision="fp16")
    assert torch.equal(search(tmp_path / "c", precision="fp16").featurizer.basis, whole.featurizer.basis)
    rewrite(tmp_path / "c", lambda _, about: about["scaler"].update(scale=-1.0))
    with pytest.raises(ArtefactError, match=r"scaler\.scale"):
        search(tmp_path / "c", precision="fp16")


def test_a_search_that_was_killed_while_its_first_checkpoint_was_written_begins_again(tmp_path: Path) -> None:
    (tmp_path / f".{NAME}.{'0123456789abcdef' * 2}").write_bytes(b"half of it")
    assert len(search(tmp_path).history) == 2


Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def tensor(name: str, how: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, _: tensors.update({name: how(tensors[name])})


def field(name: str, value: Any) -> Change:
    return lambda _, about: about.update({name: value})


EXP_AVG = "optimizer.0.exp_avg"
NAN = float("nan")
DAMAGES: dict[str, tuple[Change, str]] = {
    "no history": (lambda tensors, _: tensors.pop("history"), "lacks tensors of this search, or has others: 'history'"),
    "no parameter": (lambda tensors, _: tensors.pop("search.0"), "'search.0'"),
    "a parameter more": (lambda tensors, _: tensors.update({"search.1": torch.ones(1)}), "'search.1'"),
    "another name": (lambda tensors, _: tensors.update(x=torch.ones(1)), "'x'"),
    "a parameter transposed": (tensor("search.0", lambda x: x.T.contiguous()), "'search.0' has another shape"),
    "a parameter of integers": (tensor("search.0", lambda x: x.int()), "'search.0' has another shape or dtype"),
    "a scalar parameter": (tensor("search.0", lambda x: x.sum()), "'search.0' has another shape"),
    "NaN in a parameter": (tensor("search.0", lambda x: x * NAN), "'search.0' holds NaN"),
    "no best": (lambda tensors, _: tensors.pop("best.0"), "'best.0'"),
    "best of another shape": (tensor("best.0", lambda x: x[:1]), "'best.0' has another shape"),
    "infinity in the best": (tensor("best.0", lambda x: x + float("inf")), "'best.0' holds"),
    "tensors of no best": (field("best", None), "'best.0'"),
    "best of text": (field("best", "x"), "best"),
    "best without accuracy": (field("best", {"epoch": 1}), "best.accuracy"),
    "best of an epoch to come": (field("best", {"epoch": 9, "accuracy": 0.5}), "its best epoch is 9 of 2"),
    "best of epoch 10**30": (field("best", {"epoch": 10**30, "accuracy": 0.5}), "best.epoch"),
    "best of 200 %": (field("best", {"epoch": 1, "accuracy": 2.0}), "best.accuracy"),
    "no moment": (lambda tensors, _: tensors.pop(EXP_AVG), f"'{EXP_AVG}'"),
    "a moment of another shape": (tensor(EXP_AVG, lambda x: x[0].clone()), f"'{EXP_AVG}' has another shape"),
    "a moment NaN": (tensor(EXP_AVG, lambda x: x * NAN), f"'{EXP_AVG}' holds NaN"),
    "a moment of no parameter": (
        lambda tensors, _: tensors.update({"optimizer.x.exp_avg": torch.ones(1)}),
        "'optimizer.x.exp_avg'",
    ),
    "a moment of the last parameter": (
        lambda tensors, _: tensors.update({"optimizer.-1.exp_avg": torch.ones(1)}),
        "'optimizer.-1.exp_avg'",
    ),
    "numbers of the optimizer": (field("optimizer", {"0.lr": 1.0}), "its optimizer has other numbers"),
    "an optimizer of lists": (field("optimizer", {"0.lr": [1.0]}), "optimizer"),
    "an optimizer of text": (field("optimizer", "x"), "optimizer"),
    "a scaler": (field("scaler", {"scale": 1.0}), "scaler"),
    "a scaler of a number": (field("scaler", 3), "scaler"),
    "a history of other names": (field("history", ["epoch", "loss"]), "its history is no table of epoch, loss"),
    "a history of names twice": (field("history", ["epoch"] * 5), "its history is no table"),
    "a history of numbers": (field("history", 3), "history"),
    "a history of one axis": (tensor("history", lambda x: x[:, 0].contiguous()), "its history is no table"),
    "a history of nothing": (tensor("history", lambda x: x[:, :0].contiguous()), "its history is no table"),
    "a history of integers": (tensor("history", lambda x: x.long()), "its history is no table"),
    "an epoch NaN": (tensor("history", lambda x: x * NAN), "does not count the epochs"),
    "an epoch left out": (tensor("history", lambda x: x[1:].clone()), "does not count the epochs|best epoch is"),
    "no search": (lambda _, about: about.pop("search"), "search"),
    "a search of text": (field("search", "x"), "search"),
    "an empty search": (field("search", {}), "does not describe a search"),
    "an unknown key": (field("code", "import os"), "code"),
    "another version": (field("version", 2), "version 2; this release reads version 1"),
    "a version of text": (field("version", "1"), "has version '1'"),
    "another format": (field("format", "x"), "has the format 'x'"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("good")
    search(folder)
    return (folder / NAME).read_bytes()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_hostile_checkpoint_is_one_error(name: str, good: bytes, tmp_path: Path) -> None:
    change, words = DAMAGES[name]
    (tmp_path / NAME).write_bytes(good)
    rewrite(tmp_path, change)
    with pytest.raises(ArtefactError, match=words):
        search(tmp_path)


def link(folder: Path, good: bytes) -> None:
    (folder.parent / "elsewhere").write_bytes(good)
    (folder / NAME).symlink_to("../elsewhere")


FILES: dict[str, tuple[Callable[[Path, bytes], Any], str]] = {
    "empty": (lambda folder, _: (folder / NAME).write_bytes(b""), "is not a whole safetensors file"),
    "cut": (lambda folder, good: (folder / NAME).write_bytes(good[:-1]), "header promises"),
    "a flipped bit": (
        lambda folder, good: (folder / NAME).write_bytes(good[:-1] + bytes([good[-1] ^ 1])),
        "not those that were written",
    ),
    "a pickle": (lambda folder, _: (folder / NAME).write_bytes(b"\x80\x04N."), "is not a whole safetensors file"),
    "no metadata": (lambda folder, _: save_file({"x": torch.ones(1)}, folder / NAME), "has no metadata 'featurizers'"),
    "metadata of a list": (
        lambda folder, _: save_file({"x": torch.ones(1)}, folder / NAME, {"featurizers": "[]"}),
        "is not a JSON object",
    ),
    "a folder": (lambda folder, _: (folder / NAME).mkdir(), "is a folder, not a regular file"),
    "a pipe": (lambda folder, _: os.mkfifo(folder / NAME), "is a named pipe"),
    "a link out of the folder": (link, "is a link out of this folder"),
    "a pipe, in the old form": (lambda folder, _: os.mkfifo(folder / "checkpoint.json"), "is a named pipe"),
    "an old form of a list": (lambda folder, _: (folder / "checkpoint.json").write_text("[]"), "is no checkpoint"),
    "an old form of links": (
        lambda folder, _: (folder / "checkpoint.json").symlink_to("/etc/hostname"),
        "is a link out of this folder",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint_is_one_error(name: str, good: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    write, words = FILES[name]
    write(folder, good)
    with pytest.raises(FeaturizerError, match=words):
        search(folder)
