"""A Hub on the loopback interface, and the real huggingface_hub client pointed at it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import featurizers
import huggingface_hub
import pytest

from tests.support import hubserver


def require_xet() -> None:
    """Skip a test of uploads through Xet without hf_xet, or with a client that asks a Hub for it in another way."""
    pytest.importorskip("hf_xet")
    if int(huggingface_hub.__version__.partition(".")[0]) < 2:
        pytest.skip("the loopback Hub speaks Xet as huggingface_hub 2 does")


ALICE, ALICE_READ, BOB = "hf_alice_write", "hf_alice_read", "hf_bob_write"


class LoopbackHub(hubserver.Hub):
    """A Hub with the users alice and bob, whose state tests can read and change behind the client's back."""

    def repo(self, repo_id: str) -> dict[str, Any]:
        """Return the record of a repository."""
        return self.repos["model", repo_id]

    def head(self, repo_id: str, ref: str = "refs/heads/main") -> str:
        """Return the head commit of a branch or a pull request."""
        return self.repo(repo_id)["refs"][ref]

    def titles(self, repo_id: str, ref: str = "refs/heads/main") -> list[str]:
        """Return the titles of the commits of a branch, oldest first, without the initial commit."""
        commits, titles = self.repo(repo_id)["commits"], []
        commit = self.head(repo_id, ref)
        while commit:
            titles.append(commits[commit]["title"])
            commit = commits[commit]["parent"]
        return titles[-2::-1]

    def files(self, repo_id: str, ref: str = "refs/heads/main") -> dict[str, bytes]:
        """Return the files of a branch, without ``.gitattributes``."""
        entries = self.repo(repo_id)["commits"][self.head(repo_id, ref)]["files"]
        return {
            name: Path(self.blob(entry["sha256"])).read_bytes()
            for name, entry in entries.items()
            if name != ".gitattributes"
        }

    def put(self, repo_id: str, **changes: bytes | None) -> str:
        """Commit as another user: new contents by file name, with `_` for the dot or as it is; None deletes a file."""
        repo = self.repos.get(("model", repo_id)) or self.create("model", repo_id)
        files = dict(repo["commits"][self.head(repo_id)]["files"])
        for name, data in changes.items():
            path = name if "." in name else name.replace("_", ".")
            files.pop(path, None)
            if data is not None:
                files[path] = self.entry(self.put_bytes(data), len(data), path.endswith(".safetensors"), data)
        return self.commit(repo, "refs/heads/main", files, "someone else", "", "alice", self.head(repo_id))

    def stop(self) -> None:
        """Stop the server and close the client's connections to it."""
        from huggingface_hub import close_session

        super().stop()
        close_session()

    def fail(self, match: str, kind: str = "status", times: int = -1, **rule: Any) -> None:
        """Answer matching requests wrongly, by default for ever."""
        self.faults.append({"match": match, "kind": kind, "times": times, **rule})

    def requests(self) -> list[str]:
        """Return the method and path of every request for a model so far, storage included."""
        paths = [(r["method"], r["path"].partition("?")[0], r["cdn"]) for r in self.log]
        return [f"{method} {'/cdn' if cdn else ''}{path}" for method, path, cdn in paths if "agent" not in path]


def connect(
    monkeypatch: pytest.MonkeyPatch, url: str, home: Path, token: str | None = ALICE, *, xet: bool = False
) -> None:
    """Point huggingface_hub, imported already or not, at a Hub, with an empty cache and a user's token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_XET_CACHE", str(home / "xet"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


def subspace(seed: int = 0, d_in: int = 8, n_features: int = 3) -> featurizers.Featurizer[Any]:
    """Return a featurizer whose artefact is small."""
    return featurizers.create("subspace", d_in=d_in, n_features=n_features, seed=seed)


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that occurs exactly once in a file."""
    text = path.read_text(encoding="utf-8")
    assert len(re.findall(re.escape(old), text)) == 1, f"{old!r} is not in {path.name} exactly once"
    path.write_text(text.replace(old, new), encoding="utf-8")
