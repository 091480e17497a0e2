"""Run the checks of some modules in several processes of one gloo group, in one launch."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 60
"""After which a collective that other processes do not join is an error."""


def run_ranks(modules: str, size: int, folder: Path, *, timeout: float = 600) -> dict[str, str]:
    """Run each function ``check_*`` of some modules in ``size`` processes, one check after the other.

    Args:
        modules: their names, with commas between them. Checks take the rank, the number of processes and a folder that
            all processes share.
        size: number of processes.
        folder: an empty one.
        timeout: seconds for all checks.

    Returns:
        By the name of a check, the tracebacks of the processes in which it failed; empty if it passed.
    """
    folder.mkdir(parents=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.ranks", modules, str(size), str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, encoding="utf-8")
        for rank in range(size)
    ]
    try:
        errors = [each.communicate(timeout=timeout)[1] for each in processes]
    finally:
        for each in processes:
            each.kill()
    found: dict[str, str] = {}
    for rank, error in enumerate(errors):
        path = folder / f"rank-{rank}.json"
        assert path.exists(), f"rank {rank} ended before its checks: {error[-2000:]}"
        for name, problem in json.loads(path.read_text(encoding="utf-8")).items():
            found[name] = found.get(name, "") + (f"rank {rank}: {problem}\n" if problem else "")
    return found


def checks_of(modules: str) -> list[str]:
    """Return the names of the checks of some modules."""
    return list(_checks(modules))


def _checks(modules: str) -> dict[str, Any]:
    imported = [vars(importlib.import_module(module)) for module in modules.split(",")]
    return {name: check for names in imported for name, check in names.items() if name.startswith("check_")}


def _main(modules: str, size: int, folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    found: dict[str, str] = {}
    for name, check in _checks(modules).items():
        try:
            check(rank, size, folder)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()[-3000:]
        (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        try:
            dist.barrier()
        except RuntimeError as error:  # a process is out of step: the checks that follow would say nothing
            found[name] += f"\nthe processes are out of step: {error}"
            (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
            break
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
