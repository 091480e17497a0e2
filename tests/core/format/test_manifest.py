"""Damaged and hostile artefacts: each is refused by one error that names the folder and the problem."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import featurizers
import pytest
from featurizers.errors import FeaturizerError, ManifestError, UnknownKindError, WeightsError
from featurizers.format.manifest import Index, Manifest, dump, parse
from pydantic import ValidationError

from tests.support.damages import CONFIG, ENORMOUS, OTHERS, SPECIAL, WEIGHTS, Damage
from tests.support.damages import basis as _basis
from tests.support.damages import change as _change
from tests.support.damages import tensors as _tensors
from tests.support.hub import subspace


def _check(folder: Path, damage: Damage) -> None:
    with pytest.raises(FeaturizerError, match=damage.words) as caught:
        featurizers.load(folder)
    assert type(caught.value) is damage.error
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 800
    if damage.error is not UnknownKindError:  # about a plugin, not about the folder
        assert message.startswith(f"{folder}: ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return subspace().save_pretrained(tmp_path_factory.mktemp("whole") / "a")


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "a"))


@pytest.mark.parametrize("damage", WEIGHTS)
def test_weights(folder, damage):
    WEIGHTS[damage].spoil(folder)
    _check(folder, WEIGHTS[damage])


@pytest.mark.parametrize("damage", CONFIG)
def test_config(folder, damage):
    CONFIG[damage].spoil(folder)
    _check(folder, CONFIG[damage])


@pytest.mark.parametrize("damage", OTHERS)
def test_what_only_looks_right(folder, damage):
    OTHERS[damage].spoil(folder)
    _check(folder, OTHERS[damage])


@pytest.mark.parametrize("damage", SPECIAL)
def test_what_is_no_file_of_the_folder(folder, damage):
    SPECIAL[damage].spoil(folder)
    _check(folder, SPECIAL[damage])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_way_to_cut_a_file_short(folder, name):
    whole = (folder / name).read_bytes()
    for size in range(0, len(whole) - 1, 7):
        (folder / name).write_bytes(whole[:size])
        with pytest.raises((ManifestError, WeightsError), match=name):
            featurizers.load(folder)


# ---------------------------------------------------------------------- compositions


@pytest.fixture(scope="module")
def whole_composition(tmp_path_factory):
    stages = subspace() >> subspace(d_in=3, n_features=2)
    return stages.save_pretrained(tmp_path_factory.mktemp("whole") / "a")


@pytest.fixture
def composition(whole_composition, tmp_path):
    return Path(shutil.copytree(whole_composition, tmp_path / "a"))


def _stage(index: int, **changes: Any) -> Callable[[Path], Any]:
    return _change(lambda data: data["config"]["stages"][index].update(changes))


def _stage_size(index: int, **changes: Any) -> Callable[[Path], Any]:
    return _change(lambda data: data["config"]["stages"][index]["config"].update(changes))


STAGES = {
    "weights of another shape": Damage(_stage_size(0, d_in=9), WeightsError, r"'stages.0.basis' has shape \[8, 3\]"),
    "largest": Damage(_stage_size(0, d_in=2**24), WeightsError, r"implies \[16777216, 3\]"),
    "too few": Damage(_change(lambda d: d["config"]["stages"].pop()), ManifestError, "'stages': .*at least 2"),
    "too many": Damage(
        _change(lambda d: d["config"].update(stages=d["config"]["stages"] * 100)),
        ManifestError,
        "'stages': .*at most 64",
    ),
    "unknown key": Damage(_stage(0, code="x"), ManifestError, "'stages.0.code': Extra inputs"),
    "kind os.system": Damage(_stage(1, kind="os.system"), UnknownKindError, "'os'.*the package of its author"),
    "kind torch.nn:Linear": Damage(_stage(1, kind="torch.nn:Linear"), UnknownKindError, "never an import path"),
}
FAULTY_STAGES = {
    "negative": Damage(_stage_size(0, d_in=-8), ManifestError, "'d_in': .* greater than 0"),
    "enormous": Damage(_stage_size(0, d_in=ENORMOUS), ManifestError, "'d_in': "),
    "that do not fit": Damage(_stage_size(1, d_in=4), ManifestError, "cannot compose"),
    "that nest": Damage(_stage(1, kind="composition"), ManifestError, "not a composition itself"),
}


@pytest.mark.parametrize("damage", STAGES)
def test_stages(composition, damage):
    STAGES[damage].spoil(composition)
    _check(composition, STAGES[damage])


@pytest.mark.parametrize("damage", FAULTY_STAGES)
def test_faulty_stages(composition, damage):
    FAULTY_STAGES[damage].spoil(composition)
    _check(composition, FAULTY_STAGES[damage])


# ---------------------------------------------------------------------- checks of a kind


def test_a_basis_that_is_not_orthonormal(folder):
    _basis(lambda basis: 1.1 * basis)(folder)
    with pytest.raises(FeaturizerError, match="not orthonormal"):
        featurizers.load(folder)


def test_a_deviation_that_is_not_positive(tmp_path):
    stages = featurizers.create("standardize", d_in=8) >> subspace()
    folder = stages.save_pretrained(tmp_path / "a")
    _tensors(lambda tensors: tensors["stages.0.std"].zero_())(folder)
    with pytest.raises(FeaturizerError, match="standard deviation is not positive"):
        featurizers.load(folder)


# ---------------------------------------------------------------------- records


def test_a_large_sum_is_not_taken_for_infinity(tmp_path):
    f = featurizers.create("standardize", d_in=8)
    f.mean += 3e38
    assert featurizers.load(f.save_pretrained(tmp_path / "a")).mean.equal(f.mean)


def test_a_record_is_read_as_it_was_written():
    manifest = Manifest(kind="subspace", id="a", config={"d_in": 8}, sha256="0" * 64, metadata={"é": [1.5, None]})
    assert parse(dump(manifest), "here") == manifest
    index = Index.model_validate({"artefacts": {"a/b": {"kind": "subspace", "id": "c", "site": "embed"}}})
    assert parse(dump(index), "here") == index


def test_a_subfolder_has_at_most_512_characters():
    name = "a/" * 255 + "bc"
    index = {"artefacts": {name: {"kind": "subspace", "id": "c"}}}
    assert list(Index.model_validate(index).artefacts) == [name]
    with pytest.raises(ValidationError, match="at most 512 characters"):
        Index.model_validate({"artefacts": {f"{name}d": {"kind": "subspace", "id": "c"}}})


def test_a_config_is_readable_by_people():
    lines = dump(Manifest(kind="subspace", id="性", config={"d_in": 8}, sha256="0" * 64)).decode().splitlines()
    assert lines[:5] == [
        "{",
        '  "library_name": "featurizers",',
        '  "format_version": 1,',
        '  "kind": "subspace",',
        '  "id": "性",',
    ]
