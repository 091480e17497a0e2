"""A dictionary on a mesh of two processes beside the whole one in one process.

The case starts the second process, which does what the first does. In CPU time the ratio is that of the first process.
``python benchmarks/sharded.py`` prints the memory of each of four processes.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import featurizers
import torch
import torch.distributed as dist
from dictionaries import pair
from timing import Benchmark, Case, Settings, Skipped, same
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

_KEPT: list[Any] = []
"""Folders and processes that last as long as this process."""


def encode_decode(settings: Settings) -> Case:
    """Compare sparse features and their reconstruction with those of the whole dictionary."""
    if settings.device.type != "cpu" or dist.is_initialized():
        raise Skipped("it makes two processes on the CPU")
    d, n = settings.size(768, 64), settings.size(256, 32)
    whole, _ = pair(settings, settings.size(32768, 256), "topk", d)
    folder = tempfile.TemporaryDirectory()
    _KEPT.append(folder)
    whole.save_pretrained(Path(folder.name) / "whole")
    x = settings.randn(n, d)
    context = multiprocessing.get_context("spawn")
    own, others = context.Pipe()
    other = context.Process(target=_follow, args=(others, folder.name, x), daemon=True)
    other.start()
    _KEPT.append(other)
    f = _joined(folder.name, 0, 2)

    def ours() -> Tensor:
        own.send(True)
        return _both_ways(f, x)

    def check() -> str:
        return same(ours(), _both_ways(whole, x), 1e-5, f"a share of {len(f.share.W_enc)} features")

    what = f"encode and decode {n} tokens by {whole.n_features} features on 2 processes, d={d}"
    return Case(what, "the whole dictionary in one process", ours, lambda: _both_ways(whole, x), check)


@torch.no_grad()
def _both_ways(f: Any, x: Tensor) -> Tensor:
    decoded: Tensor = f.decode_sparse(f.encode_sparse(x))
    return decoded


def _joined(folder: str, rank: int, size: int) -> Any:
    """Join the group, and return the share of this process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    return featurizers.load(Path(folder) / "whole", mesh=init_device_mesh("cpu", (size,)))


def _follow(told: Any, folder: str, x: Tensor) -> None:
    """Do what the first process does, until it ends."""
    f = _joined(folder, 1, 2)
    while True:
        try:
            told.recv()
        except EOFError:
            return
        _both_ways(f, x)


BENCHMARKS = (Benchmark("sharded", encode_decode, "at least", 1.6),)


def _anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


def _measure(rank: int, size: int, folder: str) -> None:
    """Print how much memory the share of this process takes, once it is there and while it is read."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    small = featurizers.load(Path(folder) / "small", mesh=mesh)  # imports are not counted
    before, peak, is_done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.is_set():
            peak = max(peak, _anonymous())
            time.sleep(0.002)

    watching = threading.Thread(target=watch)
    watching.start()
    begin = time.perf_counter()
    f = featurizers.load(Path(folder) / "whole", mesh=mesh)
    seconds = time.perf_counter() - begin
    is_done.set()
    watching.join()
    share = sum(tensor.nbytes for tensor in f.share.state_dict().values())
    print(
        f"rank {rank} of {size}: share {share >> 20} MiB, grew by {(_anonymous() - before) / share:.3f} of it, "
        f"at most by {(peak - before) / share:.3f} while it was read, {seconds:.2f} s",
        flush=True,
    )
    del small
    dist.barrier()
    dist.destroy_process_group()


def main(n_features: int = 131_072, d: int = 512, size: int = 4) -> None:
    """Print the memory of each process."""
    with tempfile.TemporaryDirectory() as folder:
        for name, n in (("small", 64), ("whole", n_features)):
            weights = torch.randn(2, n, d)
            whole = featurizers.DictionaryFeaturizer.from_tensors(*weights, rule="topk", rule_options={"k": 32})
            whole.save_pretrained(Path(folder) / name)
            del weights, whole
        torch.multiprocessing.spawn(_measure, (size, folder), nprocs=size)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
