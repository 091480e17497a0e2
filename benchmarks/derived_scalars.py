"""Derived scalars: beside writes that are made one by one, and beside a plain forward and backward pass.

``python benchmarks/derived_scalars.py`` measures how the cost grows, and the identities, and writes both into the
document. The rows are those of ``python benchmarks/run.py --only scalars``.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timing
import torch
import typer
from featurizers.errors import FeaturizerError
from featurizers.models import load_model
from featurizers_derived_scalars import Basis, Circuit, Need, Place, capture, direct_total, logit_difference, plan
from featurizers_derived_scalars.quantities import act_times_grad, write_to
from models import prompts
from timing import Benchmark, Case, Settings, Sizes, Skipped, same
from torch import Tensor, einsum

HERE = Path(__file__).resolve().parent
PICTURE = HERE.parent / "docs" / "benchmarks-scalars.png"
RESULTS = HERE / "results" / "scalars-growth.json"
MODEL = os.environ.get("FEATURIZERS_BENCHMARK_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""Hub id, folder, or .gguf file, as ``featurizers scalars --model`` takes it."""
PAIR_TOKENS, TOP_TOKENS, TOP = 384, 512, 20
LENGTHS, DEPTHS = (64, 128, 256, 512), (4, 8, 16, 24, 30)
METRIC = logit_difference(5, 7)
HEADS = "write_to:attn.probs"
MEMORY = 2 * 2**30


# ---------------------------------------------------------------------- one layer's heads


def _decoder(settings: Settings, layers: int, length: int) -> Any:
    """A model of the sizes of SmolLM2-135M's blocks, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
    full = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(
        **(small if settings.quick else full),
        num_hidden_layers=layers,
        vocab_size=1000,
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().to(settings.device, settings.dtype)


@functools.lru_cache(maxsize=1)
def _layer(settings: Settings) -> tuple[Any, Callable[[], Tensor]]:
    """What was captured of one layer, and its heads' direct effects by ours."""
    length = settings.size(PAIR_TOKENS, 16)
    circuit = Circuit(_decoder(settings, 1, length))
    scalar = write_to(Basis("attn.probs"))
    (raw,) = capture(circuit, prompts(settings, 1, length, 1000)[0], scalar.needs(circuit), metric=METRIC)
    return raw, lambda: scalar.derive(raw)[HEADS, 0]


def pair_writes(raw: Any) -> Tensor:
    """The same by way of what each head writes for each pair, as transformer-debugger makes it."""
    place = Place("attn.z", 0)
    probs, values = raw[Place("attn.probs", 0), "forward"], raw[Place("attn.v", 0), "forward"]
    matrix, gradient = raw.circuit.write_matrix(place), raw[Place("resid.final"), "backward"]
    weighted = einsum("qkh,khe->hqke", probs, values)
    writes = weighted.flatten(1, 2) @ matrix.to(values.dtype)  # (head, pair, d_model), in the order that needs no copy
    return (writes.unflatten(1, probs.shape[:2]) @ gradient[None, :, :, None]).squeeze(-1).permute(1, 2, 0)


def _what(settings: Settings) -> str:
    length = settings.size(PAIR_TOKENS, 16)
    return f"direct effects of the {settings.size(9, 3)} heads of a layer of SmolLM2-135M's sizes, {length}² pairs"


def direct(settings: Settings) -> Case:
    """Direct effects of heads by pairs of tokens."""
    raw, ours = _layer(settings)
    with torch.no_grad():
        close = same(ours(), pair_writes(raw), timing.tolerance(settings.dtype), "direct effects")
    return Case(
        _what(settings),
        "the write of each head for each pair, times the gradient",
        ours,
        torch.no_grad()(lambda: pair_writes(raw)),
        lambda: close,
    )


def _peak(what: str, settings: Settings) -> dict[str, Any]:
    """What a process of its own needs at most: it prints JSON."""
    arguments = [sys.executable, str(Path(__file__)), "--peak", what, *(["--quick"] if settings.quick else [])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Skipped(f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _status(name: str) -> int:
    """Bytes of a row of this process's status, such as its greatest resident size."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError as error:
        raise Skipped(f"the memory of a process is read from /proc: {error}") from error
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024


def _growth_of(call: Callable[[], object]) -> int:
    """Bytes by which a call raises the greatest resident size above what is resident before."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not to be had for nothing
    Path("/proc/self/clear_refs").write_text("5")  # the greatest size is counted anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def direct_memory(settings: Settings) -> Sizes:
    """Memory of the same, each in a process of its own."""
    if settings.device.type != "cpu":
        raise Skipped("resident memory says nothing of a device's")
    ours, theirs = (int(_peak(side, settings)["bytes"]) for side in ("direct", "pairs"))
    return Sizes(
        f"memory touched: {_what(settings)}",
        "the write of each head for each pair, times the gradient",
        ours,
        theirs,
        "each in a process of its own, above what was resident before",
    )


# ---------------------------------------------------------------------- the largest of a whole model


@functools.lru_cache(maxsize=1)
def _model(settings: Settings) -> Circuit:
    if settings.quick:
        return Circuit(_decoder(settings, 3, 32))
    try:
        return Circuit(load_model(MODEL, device=settings.device, dtype=settings.dtype).model)
    except (FeaturizerError, ImportError) as error:
        raise Skipped(
            f"{error}; name a model, a folder or a .gguf file in FEATURIZERS_BENCHMARK_MODEL (see docs/demo.md)"
        ) from error


def _ids(settings: Settings, circuit: Circuit, length: int) -> Tensor:
    return prompts(settings, 1, length, min(circuit.d_vocab, 40000))[0]


def plain_pass(model: Any, ids: Tensor) -> Tensor:
    """The metric's gradient in the embedding: one forward and one backward pass."""
    embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
    (gradient,) = torch.autograd.grad(METRIC.of(logits), embedded)
    return gradient[0]


def largest(circuit: Circuit, ids: Tensor, what: str) -> list[Any]:
    """The largest scalars of all layers, from nothing but the model's circuit."""
    ((_, found),) = plan(circuit, what, metric=METRIC).run(ids)
    return found.topk(TOP, absolute=True)


def _top(what: str, settings: Settings) -> Case:
    circuit = _model(settings)
    length = settings.size(TOP_TOKENS, 16)
    ids = _ids(settings, circuit, length)

    def check() -> str:
        needs = [Need("resid.embed", "backward")]
        (raw,) = capture(circuit, ids, needs, metric=METRIC, freeze_norms=())
        ours = raw[Place("resid.embed"), "backward"]
        return same(ours, plain_pass(circuit.model, ids), 1e-3, "gradients in the embedding")

    return Case(
        f"{TOP} largest of {what}, of every head at every pair, neuron, bias and the embedding: "
        f"{settings.size(30, 3)} layers, {length} tokens",
        "one plain forward and backward pass",
        lambda: largest(circuit, ids, what),
        lambda: plain_pass(circuit.model, ids),
        check,
    )


def _top_memory(what: str, settings: Settings) -> Sizes:
    if settings.device.type != "cpu":
        raise Skipped("resident memory says nothing of a device's")
    _model(settings)  # which says where there is none
    ours, plain = _peak(what, settings), _peak("plain", settings)
    return Sizes(
        f"greatest resident size of a process that loads the model and finds the {TOP} largest of {what}",
        "2 GiB",
        float(ours["peak"]),
        MEMORY,
        f"a plain forward and backward pass: {plain['peak'] / 2**30:.2f} GiB",
    )


BENCHMARKS = (
    Benchmark("scalars-direct", direct, required=30),
    Benchmark("scalars-direct-memory", direct_memory, required=30),
    Benchmark("scalars-top-direct", functools.partial(_top, "write_to"), "at most", 3),
    Benchmark("scalars-top-total", functools.partial(_top, "act_times_grad"), "at most", 3),
    Benchmark("scalars-top-direct-memory", functools.partial(_top_memory, "write_to"), "at most", 1),
    Benchmark("scalars-top-total-memory", functools.partial(_top_memory, "act_times_grad"), "at most", 1),
)


def _measure_peak(what: str, settings: Settings) -> dict[str, int]:
    """In a process of its own: bytes that one computation takes, or the process at its greatest."""
    torch.set_num_threads(1)
    if what in ("direct", "pairs"):
        raw, ours = _layer(settings)
        with torch.no_grad():
            return {"bytes": _growth_of(ours if what == "direct" else lambda: pair_writes(raw))}
    circuit = _model(settings)
    ids = _ids(settings, circuit, settings.size(TOP_TOKENS, 16))
    if what == "plain":
        plain_pass(circuit.model, ids)
    else:
        largest(circuit, ids, what)
    return {"peak": _status("VmHWM")}


# ---------------------------------------------------------------------- identities and growth


def identities(settings: Settings) -> dict[str, float]:
    """The worst relative error of each identity over all layers and tokens, on a prompt of random tokens."""
    circuit = _model(settings)
    ids = _ids(settings, circuit, settings.size(128, 16))
    with torch.no_grad():  # a difference of some size, since logits are rounded, whatever their difference
        row = circuit.model(ids[None]).logits[0, -1]
    metric = logit_difference(int(row.argmax()), int(row.argmin()))
    effects = plan(circuit, "write_to", metric=metric)
    pieces = [Need(kind) for kind in ("resid.pre", "resid.mid", "resid.post", "attn.z", "mlp.neurons", "resid.final")]
    graded = [Need(kind, "backward") for kind in ("resid.mid", "resid.post")]
    totals = {
        "heads": act_times_grad(Basis("attn.probs")),
        "neurons": act_times_grad(Basis("mlp.neurons")),
    }
    needs = frozenset({*effects.needs, *pieces, *graded}).union(*(one.needs(circuit) for one in totals.values()))
    (raw,) = capture(circuit, ids, needs, metric=metric)

    def forward(kind: str, layer: int | None = None) -> Tensor:
        return raw[Place(kind, layer), "forward"]

    def written(kind: str, layer: int) -> Tensor:
        place, bias = Place(kind, layer), raw.bias_write(Place(kind, layer))
        write = raw.write(place, raw[place, "forward"])
        return write if bias is None else write + bias

    sums = attribution = 0.0
    running = forward("resid.embed").double()
    for layer in range(circuit.n_layers):
        for kind, after in (("attn.z", "resid.mid"), ("mlp.neurons", "resid.post")):
            running = running + written(kind, layer).double()
            sums = max(sums, _relative(running, forward(after, layer)))
        for name, kind, after in (("heads", "attn.z", "resid.mid"), ("neurons", "mlp.neurons", "resid.post")):
            derived = totals[name].derive(raw, [layer])
            ((key, found),) = derived.items()
            place = Place(kind, layer)
            effect = raw.write_vjp(place, raw[Place(after, layer), "backward"]) * raw[place, "forward"]
            reduced = found.sum(1) if name == "heads" else found
            attribution = max(attribution, _relative(reduced, effect.sum(-1) if name == "heads" else effect))
            assert key[1] == layer
    direct_sum = float(effects.derive(raw).sum())
    return {
        "residual stream = embedding + every write and bias": sums,
        "activation · gradient = write · gradient after it, of heads and neurons": attribution,
        "direct effects sum to the residual stream · gradient": abs(direct_sum / float(direct_total(raw)) - 1),
        "direct effects sum to the logit difference": abs(direct_sum / float(raw.metric or 0.0) - 1),
    }


def _relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference at any token, as a part of that token's vector."""
    wanted = wanted.double()
    return float(((found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)).max())


def growth(settings: Settings) -> dict[str, Any]:
    """CPU seconds of the largest direct effects and of a plain pass, by tokens and by layers."""
    circuit = _model(settings)
    points: dict[str, Any] = {"tokens": [], "layers": []}
    for length in LENGTHS:
        ids = _ids(settings, circuit, length)
        points["tokens"].append((length, *_both(circuit, ids, settings)))
    ids = _ids(settings, circuit, 128)
    for depth in DEPTHS:
        points["layers"].append((depth, *_both(Circuit(_cut(circuit.model, depth)), ids, settings)))
    return points


def _cut(model: Any, depth: int) -> Any:
    """The model without the blocks after some depth."""
    import copy

    shallow = copy.copy(model)
    shallow._modules = dict(model._modules)
    base = copy.copy(model.model)
    base._modules = dict(base._modules)
    base.layers = base.layers[:depth]
    shallow.model = base
    shallow.config = copy.deepcopy(model.config)
    shallow.config.num_hidden_layers = depth
    base.config = shallow.config
    return shallow


def _both(circuit: Circuit, ids: Tensor, settings: Settings) -> tuple[float, float, float]:
    calls: list[Callable[[], object]] = [
        functools.partial(largest, circuit, ids, what) for what in ("write_to", "act_times_grad")
    ]
    calls.append(functools.partial(plain_pass, circuit.model, ids))
    direct_s, total_s, plain_s = (timing.cpu_seconds(call, settings, samples=3) for call in calls)
    return direct_s, total_s, plain_s


def draw(points: dict[str, Any], picture: Path) -> None:
    """Both curves."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (name, label) in zip(
        axes, (("tokens", "tokens, 30 layers"), ("layers", "layers, 128 tokens")), strict=True
    ):
        sizes, direct_s, total_s, plain_s = zip(*points[name], strict=True)
        axis.plot(sizes, plain_s, "s--", color="0.45", label="a plain forward and backward pass")
        axis.plot(sizes, direct_s, "o-", color="C0", label=f"{TOP} largest direct effects")
        axis.plot(sizes, total_s, "^-", color="C1", label=f"{TOP} largest activation · gradient")
        axis.set_xlabel(label)
        axis.grid(True, alpha=0.25)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("CPU seconds")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(picture, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _write_identities(found: dict[str, float], what: str, document: Path) -> None:
    start, end = "<!-- results: scalar identities -->", "<!-- end of results: scalar identities -->"
    text = document.read_text()
    before, _, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not closed:
        raise ValueError(f"{document.name} has no markers {start!r} and {end!r}")
    rows = "\n".join(f"| {name} | {error:.1e} |" for name, error in found.items())
    table = f"{what}\n\n| identity | worst relative error |\n| --- | ---: |\n{rows}"
    document.write_text(f"{before}{start}\n{table}\n{end}{after}")


def main(
    quick: Annotated[bool, typer.Option(help="Small sizes, and no files.")] = False,
    peak: Annotated[str | None, typer.Option(help="Print what one computation takes, and end.")] = None,
    draw_only: Annotated[bool, typer.Option(help="Draw the numbers that are there, and measure nothing.")] = False,
    only_identities: Annotated[bool, typer.Option(help="Not the curves.")] = False,
) -> None:
    """Measure the identities and the curves, and write them into the document."""
    import report

    settings = Settings(torch.device("cpu"), quick=quick, sample=0.01 if quick else 0.05)
    if peak is not None:
        print(json.dumps(_measure_peak(peak, settings)))
        return
    if draw_only:
        draw(json.loads(RESULTS.read_text()), PICTURE)
        return
    torch.set_num_threads(1)
    found = identities(settings)
    for name, error in found.items():
        print(f"{name}: {error:.2e}")
    if quick:
        return
    what = f"{Path(MODEL).name}, 128 random tokens, float32, over all layers and tokens."
    _write_identities(found, what, report.DOCUMENT)
    if not only_identities:
        points = growth(settings)
        RESULTS.write_text(json.dumps(points, indent=2) + "\n")
        draw(points, PICTURE)


if __name__ == "__main__":
    typer.run(main)
