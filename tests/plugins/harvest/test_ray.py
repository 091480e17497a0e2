"""A harvest by Ray on two nodes, of which a worker is killed; skipped where Ray is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch

from tests.plugins.harvest.test_harvest import files, topk
from tests.support.models import fresh_model, save_language_model

ROWS = {"shard_tokens": 600, "batch_size": 4, "progress": False, "device": "cpu"}
IDS = torch.randint(1, 64, (120, 40), generator=torch.Generator().manual_seed(0)).tolist()

SCRIPT = """
import json, os, signal, sys, threading, time
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0", RAY_DEDUP_LOGS="0")
import ray
from ray.cluster_utils import Cluster
import psutil
from pathlib import Path
import featurizers
from tests.plugins.harvest.test_ray import IDS, ROWS

root = Path(sys.argv[1])
out = root / "ray"
memory = 150 << 20
cluster = Cluster(True, head_node_args={"num_cpus": 1, "object_store_memory": memory, "include_dashboard": False})
killed = []

def kill_one():
    while len(list((out / "done").glob("*.json"))) < 2:
        time.sleep(0.02)
    workers = [p for p in psutil.Process().children(recursive=True) if "ray::_Actor" in " ".join(p.cmdline())]
    os.kill(workers[0].pid, signal.SIGKILL)
    killed.append(workers[0].pid)

try:
    cluster.add_node(num_cpus=1, object_store_memory=memory)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR",
             runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ["PYTHONPATH"]}})
    threading.Thread(target=kill_one, daemon=True).start()
    wanted = {"f": featurizers.load(root / "f"), "x": "mlp.out:0"}
    found = featurizers.harvest(str(root / "model"), wanted, IDS, out, engine="ray", workers=2, **ROWS)
    print(json.dumps({"complete": found.is_complete, "killed": len(killed), "nodes": len(ray.nodes())}))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def test_two_nodes_and_a_killed_worker_write_what_one_process_writes(tmp_path: Any) -> None:
    pytest.importorskip("ray")
    save_language_model(fresh_model("llama"), tmp_path / "model")
    topk().save_pretrained(tmp_path / "f")
    torch.set_num_threads(1)
    wanted = {"f": featurizers.load(tmp_path / "f"), "x": "mlp.out:0"}
    featurizers.harvest(str(tmp_path / "model"), wanted, IDS, tmp_path / "whole", **ROWS)
    paths = os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    call = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"complete": True, "killed": 1, "nodes": 2}
    assert files(tmp_path / "ray") == files(tmp_path / "whole")
