"""SAELens itself, where it is installed."""

import warnings
from typing import Any

import pytest


@pytest.fixture(scope="session")
def sae_lens() -> Any:
    """Return the module `sae_lens`, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")
