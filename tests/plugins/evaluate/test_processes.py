"""Evaluations by three processes, in one launch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import checks_of, run_ranks

MODULE = "tests.plugins.evaluate.rank_checks"


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> dict[str, str]:
    """Return what went wrong in each check."""
    return run_ranks(MODULE, 3, tmp_path_factory.mktemp("ranks") / "folder")


@pytest.mark.parametrize("check", checks_of(MODULE))
def test_by_three_processes(found: dict[str, str], check: str) -> None:
    assert check in found, "the checks before it left the processes out of step"
    assert not found[check], found[check]
