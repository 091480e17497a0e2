"""Search of the Hub by kind, model and site, with the real client; what a Hub sends is checked, and printed escaped."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import featurizers
import pytest
from featurizers import Site
from featurizers.errors import FeaturizerError, HubError, SiteError, UsageError
from featurizers.hub import search

from tests.support.command import as_json, run
from tests.support.hub import LoopbackHub, subspace


def at(f: Any, site: str, model: str | None = "owner/model") -> Any:
    f.site = Site.parse(site).at(model=model)
    return f


@pytest.fixture
def filled(hub: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    at(subspace(), "resid.post:8").push_to_hub("alice/eight")
    at(subspace(), "resid.post:11", "owner/other").push_to_hub("alice/eleven")
    at(featurizers.create("identity", d_in=4), "mlp.out:3").push_to_hub("alice/identity")
    featurizers.create("identity", d_in=4).push_to_hub("alice/nowhere")
    at(subspace(), "resid.post:8").push_to_hub("alice/secret", private=True)
    parts = {
        "a": at(subspace(), "resid.post:8"),
        "b": at(featurizers.create("identity", d_in=4), "attn.z:1:2"),
        "c": at(subspace(seed=1), "resid.post:9", "owner/other"),
    }
    featurizers.push(featurizers.save_collection(parts, tmp_path / "parts"), "alice/parts")
    hub.put("alice/stranger", README_md=b"---\nlibrary_name: transformers\ntags: [subspace]\n---\n")
    return hub


ALL = {"alice/eight", "alice/eleven", "alice/identity", "alice/nowhere", "alice/secret", "alice/parts"}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ALL),
        ({"kind": "subspace"}, {"alice/eight", "alice/eleven", "alice/secret", "alice/parts"}),
        ({"model": "owner/other"}, {"alice/eleven", "alice/parts"}),
        ({"site": "resid.post:8"}, {"alice/eight", "alice/secret", "alice/parts"}),
        ({"site": "resid.post"}, {"alice/eight", "alice/eleven", "alice/secret", "alice/parts"}),
        ({"site": "attn.z:1:2"}, {"alice/parts"}),
        ({"site": "resid"}, SiteError),
        ({"kind": "identity", "site": "mlp.out:3", "model": "owner/model"}, {"alice/identity"}),
        ({"kind": "standardize"}, set()),
        ({"text": "ele"}, {"alice/eleven"}),
        ({"author": "bob"}, set()),
        ({"token": False}, ALL - {"alice/secret"}),
    ],
)
def test_repositories_are_found_by_what_their_cards_say(
    filled: LoopbackHub, asked: dict[str, Any], expected: set[str] | type[FeaturizerError]
) -> None:
    if not isinstance(expected, set):
        with pytest.raises(expected):
            search(**asked)
        return
    assert {each.repo_id for each in search(**asked)} == expected


def test_what_is_said_of_a_repository(filled: LoopbackHub) -> None:
    (one,) = search("eight")
    assert (one.kinds, one.models, one.sites) == (("subspace",), ("owner/model",), ("resid.post:8",))
    assert one.revision == filled.head("alice/eight")
    assert (one.private, one.gated) == (False, False)
    (parts,) = search("parts")
    assert parts.kinds == ("identity", "subspace")
    assert parts.models == ("owner/model", "owner/other")
    assert parts.sites == ("resid.post:8", "attn.z:1:2", "resid.post:9")
    (nowhere,) = search("nowhere")
    assert (nowhere.models, nowhere.sites) == ((), ())
    assert len(search(limit=2)) == 2


def test_the_tags_follow_the_site(filled: LoopbackHub) -> None:
    at(subspace(), "mlp.out:2").push_to_hub("alice/eight")
    assert "alice/eight" not in {each.repo_id for each in search(site="resid.post")}
    assert [each.sites for each in search("eight")] == [("mlp.out:2",)]


def test_the_command_prints_a_table_and_json(filled: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    code, out, error = run("search", "--kind", "subspace", "--model", "owner/model", "--site", "resid.post:8")
    assert (code, error) == (0, "")
    assert "│ alice/eight  │ subspace           │ owner/model              │ resid.post:8" in out
    assert "alice/eleven" not in out
    rows = as_json("search", "eleven")
    assert [(row["repo_id"], row["kinds"], row["sites"]) for row in rows] == [
        ("alice/eleven", ["subspace"], ["resid.post:11"])
    ]


def test_what_can_be_none_is_refused_before_the_hub_is_asked(hub: LoopbackHub) -> None:
    for asked in ({"limit": 0}, {"limit": 1001}, {"kind": "Sub space"}, {"model": "a/b/c"}):
        with pytest.raises(UsageError):
            search(**asked)  # type: ignore[arg-type]
    with pytest.raises(SiteError):
        search(site="nosuch:3")
    assert not hub.requests()


def answer(hub: LoopbackHub, value: Any) -> None:
    """Let the Hub answer every search so."""
    hub.fail("GET /api/models", "replace", b64=base64.b64encode(json.dumps(value).encode()).decode())


def test_what_a_hub_sends_is_printed_escaped_and_what_is_no_answer_left_out(hub: LoopbackHub) -> None:
    card = {
        "tags": [
            "featurizers",
            "mechanistic-interpretability",
            "subspace",
            "site:resid.post:1",
            "site:\x1b[2J",
            3,
            None,
        ],
        "base_model": ["owner/\x1b]0;title\x07\u202e", 5],
    }
    good = {"id": "alice/x", "tags": ["featurizers", 7], "cardData": card, "downloads": "many", "sha": 3}
    answer(
        hub,
        [
            good,
            {"id": "alice/not-asked-for", "tags": ["other"]},
            {"id": "../x\x1b", "tags": ["featurizers"]},
            {"id": "alice/bare", "tags": ["featurizers"]},
        ],
    )
    first, bare = search()
    assert (first.repo_id, first.kinds, first.sites) == ("alice/x", ("subspace",), ("resid.post:1",))
    assert (first.downloads, first.revision, bare.kinds) == (None, None, ())
    for words in (("search",), ("search", "--json")):
        code, out, error = run(*words)
        assert (code, error) == (0, "")
        assert out.replace("\n", "").isprintable()
        assert "title" in out


@pytest.mark.parametrize("value", [3, [3], {"x": 1}, [{"id": None}], "x"])
def test_an_answer_that_is_no_list_of_repositories_is_an_error(hub: LoopbackHub, value: Any) -> None:
    answer(hub, value)
    with pytest.raises(HubError):
        search()


def test_a_hub_that_refuses_is_one_line(hub: LoopbackHub) -> None:
    hub.fail("GET /api/models", "status", status=403)
    code, out, error = run("search")
    assert (code, out, len(error.splitlines())) == (1, "", 1)
    assert "the Hub refused this token (403)" in error


def test_a_machine_without_a_network_says_so(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError):
        search()
