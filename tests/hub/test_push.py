"""Pushing: one commit each, to the right repository and folder, and all other files are kept."""

import json

import featurizers
import pytest
import torch
from featurizers import Site
from featurizers.errors import ManifestError

from tests.support.hub import BOB, subspace

ARTEFACT = {"config.json", "model.safetensors", "README.md"}


def in_folder(name):
    return {f"{name}/{file}" for file in ARTEFACT}


def test_the_first_push_creates_the_repository_and_returns_the_commit(hub):
    commit = subspace().push_to_hub("alice/x")
    assert commit.oid == hub.head("alice/x")
    assert set(hub.files("alice/x")) == ARTEFACT
    assert hub.titles("alice/x") == ["Upload featurizer with featurizers"]
    assert hub.repo("alice/x")["private"] is False


def test_a_push_says_who_asks(hub):
    subspace().push_to_hub("alice/x")
    featurizers.load("alice/x")
    agents = [record["ua"] for record in hub.log if "/resolve/" in record["path"] or "/api/models/" in record["path"]]
    assert all(f"featurizers/{featurizers.__version__}" in agent for agent in agents)


@pytest.mark.parametrize("private", [None, False, True])
def test_private(hub, private):
    subspace().push_to_hub("alice/x", private=private)
    assert hub.repo("alice/x")["private"] is bool(private)


def test_commit_message(hub):
    subspace().push_to_hub("alice/x", commit_message="Gender of names")
    subspace(seed=1).push_to_hub("alice/x", subfolder=None, commit_message="Again")
    assert hub.titles("alice/x") == ["Gender of names", "Again"]


def test_a_branch_is_created_and_main_stays(hub):
    first, second = subspace(seed=1), subspace(seed=2)
    main = first.push_to_hub("alice/x").oid
    commit = second.push_to_hub("alice/x", branch="next").oid
    assert hub.head("alice/x") == main
    assert hub.head("alice/x", "refs/heads/next") == commit
    assert featurizers.load("alice/x").basis.equal(first.basis)
    assert featurizers.load("alice/x@next").basis.equal(second.basis)


def test_a_branch_of_a_repository_that_is_not_there(hub):
    subspace().push_to_hub("alice/x", branch="next")
    assert set(hub.files("alice/x", "refs/heads/next")) == ARTEFACT
    assert hub.files("alice/x") == {}


@pytest.mark.parametrize("token", [None, BOB], ids=["own", "someone else's"])
def test_a_pull_request_leaves_main(hub, token):
    main = subspace(seed=1).push_to_hub("alice/x").oid
    commit = subspace(seed=2).push_to_hub("alice/x", create_pr=True, token=token)
    assert commit.pr_num == 1
    assert hub.head("alice/x") == main
    assert featurizers.load("alice/x", revision="refs/pr/1").basis.equal(subspace(seed=2).basis)


def test_a_pull_request_from_a_branch_is_refused(hub):
    with pytest.raises(featurizers.errors.UsageError, match="branch"):
        subspace().push_to_hub("alice/x", branch="next", create_pr=True)


def test_pushing_the_same_again_is_no_commit(hub):
    first = subspace().push_to_hub("alice/x").oid
    assert subspace().push_to_hub("alice/x").oid == first
    assert len(hub.titles("alice/x")) == 1


def test_a_push_replaces_the_artefact_and_keeps_other_files(hub):
    subspace(seed=1).push_to_hub("alice/x")
    hub.put("alice/x", notes_txt=b"keep me")
    subspace(seed=2).push_to_hub("alice/x")
    assert hub.files("alice/x")["notes.txt"] == b"keep me"
    assert featurizers.load("alice/x", verify=True).basis.equal(subspace(seed=2).basis)
    assert len(hub.titles("alice/x")) == 3


def test_the_prose_of_the_card_is_kept(hub):
    subspace(seed=1).push_to_hub("alice/x")
    card = hub.files("alice/x")["README.md"].decode()
    front, _, body = card.partition("\n---\n")
    hub.put("alice/x", README_md=f"{front}\ndoi: 10.1/2\n---\nBefore.\n{body}\nAfter.\n".encode())
    f = subspace(seed=2)
    f.id = "renamed"
    f.push_to_hub("alice/x")
    card = hub.files("alice/x")["README.md"].decode()
    assert card.index("doi: 10.1/2") < card.index("Before.") < card.index("# renamed") < card.index("After.")
    assert card.count("featurizers.load(") == 1


def test_a_card_that_people_wrote_first_is_kept(hub):
    hub.put("alice/x", README_md=b"# My work\n\nProse.\n")
    subspace().push_to_hub("alice/x")
    card = hub.files("alice/x")["README.md"].decode()
    assert card.startswith("---\nlibrary_name: featurizers\n")
    assert card.index("Prose.") < card.index('featurizers.load("alice/x")')


@pytest.mark.parametrize("site", [None, Site("resid.post", 3).at(position=(-1,), model="org/model")], ids=["", "site"])
def test_the_hub_reads_the_card(hub, site):
    from huggingface_hub import HfApi

    f = subspace()
    f.site, f.metadata = site, {"license": "mit"}
    f.push_to_hub("alice/x")
    info = HfApi().model_info("alice/x")
    assert info.library_name == "featurizers"
    assert {"featurizers", "subspace", "safetensors", "license:mit"} <= set(info.tags)
    assert ("base_model:org/model" in info.tags) is (site is not None)


# ---------------------------------------------------------------------- several in one repository


def test_subfolders_and_their_index(hub):
    parts = {"resid.post/layer-3": subspace(seed=1), "b": subspace(seed=2)}
    parts["b"].id, parts["b"].site = "second", Site("mlp.out", 4)
    for name, f in parts.items():
        f.push_to_hub("alice/x", subfolder=name)
    assert set(hub.files("alice/x")) == {"config.json", "README.md"}.union(*map(in_folder, parts))
    assert hub.titles("alice/x") == [f"Upload {name} with featurizers" for name in parts]
    entries = {name: entry.model_dump() for name, entry in featurizers.list_artefacts("alice/x").items()}
    assert entries == {
        "b": {"kind": "subspace", "id": "second", "site": "mlp.out:4"},
        "resid.post/layer-3": {"kind": "subspace", "id": "subspace", "site": None},
    }
    for name, f in parts.items():
        assert featurizers.load("alice/x", subfolder=name, verify=True).basis.equal(f.basis)
    card = hub.files("alice/x")["README.md"].decode()
    assert all(f"`{name}`" in card for name in parts)
    assert 'subfolder="b"' in hub.files("alice/x")["b/README.md"].decode()


def test_a_subfolder_pushed_again_is_renewed_in_the_index(hub):
    f = subspace()
    f.push_to_hub("alice/x", subfolder="a")
    f.id = "renamed"
    f.push_to_hub("alice/x", subfolder="a")
    assert [entry.id for entry in featurizers.list_artefacts("alice/x").values()] == ["renamed"]


def test_the_prose_of_both_cards_is_kept(hub):
    subspace().push_to_hub("alice/x", subfolder="a")
    files = hub.files("alice/x")
    repo = hub.repo("alice/x")
    entries = dict(repo["commits"][hub.head("alice/x")]["files"])
    for name in ("README.md", "a/README.md"):
        text = files[name] + b"\nProse.\n"
        entries[name] = hub.entry(hub.put_bytes(text), len(text), False, text)
    hub.commit(repo, "refs/heads/main", entries, "prose", "", "alice", hub.head("alice/x"))
    subspace(seed=1).push_to_hub("alice/x", subfolder="a")
    subspace(seed=2).push_to_hub("alice/x", subfolder="b")
    files = hub.files("alice/x")
    assert files["README.md"].endswith(b"Prose.\n")
    assert b"| `b` |" in files["README.md"]
    assert files["a/README.md"].endswith(b"Prose.\n")


def test_a_collection(hub, tmp_path):
    parts = {"a": subspace(seed=1), "deep/b": featurizers.create("identity")}
    folder = featurizers.save_collection(parts, tmp_path / "parts")
    commit = featurizers.push(folder, "alice/x")
    assert commit.oid == hub.head("alice/x")
    assert len(hub.titles("alice/x")) == 1
    assert set(hub.files("alice/x")) == {"config.json", "README.md"}.union(*map(in_folder, parts))
    assert list(featurizers.list_artefacts("alice/x")) == list(parts)
    assert featurizers.load("alice/x", subfolder="a").basis.equal(parts["a"].basis)
    with pytest.raises(ManifestError, match=r"alice/x: it holds 2 artefacts; .*'a', 'deep/b'"):
        featurizers.load("alice/x")
    with pytest.raises(ManifestError, match="give a subfolder"):
        subspace().push_to_hub("alice/x")
    with pytest.raises(ManifestError, match="not to a subfolder"):
        featurizers.push(folder, "alice/y", subfolder="c")


def test_cards_name_the_repository_and_not_the_folder(hub, tmp_path):
    folder = featurizers.save_collection({"a": subspace()}, tmp_path / "parts")
    featurizers.push(folder, "alice/x")
    cards = b"".join(data for name, data in hub.files("alice/x").items() if name.endswith("README.md"))
    assert b"./parts" not in cards
    assert cards.count(b'featurizers.load("alice/x", subfolder="a")') == 2


def test_what_is_pushed_is_what_was_saved(hub):
    f = subspace()
    f.id, f.site = "gender", Site("resid.post", 3).at(position=(-1,), model="org/model", model_revision="a" * 40)
    f.feature_sets, f.metadata = {"best": torch.tensor([2, 0])}, {"accuracy": 0.5}
    f.push_to_hub("alice/x")
    loaded = featurizers.load("alice/x", verify=True)
    assert (loaded.id, loaded.metadata) == (f.id, f.metadata)
    assert vars(loaded.site) == vars(f.site)
    assert loaded.feature_sets["best"].equal(f.feature_sets["best"])
    assert json.loads(hub.files("alice/x")["config.json"])["features"] == ["best"]


def test_pushing_another_collection_keeps_what_the_first_listed(hub, tmp_path):
    for name in ("a", "b"):
        featurizers.push(featurizers.save_collection({name: subspace()}, tmp_path / name), "alice/x")
    assert list(featurizers.list_artefacts("alice/x")) == ["a", "b"]
    assert featurizers.load("alice/x", subfolder="a").kind == "subspace"


@pytest.mark.parametrize("branch", [None, "draft"])
def test_a_repository_and_a_branch_that_another_program_makes_meanwhile_are_used(hub, monkeypatch, branch):
    from huggingface_hub import HfApi

    real = {name: getattr(HfApi, name) for name in ("create_repo", "create_branch")}

    def create_repo(self, *args, **options):
        real["create_repo"](HfApi(), "alice/x")
        return real["create_repo"](self, *args, **options)

    def create_branch(self, *args, **options):
        real["create_branch"](HfApi(), "alice/x", branch="draft")
        return real["create_branch"](self, *args, **options)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_branch", create_branch)
    subspace().push_to_hub("alice/x", branch=branch)
    assert set(hub.files("alice/x", f"refs/heads/{branch or 'main'}")) == ARTEFACT
