"""A shard of a harvest, from documents to committed files, beside the forward pass and the encoding that it needs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from dictionaries import pair
from featurizers_harvest.prepared import Options, Prepared
from models import gpt2, prompts
from timing import Benchmark, Case, Settings, Skipped, same
from torch import Tensor

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


BENCHMARKS = (Benchmark("harvest", shard, "at most", 1 / 0.9),)
