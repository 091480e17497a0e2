"""A shard of a harvest beside the forward pass and the encoding that it needs; two nodes of Ray beside one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from dictionaries import pair
from featurizers_harvest.prepared import Options, Prepared
from models import gpt2, prompts
from timing import Benchmark, Case, Elsewhere, Settings, Skipped, Unequal, same
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


class _Ended(Exception):
    """Ends a forward pass."""


def shard(settings: Settings) -> Case:
    """Compare with plain forward passes that end at the site, and one encoding of each batch, written nowhere."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise Skipped(f"pyarrow cannot be used: {error}") from error
    layers, width, vocabulary = settings.size(12, 4), settings.size(768, 64), settings.size(50257, 100)
    length, documents = settings.size(128, 8), 8
    model = gpt2(settings, layers=layers, width=width, vocabulary=vocabulary, length=length).requires_grad_(False)
    f, _ = pair(settings, settings.size(16384, 128), "topk", width)
    f.site = f"resid.post:{layers - 1}"
    ids = prompts(settings, documents, length, vocabulary)
    _FOLDERS.append(tempfile.TemporaryDirectory())
    out = Path(_FOLDERS[-1].name) / "harvest"
    prepared = Prepared.of(model, {"f": f}, ids.cpu(), out, Options(batch_size=4, values="float32"))
    prepared.begin()
    worker = prepared.worker()
    block = model.transformer.h[layers - 1]

    @torch.no_grad()
    def activations(batch: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def keep(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)
            raise _Ended

        handle = block.register_forward_hook(keep)
        try:
            model(batch, use_cache=False)
        except _Ended:
            return kept[0]
        finally:
            handle.remove()
        raise RuntimeError("the forward pass was not ended")

    def theirs() -> list[Tensor]:
        with torch.no_grad():
            return [f.encode_sparse(activations(batch)).values for batch in ids.split(4)]

    def check() -> str:
        worker(0)
        table = pq.read_table(out / "site=f" / "part-000000.parquet")
        found = torch.tensor(table["values"].combine_chunks().flatten().to_pylist())
        values = torch.cat([batch.flatten(0, 1) for batch in theirs()])
        return same(found, values[values != 0].cpu(), 1e-4, f"{table.num_rows} tokens")

    what = f"harvest {f.n_features} features after {layers} layers, d={width}, {documents} documents × {length} tokens"
    peer = "plain forward passes that end at the site, and `encode_sparse`; nothing is written"
    return Case(what, peer, lambda: worker(0), theirs, check)


def nodes(settings: Settings) -> Case:
    """Compare actors of Ray on two nodes of this machine with one process, once all workers run."""
    if settings.device.type != "cpu":
        raise Skipped("two nodes of one machine share its accelerator")
    if find_spec("ray") is None or find_spec("psutil") is None:
        raise Skipped("Ray or psutil is not installed")
    width, length, documents = settings.size(768, 64), settings.size(128, 64), settings.size(320, 640)
    model = gpt2(settings, layers=settings.size(6, 2), width=width, vocabulary=100, length=length)
    _FOLDERS.append(tempfile.TemporaryDirectory())
    root = Path(_FOLDERS[-1].name)
    model.save_pretrained(root / "model")
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(100)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(root / "model")
    f, _ = pair(settings, settings.size(16384, 128), "topk", width)
    f.site = f"resid.post:{settings.size(5, 1)}"
    f.save_pretrained(root / "f")
    ids = prompts(settings, documents, length, 100).tolist()
    (root / "ids.jsonl").write_text("".join(json.dumps({"ids": each}) + "\n" for each in ids))
    rates: dict[str, list[float]] = {"ray": [], "local": []}

    def run(engine: str) -> Elsewhere:
        shutil.rmtree(root / engine, ignore_errors=True)
        script = [
            sys.executable,
            str(Path(__file__).with_name("harvest_nodes.py")),
            str(root),
            str(root / "model"),
            engine,
        ]
        done = subprocess.run(script, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        rates[engine].append(found["tokens"] / found["wall"])
        return Elsewhere(1000 * found["wall"] / found["tokens"], 1000 * found["cpu"] / found["tokens"])

    def check() -> str:
        return "the files are compared after the runs"

    def after() -> str:
        names = [
            f"site=f/part-{number:06d}.parquet" for number in range(len(list((root / "local" / "done").iterdir())))
        ]
        if any((root / "local" / name).read_bytes() != (root / "ray" / name).read_bytes() for name in names):
            raise Unequal("the files of Ray differ from those of one process")
        rate = {engine: max(each) for engine, each in rates.items()}
        return f"{len(names)} files equal in every byte; at best {rate['ray']:.0f} and {rate['local']:.0f} tokens/s"

    what = f"harvest of {documents} documents × {length} tokens by two nodes of Ray, seconds for 1000 tokens"
    return Case(what, "one process", lambda: run("ray"), lambda: run("local"), check, after)


BENCHMARKS = (Benchmark("harvest", shard, "at most", 1 / 0.9), Benchmark("harvest-nodes", nodes, "at least", 1.7))
