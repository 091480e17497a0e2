"""Round trip in a new process, which gets the Hub from its environment; with and without the Xet storage."""

import os
import subprocess
import sys

import pytest

from tests.support.hub import ALICE, LoopbackHub, require_xet

ROUND_TRIP = """
import featurizers
from huggingface_hub import constants
f = featurizers.create("subspace", d_in=64, n_features=16, seed=1)
commit = f.push_to_hub("alice/x", subfolder="a").oid
loaded = featurizers.load("alice/x", subfolder="a", verify=True)
assert loaded.revision == commit and loaded.basis.equal(f.basis)
print("plain" if constants.HF_HUB_DISABLE_XET else "xet")
"""


@pytest.mark.parametrize("xet", [False, True], ids=["plain", "xet"])
def test_round_trip(tmp_path, xet):
    if xet:
        require_xet()
    hub = LoopbackHub(tmp_path / "server", xet=xet)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = {
        **clean,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": ALICE,
        "HF_HUB_DISABLE_XET": str(int(not xet)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP], env=environment, capture_output=True, text=True, check=False
    )
    hub.stop()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("xet" if xet else "plain")
    assert any("xet-write-token" in request for request in hub.requests()) is xet
    assert any(request.startswith("PUT /cdn") for request in hub.requests()) is not xet
