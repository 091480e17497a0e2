"""Rates of a harvest by one process, or by actors of Ray on two nodes of this machine, printed as JSON.

The rate is taken from the moment at which every worker has committed a shard, so that what it takes to start and to
load models is not in it. Usage: ``python harvest_nodes.py FOLDER MODEL local|ray``, with documents in ``ids.jsonl``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0", RAY_DEDUP_LOGS="0")

import featurizers
import featurizers_harvest
import psutil
import torch
from featurizers_harvest.engines import Engine, Local

MEMORY = 150 * 2**20
"""Bytes of the object store of a node, through which no rows pass."""


class Timed(Engine):
    """Lets another engine compute the shards, and notes when each was there and how much CPU time was used.

    Args:
        engine: that computes them.
        workers: how many it has.
    """

    def __init__(self, engine: Engine, workers: int) -> None:
        self._engine, self._workers, self.is_remote = engine, workers, engine.is_remote
        self.tokens, self.wall, self.cpu = 0, 0.0, 0.0

    def run(self, start: Any, shards: Any) -> Iterator[Any]:
        """See `Engine.run`."""
        begin, cpu = 0.0, 0.0
        for number, result in enumerate(self._engine.run(start, shards)):
            if number == self._workers - 1:
                begin, cpu = time.perf_counter(), _cpu()
            elif number >= self._workers:
                self.tokens += result.tokens
                self.wall, self.cpu = time.perf_counter() - begin, _cpu() - cpu
            yield result


def _cpu() -> float:
    """Return the CPU time of this process and of the workers."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    total = 0.0
    for each in processes:
        try:
            total += sum(each.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return total


@contextmanager
def two_nodes() -> Iterator[None]:
    """Start Ray with two nodes of one CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(True, head_node_args={"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    """Run the harvest that the arguments name."""
    folder, model, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    f = featurizers.load(folder / "f")
    options: dict[str, Any] = {"key": "ids", "shard_tokens": 2048, "progress": False, "device": "cpu"}

    def run(engine: Timed) -> Timed:
        featurizers.harvest(model, {"f": f}, folder / "ids.jsonl", folder / name, engine=engine, **options)
        return engine

    if name == "ray":
        with two_nodes():
            timed = run(Timed(featurizers_harvest.Ray(2), 2))
    else:
        timed = run(Timed(Local(), 1))
    print(json.dumps({"tokens": timed.tokens, "wall": timed.wall, "cpu": timed.cpu}))


if __name__ == "__main__":
    main()
