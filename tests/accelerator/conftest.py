"""Tests on an accelerator; where there is none they are skipped."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """The accelerator."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        pytest.skip("there is no accelerator here")
    return torch.device(found.type, 0)
