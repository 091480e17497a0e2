"""Causal bases compared with tuned-lens 0.2.0 and with the first published schedule: time, memory and energies.

``python benchmarks/causal_basis.py FILE.json`` runs everything and writes a report that ``report.py`` puts into the
document; ``--only NAME`` runs some cases, and ``--picture`` plots the cost of an evaluation. Each sample runs in its
own process, so that memory is measured separately, and the sides alternate. tuned-lens needs packages that the library
does not: install it with ``--no-deps`` into a folder, and set ``FEATURIZERS_TUNED_LENS`` to that folder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import Machine, Report
from timing import Row, Settings, cpu_seconds
from torch import Tensor, nn

MODEL = os.environ.get("FEATURIZERS_BENCHMARK_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""Hub id, folder, or .gguf file."""
PEERS = os.environ.get("FEATURIZERS_TUNED_LENS")
ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "benchmarks-causal-basis.png"
PEER = "tuned-lens"
PUBLISHED = "published"
NAMES = {PEER: "tuned-lens 0.2.0, LogitLens", PUBLISHED: "the schedule that was published first, by autograd"}


@dataclass(frozen=True)
class Comparison:
    """Samples of one preset, to compare with a peer.

    Attributes:
        name: of the row.
        case: a key of `CASES`.
        preset: of this library.
        required: least ratio of the peer's time to this library's.
        samples: per side.
        peer: a key of `NAMES`.
    """

    name: str
    case: str
    preset: str
    required: float | None
    samples: int
    peer: str = PEER


COMPARISONS = (
    Comparison("causal-reference", "toy", "reference", 4.5, 3),
    Comparison("causal-multi", "toy", "multi", 2.5, 3),
    Comparison("causal-axes", "toy", "reference-axes", None, 3, PUBLISHED),
    Comparison("causal-reference-trained", "trained", "reference", 4.5, 3),
    Comparison("causal-multi-trained", "trained", "multi", 2.5, 3),
    Comparison("causal-axes-trained", "trained", "reference-axes", None, 3, PUBLISHED),
    Comparison("causal-smollm2", "smollm2", "multi", 10.0, 1),
)


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, the inputs of the blocks to find bases for, and the number of vectors."""

    what: str
    model: nn.Module
    hiddens: list[Tensor]
    k: int


def toy(*, trained: bool) -> Problem:
    """Return a small GPT-2 with random weights, or after 300 steps on a Markov chain of 32 classes of words."""
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary, classes = 2048, 32
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=vocabulary, bos_token_id=None, eos_token_id=None)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config).train()
    generator = torch.Generator().manual_seed(1)
    move = torch.softmax(torch.randn(classes, classes, generator=generator) * 2.5, -1)
    word = torch.softmax(-1.2 * torch.log(torch.arange(1, vocabulary // classes + 1).float()), 0)

    def text(n: int, length: int) -> Tensor:
        ids, state = torch.empty(n, length, dtype=torch.long), torch.randint(0, classes, (n,), generator=generator)
        for i in range(length):
            ids[:, i] = state * (vocabulary // classes) + torch.multinomial(word, n, True, generator=generator)
            state = torch.multinomial(move[state], 1, generator=generator)[:, 0]
        return ids

    loss = None
    if trained:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(300):
            ids = text(8, 64)
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        states = model.eval()(text(8, 64), output_hidden_states=True).hidden_states
    name = "random weights" if loss is None else f"300 steps on a Markov chain, loss {loss.item():.2f}"
    return Problem(f"GPT-2, 4 layers, d 256, V 2048, {name}, 512 tokens, k 6", model, list(states), 6)


def smollm2() -> Problem:
    """Return 512 tokens of the licence, which never changes, without the first of each prompt, at two layers."""
    from featurizers.models import load_model

    given = load_model(MODEL)
    text = (ROOT / "LICENSE").read_text()
    ids = given.tokenizer(text, return_tensors="pt").input_ids[0, : 4 * 129].reshape(4, 129)
    with torch.no_grad():
        states = given.model(ids, output_hidden_states=True).hidden_states
    hiddens = [states[layer][:, 1:].contiguous() for layer in (15, 25)]
    return Problem(
        "SmolLM2-135M-Instruct, V 49152, inputs of blocks 15 and 25, 512 tokens, k 3", given.model, hiddens, 3
    )


CASES = {"toy": lambda: toy(trained=False), "trained": lambda: toy(trained=True), "smollm2": smollm2}


def by_featurizers(problem: Problem, preset: str) -> tuple[list[float], int]:
    """Return the summed energy of each layer and the number of evaluations, by this library."""
    from featurizers_causal_basis import LogitLens, extract_causal_bases

    bases = extract_causal_bases(LogitLens(problem.model), problem.hiddens, problem.k, preset=preset)
    return [float(basis.energies.sum()) for basis in bases], sum(basis.record.evaluations or 0 for basis in bases)


def by_tuned_lens(problem: Problem) -> tuple[list[float], int]:
    """Return the same by tuned-lens. It ignores the last hidden states, so the last ones are given twice."""
    from tuned_lens.causal import subspaces
    from tuned_lens.nn.lenses import LogitLens

    lens, count = LogitLens.from_model(problem.model), 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    lens.register_forward_hook(note)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        layers = problem.hiddens if len(problem.hiddens) > 4 else [*problem.hiddens, problem.hiddens[-1]]
        bases = list(subspaces.extract_causal_bases(lens, layers, problem.k))
    return [float(basis.energies.sum()) for basis in bases], count - len(bases)


def by_published_schedule(problem: Problem) -> tuple[list[float], int]:
    """Return the same by one ascent per vector from a unit axis, with autograd through the final norm and the head."""
    run = nn.Sequential(problem.model.transformer.ln_f, problem.model.lm_head).requires_grad_(False)
    layers = [_published_layer(run, hidden.flatten(0, -2), problem.k) for hidden in problem.hiddens[:-1]]
    return [energy for energy, _ in layers], sum(count for _, count in layers)


def _published_layer(run: nn.Module, h: Tensor, k: int) -> tuple[float, int]:
    d, mean, eps = h.shape[1], h.mean(0), torch.finfo(h.dtype).eps
    basis, total, count = torch.zeros(d, 0), 0.0, 0
    with torch.no_grad():
        log_p = run(h).log_softmax(-1)

    def unit(x: Tensor) -> Tensor:
        rest = x - basis @ (basis.mT @ x)
        return rest / (rest.norm() + eps)

    def energy(v: Tensor) -> Tensor:
        log_q = run(h - ((h - mean) @ v).unsqueeze(-1) * v).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def loss() -> Tensor:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        negative = -energy(unit(v))
        negative.backward()
        return negative

    for j in range(k):
        v = nn.Parameter(unit(torch.eye(d)[:, j]))
        optimizer = torch.optim.LBFGS([v], line_search_fn="strong_wolfe", max_iter=100, tolerance_change=eps)
        optimizer.step(loss)
        with torch.no_grad():
            direction = unit(v)
            total += float(energy(direction))
            basis = torch.cat([basis, direction.unsqueeze(-1)], dim=1)
    return total, count


SIDES = {PEER: by_tuned_lens, PUBLISHED: by_published_schedule}


def sample(case: str, side: str) -> None:
    """Print one sample as JSON: seconds, CPU seconds, and memory in addition to the model and the hidden states."""
    torch.set_num_threads(1)
    if case == "trained":  # all samples share one model
        kept = Path(os.environ["FEATURIZERS_BENCHMARK_FOLDER"]) / "trained.pt"
        if not kept.exists():
            made = toy(trained=True)
            torch.save((made.what, made.model.state_dict(), made.hiddens), kept)
        what, state, hiddens = torch.load(kept)
        plain = toy(trained=False)
        plain.model.load_state_dict(state)
        problem = Problem(what, plain.model, hiddens, plain.k)
    else:
        problem = CASES[case]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    energies, evaluations = SIDES[side](problem) if side in SIDES else by_featurizers(problem, side)
    measured = {
        "seconds": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "energies": energies,
        "evaluations": evaluations,
        "what": problem.what,
    }
    print(json.dumps(measured))


def run_sample(case: str, side: str, folder: Path) -> dict[str, Any]:
    """Run one sample in its own process and return it."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), PEERS if side == PEER else None]))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "FEATURIZERS_BENCHMARK_FOLDER": str(folder),
        "PYTHONPATH": path,
    }
    command = [sys.executable, __file__, "--sample", case, side]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{case} {side}: {measured['seconds']:.1f} s, {measured['evaluations']} evaluations, {measured['energies']}",
        flush=True,
    )
    return measured


def compare(name: str, comparisons: list[Comparison], folder: Path) -> list[Row]:
    """Return the rows of one case; its sides alternate."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for _ in range(comparisons[0].samples):
        for side in dict.fromkeys((*(each.preset for each in comparisons), *(each.peer for each in comparisons))):
            samples.setdefault(side, []).append(run_sample(name, side, folder))
    return [row(comparison, samples[comparison.preset], samples[comparison.peer]) for comparison in comparisons]


def row(comparison: Comparison, mine: list[dict[str, Any]], peers: list[dict[str, Any]]) -> Row:
    """Return one line of the table."""
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(mine, peers, strict=True)]
    medians = [statistics.median(each[what] for each in side) for side in (mine, peers) for what in ("seconds", "cpu")]
    a, b = mine[0], peers[0]
    total = sum(a["energies"]) / sum(b["energies"]) - 1
    layers = ", ".join(f"{x:.5g} ({x / y - 1:+.2%})" for x, y in zip(a["energies"], b["energies"], strict=True))
    ratio = medians[2] / medians[0]
    return Row(
        name=comparison.name,
        what=f"preset {comparison.preset}: {a['what']}",
        peer=NAMES[comparison.peer],
        required=comparison.required,
        ours=medians[0],
        theirs=medians[2],
        ratio=ratio,
        spread=(min(ratios), max(ratios)),
        pairs=len(ratios),
        ours_cpu=medians[1],
        theirs_cpu=medians[3],
        cpu_ratio=medians[3] / medians[1],
        met=None if comparison.required is None else ratio >= comparison.required,
        outcome=f"summed energy of each layer {layers}, of all {total:+.3%}; {a['evaluations']} evaluations here, "
        f"{b['evaluations']} there; memory beyond the model's {a['bytes'] / 2**20:.0f} MiB here, "
        f"{b['bytes'] / 2**20:.0f} MiB there",
    )


# ---------------------------------------------------------------------- cost of an evaluation


def point(d: int, vocabulary: int, n: int) -> tuple[float, float]:
    """Return CPU seconds of one evaluation with its gradient, in closed form and by autograd."""
    from featurizers_causal_basis import Decoder
    from featurizers_causal_basis.solve.differentiated import DifferentiatedEnergy
    from featurizers_causal_basis.solve.energy import Tokens
    from featurizers_causal_basis.solve.exact import ExactEnergy
    from featurizers_causal_basis.solve.processes import Processes

    run = nn.Sequential(nn.RMSNorm(d, eps=1e-6), nn.Linear(d, vocabulary, bias=False)).requires_grad_(False)
    settings = Settings(torch.device("cpu"))
    tokens = Tokens.of(settings.randn(n, d), "mean", Processes(), 0)
    form = Decoder(run).affine_norm(0)
    assert form is not None
    v = nn.functional.normalize(settings.randn(d, seed=1).double(), dim=0)
    exact = ExactEnergy(tokens, form)
    general = DifferentiatedEnergy(tokens, [slice(0, n)], lambda h, _: run(h).log_softmax(-1))
    mine, other = (cpu_seconds(lambda e=e: e.value_and_grad(v), settings, samples=3) for e in (exact, general))
    return mine, other


def picture() -> None:
    """Plot the cost of an evaluation against the width, the vocabulary and the number of tokens."""
    from matplotlib import pyplot

    torch.set_num_threads(1)
    base = {"d": 512, "vocabulary": 8192, "n": 256}
    panels = {
        "d": ("width d", (64, 128, 256, 512, 1024, 2048)),
        "vocabulary": ("vocabulary V", (1024, 4096, 16384, 49152)),
        "n": ("tokens", (64, 256, 1024)),
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
    for axis, (name, (label, sizes)) in zip(axes, panels.items(), strict=True):
        points = [point(**{**base, name: size}) for size in sizes]
        axis.loglog(sizes, [other for _, other in points], "s--", color="0.45", label="autograd")
        axis.loglog(sizes, [mine for mine, _ in points], "o-", color="C0", label="by the formula")
        axis.set_xlabel(label)
        axis.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
        axis.minorticks_off()
        axis.grid(True, alpha=0.25)
    axes[0].set_ylabel("CPU seconds of an evaluation")
    axes[0].legend(frameon=False)
    figure.savefig(PICTURE, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="file for the report")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--sample", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample:
        sample(*options.sample)
        return
    if options.picture:
        picture()
        return
    import tempfile

    settings, before, rows = Settings(torch.device("cpu")), os.getloadavg()[0], []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            rows += compare(name, [each for each in COMPARISONS if each.case == name], Path(folder))
    load = before, os.getloadavg()[0]
    report = Report(
        device="cpu",
        dtype="float32",
        quick=False,
        pairs=3,
        machine=Machine.here(settings),
        load=load,
        rows=rows,
        table="causal-basis",
    )
    report.print()
    if options.file is not None:
        options.file.write_text(report.model_dump_json(indent=2))


if __name__ == "__main__":
    main()
