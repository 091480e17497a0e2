"""Exports of a harvest to the files of other libraries."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from featurizers.errors import MissingDependencyError, UsageError, shown
from featurizers.files import filling, os_errors, temporary_folder
from safetensors.numpy import save_file

from featurizers_harvest.reading import Harvest
from featurizers_harvest.targets import NAME


def to_sae_lens(harvest: Harvest, name: str, out: str | Path, *, hook_name: str, context_size: int) -> int:
    """Write activations as SAELens caches them, for its ``cached_activations_path``.

    That is a folder of `datasets` whose rows are contexts of one length. Tokens are put side by side in their order,
    across documents; each has the activation of its own document. Tokens that fill no whole context at the end are left
    out.

    Args:
        harvest: complete.
        name: of a site in it.
        out: new folder.
        hook_name: of the activations, such as ``blocks.3.hook_resid_post``.
        context_size: tokens of a context.

    Returns:
        The number of contexts.

    Raises:
        UsageError: there are features under this name, or too few tokens for a context.
        ArtefactError: the folder is not empty, or cannot be written.
        MissingDependencyError: `datasets` is not installed.
    """
    if type(context_size) is not int or context_size < 1:
        raise UsageError(f"context_size is a whole number of at least 1, not {shown(context_size)}")
    try:
        from datasets import Array2D, Dataset, Features, Sequence, Value
    except ImportError as error:
        command = "pip install 'featurizers-harvest[datasets]'"
        raise MissingDependencyError("an export for SAELens", "datasets", command) from error
    harvest.batches(name, 1)  # raises for a name without activations
    kind = harvest.dataset(name).schema.field("activation").type
    contexts = int(harvest.dataset(name).count_rows()) // context_size
    if not contexts:
        raise UsageError(f"{name!r} has fewer tokens than one context of {context_size}")
    features = Features(
        {
            hook_name: Array2D((context_size, kind.list_size), str(harvest.plan.rows["values"])),
            "token_ids": Sequence(Value("int32"), length=context_size),
        }
    )
    with temporary_folder() as cache, filling(out) as new:
        arguments = {"harvest": harvest, "name": name, "size": context_size, "hook_name": hook_name}
        made = Dataset.from_generator(_contexts, features=features, gen_kwargs=arguments, cache_dir=str(cache))
        made.save_to_disk(str(new))
    return contexts


def _contexts(harvest: Harvest, name: str, size: int, hook_name: str) -> Iterator[dict[str, Any]]:
    held: list[tuple[Any, Any]] = []
    n = 0
    for batch in harvest.dataset(name).to_batches(columns=["token", "activation"]):
        x = batch.column("activation").flatten().to_numpy(zero_copy_only=False)
        held.append((batch.column("token").to_numpy(), x.reshape(len(batch), -1) if len(batch) else x[:0]))
        n += len(batch)
        if n < size:
            continue
        tokens = np.concatenate([each for each, _ in held])
        activations = np.concatenate([each for _, each in held if len(each)])
        for start in range(0, n - n % size, size):
            part = slice(start, start + size)
            yield {hook_name: activations[part], "token_ids": tokens[part]}
        held, n = [(tokens[n - n % size :], activations[n - n % size :])], n % size


def to_delphi(
    harvest: Harvest,
    name: str,
    out: str | Path,
    *,
    module: str,
    context_size: int,
    splits: int = 5,
    model_name: str | None = None,
) -> int:
    """Write features as delphi caches them, for its ``LatentDataset``.

    That is a folder for a module with a safetensors file for each range of features, which all have the token ids.
    Tokens are put side by side in their order, across documents, as in `to_sae_lens`.

    Args:
        harvest: complete.
        name: of features in it.
        out: new folder.
        module: name of the module, such as ``layers.8``, which becomes a folder.
        context_size: tokens of a context.
        splits: number of ranges of features.
        model_name: of the model's tokenizer, which delphi loads; None for the name in the plan.

    Returns:
        The number of contexts.

    Raises:
        UsageError: there are activations under this name, or too few tokens for a context.
        ArtefactError: the folder is not empty, or cannot be written.
    """
    for what, number in (("context_size", context_size), ("splits", splits)):
        if type(number) is not int or number < 1:
            raise UsageError(f"{what} is a whole number of at least 1, not {shown(number)}")
    if NAME.fullmatch(module) is None:
        raise UsageError(f"a module is letters, digits, '.', '_' and '-', as it becomes a folder, not {shown(module)}")
    n_features = harvest.n_features(name) or len(harvest.densities(name))
    contexts = harvest.n_tokens // context_size
    if not contexts:
        raise UsageError(f"there are fewer tokens than one context of {context_size}")
    tokens = harvest.table(columns=["token"])["token"].to_numpy()[: contexts * context_size]
    bounds = np.linspace(0, n_features, splits + 1).astype(np.int64).tolist()
    about = {
        "model_name": model_name or harvest.plan.about["model"],
        "ctx_len": context_size,
        "n_tokens": len(tokens),
        "n_splits": splits,
    }
    with filling(out) as new, os_errors(new):
        folder = new / module
        folder.mkdir()
        for first, end in itertools.pairwise(bounds):
            if first == end:
                continue
            found = [part for part in _locations(harvest, name, first, end, context_size, contexts) if len(part[1])]
            locations = np.concatenate([each for each, _ in found] or [np.zeros((0, 3), np.int64)])
            values = np.concatenate([each for _, each in found] or [np.zeros(0, np.float16)])
            small = max(contexts, end - first) <= 2**16
            save_file(
                {
                    "locations": locations.astype(np.uint16 if small else np.uint32),
                    "activations": values,
                    "tokens": tokens.reshape(contexts, context_size).astype(np.int64),
                },
                folder / f"{first}_{end - 1}.safetensors",
            )
        (folder / "config.json").write_text(json.dumps(about, indent=4) + "\n", encoding="utf-8")
    return contexts


def _locations(
    harvest: Harvest, name: str, first: int, end: int, size: int, contexts: int
) -> Iterator[tuple[Any, Any]]:
    """Yield context, position in it and feature from ``first`` on, ``(n, 3)``, with the values, file by file."""
    start = 0
    for of_tokens, of_site in zip(harvest.files(), harvest.files(name), strict=True):
        columns = ["document", "position", "indices", "values"]
        tokens, rows = (
            harvest.folder.dataset([file]).to_table(columns=columns[: 2 if file is of_tokens else 4]).combine_chunks()
            for file in (of_tokens, of_site)
        )
        n = len(tokens)
        keys, wanted = (table["document"].to_numpy() * 2**31 + table["position"].to_numpy() for table in (tokens, rows))
        at = start + np.searchsorted(keys, wanted)
        start += n
        lists, values = (pa.concat_arrays(rows[each].chunks) if len(rows) else None for each in columns[2:])
        if lists is None or values is None:
            continue
        features = lists.flatten().to_numpy()
        at = at.repeat(np.diff(lists.offsets.to_numpy()))
        kept = (features >= first) & (features < end) & (at < contexts * size)
        at, features = at[kept], features[kept]
        found = values.flatten().to_numpy(zero_copy_only=False)[kept].astype(np.float16)
        yield np.stack([at // size, at % size, features - first], axis=1), found
