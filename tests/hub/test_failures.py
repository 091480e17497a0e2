"""Failures of the Hub and of the connection: each is one error of this library, and the branch is unchanged."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import featurizers
import pytest
from featurizers.errors import (
    ArtefactError,
    CachedCopyWarning,
    FeaturizerError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubOfflineError,
    ManifestError,
    WeightsError,
)
from featurizers.hub import repository, transport
from featurizers.store import pushing

from tests.support.hub import ALICE_READ, BOB, LoopbackHub, require_xet, subspace


class Failure(NamedTuple):
    """Failure to cause, call to make, and error that the call must raise."""

    cause: Callable[[LoopbackHub], Any]
    call: Callable[[], Any]
    error: type[FeaturizerError]
    words: str


def _none(hub: LoopbackHub) -> None:
    """Leave the Hub unchanged."""


def _load(source: str = "alice/x", **options: Any) -> Callable[[], Any]:
    return lambda: featurizers.load(source, **options)


LOAD = _load()


def _push(repo_id: str = "alice/x", **options: Any) -> Callable[[], Any]:
    return lambda: subspace(seed=1).push_to_hub(repo_id, **options)


def _status(match: str, status: int, **headers: Any) -> Callable[[LoopbackHub], None]:
    return lambda hub: hub.fail(match, status=status, headers=headers)


def _fault(match: str, kind: str, **rule: Any) -> Callable[[LoopbackHub], None]:
    return lambda hub: hub.fail(match, kind, **rule)


def _set(**fields: Any) -> Callable[[LoopbackHub], None]:
    return lambda hub: hub.repo("alice/x").update(fields)


def _says(**headers: Any) -> Callable[[LoopbackHub], None]:
    """Let the Hub answer the request for the config with other headers."""

    def cause(hub: LoopbackHub) -> None:
        sound = {"ETag": f'"{"a" * 40}"', "X-Repo-Commit": hub.head("alice/x"), "X-Linked-Size": 400}
        hub.fail("HEAD .*config.json", "replace", b64="", headers={**sound, **headers})

    return cause


def _foreign_with(name: object) -> Callable[[LoopbackHub], None]:
    """Make a repository of another library whose list of files has a hostile name."""

    def cause(hub: LoopbackHub) -> None:
        hub.put("alice/x", config_json=b'{"model_type": "gpt2"}')
        listing = {"id": "alice/x", "sha": hub.head("alice/x"), "siblings": [{"rfilename": name}]}
        hub.fail("GET /api/models/alice/x", "replace", b64=base64.b64encode(json.dumps(listing).encode()).decode())

    return cause


LOGIN_PAGE = base64.b64encode(b"<html>please log in</html>").decode()
DOWNLOADS = {
    "no such repository": Failure(_none, _load("alice/y"), HubNotFoundError, "alice/y: no such repository"),
    "no such owner, anonymous": Failure(_none, _load("carol/y", token=False), HubNotFoundError, "no such repository"),
    "no such revision": Failure(_none, _load("alice/x@v9"), HubNotFoundError, "alice/x@v9: .*no such branch"),
    "no such commit": Failure(_none, _load(revision="0" * 40), HubNotFoundError, "no such branch, tag or commit"),
    "no such subfolder": Failure(_none, _load(subfolder="z"), HubNotFoundError, "alice/x/z: .*config.json"),
    "no config": Failure(
        lambda hub: hub.put("alice/x", config_json=None), LOAD, ManifestError, "no config.json of featur"
    ),
    "no weights": Failure(
        lambda hub: hub.put("alice/x", model_safetensors=None), LOAD, HubNotFoundError, "model.safetensors"
    ),
    "config of another library": Failure(
        lambda hub: hub.put("alice/x", config_json=b'{"model_type": "gpt2"}'),
        LOAD,
        ManifestError,
        "no installed plugin",
    ),
    "weights of another shape": Failure(
        lambda hub: hub.put("alice/x", config_json=hub.files("alice/x")["config.json"].replace(b": 8", b": 9")),
        LOAD,
        WeightsError,
        r"alice/x: tensor 'basis' has shape \[8, 3\]",
    ),
    "gated, anonymous": Failure(_set(gated="auto"), _load(token=False), HubAccessError, "alice/x: .*gated"),
    "gated, not admitted": Failure(_set(gated="auto"), _load(token=BOB), HubAccessError, "gated; ask for access"),
    "private, anonymous": Failure(_set(private=True), _load(token=False), HubNotFoundError, "or it is private"),
    "private, someone else's": Failure(_set(private=True), _load(token=BOB), HubNotFoundError, "or it is private"),
    "wrong token": Failure(_none, _load(token="hf_wrong"), HubAccessError, "alice/x: the Hub refused this token"),
    "malformed name": Failure(_none, _load("alice/x--y"), HubError, "alice/x--y: not a valid repository"),
    "subfolder outside": Failure(_none, _load(subfolder="../.."), HubError, "alice/x"),
    "not cached": Failure(_none, _load(local_files_only=True), HubOfflineError, "not cached"),
    "forced without asking": Failure(_none, _load(force_download=True, local_files_only=True), HubError, "alice/x: "),
    "dead": Failure(LoopbackHub.stop, LOAD, HubOfflineError, "alice/x: the Hub cannot be reached"),
    "dead, forced": Failure(LoopbackHub.stop, _load(force_download=True), HubError, "alice/x: the Hub "),
    "status 500": Failure(_status("/resolve/", 500), LOAD, HubError, "alice/x: the Hub "),
    "status 429": Failure(_status("/resolve/", 429), LOAD, HubError, "alice/x: the Hub "),
    "weights 500": Failure(_status("GET /cdn", 500), LOAD, HubError, "alice/x: "),
    "weights 403": Failure(_status("GET /cdn", 403), LOAD, HubAccessError, "alice/x: "),
    "no answer": Failure(_fault("/resolve/", "drop"), LOAD, HubError, "alice/x: "),
    "reset": Failure(_fault("/resolve/", "drop", rst=True), LOAD, HubError, "alice/x: "),
    "weights cut": Failure(_fault("GET /cdn", "drop", after=50, rst=True), LOAD, HubError, "alice/x: "),
    "weights too short": Failure(_fault("GET /cdn", "truncate", after=50), LOAD, HubError, "alice/x: "),
    "a login page": Failure(
        _fault("/resolve/", "replace", b64=LOGIN_PAGE),
        LOAD,
        HubError,
        "the answer is not from a Hub; check whether",
    ),
    "a login page for the weights": Failure(
        _fault("GET /cdn", "replace", b64=LOGIN_PAGE), LOAD, FeaturizerError, "alice/x: "
    ),
    "429 and when to ask again": Failure(
        _status("/resolve/", 429, **{"Retry-After": "86400"}),
        LOAD,
        HubError,
        r"alice/x: the Hub is asked too often \(429\); try again in 86400 seconds",
    ),
    "429 and an endless header": Failure(
        _status("/resolve/", 429, **{"Retry-After": "9" * 5000}), LOAD, HubError, "asked too often"
    ),
    "weights 404": Failure(_status("GET /cdn", 404), LOAD, HubError, "alice/x: "),
    "weights reset": Failure(_fault("GET /cdn", "drop", rst=True), LOAD, HubError, "alice/x: "),
    "config cut": Failure(_fault("GET .*config.json", "drop", after=50, rst=True), LOAD, HubError, "alice/x: "),
    "config too short": Failure(_fault("GET .*config.json", "truncate", after=50), LOAD, FeaturizerError, "alice/x: "),
    "config 500 after all": Failure(_status("GET .*config.json", 500), LOAD, HubError, "alice/x: "),
    "disabled": Failure(_set(disabled=True), LOAD, HubAccessError, "alice/x: "),
    "a config over the limit": Failure(
        lambda hub: hub.put("alice/x", config_json=b" " * 1_000_001),
        LOAD,
        ManifestError,
        "config.json has 1000001 bytes, more than the 1000000 that it may have",
    ),
    "weights that no config implies": Failure(
        lambda hub: hub.put("alice/x", model_safetensors=bytes(10_000_400)),
        LOAD,
        ManifestError,
        "model.safetensors has 10000400 bytes, more than the 10000192 that it may have",
    ),
    "only other weights": Failure(
        lambda hub: hub.put("alice/x", model_safetensors=None, pytorch_model_bin=b"x", model_pt=b"x", model_npz=b"x"),
        LOAD,
        HubNotFoundError,
        "model.safetensors",
    ),
    "a checksum that is a path": Failure(_says(ETag='"/tmp/x"'), LOAD, HubError, "the answer is not from a Hub"),
    "a checksum that leads out": Failure(_says(ETag='"../../x"'), LOAD, HubError, "the answer is not from a Hub"),
    "no commit": Failure(_says(**{"X-Repo-Commit": ""}), LOAD, HubError, "the answer is not from a Hub"),
    "a commit that leads out": Failure(
        _says(**{"X-Repo-Commit": "../x"}), LOAD, HubError, "the answer is not from a Hub"
    ),
    "an absurd size": Failure(_says(**{"X-Linked-Size": 10**15 * 2}), LOAD, HubError, "which is impossible"),
    "a listing of numbers": Failure(_foreign_with(5), LOAD, HubError, "its list of files is malformed"),
    "a listing that leads out": Failure(
        _foreign_with("../../evil.json"), LOAD, HubError, "its list of files has '../../evil.json', which is outside"
    ),
    "an absolute listing": Failure(_foreign_with("/etc/passwd"), LOAD, HubError, "has '/etc/passwd', which is outside"),
    "a listing for Windows": Failure(_foreign_with(r"..\evil"), LOAD, HubError, "which is outside the repository"),
    "a listing of controls": Failure(_foreign_with("\x1b[2J\u202e"), LOAD, ManifestError, r"'\\x1b\[2J\\u202e'"),
}


UPLOADS = {
    "read token": Failure(_none, _push(token=ALICE_READ), HubAccessError, "alice/x: the Hub refused this token"),
    "anonymous": Failure(_none, _push(token=False), HubAccessError, "alice/x: the Hub refused this token, or got none"),
    "wrong token": Failure(_none, _push(token="hf_wrong"), HubAccessError, "alice/x: the Hub refused this token"),
    "someone else's": Failure(_none, _push(token=BOB), HubAccessError, "alice/x: the Hub refused this token"),
    "someone else's namespace": Failure(_none, _push("bob/y"), HubAccessError, "bob/y: the Hub refused this token"),
    "malformed name": Failure(_none, _push("alice/x--y"), HubError, "alice/x--y: not a valid repository"),
    "overtaken": Failure(_status("POST .*/commit/", 412), _push(), HubConflictError, "someone else pushed meanwhile"),
    "commit 500": Failure(_status("POST .*/commit/", 500), _push(), HubError, "alice/x: "),
    "storage 500": Failure(_status("PUT /cdn", 500), _push(), HubError, "alice/x: "),
    "storage cut": Failure(_fault("PUT /cdn", "drop", after=50), _push(), HubError, "alice/x: "),
    "dead": Failure(LoopbackHub.stop, _push(), HubError, "alice/x: "),
    "storage refuses": Failure(_status("PUT /cdn", 403), _push(), HubError, "alice/x: "),
    "no storage at all": Failure(_status("POST .*objects/batch", 500), _push(), HubError, "alice/x: "),
    "a reset instead of an answer": Failure(
        _fault("POST .*/commit/", "drop", rst=True), _push(), HubError, "alice/x: "
    ),
    "the repository asked for 500": Failure(_status("GET /api/models", 500), _push(), HubError, "alice/x: "),
    "429": Failure(_status("GET /api/models", 429, **{"Retry-After": "60"}), _push(), HubError, "in 60 seconds"),
    "a new repository 500": Failure(_status("POST /api/repos", 500), _push("alice/new"), HubError, "alice/new: "),
    "a branch 500": Failure(_status("POST .*/branch/", 500), _push(branch="b"), HubError, "alice/x: "),
    "a hostile root": Failure(
        lambda hub: hub.put("alice/x", config_json=b"[" * 100_000),
        _push(),
        ManifestError,
        "alice/x: config.json is not",
    ),
    "an enormous root": Failure(
        lambda hub: hub.put("alice/x", config_json=b" " * 1_000_001), _push(), ManifestError, "config.json has 1000001"
    ),
    "an enormous card": Failure(
        lambda hub: hub.put("alice/x", README_md=b" " * 10_000_001), _push(), ManifestError, "README.md has 10000001"
    ),
    "a card that is no text": Failure(
        lambda hub: hub.put("alice/x", README_md=b"\xff\xfe"), _push(), ArtefactError, "README.md"
    ),
    "root of another library": Failure(
        lambda hub: hub.put("alice/x", config_json=b'{"model_type": "gpt2"}'), _push(), ManifestError, "alice/x: config"
    ),
    "subfolder beside an artefact": Failure(_none, _push(subfolder="a"), ManifestError, "root holds an artefact"),
}


def _check(hub: LoopbackHub, case: Failure) -> None:
    case.cause(hub)
    with pytest.raises(case.error, match=case.words) as caught:
        case.call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "Signature=" not in str(caught.value)  # it would give any reader access to the storage


@pytest.fixture(params=["plain", "xet"])
def filled(hub, hasty, request, monkeypatch):
    """Push an artefact to alice/x and empty the cache; with and without the Xet storage."""
    from huggingface_hub import constants

    if request.param == "xet":
        require_xet()
        hub.xet = True
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    subspace().push_to_hub("alice/x")
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    return hub


@pytest.mark.parametrize("case", DOWNLOADS)
def test_a_download_that_fails(filled, case):
    _check(filled, DOWNLOADS[case])


@pytest.mark.parametrize("case", UPLOADS)
def test_an_upload_that_fails_changes_nothing(filled, case, monkeypatch):
    UPLOADS[case].cause(filled)
    for fault in filled.faults if filled.xet else ():  # Xet has other requests for storage
        if re.search("PUT /cdn|objects/batch", fault["match"]):
            fault.update(match="xet-write-token", after=0)
            monkeypatch.setattr(transport, "DEADLINE", 3.0)  # its client retries for minutes
    before = filled.head("alice/x")
    _check(filled, UPLOADS[case]._replace(cause=_none))
    assert filled.head("alice/x") == before


@pytest.mark.parametrize("subfolder", ["../a", "/a", ".git"])
def test_a_subfolder_that_no_index_could_hold_is_refused_first(hub, subfolder):
    with pytest.raises(ManifestError, match=subfolder):
        subspace().push_to_hub("alice/z", subfolder=subfolder)
    assert hub.requests() == []


def test_a_repository_that_the_hub_has_disabled_is_not_called_offline(filled):
    filled.repo("alice/x")["disabled"] = True
    with pytest.raises(HubAccessError, match="alice/x"):
        featurizers.load("alice/x")


def test_a_hub_that_answers_500_is_told(filled):
    filled.fail("/resolve/", status=500)
    with pytest.raises(HubError, match="500"):
        featurizers.load("alice/x")


@pytest.mark.parametrize("call", [LOAD, _push()], ids=["load", "push"])
def test_a_hub_that_fails_is_not_asked_again(filled, call):
    filled.log.clear()
    filled.fail("", status=500)
    with pytest.raises(HubError, match="500"):
        call()
    assert len(filled.requests()) == 1


def test_a_push_that_is_overtaken_leaves_the_other(filled, monkeypatch):
    build = pushing._operations

    def overtaken(*arguments):
        filled.put("alice/x", notes_txt=b"mine")
        return build(*arguments)

    monkeypatch.setattr(pushing, "_operations", overtaken)
    with pytest.raises(HubConflictError, match="alice/x: someone else pushed meanwhile"):
        subspace(seed=1).push_to_hub("alice/x")
    assert filled.titles("alice/x")[1:] == ["someone else"]


@pytest.mark.parametrize("broken", ["dead", "500", "revoked"])
def test_what_is_cached_loads_without_the_hub(filled, broken):
    loaded = featurizers.load("alice/x")
    if broken == "dead":
        filled.stop()
    elif broken == "500":
        filled.fail("", status=500)
    else:
        filled.repo("alice/x")["private"] = True
    with pytest.warns(CachedCopyWarning, match=rf"alice/x: .*\. The copy of {loaded.revision} in the cache is used"):
        again = featurizers.load("alice/x", token=False)
    assert again.revision == loaded.revision
    assert again.basis.equal(loaded.basis)
    for options in ({"local_files_only": True}, {"revision": loaded.revision}):  # without a request
        with warnings.catch_warnings():
            warnings.simplefilter("error", CachedCopyWarning)
            again = featurizers.load("alice/x", **options)
        assert again.revision == loaded.revision
        assert again.basis.equal(loaded.basis)


@pytest.mark.parametrize("what", ["file", "branch"])
def test_what_was_deleted_is_not_taken_from_the_cache(filled, what):
    featurizers.load("alice/x")
    if what == "file":
        filled.put("alice/x", config_json=None, README_md=None, model_safetensors=None)
    else:
        filled.repo("alice/x")["refs"]["refs/heads/other"] = filled.head("alice/x")
        featurizers.load("alice/x@other")
        del filled.repo("alice/x")["refs"]["refs/heads/other"]
    with pytest.raises(
        HubNotFoundError if what == "branch" else ManifestError, match=r"no such branch|no config\.json of"
    ):
        featurizers.load("alice/x@other" if what == "branch" else "alice/x")


def test_offline_mode(filled, monkeypatch):
    from huggingface_hub import constants

    loaded = featurizers.load("alice/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(filled.log)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CachedCopyWarning)
        assert featurizers.load("alice/x").revision == loaded.revision
    with pytest.raises(HubOfflineError, match=r"alice/y: .*not cached"):
        featurizers.load("alice/y")
    with pytest.raises(HubError, match="alice/x: "):
        subspace().push_to_hub("alice/x")
    assert len(filled.log) == before


# ---------------------------------------------------------------------- time


@pytest.fixture
def lose_patience(hub, monkeypatch):
    """A function that shortens the time limits; at the end the threads that were abandoned are waited for."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    over, before = threading.Event(), set(threading.enumerate())
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), "sleep": over.wait}))

    def shorten(seconds: float = 1.0) -> None:
        for module in (repository, pushing):
            monkeypatch.setattr(module, "TIMEOUT", 0.3 * seconds)
            monkeypatch.setattr(module, "DEADLINE", seconds)
        monkeypatch.setattr(transport, "DEADLINE", seconds)

    yield shorten
    hub.faults.clear()
    over.set()
    for thread in set(threading.enumerate()) - before:
        if thread.name == "featurizers-hub":
            thread.join(30)


SLOW = {
    "no answer": (_load(), {"match": "/resolve/", "kind": "status", "delay": 2}),
    "no answer for the weights": (_load(), {"match": "HEAD .*safetensors", "kind": "status", "delay": 2}),
    "a byte now and then": (_load(), {"match": "GET .*config.json", "kind": "slow", "rate": 60}),
    "weights, a byte now and then": (_load(), {"match": "GET /cdn", "kind": "slow", "rate": 60}),
    "429, and to wait a day": (_load(), {"match": "GET /cdn", "kind": "status", "status": 429, "wait": "86400"}),
    "push: no answer": (_push(), {"match": "GET /api/models", "kind": "status", "delay": 2}),
    "push: a new repository": (_push("alice/new"), {"match": "POST /api/repos", "kind": "slow", "delay": 2}),
    "push: a branch": (_push(branch="b"), {"match": "POST .*/branch/", "kind": "slow", "delay": 2}),
    "push: the commit": (_push(), {"match": "POST .*/commit/", "kind": "slow", "delay": 2}),
    "push: the storage": (_push(), {"match": "PUT /cdn|xet-write", "kind": "slow", "delay": 2}),
    "push: to wait a day": (_push(), {"match": "PUT /cdn|xet-write", "kind": "status", "status": 429, "wait": "86400"}),
    "a listing": (_load(), {"match": "GET /api/models", "kind": "slow", "delay": 2}),
}


@pytest.mark.parametrize("case", SLOW)
def test_no_call_waits_for_ever(hub, lose_patience, case):
    call, rule = SLOW[case]
    subspace().push_to_hub("alice/x")
    if case == "a listing":
        hub.put("alice/x", config_json=b'{"model_type": "gpt2"}')
    shutil.rmtree(_cache(), ignore_errors=True)
    wait = rule.get("wait")
    hub.fail(**{k: v for k, v in rule.items() if k != "wait"}, **({"headers": {"Retry-After": wait}} if wait else {}))
    lose_patience()
    with pytest.raises(
        HubError, match=r"alice/(x|new): the Hub (took longer than 1 seconds|cannot be reached|is asked)"
    ):
        call()


def test_a_push_that_may_still_arrive_says_so(hub, lose_patience):
    subspace().push_to_hub("alice/x")
    hub.fail("POST .*/commit/", "slow", delay=6)
    lose_patience(4.0)  # what comes before the commit ends in time on a busy machine too
    with pytest.raises(
        HubOfflineError, match="the commit may arrive all the same: look at the repository before you push"
    ):
        subspace(seed=1).push_to_hub("alice/x")


# ---------------------------------------------------------------------- what a Hub may not choose


def test_a_file_of_this_machine_is_neither_read_nor_pushed(filled, tmp_path, monkeypatch):
    """The client asks the Hub a second time, gets another answer, and makes a link as it says."""
    (tmp_path / "secret").write_text("hf_secret")
    real = repository.Remote._download

    def download(self, name, commit):
        path = Path(real(self, name, commit))
        if name == "README.md":
            path.unlink()
            path.symlink_to(tmp_path / "secret")
        return str(path)

    monkeypatch.setattr(repository.Remote, "_download", download)
    before = filled.head("alice/x")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ArtefactError, match=r"README\.md is a link out of this folder"):
            subspace(seed=1).push_to_hub("alice/x")
    assert filled.head("alice/x") == before


def test_a_subfolder_called_snapshots_is_read_at_its_commit(filled):
    first = subspace(seed=1).push_to_hub("alice/y", subfolder="snapshots/main").oid
    subspace(seed=2).push_to_hub("alice/y", subfolder="snapshots/main")
    for _ in range(2):
        f = featurizers.load("alice/y", subfolder="snapshots/main", revision=first, verify=True)
        assert f.revision == first
        assert f.basis.equal(subspace(seed=1).basis)


# ---------------------------------------------------------------------- what is pushed


def test_weights_of_another_config_are_not_pushed(filled, tmp_path):
    folder = subspace(seed=1).save_pretrained(tmp_path / "a")
    other = subspace(seed=2).save_pretrained(tmp_path / "b")
    shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")
    before = filled.head("alice/x")
    with pytest.raises(WeightsError, match=r"a: model.safetensors has sha256 .*; nothing was pushed"):
        featurizers.push(folder, "alice/x")
    assert filled.head("alice/x") == before


def test_a_link_to_a_secret_is_not_pushed(filled, tmp_path):
    (tmp_path / "secret").write_text("hf_secret")
    folder = subspace(seed=1).save_pretrained(tmp_path / "a")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("../secret")
    before = filled.head("alice/x")
    with pytest.raises(ArtefactError, match=r"README.md is a link out of this folder"):
        featurizers.push(folder, "alice/x")
    assert filled.head("alice/x") == before


def test_python_files_of_a_repository_are_not_even_fetched(filled, monkeypatch):
    filled.put("alice/x", featurizer_py=b"raise SystemExit", setup_py=b"raise SystemExit", __init___py=b"x")
    monkeypatch.chdir(_cache().parent if _cache().parent.exists() else ".")
    before = list(sys.path)
    assert featurizers.load("alice/x").revision == filled.head("alice/x")
    assert sys.path == before
    assert not [request for request in filled.requests() if ".py" in request]
    assert not list(_cache().rglob("*.py"))


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
