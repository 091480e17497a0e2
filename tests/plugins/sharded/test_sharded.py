"""Dictionaries and maps on a mesh of 2 and of 4 processes, beside the whole ones: one launch of all checks for each."""

from __future__ import annotations

import featurizers
import pytest
from featurizers import errors
from featurizers.registry import forwarding
from featurizers.registry.plugin_host import PluginHost

from tests.support.dictionaries import dictionary
from tests.support.ranks import checks_of, run_ranks

MODULES = ",".join(f"tests.plugins.sharded.{name}" for name in ("checks", "map_checks", "led_checks"))


@pytest.mark.parametrize("size", [2, 4])
def test_on_a_mesh(size, tmp_path):
    """All checks are one test, because processes of pytest-xdist would launch a fixture once each."""
    found = run_ranks(MODULES, size, tmp_path / "folder")
    wrong = [f"{check}: {found[check]}" for check in checks_of(MODULES) if found.get(check)]
    assert not wrong, "\n".join(wrong)
    assert [*found] == checks_of(MODULES), "a check left the processes out of step"


def test_without_the_plugin_a_mesh_names_the_package(monkeypatch, tmp_path):
    dictionary("relu").save_pretrained(tmp_path / "dictionary")
    without = PluginHost()  # the one of this process may have loaded the plugin
    del without._entries["sharded"]
    monkeypatch.setattr(forwarding, "host", lambda: without)
    with pytest.raises(errors.MissingDependencyError, match=r"load with mesh= needs featurizers-sharded.*pip install"):
        featurizers.load(tmp_path / "dictionary", mesh=object())
