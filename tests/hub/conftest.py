"""Fixtures: a local Hub for each test, with the user alice logged in."""

import time
from types import SimpleNamespace

import pytest

from tests.support.hub import LoopbackHub, connect


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = LoopbackHub(tmp_path / "server")
    connect(monkeypatch, hub.url, tmp_path / "home")
    yield hub
    hub.stop()


@pytest.fixture
def hasty(monkeypatch):
    """Let the client retry without pauses."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
