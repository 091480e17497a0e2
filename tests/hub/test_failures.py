"""What the Hub refuses, or a broken connection: one error of this library each, and the branch as it was."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import featurizers
import pytest
from featurizers import pushing
from featurizers.errors import (
    FeaturizerError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubOfflineError,
    ManifestError,
    WeightsError,
)

from tests.support.hub import ALICE_READ, BOB, LoopbackHub, subspace


class Failure(NamedTuple):
    """How to bring it about, what to call then, and what that must raise."""

    cause: Callable[[LoopbackHub], Any]
    call: Callable[[], Any]
    error: type[FeaturizerError]
    words: str


def _none(hub: LoopbackHub) -> None:
    """The Hub is as it should be."""


def _load(source: str = "alice/x", **options: Any) -> Callable[[], Any]:
    return lambda: featurizers.load(source, **options)


def _push(repo_id: str = "alice/x", **options: Any) -> Callable[[], Any]:
    return lambda: subspace(seed=1).push_to_hub(repo_id, **options)


def _status(match: str, status: int, **headers: Any) -> Callable[[LoopbackHub], None]:
    return lambda hub: hub.fail(match, status=status, headers=headers)


def _fault(match: str, kind: str, **rule: Any) -> Callable[[LoopbackHub], None]:
    return lambda hub: hub.fail(match, kind, **rule)


def _set(**fields: Any) -> Callable[[LoopbackHub], None]:
    return lambda hub: hub.repo("alice/x").update(fields)


LOGIN_PAGE = base64.b64encode(b"<html>please log in</html>").decode()
DOWNLOADS = {
    "no such repository": Failure(_none, _load("alice/y"), HubNotFoundError, "alice/y: no such repository"),
    "no such owner, anonymous": Failure(_none, _load("carol/y", token=False), HubNotFoundError, "no such repository"),
    "no such revision": Failure(_none, _load("alice/x@v9"), HubNotFoundError, "alice/x@v9: .*no such branch"),
    "no such commit": Failure(_none, _load(revision="0" * 40), HubNotFoundError, "no such branch, tag or commit"),
    "no such subfolder": Failure(_none, _load(subfolder="z"), HubNotFoundError, "alice/x/z: .*config.json"),
    "no config": Failure(
        lambda hub: hub.put("alice/x", config_json=None), _load(), ManifestError, "no config.json of featur"
    ),
    "no weights": Failure(
        lambda hub: hub.put("alice/x", model_safetensors=None), _load(), HubNotFoundError, "model.safetensors"
    ),
    "config of another library": Failure(
        lambda hub: hub.put("alice/x", config_json=b'{"model_type": "gpt2"}'),
        _load(),
        ManifestError,
        "no installed plugin",
    ),
    "weights of another shape": Failure(
        lambda hub: hub.put("alice/x", config_json=hub.files("alice/x")["config.json"].replace(b": 8", b": 9")),
        _load(),
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
    "dead": Failure(LoopbackHub.stop, _load(), HubOfflineError, "alice/x: the Hub cannot be reached"),
    "dead, forced": Failure(LoopbackHub.stop, _load(force_download=True), HubError, "alice/x: the Hub "),
    "status 500": Failure(_status("/resolve/", 500), _load(), HubError, "alice/x: the Hub "),
    "status 429": Failure(_status("/resolve/", 429), _load(), HubError, "alice/x: the Hub "),
    "weights 500": Failure(_status("GET /cdn", 500), _load(), HubError, "alice/x: "),
    "weights 403": Failure(_status("GET /cdn", 403), _load(), HubAccessError, "alice/x: "),
    "no answer": Failure(_fault("/resolve/", "drop"), _load(), HubError, "alice/x: "),
    "reset": Failure(_fault("/resolve/", "drop", rst=True), _load(), HubError, "alice/x: "),
    "weights cut": Failure(_fault("GET /cdn", "drop", after=50, rst=True), _load(), HubError, "alice/x: "),
    "weights too short": Failure(_fault("GET /cdn", "truncate", after=50), _load(), HubError, "alice/x: "),
    "a login page": Failure(_fault("/resolve/", "replace", b64=LOGIN_PAGE), _load(), HubError, "alice/x: "),
}


UPLOADS = {
    "read token": Failure(_none, _push(token=ALICE_READ), HubAccessError, "alice/x: the Hub refused this token"),
    "anonymous": Failure(_none, _push(token=False), HubAccessError, "alice/x: the Hub refused this token"),
    "wrong token": Failure(_none, _push(token="hf_wrong"), HubAccessError, "alice/x: the Hub refused this token"),
    "someone else's": Failure(_none, _push(token=BOB), HubAccessError, "alice/x: the Hub refused this token"),
    "someone else's namespace": Failure(_none, _push("bob/y"), HubAccessError, "bob/y: the Hub refused this token"),
    "malformed name": Failure(_none, _push("alice/x--y"), HubError, "alice/x--y: not a valid repository"),
    "overtaken": Failure(_status("POST .*/commit/", 412), _push(), HubConflictError, "someone else pushed meanwhile"),
    "commit 500": Failure(_status("POST .*/commit/", 500), _push(), HubError, "alice/x: "),
    "storage 500": Failure(_status("PUT /cdn", 500), _push(), HubError, "alice/x: "),
    "storage cut": Failure(_fault("PUT /cdn", "drop", after=50), _push(), HubError, "alice/x: "),
    "dead": Failure(LoopbackHub.stop, _push(), HubError, "alice/x: "),
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


@pytest.fixture
def filled(hub, hasty):
    """A Hub where alice/x is an artefact, and an empty cache."""
    from huggingface_hub import constants

    subspace().push_to_hub("alice/x")
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    return hub


@pytest.mark.parametrize("case", DOWNLOADS)
def test_a_download_that_fails(filled, case):
    _check(filled, DOWNLOADS[case])


@pytest.mark.parametrize("case", UPLOADS)
def test_an_upload_that_fails_changes_nothing(filled, case):
    UPLOADS[case].cause(filled)
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
    for options in ({"token": False}, {"local_files_only": True}, {"revision": loaded.revision}):
        again = featurizers.load("alice/x", **options)
        assert again.revision == loaded.revision
        assert again.basis.equal(loaded.basis)
