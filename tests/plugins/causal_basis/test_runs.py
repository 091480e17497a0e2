"""Folders of extractions: a full disk, a killed process, and each way in which a damaged or hostile one is refused."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from featurizers.errors import ArtefactError, FeaturizerError
from featurizers_causal_basis import extract_causal_bases, iterate_causal_bases
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

D, K = 6, 3
NAME = "layer-000.safetensors"


def extract(folder: Path | None, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(D, 12).double()
    with torch.no_grad():
        linear.weight.copy_(torch.randn(12, D, generator=generator))
        linear.bias.zero_()
    hidden = torch.randn(40, D, generator=generator, dtype=torch.float64)
    return extract_causal_bases(nn.Sequential(linear), [hidden], K, max_iter=5, resume=folder, **options)[0]


@contextmanager
def full_disk():
    """Let the system refuse to write to any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_on_a_full_disk_can_be_used_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with full_disk(), pytest.raises(ArtefactError, match=r"run.json: it cannot be written: File too large"):
        extract(folder)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert torch.equal(extract(folder).directions, extract(None).directions)


def test_a_folder_whose_process_was_killed_while_it_began_can_be_used(tmp_path: Path) -> None:
    (tmp_path / f".run.json.{'0123456789abcdef' * 2}").write_text('{"k"')
    extract(tmp_path)
    assert (tmp_path / NAME).exists()


def test_a_second_extraction_in_a_folder_is_refused_and_the_first_one_goes_on(tmp_path: Path) -> None:
    refused: list[str] = []

    def listener(_: Any) -> None:
        with pytest.raises(ArtefactError, match="another program is writing to it") as caught:
            extract(tmp_path)
        refused.append(str(caught.value))

    first = extract(tmp_path, progress=listener)
    assert torch.equal(first.directions, extract(None).directions)
    assert torch.equal(extract(tmp_path).directions, first.directions)  # the lock is released
    assert refused


def test_an_iterator_that_is_closed_releases_the_folder(tmp_path: Path) -> None:
    decoder, hidden = nn.Linear(4, 8), torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    bases = iterate_causal_bases(decoder, [hidden, hidden], 1, resume=tmp_path, max_iter=2)
    next(bases)
    with pytest.raises(ArtefactError, match="another program is writing to it"):
        extract_causal_bases(decoder, [hidden, hidden], 1, resume=tmp_path, max_iter=2)
    bases.close()  # type: ignore[attr-defined]  # it is a generator
    assert len(extract_causal_bases(decoder, [hidden, hidden], 1, resume=tmp_path, max_iter=2)) == 2


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    extract(folder)
    return folder


Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def tensor(name: str, how: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, _: tensors.update({name: how(tensors[name])})


def field(name: str, value: Any) -> Change:
    return lambda _, about: about.update({name: value})


NAN = float("nan")
DAMAGES: dict[str, tuple[Change, str]] = {
    "no vectors": (lambda tensors, _: tensors.pop("vectors"), "not vectors, energies, losers"),
    "a tensor more": (lambda tensors, _: tensors.update(x=torch.ones(1)), "it holds the tensors .*'x'"),
    "vectors of another width": (tensor("vectors", lambda x: x[:-1].clone()), "its vectors are torch.float64"),
    "transposed vectors": (tensor("vectors", lambda x: x.T.contiguous()), "its vectors are torch.float64"),
    "one vector": (tensor("vectors", lambda x: x[:, 0].clone()), "its vectors are torch.float64"),
    "vectors in single precision": (tensor("vectors", lambda x: x.float()), "its vectors are torch.float32"),
    "vectors of integers": (tensor("vectors", lambda x: x.long()), "its vectors are torch.int64"),
    "vectors NaN": (tensor("vectors", lambda x: x * NAN), "its vectors hold NaN"),
    "long vectors": (tensor("vectors", lambda x: x * 2), "not orthonormal"),
    "one vector twice": (tensor("vectors", lambda x: x[:, :1].repeat(1, K)), "not orthonormal"),
    "energies of a matrix": (tensor("energies", lambda x: x[:, None].clone()), "its energies are torch.float64"),
    "energies of nothing": (tensor("energies", lambda x: x.sum()), "its vectors are|its energies are"),
    "an energy too few": (tensor("energies", lambda x: x[:-1].clone()), "its vectors are torch.float64"),
    "an energy infinite": (tensor("energies", lambda x: x / 0), "its energies hold NaN or infinity"),
    "vectors too many": (
        lambda tensors, _: tensors.update(
            vectors=torch.eye(D, dtype=torch.float64), energies=torch.ones(D, dtype=torch.float64)
        ),
        "at most 3",
    ),
    "a loser of no axis": (lambda tensors, _: tensors.update(losers=torch.tensor(1.0).double()), "its losers are"),
    "a loser of another width": (
        lambda tensors, _: tensors.update(losers=torch.ones(D - 1, 1).double()),
        "its losers are torch.float64",
    ),
    "a loser of zeros": (
        lambda tensors, _: tensors.update(losers=torch.zeros(D, 1).double()),
        "its losers are no unit vectors",
    ),
    "a loser NaN": (lambda tensors, _: tensors.update(losers=torch.full((D, 1), NAN).double()), "its losers hold NaN"),
    "losers too many": (
        lambda tensors, _: tensors.update(losers=torch.eye(D, dtype=torch.float64)),
        "its losers are .*at most 1",
    ),
    "not finished": (field("finished", False), "has all vectors, but says that it is not finished"),
    "finished of a number": (field("finished", 1), "finished"),
    "minus one evaluations": (field("evaluations", -1), "evaluations"),
    "evaluations without end": (field("evaluations", 10**30), "evaluations"),
    "no evaluations": (lambda _, about: about.pop("evaluations"), "evaluations"),
    "an energy of text": (field("joint_energy", "x"), "joint_energy"),
    "a hash of a number": (field("activations_sha256", 3), "activations_sha256"),
    "an unknown key": (field("code", "import os"), "code"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_hostile_layer_is_one_error(name: str, good: Path, tmp_path: Path) -> None:
    change, words = DAMAGES[name]
    (tmp_path / "run.json").write_bytes((good / "run.json").read_bytes())
    with safe_open(good / NAME, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no mapping
        about = json.loads(file.metadata()["about"])
    change(tensors, about)
    save_file(tensors, tmp_path / NAME, {"about": json.dumps(about)})
    with pytest.raises(ArtefactError, match=f"{words}.*; delete it to search the layer again"):
        extract(tmp_path)


def link(name: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, good: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(good / name)

    return spoil


def pipe(name: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, _: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def write(name: str, data: bytes) -> Callable[[Path, Path], Any]:
    return lambda folder, _: (folder / name).write_bytes(data)


FILES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "options: link out": (link("run.json"), "run.json is a link out of this folder"),
    "layer: link out": (link(NAME), f"{NAME} is a link out of this folder"),
    "options: pipe": (pipe("run.json"), "run.json is a named pipe"),
    "layer: pipe": (pipe(NAME), f"{NAME} is a named pipe"),
    "options: empty": (write("run.json", b""), "not valid JSON"),
    "options: a list": (write("run.json", b"[]"), "not a JSON object"),
    "options: none": (write("run.json", b"{}"), "belongs to another extraction: k was None"),
    "options: a key twice": (write("run.json", b'{"k": 3, "k": 3}'), "not valid JSON"),
    "options: deep": (write("run.json", b'{"k": ' + b"[" * 600 + b"]" * 600 + b"}"), "nested"),
    "options: NaN": (write("run.json", b'{"k": NaN}'), "not valid JSON"),
    "options: large": (write("run.json", b" " * 2_000_000), "larger than"),
    "layer: empty": (write(NAME, b""), "not a whole safetensors file"),
    "layer: a pickle": (write(NAME, b"\x80\x04N."), "not a whole safetensors file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_form_is_one_error(name: str, good: Path, tmp_path: Path) -> None:
    spoil, words = FILES[name]
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path, good)
    with pytest.raises(FeaturizerError, match=words):
        extract(tmp_path)
