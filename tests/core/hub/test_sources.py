"""Parsing of sources: nothing is guessed, and every error is a `SourceError`."""

import contextlib
from pathlib import Path

import featurizers
import pytest
from featurizers.errors import PluginError, SourceError, UnknownKindError
from featurizers.hub.sources import CatalogueSource, FolderSource, HubSource, parse_source
from hypothesis import example, given
from hypothesis import strategies as st

HUB = {
    "owner/name": HubSource("owner/name"),
    "owner/name@v1": HubSource("owner/name", "v1"),
    "owner/name@refs/pr/1": HubSource("owner/name", "refs/pr/1"),
    "owner/name@a@b": HubSource("owner/name", "a@b"),
    "Org-1/My_name.v2": HubSource("Org-1/My_name.v2"),
    "hub:owner/name": HubSource("owner/name"),
    "hub:owner/name@v1": HubSource("owner/name", "v1"),
}
FOLDERS = {
    "./folder": "folder",
    "../folder": "../folder",
    "/root/folder": "/root/folder",
    "~/folder": "~/folder",
    ".": ".",
    "..": "..",
    "~": "~",
    "local:folder": "folder",
    "local:owner/name@v1": "owner/name@v1",
    "C:\\folder": "C:\\folder",
    "c:/folder": "c:/folder",
}
CATALOGUE = {
    "sae-lens:release/id": CatalogueSource("sae-lens", "release/id"),
    "plugin:a:b": CatalogueSource("plugin", "a:b"),
    "plugin:/a": CatalogueSource("plugin", "/a"),
}
NOTHING = [
    "",
    " ",
    "name",
    "owner/",
    "owner/name@",
    "owner/name/subfolder",
    "owner//name",
    "-owner/name",
    "owner/.name",
    "owner/name\n",
    "owner name/x",
    "hub:",
    "hub:name",
    "hub:./folder",
    "hub:owner/name@",
    "plugin:",
    "Plugin:reference",
    "https://huggingface.co/owner/name",
    "@v1",
]
TYPES = [None, 3, b"owner/name", ["owner/name"], {"owner": "name"}]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("source", "parsed"), {**HUB, **CATALOGUE}.items())
def test_repositories_and_catalogues(source, parsed):
    assert parse_source(source) == parsed


@pytest.mark.parametrize(("source", "path"), FOLDERS.items())
def test_folders(source, path):
    assert parse_source(source) == FolderSource(Path(path))


def test_a_path_is_always_a_folder():
    assert parse_source(Path("owner/name")) == FolderSource(Path("owner/name"))


@pytest.mark.parametrize("source", NOTHING)
def test_what_names_nothing(source):
    with pytest.raises(SourceError, match=r"(?s)cannot tell .* 'owner/name' .* './folder' .* 'plugin:reference'"):
        parse_source(source)


@pytest.mark.parametrize("source", TYPES)
def test_a_source_of_another_type(source):
    with pytest.raises(SourceError, match="a string or a path, not"):
        parse_source(source)


@pytest.mark.parametrize(("source", "parsed"), {**HUB, **CATALOGUE}.items())
def test_the_text_of_a_source_names_the_same(source, parsed):
    assert parse_source(str(parsed)) == parsed


# ---------------------------------------------------------------------- a folder or a repository


@pytest.mark.parametrize("source", ["owner/name", "owner/name@v1"])
def test_a_folder_of_the_name_of_a_repository_is_told(source):
    Path("owner/name").mkdir(parents=True)
    with pytest.raises(SourceError, match=rf"'hub:{source}' or './{source}'"):
        parse_source(source)
    assert parse_source(f"hub:{source}") == HUB[source]
    assert parse_source("./owner/name") == FolderSource(Path("owner/name"))
    assert parse_source("local:owner/name") == FolderSource(Path("owner/name"))


def test_a_folder_of_the_name_of_the_owner_alone_is_no_matter():
    Path("owner").mkdir()
    assert parse_source("owner/name") == HubSource("owner/name")


# ---------------------------------------------------------------------- revisions


@pytest.mark.parametrize("source", ["owner/name", "owner/name@v1", "hub:owner/name"])
def test_a_revision_beside_the_source(source):
    assert parse_source(source, "v1") == HubSource("owner/name", "v1")


def test_two_revisions():
    with pytest.raises(SourceError, match="'owner/name@v1' and revision='v2' name two revisions"):
        parse_source("owner/name@v1", "v2")


@pytest.mark.parametrize("source", ["./folder", Path("folder"), "plugin:reference", "/"])
def test_only_a_repository_has_a_revision(source):
    with pytest.raises(SourceError, match="no revision 'v1'"):
        parse_source(source, "v1")


# ---------------------------------------------------------------------- anything

texts = st.one_of(
    st.text(max_size=40),
    st.text("ab/@:.~-_\\ C\n\0é", max_size=12),
    st.tuples(st.sampled_from(["", "hub:", "local:", "a/b", "~", "./"]), st.text(max_size=20)).map("".join),
)


@given(texts, st.none() | st.text(max_size=5))
@example("a/b\0", None)
@example("~nobody/x", None)
@example("local:", "v1")
def test_any_text_is_a_source_or_a_source_error(source, revision):
    with contextlib.suppress(SourceError):
        assert isinstance(parse_source(source, revision), FolderSource | HubSource | CatalogueSource)


@pytest.mark.parametrize("source", ["a" * 300 + "/b", "a/" + "b" * 5000])
def test_a_very_long_name(source):
    assert parse_source(source) == HubSource(source)


# ---------------------------------------------------------------------- loading what is no artefact


@pytest.mark.parametrize("function", [featurizers.load, featurizers.list_artefacts])
def test_catalogues(function):
    words = "'identity' has no catalogue, so 'identity:x'" if function is featurizers.load else "is an entry of"
    with pytest.raises(PluginError, match=words):
        function("identity:x")
    with pytest.raises(UnknownKindError, match="'not-installed'"):
        function("not-installed:x")


@pytest.mark.parametrize(
    "source",
    [
        "local:~nobody-of-that-name/x",
        "./" + "a" * 300,
        "./a\0b",
        "./missing",
    ],
)
def test_a_folder_that_cannot_be(source):
    with pytest.raises(featurizers.errors.ManifestError, match=r"there is no config\.json"):
        featurizers.load(source)


def test_the_name_of_a_folder_that_is_here_is_answered_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    f = featurizers.create("subspace", d_in=4, n_features=2)
    f.save_pretrained("my-featurizer")
    with pytest.raises(SourceError, match=r"did you mean '\./my-featurizer', which is here\?"):
        featurizers.load("my-featurizer")
    assert featurizers.load("./my-featurizer").n_features == 2
    for other in ("not-here", "hub:my-featurizer", ""):
        with pytest.raises(SourceError, match="cannot tell what the source"):
            featurizers.load(other)
