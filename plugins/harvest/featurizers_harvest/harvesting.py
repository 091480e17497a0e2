"""`harvest` and `check`: features or activations of a corpus into Parquet files, and some of them computed again."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from featurizers.cli import ProgressBar, progress_bar
from featurizers.errors import UsageError, shown
from featurizers.files import temporary_folder
from featurizers_evaluate import launched

from featurizers_harvest.engines import Engine, engine_of
from featurizers_harvest.folders import Disk
from featurizers_harvest.prepared import Options, Prepared
from featurizers_harvest.reading import Harvest
from featurizers_harvest.reading import open as open_harvest
from featurizers_harvest.shards import Result


def harvest(
    model: object,
    wanted: Any,
    data: Any,
    out: str | Path,
    *,
    tokenizer: Any = None,
    key: str | None = None,
    context: int | None = None,
    batch_size: int = 8,
    exclude_special_tokens: bool | Iterable[int] = False,
    values: str = "float16",
    shard_tokens: int = 2**16,
    max_documents: int | None = None,
    shard: tuple[int, int] | Literal["rank"] | None = None,
    engine: str | Engine = "local",
    workers: int = 1,
    device: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    any_model: bool = False,
    progress: bool = True,
) -> Harvest:
    """Write features, or activations, of a corpus to Parquet files, one row a token, exactly once.

    All is read in one pass of the model, which ends after the last site. Shards of documents are computed and committed
    one by one. Called again after a stop, at whatever point it came, it computes the shards that are missing, and the
    files are those of a run that was not stopped.

    Args:
        model: a decoder, as in `featurizers.intervene`; or the name of one, as in `featurizers.load_model`.
        wanted: by name, featurizers and maps between sites, whose features that are not 0 are written, and sites, whose
            activations are; or a list of these.
        data: path of a ``.jsonl``, ``.parquet`` or text file; or documents: token ids ``(documents, tokens)``, inputs
            with ``attention_mask``, or an iterable that can be read again of texts, token ids or records, such as a
            data set.
        out: folder, or an address that fsspec knows, such as ``s3://bucket/name``.
        tokenizer: of the model, for texts; a model that is given by name brings its own.
        key: under which a record has its text or token ids; None for ``text``, or in memory ``input_ids`` too.
        context: tokens of a row; longer documents are cut into several. None for 1024, or the most of the model.
        batch_size: rows that run together.
        exclude_special_tokens: token ids that are read and get no features, or True for the tokenizer's bos, eos, pad,
            sep and decoder start. Those of a featurizer never get any.
        values: ``float16`` or ``float32``; a value that float16 cannot hold is an error.
        shard_tokens: about how many tokens a shard has; four bytes of a text count as one.
        max_documents: number of documents to read; None for all.
        shard: ``(i, n)`` computes every n-th shard from the i-th on, for one of n jobs; ``"rank"`` takes both from
            torchrun, whose processes share the shards; None for all.
        engine: ``local``, ``ray``, or another `Engine`.
        workers: processes, or actors of Ray; more than one take the model by its name.
        device: of a model that is given by its name.
        dtype: of a model that is given by its name; None for the stored one.
        any_model: accept another model than the one that a featurizer's artefact names.
        progress: whether to show a bar on a terminal, or a line for each shard.

    Raises:
        UsageError: an argument is invalid, or a document does not fit the model.
        ArtefactError: the folder holds a harvest of another plan, or cannot be written.
        SiteError, ShapeError: a featurizer does not fit the model.

    Examples:
        >>> import torch, featurizers, tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).eval()
        >>> f = featurizers.DictionaryFeaturizer.from_tensors(torch.randn(16, 8), torch.randn(16, 8))
        >>> f.site = "resid.post:0"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = featurizers.harvest(model, {"f": f}, torch.arange(20).reshape(2, 10), folder, progress=False)
        ...     found.table("f").num_rows
        20
    """
    options = Options(
        tokenizer=tokenizer,
        key=key,
        context=context,
        batch_size=batch_size,
        exclude_special_tokens=exclude_special_tokens,
        values=values,
        shard_tokens=shard_tokens,
        max_documents=max_documents,
        device=device,
        dtype=dtype,
        any_model=any_model,
    )
    chosen, used = _chosen(shard), engine_of(engine, workers)
    prepared = Prepared.of(model, wanted, data, out, options)
    if chosen is None:
        with prepared.folder.lock():
            prepared.folder.clear()
            _run(prepared, used, range(len(prepared.shards)), progress)
    else:
        _run(prepared, used, range(chosen[0], len(prepared.shards), chosen[1]), progress)
    return open_harvest(out, partial=chosen is not None)


def check(
    model: object, wanted: Any, data: Any, out: str | Path, *, share: float = 0.01, seed: int = 0, **options: Any
) -> list[str]:
    """Compute some shards of a harvest once more, and return what differs from its files: nothing, as a rule.

    Args:
        model: as in `harvest`.
        wanted: as in `harvest`.
        data: as in `harvest`.
        out: as in `harvest`.
        share: of the shards, at least one.
        seed: of their choice.
        options: those of `harvest` that its rows depend on, which have to be given again.

    Raises:
        UsageError: an argument is invalid, or nothing was harvested.
        ArtefactError: the arguments are not those of the folder's plan.
    """
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise UsageError(f"share is a number above 0, and at most 1, not {shown(share)}")
    prepared = Prepared.of(model, wanted, data, out, Options(**options), trust=False)
    done = sorted(prepared.finished())
    if not done:
        raise UsageError(f"{prepared.folder.where} has no finished shard to check")
    chosen = random.Random(seed).sample(done, max(1, math.ceil(share * len(done))))
    worker = prepared.worker()
    lost = [f"shard {number} is not there whole" for number in set(range(len(prepared.shards))) - set(done)]
    with temporary_folder() as scratch:
        return [*lost, *(each for number in sorted(chosen) for each in worker.check(number, Disk(scratch)))]


def _chosen(shard: Any) -> tuple[int, int] | None:
    if shard is None:
        return None
    if isinstance(shard, str) and shard == "rank":
        if (place := launched()) is None:
            raise UsageError("shard='rank' is for processes that torchrun starts; give (i, n)")
        return place.rank, place.size
    try:
        i, n = shard
    except (TypeError, ValueError):
        i, n = None, None
    if type(i) is not int or type(n) is not int or not 0 <= i < n:
        raise UsageError(f"shard is (i, n) with i from 0 to n - 1, not {shown(shard)}")
    return i, n


def _run(prepared: Prepared, engine: Engine, numbers: range, progress: bool) -> None:
    """Compute the shards that are missing."""
    done = prepared.finished()
    left = [number for number in numbers if number not in done]
    if not left:
        prepared.begin()
        return
    documents = sum(prepared.shards[number].documents for number in left)
    with prepared.start(engine) as start, progress_bar(documents, "harvest", shown=progress) as bar:
        prepared.begin()
        told = _Told(bar, len(left), documents)
        for result in engine.run(start, left):
            told.add(result)


class _Told:
    """What the bar shows."""

    def __init__(self, bar: ProgressBar, shards: int, documents: int) -> None:
        self._bar, self._shards, self._total = bar, shards, documents
        self._begin, self._done, self._tokens, self._documents = time.perf_counter(), 0, 0, 0

    def add(self, result: Result) -> None:
        """Show one more shard."""
        self._done += 1
        self._tokens += result.tokens
        self._documents += result.documents
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        rate = f"{self._tokens / seconds:,.0f} tokens/s"
        left = seconds * (self._total - self._documents) / max(self._documents, 1)
        self._bar.advance(result.documents, f"harvest, {rate}")
        self._bar.note(
            f"shard {result.shard}, {self._done} of {self._shards}: {result.tokens:,} tokens, {rate}, "
            f"{left / 60:,.1f} minutes left"
        )
