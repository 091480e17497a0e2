"""Loading from the Hub: all files are of one commit, each is requested once, and only the Hub gets the token."""

import featurizers
import pytest
from featurizers.errors import UnknownKindError, UsageError, WeightsError
from featurizers.hub.repository import Remote

from tests.support.hub import ALICE, subspace


def new_requests(hub):
    """Return the requests since the last call."""
    seen = hub.requests()
    hub.log.clear()
    return seen


@pytest.mark.parametrize("form", ["alice/x", "hub:alice/x", "alice/x@main", "alice/x@{}", "commit"])
def test_forms_of_a_source(hub, form):
    f = subspace(seed=1)
    commit = f.push_to_hub("alice/x").oid
    options = {"revision": commit} if form == "commit" else {}
    loaded = featurizers.load("alice/x" if options else form.format(commit), **options)
    assert loaded.revision == commit
    assert loaded.basis.equal(f.basis)
    assert not loaded.training


def test_revisions_are_kept_apart(hub):
    commits = [subspace(seed=seed).push_to_hub("alice/x").oid for seed in range(3)]
    for seed, commit in enumerate(commits):
        assert featurizers.load(f"alice/x@{commit}").basis.equal(subspace(seed=seed).basis)
    assert featurizers.load("alice/x").revision == commits[-1]


def test_a_push_between_config_and_weights_is_not_mixed_in(hub, monkeypatch):
    first, second = subspace(seed=1), subspace(seed=2)
    commit = first.push_to_hub("alice/x").oid
    fetch = Remote.weights

    def weights(self, *arguments):
        second.push_to_hub("alice/x")
        return fetch(self, *arguments)

    monkeypatch.setattr(Remote, "weights", weights)
    loaded = featurizers.load("alice/x", verify=True)
    assert loaded.revision == commit != hub.head("alice/x")
    assert loaded.basis.equal(first.basis)


def test_how_often_the_hub_is_asked(hub):
    commit = subspace().push_to_hub("alice/x").oid
    new_requests(hub)
    featurizers.load("alice/x")
    cold = new_requests(hub)
    assert "HEAD /alice/x/resolve/main/config.json" in cold
    assert len(cold) <= 6
    assert [path for path in cold if path.endswith("model.safetensors") and "/resolve/main/" in path] == []
    featurizers.load("alice/x")
    assert new_requests(hub) == ["HEAD /alice/x/resolve/main/config.json"]
    featurizers.load("alice/x", revision=commit)
    featurizers.load("alice/x", local_files_only=True)
    assert new_requests(hub) == []


def test_listing_reads_the_root_alone(hub):
    for name in ("a", "b"):
        subspace().push_to_hub("alice/x", subfolder=name)
    new_requests(hub)
    assert list(featurizers.list_artefacts("alice/x", revision="main")) == ["a", "b"]
    assert {path.partition("/resolve/")[2] for path in new_requests(hub)} <= {"main/config.json"}


def test_listing_one_artefact(hub):
    subspace().push_to_hub("alice/x")
    assert {name: entry.kind for name, entry in featurizers.list_artefacts("alice/x").items()} == {"": "subspace"}


def test_weights_of_a_kind_that_cannot_be_read_are_not_fetched(hub):
    subspace().push_to_hub("alice/x")
    config = hub.files("alice/x")["config.json"].replace(b'"kind": "subspace"', b'"kind": "not-installed"')
    hub.put("alice/x", config_json=config)
    new_requests(hub)
    with pytest.raises(UnknownKindError):
        featurizers.load("alice/x")
    with pytest.raises(UsageError, match="alice/x holds a featurizer of kind 'not-installed', not 'subspace'"):
        featurizers.load("alice/x", kind="subspace")
    assert not any("safetensors" in path for path in new_requests(hub))


def test_a_flipped_bit_is_refused_if_asked_and_mended_by_fetching_again(hub):
    f = subspace()
    f.push_to_hub("alice/x")
    hub.fail("GET /cdn/.*model.safetensors", "flip", times=1, offset=-4)
    with pytest.raises(WeightsError, match=r"alice/x: model.safetensors has sha256 .* fetch it again"):
        featurizers.load("alice/x", verify=True)
    assert not featurizers.load("alice/x").basis.equal(f.basis)
    assert featurizers.load("alice/x", verify=True, force_download=True).basis.equal(f.basis)


def test_cache_dir(hub, tmp_path):
    subspace().push_to_hub("alice/x")
    featurizers.load("alice/x", cache_dir=tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").glob("models--alice--x/snapshots/*/model.safetensors"))
    new_requests(hub)
    featurizers.load("alice/x", cache_dir=tmp_path / "elsewhere", local_files_only=True)
    assert new_requests(hub) == []


@pytest.mark.parametrize("token", [None, ALICE, True], ids=["stored", "given", "true"])
def test_the_token_reaches_the_hub_and_not_the_storage(hub, token):
    subspace().push_to_hub("alice/x", private=True, token=token)
    featurizers.load("alice/x", token=token, force_download=True)
    storage = [record for record in hub.log if record["cdn"]]
    assert {record["method"] for record in storage} == {"GET", "PUT"}
    assert not any(record["auth"] for record in storage)
    assert all(record["auth"] for record in hub.log if "/resolve/" in record["path"])


def test_no_token(hub):
    subspace().push_to_hub("alice/x")
    new_requests(hub)
    featurizers.load("alice/x", token=False)
    assert not any(record["auth"] for record in hub.log)


def test_a_repository_that_was_renamed(hub):
    from huggingface_hub import HfApi

    f = subspace()
    f.push_to_hub("alice/x")
    HfApi().move_repo("alice/x", "alice/y")
    assert featurizers.load("alice/x").basis.equal(f.basis)
