"""Artefacts on disk: they load to the same bits, are written as a whole or not at all, and keep other files."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import featurizers
import pytest
import torch
import yaml
from featurizers import Site
from featurizers.errors import ArtefactError, ManifestError, UnknownKindError, UsageError, WeightsError
from featurizers.files import replacement
from featurizers.format import card, weights
from featurizers.registry.plugin_host import host
from featurizers.store import artefact
from featurizers_subspace import StandardizeFeaturizer, SubspaceFeaturizer

from tests.support.hub import edit, subspace

FILES = {"config.json", "model.safetensors", "README.md"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations() -> torch.Tensor:
    return 3 * normal(20, 8) + 2


FEATURIZERS = {
    "identity": lambda: featurizers.create("identity"),
    "identity of a width": lambda: featurizers.create("identity", d_in=8),
    "subspace": subspace,
    "rotation": lambda: subspace(d_in=8, n_features=8),
    "standardize": lambda: StandardizeFeaturizer.fit(activations()),
    "components": lambda: SubspaceFeaturizer.fit_pca(activations(), 4, whiten=True),
    "three stages": lambda: subspace(n_features=8) >> SubspaceFeaturizer.fit_pca(activations(), 5),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(a: featurizers.Featurizer, b: featurizers.Featurizer) -> None:
    """Check that two featurizers have the same configuration, tensors and outputs, bit for bit."""
    assert type(a) is type(b)
    assert a.config == b.config
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert tensor.dtype == b.state_dict()[name].dtype
        assert tensor.equal(b.state_dict()[name])
    dtype = next(iter(a.state_dict().values()), torch.zeros(0)).dtype
    x, source = normal(4, 8, seed=1).to(dtype), normal(4, 8, seed=2).to(dtype)
    assert a.collect(x).equal(b.collect(x))
    assert a.interchange(x, source, [0, 1]).equal(b.interchange(x, source, [0, 1]))


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", FEATURIZERS.values(), ids=FEATURIZERS)
def test_round_trip(tmp_path, make, dtype):
    f = make().to(dtype)
    folder = f.save_pretrained(tmp_path / "a")
    assert folder == tmp_path / "a"
    loaded = featurizers.load(folder, kind=f.kind, verify=True)
    same(f, loaded)
    assert not loaded.training
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in f.parameters()]
    same(f, type(f).from_pretrained(folder))


def test_the_folder_holds_three_files(tmp_path):
    subspace().save_pretrained(tmp_path / "a" / "b")
    assert contents(tmp_path).keys() == {f"a/b/{name}" for name in FILES}


SITES = [
    None,
    Site("embed"),
    Site("attn.z", 3, head=1),
    Site("resid.post", 0).at(position=(-1, 4), model="org/model", model_revision="a" * 40),
    Site("module", module="model.layers.8.mlp", side="output").at(position=()),
]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_site_and_where_it_was_found(tmp_path, site):
    f = subspace()
    f.site = site
    loaded = featurizers.load(f.save_pretrained(tmp_path / "a"))
    assert loaded.site is None if site is None else vars(loaded.site) == vars(site)


def test_the_id_and_the_ids_of_stages(tmp_path):
    f, g = subspace(), featurizers.create("identity")
    f.id, g.id = "gender 性", 'a "b" | <c> ---'
    both = f >> g
    loaded = featurizers.load(both.save_pretrained(tmp_path / "a"))
    assert loaded.id == both.id
    assert [stage.id for stage in loaded.stages] == [f.id, g.id]


def test_feature_sets(tmp_path):
    f = subspace()
    f.feature_sets = {
        "indices": torch.tensor([2, 0]),
        "mask": torch.tensor([True, False, True]),
        "gate": torch.tensor([0.5, 0.0, 1.0], dtype=torch.bfloat16),
        "none": torch.zeros(0, dtype=torch.int64),
        "a_set-9": torch.tensor(1),
    }
    loaded = featurizers.load(f.save_pretrained(tmp_path / "a"))
    assert loaded.feature_sets.keys() == f.feature_sets.keys()
    for name, tensor in f.feature_sets.items():
        assert loaded.feature_sets[name].dtype == tensor.dtype
        assert loaded.feature_sets[name].equal(tensor)


def test_metadata(tmp_path):
    f = subspace()
    f.metadata = {"accuracy": 0.93, "seeds": [0, 1], "notes": {"é\u2028": None, "deep": [[{}]]}, "big": 2**80}
    assert featurizers.load(f.save_pretrained(tmp_path / "a")).metadata == f.metadata


def test_views_and_shared_storage(tmp_path):
    f = subspace()
    shared = torch.arange(6)
    f.feature_sets = {"a": shared[::2], "b": shared[1::2], "c": shared}
    loaded = featurizers.load(f.save_pretrained(tmp_path / "a"))
    assert loaded.feature_sets["b"].tolist() == [1, 3, 5]


def test_a_subspace_that_was_trained_is_saved_orthonormal(tmp_path):
    f = subspace()
    with torch.no_grad():
        f.basis += 0.1 * normal(8, 3)
    same(f, featurizers.load(f.save_pretrained(tmp_path / "a")))


def test_a_large_subspace_is_a_small_file(tmp_path):
    subspace(d_in=4096, n_features=16).save_pretrained(tmp_path)
    assert sum(map(len, contents(tmp_path).values())) < 300 * 1024


@pytest.mark.parametrize("dtype", DTYPES)
def test_load_in_another_dtype(tmp_path, dtype):
    f = SubspaceFeaturizer.fit_pca(activations(), 4)
    f.feature_sets = {"indices": torch.tensor([0])}
    loaded = featurizers.load(f.save_pretrained(tmp_path / "a"), dtype=dtype, device="cpu")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    assert loaded.feature_sets["indices"].dtype == torch.int64
    same(f.to(dtype), loaded)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_load_to_a_device(tmp_path):
    f = subspace()
    f.feature_sets = {"indices": torch.tensor([0])}
    loaded = featurizers.load(f.save_pretrained(tmp_path / "a"), device="cuda")
    assert loaded.basis.is_cuda
    assert loaded.feature_sets["indices"].is_cuda
    same(f, loaded.cpu())


@pytest.mark.parametrize("dtype", [torch.int8, "float16"])
def test_a_dtype_that_is_none(tmp_path, dtype):
    with pytest.raises(UsageError, match="dtype"):
        featurizers.load(subspace().save_pretrained(tmp_path / "a"), dtype=dtype)


def test_another_kind_is_refused(tmp_path):
    folder = subspace().save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match=f"{folder} holds a featurizer of kind 'subspace', not 'identity'"):
        featurizers.load(folder, kind="identity")
    with pytest.raises(UsageError, match="not a StandardizeFeaturizer"):
        StandardizeFeaturizer.from_pretrained(folder)


def test_verify_finds_one_bit(tmp_path):
    folder = subspace().save_pretrained(tmp_path / "a")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-4] ^= 1  # the lowest bit of the last number
    (folder / "model.safetensors").write_bytes(data)
    featurizers.load(folder)  # without verify it is not noticed
    with pytest.raises(WeightsError, match=f"{folder}: model.safetensors has sha256"):
        featurizers.load(folder, verify=True)


# ---------------------------------------------------------------------- kinds that are not installed


@pytest.fixture
def _no_plugins(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    host.cache_clear()
    yield
    host.cache_clear()


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("subspace", "pip install featurizers-subspace"),
        ("standardize", "pip install featurizers-subspace"),
        ("identity", "pip install featurizers-identity"),
        ("sae", "Install the package of its author"),
        ("featurizers-subspace", "Install the package of its author"),
    ],
)
@pytest.mark.usefixtures("_no_plugins")
def test_a_kind_that_is_not_installed(tmp_path, kind, hint):
    config = f'{{"library_name": "featurizers", "kind": "{kind}", "id": "a", "config": {{}}, "sha256": "{"0" * 64}"}}'
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UnknownKindError, match=f"{kind!r}.*{hint}") as caught:
        featurizers.load(tmp_path)
    assert ("pip install" in str(caught.value)) is ("pip install" in hint)
    assert caught.value.kind == kind


# ---------------------------------------------------------------------- saving over an artefact


def test_other_files_and_prose_are_kept(tmp_path):
    folder = subspace(seed=1).save_pretrained(tmp_path / "a")
    (folder / "notes.txt").write_text("mine")
    (folder / "runs" / "1").mkdir(parents=True)
    (folder / "runs" / "1" / "log").write_text("mine")
    (folder / "link").symlink_to("notes.txt")
    readme = folder / "README.md"
    front, _, body = readme.read_text().partition("\n---\n")
    readme.write_text(f"{front}\ndoi: 10.1/2\n---\nBefore.\n{body}\nAfter.\n")
    f = subspace(seed=2)
    f.id = "renamed"
    f.save_pretrained(folder)
    same(f, featurizers.load(folder, verify=True))
    assert contents(folder).keys() == {*FILES, "notes.txt", "link", "runs/1/log"}
    assert (folder / "link").is_symlink()
    text = readme.read_text()
    assert text.index("doi: 10.1/2") < text.index("Before.") < text.index("# renamed") < text.index("After.")
    assert text.count("featurizers.load(") == 1


def test_a_readme_that_was_there_first_is_kept(tmp_path):
    (tmp_path / "a").mkdir()
    subspace().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    subspace().save_pretrained(tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\nlibrary_name: featurizers\n")
    assert "\n---\n# Mine\n" in text
    assert text.count("featurizers.load(") == 1


def test_a_readme_in_another_encoding(tmp_path):
    folder = subspace().save_pretrained(tmp_path / "a")
    (folder / "README.md").write_bytes("Prosa für alle".encode("latin-1"))
    with pytest.raises(ArtefactError, match=r"README\.md"):
        subspace().save_pretrained(folder)


@pytest.mark.parametrize(
    "fill",
    [
        lambda folder: (folder / "thesis.tex").write_text("mine"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
        lambda folder: (folder / "config.json").write_text(""),
    ],
    ids=["files", "another library's", "empty config"],
)
def test_a_folder_that_is_no_artefact_is_refused(tmp_path, fill):
    folder = tmp_path / "a"
    folder.mkdir()
    fill(folder)
    before = contents(tmp_path)
    with pytest.raises(ArtefactError, match=f"{folder}: "):
        subspace().save_pretrained(folder)
    with pytest.raises(ArtefactError, match=f"{folder}: "):
        featurizers.save_collection({"x": subspace()}, folder)
    assert contents(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ArtefactError, match="it is a file"):
        subspace().save_pretrained(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "a").mkdir()
    same(subspace(), featurizers.load(subspace().save_pretrained(tmp_path / "a")))


STEPS = {"weights": (weights, "write_tensors"), "config": (artefact, "dump"), "card": (card, "write")}


@pytest.mark.parametrize("step", [*STEPS, "putting it in place", "the second of two renames", "not JSON"])
@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "anew"])
def test_a_save_that_fails_leaves_all_as_it_was(tmp_path, monkeypatch, step, old):
    folder = tmp_path / "a"
    if old:
        subspace(seed=1).save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    f = subspace(seed=2)
    if step == "not JSON":
        f.metadata = {"x": object()}
    elif step in STEPS:
        monkeypatch.setattr(*STEPS[step], _broken)
    elif step == "putting it in place":
        monkeypatch.setattr(replacement, "_swap", _broken)
    else:
        monkeypatch.setattr(replacement, "_swap", lambda *_: False)
        monkeypatch.setattr(Path, "rename", _broken_once(Path.rename, folder))
    with pytest.raises(ArtefactError, match="JSON" if step == "not JSON" else f"{folder}: .*no space left"):
        f.save_pretrained(folder)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"] * old


def _broken(*_: object, **__: object) -> None:
    raise OSError("no space left on device")


def _broken_once(rename, folder: Path):
    """Return a `Path.rename` that fails the first time that it is called with this target."""
    pending = [folder]

    def renamed(self: Path, to: Path) -> Path:
        if to in pending:
            pending.remove(to)
            _broken()
        return rename(self, to)

    return renamed


def test_saving_where_it_was_loaded_from(tmp_path):
    f = subspace()
    loaded = featurizers.load(f.save_pretrained(tmp_path / "a"))
    loaded.id = "renamed"
    loaded.save_pretrained(tmp_path / "a")
    same(f, loaded)
    same(f, featurizers.load(tmp_path / "a", verify=True))


def test_relative_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert subspace().save_pretrained("a/b") == Path("a/b")
    subspace().save_pretrained("a/b")
    same(subspace(), featurizers.load("./a/b"))


@pytest.mark.parametrize("form", [".", "../link"])
def test_other_names_of_a_folder(tmp_path, monkeypatch, form):
    folder = subspace(seed=1).save_pretrained(tmp_path / "a")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    subspace(seed=2).save_pretrained(form)
    same(subspace(seed=2), featurizers.load(folder))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "link"}


UMASK = """
import os, sys, featurizers
os.umask(int(sys.argv[1], 8))
featurizers.create("subspace", d_in=8, n_features=2).save_pretrained(sys.argv[2])
"""


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize(
    ("umask", "file", "folder"), [("002", 0o664, 0o775), ("077", 0o600, 0o700)], ids=["002", "077"]
)
def test_modes_follow_the_umask(tmp_path, umask, file, folder):
    subprocess.run([sys.executable, "-c", UMASK, umask, tmp_path / "a"], check=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == folder
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()} == {file}


# ---------------------------------------------------------------------- what cannot be saved


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("metadata", {"x": object()}),
        ("metadata", {"x": float("nan")}),
        ("metadata", {1: 2}),
        ("metadata", {"x": torch.ones(1)}),
        ("id", ""),
        ("id", None),
        ("id", "x" * 257),
        ("id", "two\nlines"),
        ("id", "\x1b[2J\u202e"),
        ("feature_sets", {"a b": torch.zeros(1)}),
        ("feature_sets", {"": torch.zeros(1)}),
        ("feature_sets", {"../a": torch.zeros(1)}),
        pytest.param("metadata", {"x": "\ud800"}, id="text that is not Unicode"),
        pytest.param("metadata", {"x": "y" * 1_000_000}, id="a config too large to be read"),
        pytest.param("feature_sets", {"a": torch.zeros(1, dtype=torch.complex64)}, id="a dtype that is not read"),
        pytest.param("feature_sets", {"a": torch.tensor([float("nan")])}, id="NaN"),
    ],
)
def test_what_no_artefact_can_hold(tmp_path, attribute, value):
    f = subspace()
    setattr(f, attribute, value)
    with pytest.raises(ArtefactError):
        f.save_pretrained(tmp_path / "a")
    assert contents(tmp_path) == {}


# ---------------------------------------------------------------------- collections


def test_a_collection(tmp_path):
    parts = {"resid.post/layer-3": subspace(seed=1), "b": FEATURIZERS["components"]()}
    parts["b"].id, parts["b"].site = "second", Site("mlp.out", 4)
    folder = featurizers.save_collection(parts, tmp_path / "all")
    assert contents(folder).keys() == {
        "config.json",
        "README.md",
        *(f"{name}/{file}" for name in parts for file in FILES),
    }
    entries = featurizers.list_artefacts(folder)
    assert {name: (entry.kind, entry.id, entry.site) for name, entry in entries.items()} == {
        "resid.post/layer-3": ("subspace", "subspace", None),
        "b": ("composition", "second", "mlp.out:4"),
    }
    for name, f in parts.items():
        same(f, featurizers.load(folder, subfolder=name, verify=True))
        same(f, featurizers.load(folder / name))
    assert "`resid.post/layer-3`" in (folder / "README.md").read_text()
    with pytest.raises(ManifestError, match=f"{folder}: it holds 2 artefacts; .*'resid.post/layer-3', 'b'"):
        featurizers.load(folder)
    with pytest.raises(ManifestError, match=f"{folder / 'c'}: there is no config.json"):
        featurizers.load(folder, subfolder="c")


def test_a_collection_of_many_names_ten(tmp_path):
    folder = featurizers.save_collection({f"a{i}": featurizers.create("identity") for i in range(11)}, tmp_path / "all")
    with pytest.raises(ManifestError, match=r"it holds 11 artefacts; .*'a0', .*'a9', …$"):
        featurizers.load(folder)


def test_a_collection_takes_the_place_of_another(tmp_path):
    folder = featurizers.save_collection({"a": subspace(seed=1), "b": subspace(seed=2)}, tmp_path / "all")
    (folder / "notes.txt").write_text("mine")
    featurizers.save_collection({"b": subspace(seed=3)}, folder)
    assert contents(folder).keys() == {"config.json", "README.md", "notes.txt", *(f"b/{file}" for file in FILES)}
    same(subspace(seed=3), featurizers.load(folder, subfolder="b"))
    subspace().save_pretrained(folder)
    assert contents(folder).keys() == {*FILES, "notes.txt"}


def test_a_collection_that_fails_leaves_the_old_one(tmp_path):
    folder = featurizers.save_collection({"a": subspace(seed=1)}, tmp_path / "all")
    before = contents(tmp_path)
    broken = subspace()
    broken.metadata = {"x": object()}
    with pytest.raises(ManifestError):
        featurizers.save_collection({"a": subspace(seed=2), "b": broken}, folder)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "/a",
        "a/",
        "a//b",
        "a/../b",
        ".git",
        "a/.b",
        "a\\b",
        "a b",
        "a\n",
        "config.json",
        "README.md",
        "README.md/a",
    ],
)
def test_names_that_no_subfolder_may_have(tmp_path, name):
    with pytest.raises(ManifestError):
        featurizers.save_collection({"a": subspace(), name: subspace()}, tmp_path / "all")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_collection(tmp_path):
    with pytest.raises(UsageError, match="at least one"):
        featurizers.save_collection({}, tmp_path / "all")


def test_listing_one_artefact(tmp_path):
    f = subspace()
    f.site = Site("attn.z", 3, head=1)
    entries = featurizers.list_artefacts(f.save_pretrained(tmp_path / "a"))
    assert {name: entry.model_dump() for name, entry in entries.items()} == {
        "": {"kind": "subspace", "id": "subspace", "site": "attn.z:3:1"}
    }


HOSTILE = "a | b `c` <script>alert(1)</script> [x](javascript:y) <!-- featurizers: end -->"


def test_a_card_shows_what_an_artefact_says_as_it_is(tmp_path):
    f = subspace()
    f.id, f.site = HOSTILE, Site("resid.post", 3).at(model=HOSTILE)
    folder = f.save_pretrained(tmp_path / "a")
    featurizers.save_collection({"x": f}, tmp_path / "many")
    for path in (folder / "README.md", tmp_path / "many" / "README.md", tmp_path / "many" / "x" / "README.md"):
        text = path.read_text(encoding="utf-8").partition("\n---\n")[2]  # the front matter is YAML
        outside = re.sub(r"`[^`\n]*`", "`code`", text)
        assert not re.search(r"(?<!\\)<(?!!-- featurizers: (start|end) -->)|(?<!\\)\]\(", outside)
        assert text.count("<!-- featurizers: end -->") == 1
        rows = [line for line in outside.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
        assert yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])["library_name"] == "featurizers"
    again = featurizers.load(folder)
    again.save_pretrained(folder)
    assert (folder / "README.md").read_text(encoding="utf-8").count("featurizers: start") == 1


def test_an_artefact_may_be_moved_and_its_card_changed(tmp_path):
    subspace().save_pretrained(tmp_path / "a").rename(tmp_path / "b")
    edit(tmp_path / "b" / "README.md", "# subspace", "# anything")
    same(subspace(), featurizers.load(tmp_path / "b", verify=True))
    (tmp_path / "b" / "README.md").unlink()
    same(subspace(), featurizers.load(tmp_path / "b", verify=True))


def test_replacing_a_collection_keeps_other_files_in_its_parts(tmp_path):
    folder = featurizers.save_collection({"a": subspace(), "b": subspace()}, tmp_path / "all")
    (folder / "a" / "plot.png").write_bytes(b"mine")
    featurizers.save_collection({"a": subspace(seed=2)}, folder)
    assert (folder / "a" / "plot.png").read_bytes() == b"mine"
    assert list(featurizers.list_artefacts(folder)) == ["a"]
    assert not (folder / "b" / "model.safetensors").exists()


@pytest.mark.parametrize("d_in", [31, 33, 64])
def test_products_round_as_before(tmp_path, d_in):
    """Rounding depends on the address and on the memory layout of a matrix."""
    x, source = normal(7, d_in, seed=1), normal(7, d_in, seed=2)
    drawn = subspace(d_in=d_in, n_features=9)
    by_rows = drawn.basis.detach().mT.contiguous()
    made = {"drawn": drawn, "given by rows": SubspaceFeaturizer.from_basis(by_rows.mT)}
    for name, f in made.items():
        loaded = featurizers.load(f.save_pretrained(tmp_path / name))
        assert [t.data_ptr() % 64 for t in loaded.state_dict().values()] == [0] * len(loaded.state_dict())
        for indices in (None, [0], [2, 5, 7]):
            assert torch.equal(f.interchange(x, source, indices), loaded.interchange(x, source, indices))


def test_a_config_names_the_distributions_that_wrote_it(tmp_path):
    folder = subspace().save_pretrained(tmp_path / "a")
    versions = {name: metadata.version(name) for name in ("featurizers", "featurizers-subspace")}
    assert json.loads((folder / "config.json").read_text())["saved_with"] == versions
