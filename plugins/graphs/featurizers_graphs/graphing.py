"""`graph`: the attribution graph of a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Final

import torch
from featurizers import SiteMap
from featurizers.errors import UsageError, shown
from featurizers.models import backend_of, evaluating, text_ids, unedited
from featurizers_derived_scalars import Circuit, Place
from torch import Tensor

from featurizers_graphs.collection import Collection
from featurizers_graphs.graph_files import VERSIONS
from featurizers_graphs.influence import check_share
from featurizers_graphs.local_model import LocalModel
from featurizers_graphs.result import Graph
from featurizers_graphs.sources import Sources
from featurizers_graphs.sweep import Sweep, assembled
from featurizers_graphs.targets import rows_of

UNITS: Final = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
ROW_TOKENS: Final = {"cpu": 8192}
"""Tokens of all rows that are made together at most, by device, where more are slower: they leave the caches."""


@torch.inference_mode(False)
@torch.no_grad()
def graph(
    model: Any,
    prompt: Any,
    maps: Sequence[SiteMap[Any]] | SiteMap[Any],
    *,
    targets: Any = None,
    first: int | None = None,
    nodes: int = 10_000,
    keep: float = 0.99,
    memory: int | str = "2GiB",
    tokenizer: Any = None,
    progress: Callable[[float], None] | None = None,
) -> Graph:
    """Trace which features, on which tokens, bring about the next token of a prompt.

    In the local replacement model attention patterns and the scales of norms are held, and each MLP is its map's
    features, an error and biases. The whole is linear: an edge is what a source adds to what its target reads, and
    edges and constants add up to the target's pre-activation. Effects through changed patterns, through features that
    are off and through norms are not in the graph; `featurizers_graphs.validate` measures them.

    Source: Ameisen et al. 2025, "Circuit Tracing"; the definitions are those of circuit-tracer.

    Args:
        model: a decoder of `transformers` with its language-model head, or an object that holds one.
        prompt: a text, or token ids.
        maps: transcoders or cross-layer transcoders with their sites. At a layer without a map the whole output of the
            MLP is an error.
        targets: None for the most probable next tokens, at most ten that hold 95 % of the probability. Token ids or
            texts of one token; a metric of `featurizers_derived_scalars` or a function of the logits
            ``(token, vocab)``, whose gradient is taken; or triples (layer, position, number) of features. One or a
            list. Logits are taken before a soft cap.
        first: number of tokens at the start whose features and errors are constants, since maps are not trained on
            them. None for the leading tokens that the maps name as special, or for one if they name none.
        nodes: most features whose inputs are traced, those of the largest influence. The others stay as sources, and
            the scores get bounds.
        keep: share of each row's absolute sum whose edges are kept, the largest first. Sums, influence and scores are
            of all edges.
        memory: that may be used beside the model and the maps, in bytes or as ``"2GiB"``. It sets how many rows are
            made together, and what is kept or computed again.
        tokenizer: of the model, for texts and labels.
        progress: is called with the share of the layers that are done.

    Raises:
        UsageError: an argument is wrong, the memory is too small, or the prompt does not begin as the maps expect.
        SiteError: the model is not supported, or a map does not fit it.

    Examples:
        >>> import torch
        >>> from featurizers_transcoder import Transcoder
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, activation_function="relu")
        >>> model = GPT2LMHeadModel(config).eval()
        >>> maps = []
        >>> for layer, block in enumerate(model.transformer.h):  # an MLP with ReLU is its own transcoder
        ...     up, down = block.mlp.c_fc, block.mlp.c_proj
        ...     f = Transcoder.from_weights(up.weight.T, down.weight, up.bias, down.bias)
        ...     f.reads, f.writes = {"in": f"mlp.in:{layer}"}, {"out": f"mlp.out:{layer}"}
        ...     maps.append(f)
        >>> found = graph(model, [1, 2, 3], maps)
        >>> found.scores.replacement.low > 0.999
        True
    """
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 0:
        raise UsageError(f"nodes is a number of features from 0, not {shown(nodes)}")
    check_share("keep", keep)
    allowed = bytes_of(memory)
    module = backend_of(model).model
    ids = _prompt_ids(prompt, tokenizer)
    with unedited(), evaluating(module):
        circuit = Circuit(module)
        circuit.check_tokens(ids)
        collection = Collection.of(circuit, maps)
        start = _first(first, collection, ids, tokenizer)
        local = LocalModel(circuit, ids, pattern_bytes=allowed // 4)
        sources = Sources(local, collection, start, cache_bytes=allowed // 4)
        rows = rows_of(targets, local, collection, sources, tokenizer)
        count = sum(len(own.targets) for own in rows)
        sweep = Sweep(local, collection, sources, count, keep, _batch(local, sources, allowed // 2))
        sweep.run(rows, nodes, progress)
    offsets, edge_sources, weights = assembled(sweep.edges, len(sources.features) + count)
    every = tuple(target for own in rows for target in own.targets)
    features = torch.cat([sources.features[:, :2], sources.numbers[:, None]], 1)
    about = _about(local, collection, start, keep, nodes)
    return Graph(
        tokens=ids,
        token_texts=tuple(str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids.tolist()),
        features=features.cpu(),
        values=_single(sources.values),
        n_layers=circuit.n_layers,
        targets=every,
        influence=_single(sweep.influence),
        expanded=sweep.expanded.cpu(),
        offsets=offsets,
        sources=edge_sources,
        weights=weights,
        constant=_single(sweep.constant),
        total=_single(sweep.total),
        summed=_single(sweep.summed),
        absolute=_single(sweep.absolute),
        error_share=_single(sweep.error_share),
        kept=torch.ones(len(sweep.influence), dtype=torch.bool),
        about=about,
    )


def _single(tensor: Tensor) -> Tensor:
    return tensor.float().cpu()


def bytes_of(memory: int | str) -> int:
    """Return a number of bytes that is given as a number or as a text such as ``2GiB``.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?) ?(B|KiB|MiB|GiB)", memory) if isinstance(memory, str) else None
    if match is None:
        raise UsageError(f"memory is a number of bytes, or a text such as '500MiB' or '2GiB', not {shown(memory)}")
    return int(float(match[1]) * UNITS[match[2]])


def _prompt_ids(prompt: Any, tokenizer: Any) -> Tensor:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UsageError("the prompt is a text; give the tokenizer, or token ids")
        prompt = text_ids(tokenizer, prompt)[0]
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"the prompt is a text or token ids, not {shown(prompt)}") from error
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UsageError(f"the prompt is one sequence of token ids, not {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.long().cpu()


def _first(first: int | None, collection: Collection, ids: Tensor, tokenizer: Any) -> int:
    """Return the number of tokens at the start whose features and errors are constants."""
    if first is not None:
        if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < len(ids):
            raise UsageError(f"first is a number of tokens from 0 to {len(ids) - 1}, not {shown(first)}")
        return first
    special = collection.special_tokens
    count = next((n for n, token in enumerate(ids.tolist()) if token not in special), len(ids)) if special else 1
    if not count:
        names = [str(i) if tokenizer is None else repr(tokenizer.decode([i])) for i in sorted(special)]
        raise UsageError(
            f"the maps expect prompts that begin with a special token ({', '.join(names[:5])}), and this begins with "
            f"token {int(ids[0])}; put it in front, or give first=1 (or 0) to go on without"
        )
    if count >= len(ids):
        raise UsageError(
            f"the prompt ends before the first token that is traced, token {count} counted from 0; give a longer "
            "prompt, or first=0"
        )
    return count


def _batch(local: LocalModel, sources: Sources, allowed: int) -> int:
    """Return the number of rows that fit into some bytes.

    A row takes its direction at each token, and a handful of copies of it in the attention, and one number a node with
    its size, bin and sign.
    """
    heads = local.circuit.n_heads * local.circuit.d_value
    row = local.length * (4 * local.width + 4 * heads) * 4
    nodes = len(sources.features) + (local.n_layers + 1) * local.length
    needed = row + 24 * nodes
    if needed > allowed:
        raise UsageError(
            f"one row of this graph takes {needed / 2**20:.0f} MiB, and half of memory= is {allowed / 2**20:.0f} MiB; "
            "allow more, or give a shorter prompt"
        )
    most = ROW_TOKENS.get(local.device.type, 2**20) // local.length
    return max(1, min(allowed // needed, most))


def _about(local: LocalModel, collection: Collection, first: int, keep: float, nodes: int) -> dict[str, Any]:
    circuit, model = local.circuit, local.circuit.model
    config = getattr(model, "config", None)
    maps = dict.fromkeys(reader.read.map for reader in collection.readers.values())
    return {
        "model": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "revision": getattr(config, "_commit_hash", None),
        "fingerprint": circuit.fingerprint(),
        "dtype": str(local.raw[Place("resid.embed"), "forward"].dtype).removeprefix("torch."),
        "maps": [{"id": each.id, "kind": each.kind, "sites": each.sites_text} for each in maps],
        "first": first,
        "keep": keep,
        "nodes": nodes,
        "softcap": circuit.unembedding.softcap if circuit.d_vocab else None,
        "versions": {name: metadata.version(name) for name in VERSIONS},
    }
