"""Hooks of pytest."""

import pytest

from tests.support.gptj import skip_gptj


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this version of `transformers` cannot do."""
    skip_gptj(item)
