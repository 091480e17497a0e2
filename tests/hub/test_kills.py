"""Programs that are killed while they talk to the Hub: branch, cache and folder stay whole."""

import os

import pytest

from tests.support import faults
from tests.support.hub import require_xet

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the programs are forked")
KILLS = 10


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "xet"])
def hub(request, tmp_path_factory):
    if request.param:
        require_xet()
    with faults.HubProcess(tmp_path_factory.mktemp("hub"), xet=request.param) as hub:
        yield hub


@pytest.fixture(scope="module")
def nursery(hub):
    with faults.Nursery(hub.environment) as nursery:
        yield nursery


def test_pushes(nursery, hub):
    done = faults.kills_of_push(nursery, hub, KILLS, seed=1)
    assert (done.bad, done.lost) == ([], 0)
    assert done.middle > 0


def test_pulls(nursery, hub):
    done = faults.kills_of_pull(nursery, hub, KILLS, seed=1)
    assert done.bad == []
    assert done.middle > 0
