"""Several processes that share the tokens find the bases that one process finds."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from featurizers_causal_basis import extract_causal_bases
from torch import nn

from tests.support.models import prompts, tiny_model

D, VOCABULARY = 10, 40
ROOT = Path(__file__).parents[3]

WORKER = """
import os, sys, torch, torch.distributed as dist
from tests.plugins.causal_basis.test_distributed import CASES
torch.set_num_threads(1)  # threads of both processes would wait for each other's cores
rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
found = {name: case(rank, folder) for name, case in CASES.items()}
kept = {
    name: [(b.directions, b.energies, b.mean, b.record.n_tokens, b.record.evaluations) for b in bases]
    for name, bases in found.items()
}
torch.save(kept, f"{folder}/{rank}.pt")
try:
    CASES["mean"](rank, folder, mode="zero", resume=f"{folder}/run")
except ValueError as error:
    with open(f"{folder}/{rank}.txt", "w") as file:
        file.write(str(error))
dist.barrier()
os._exit(0)  # when Python ends in the usual way, gloo's threads sometimes abort the process after its work is done
"""


def decoder() -> nn.Sequential:
    made = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, VOCABULARY)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made[1].weight.copy_(torch.randn(VOCABULARY, D, generator=generator) * torch.linspace(2, 0.3, D))
        made[1].bias.copy_(torch.randn(VOCABULARY, generator=generator))
    return made


def hiddens() -> torch.Tensor:
    return torch.randn(100, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).cumsum(0) / 4


# Process 0 has 70 tokens, process 1 has 30.
SHARES = {None: slice(None), 0: slice(0, 70), 1: slice(70, 100)}


def of_hiddens(rank: int | None, folder: str, **options):
    return extract_causal_bases(decoder(), [hiddens()[SHARES[rank]]], 3, **options)


def of_a_model(rank: int | None, folder: str):
    ids = prompts(5, 6)[{None: slice(None), 0: slice(0, 3), 1: slice(3, 5)}[rank]]
    return extract_causal_bases(tiny_model("llama"), ids, 2, layers=[1], max_iter=10)


def resumed(rank: int | None, folder: str):
    if rank is None:
        return of_hiddens(rank, folder)
    of_hiddens(rank, folder, resume=f"{folder}/run")
    told = []
    bases = of_hiddens(rank, folder, resume=f"{folder}/run", progress=told.append)
    assert told == []
    return bases


CASES = {
    "mean": of_hiddens,
    "zero": lambda rank, folder: of_hiddens(rank, folder, mode="zero"),
    "resample": lambda rank, folder: of_hiddens(rank, folder, mode="resample"),
    "threshold": lambda rank, folder: of_hiddens(rank, folder, min_energy=1.0, preset="reference"),
    "resumed": resumed,
    "model": of_a_model,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the bases that each of two processes found, by case, and its error for a folder of another run."""
    folder = tmp_path_factory.mktemp("processes")
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), "2", str(folder)], cwd=ROOT) for rank in range(2)
    ]
    try:
        # no limit of time, which a busy machine would exceed: if one worker ends badly, the other one is ended too
        while any(worker.poll() is None for worker in workers) and not any(worker.poll() for worker in workers):
            time.sleep(0.05)
        assert [worker.poll() for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [(torch.load(folder / f"{rank}.pt"), (folder / f"{rank}.txt").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_what_one_finds(name, found):
    first, second = (bases[name] for bases, _ in found)
    alone = CASES[name](None, "")
    assert len(first) == len(second) == len(alone) == 1
    for one, other in zip(first[0], second[0], strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), "the processes differ"
    directions, energies, mean, n_tokens, _ = first[0]
    tolerance = 1e-3 if name == "model" else 1e-6
    assert n_tokens == alone[0].record.n_tokens
    assert torch.allclose(energies, alone[0].energies, rtol=tolerance)
    assert torch.allclose(mean, alone[0].mean, rtol=1e-5)
    cosines = (directions * alone[0].directions).sum(1).abs()
    assert float(cosines.min()) > 1 - tolerance
    if name == "threshold":
        assert 0 < len(energies) < 3, "the threshold has no effect"


def test_both_processes_refuse_a_folder_of_another_run(found):
    (_, first), (_, second) = found
    assert "belongs to another extraction: mode was 'mean' and is 'zero'" in first
    assert second == f"process 0 refuses: {first}"
