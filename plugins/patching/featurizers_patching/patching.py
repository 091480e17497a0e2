"""`patch`: the effect of each edit of a grid, sites × pairs × positions."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from featurizers import Anatomy, Featurizer, Site, SiteMap
from featurizers.errors import UsageError, did_you_mean, shown
from torch import Tensor, nn

from featurizers_patching.answers import prompts_of
from featurizers_patching.engine.ending import checked_head
from featurizers_patching.estimates import METHODS
from featurizers_patching.grid import Grid
from featurizers_patching.grid_run import GridRun, Results
from featurizers_patching.metrics import metrics_of
from featurizers_patching.operations import Options
from featurizers_patching.pairs import Pair, pairs_of
from featurizers_patching.positions import Column, PatchPositions, columns_of
from featurizers_patching.request import Method, Request
from featurizers_patching.sites import by_head, receivers_of, sites_of

FREEZES: Final = ("attn.out", "mlp.out", "attn.pattern")
CPU_ROWS, DEVICE_ROWS = 1024, 16384
"""Rows that run together by default: a CPU computes no faster with more."""


@torch.inference_mode(False)
@torch.no_grad()
def patch(
    model: nn.Module,
    base: Any,
    source: Any = None,
    sites: Any = None,
    *,
    heads: str | Sequence[int] | None = None,
    positions: PatchPositions = None,
    featurizer: Featurizer[Any] | SiteMap[Any] | None = None,
    operation: str | Callable[[Tensor, Tensor], Tensor] = "interchange",
    indices: Any = None,
    value: float | Tensor = 0.0,
    gate: Tensor | None = None,
    metric: Any = "logit_difference",
    at: Any = -1,
    normalize: bool = True,
    receivers: Any = None,
    freeze: Sequence[str] | str = (),
    batch_rows: int | None = None,
    skip_equal: bool = True,
    verify: int = 4,
    method: str | None = None,
    steps: int = 5,
    screen: int | None = None,
    tokenizer: Any = None,
    progress: Callable[[float], None] | None = None,
) -> Grid:
    """Run ``base`` with the activations of ``source`` at each site and position, one at a time, and measure the effect.

    All cells run together and only where they change something; the numbers are those of `featurizers.intervene`, a
    cell at a time. A few cells are compared with it. A model that cannot run so is run whole for each cell, with one
    warning. All runs are of the model without the operations of any `intervene` context around the call.

    Args:
        model: a decoder of `transformers` with its language-model head, in evaluation mode.
        base: prompt or prompts to edit: texts, token ids or model inputs. Or records with base, source and label, such
            as `featurizers_training.Pairs`, and then no source.
        source: prompt for each base, from which activations are taken.
        sites: a site; a kind such as ``resid.pre`` for all blocks; ``attn.z:*:*`` for all heads; a list of these, or a
            mapping from these to featurizers. None for ``resid.pre``, and with heads for ``attn.z``.
        heads: ``"all"``, or numbers of heads: each site is patched head by head.
        positions: None for each token in a column of its own; a list of columns, each a number, a name of the records
            or a list of numbers that are patched together; ``"all"``; or a mapping from labels to these.
        featurizer: to patch through; None for the whole activations.
        operation: ``interchange``; ``ablate``, with ``value``; ``mask``, with ``gate``; or a function of the
            activations of base and source, ``(k, d)`` each.
        indices: features to change; None for all.
        value: that ``ablate`` sets features to.
        gate: of ``mask``.
        metric: ``logit_difference``, ``log_probability``, ``probability``, ``loss``, ``accuracy`` or ``kl``; a tuple
            of a name and its answers, as in ``("logit_difference", " Paris", " Tokyo")``; a `Metric`; a function of
            logits ``(runs, vocabulary)``; or a mapping of these by name. Answers may have several tokens, but for
            ``logit_difference``.
        at: token, or tokens, whose logits are measured.
        normalize: give values as 0 for the base alone and 1 for the source alone; the grid keeps the raw values too.
        receivers: path patching: sites such as ``attn.q:9:6``, written as ``sites``. Each edit is made in a run in
            which attention and MLPs keep their clean outputs; then a run of the base is measured in which the receivers
            get what they read in that run. With ``freeze="attn.out"`` the MLPs between are computed.
        freeze: ``attn.out``, ``mlp.out`` and ``attn.pattern``: keep these as in the base's clean run, from the block of
            each edit on, so that its effect goes around them.
        batch_rows: tokens that run together, which bounds the memory; None for a default of the device. It is halved
            where memory runs out.
        skip_equal: do not run cells of tokens before the first one in which base and source differ.
        verify: number of cells to compare with whole runs.
        method: ``exact`` runs each cell. ``gradient`` estimates all cells at once, by a first-order expansion at the
            base: one forward and one backward pass. ``integrated`` takes the mean of gradients between the token
            embeddings of base and source. None for ``exact``, or for ``gradient`` with ``screen``.
        steps: number of gradients of ``integrated``.
        screen: number of cells with the largest estimates to run exactly; `Grid.exact` says which these are.
        tokenizer: of the model, for texts and labels.
        progress: is called with the share of the work that is done.

    Raises:
        UsageError: an argument is wrong, or a metric gives NaN.
        SiteError: the model does not have a site.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).eval()
        >>> grid = patch(model, [1, 2, 3], [4, 5, 3], "resid.post", metric=("logit_difference", 7, 9))
        >>> grid.values.shape
        torch.Size([1, 2, 1, 3])
    """
    if model.training:
        raise UsageError("the model is in training mode, so that its runs differ; call model.eval()")
    checked_head(model)
    pairs = pairs_of(base, source, tokenizer)
    _check_vocabulary(model, pairs)
    anatomy = Anatomy(model)
    sites = ("resid.pre" if heads is None else "attn.z") if sites is None else sites
    rows = sites_of(anatomy, sites if heads is None else by_head(sites, heads), featurizer)
    to = receivers_of(anatomy, receivers)
    options = Options(operation, indices, value, gate)
    bound = {name: each.bound(pairs, tokenizer) for name, each in metrics_of(metric).items()}
    columns = columns_of(positions, pairs)
    found: dict[str, Results] = {}
    groups = list(prompts_of(bound, pairs, at))
    request = Request(
        model=model,
        pairs=pairs,
        sites=[site for site, _ in rows],
        through=[each for _, each in rows],
        columns=columns,
        at=[],
        options=options,
        metrics=bound,
        freeze=_freeze(freeze, to),
        batch_rows=_rows(batch_rows, next(model.parameters()).device),
        skip_equal=skip_equal,
        verify=verify,
        normalize=normalize,
        progress=progress or (lambda _: None),
        method=_method(method, steps, screen, to),
        receivers=to,
    )
    if len(groups) > 1 and screen is not None:
        raise UsageError("a screen is of metrics that are read in the same runs; give each answer a call of its own")
    for number, (metrics, prompts, read) in enumerate(groups):
        _check_vocabulary(model, prompts)  # with the answers after them
        share = functools.partial(_share, request.progress, number, len(groups))
        one = replace(request, pairs=prompts, at=read, metrics=metrics, progress=share)
        found |= GridRun(one).run().by_metric(metrics)
    results = Results.of([found[name] for name in bound])
    report = results.report
    labels = _labels(columns, pairs, tokenizer) if positions is None else [column.label for column in columns]
    about = {
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "operation": operation if isinstance(operation, str) else "function",
        "featurizers": sorted({each.id for each in request.through if each is not None and each.id}),
        "freeze": list(request.freeze),
        "receivers": list(map(str, to)),
        "method": request.method.name,
        "packed": report.packed,
        "reason": report.reason,
        "verified": report.verified,
        "difference": report.difference,
    }
    grid = Grid(
        raw=results.values,
        base=results.baselines[0],
        source=results.baselines[1],
        metrics=tuple(bound),
        sites=tuple(request.sites),
        positions=tuple(column.label for column in columns),
        labels=tuple(labels),
        prompts=tuple((pair.base, pair.source) for pair in pairs),
        normalized=normalize,
        exact=results.exact,
        estimate=results.estimate,
        about=about,
    )
    if normalize:
        _warn_of_small(grid)
    return grid


def _share(progress: Callable[[float], None], number: int, count: int, share: float) -> None:
    progress((number + share) / count)


def _freeze(freeze: Sequence[str] | str, receivers: tuple[Site, ...]) -> tuple[str, ...]:
    found = (freeze,) if isinstance(freeze, str) else tuple(freeze)
    if unknown := [each for each in found if each not in FREEZES]:
        raise UsageError(f"{shown(unknown[0])} cannot be frozen; freeze some of {', '.join(FREEZES)}")
    if not receivers:
        return found
    if found and ("attn.out" not in found or "attn.pattern" in found):
        raise UsageError(
            f"freeze={shown(freeze)} does not go with receivers; between a sender and its receivers 'attn.out' is "
            "frozen, and 'mlp.out' too or not"
        )
    return found or ("attn.out", "mlp.out")


def _method(name: str | None, steps: int, screen: int | None, receivers: tuple[Site, ...]) -> Method:
    name = name or ("exact" if screen is None else "gradient")
    if name not in METHODS:
        raise UsageError(f"there is no method {shown(name)}. {did_you_mean(name, METHODS)}")
    if screen is not None and (type(screen) is not int or screen < 1 or name == "exact"):
        raise UsageError(
            f"screen is a number of cells from 1 to run after an estimate, and goes with 'gradient' and 'integrated'; "
            f"not {shown(screen)} with {name!r}"
        )
    if receivers and name != "exact":
        raise UsageError(f"the effect of paths is not estimated; leave receivers or method={name!r} out")
    if type(steps) is not int or steps < 1:
        raise UsageError(f"steps is a number from 1, not {shown(steps)}")
    return Method(name, steps, screen)


def _rows(batch_rows: int | None, device: torch.device) -> int:
    if batch_rows is None:
        return CPU_ROWS if device.type == "cpu" else DEVICE_ROWS
    if type(batch_rows) is not int or batch_rows < 1:
        raise UsageError(f"batch_rows is a number of tokens from 1, not {shown(batch_rows)}")
    return batch_rows


def _check_vocabulary(model: nn.Module, pairs: Sequence[Pair]) -> None:
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None)
    for number, pair in enumerate(pairs):
        largest = max(*pair.base, *pair.source)
        if size is not None and largest >= size:
            raise UsageError(
                f"pair {number} has the token {largest}, and the model's vocabulary has {size}, counted from 0; use "
                "the model's own tokenizer"
            )


def _labels(columns: Sequence[Column], pairs: Sequence[Pair], tokenizer: Any) -> list[str]:
    """Return what is written under each column: tokens, if there is one pair; else positions."""
    if len(pairs) > 1:
        return [column.label for column in columns]
    ids = [pairs[0].base[int(column.label)] for column in columns]
    return [str(each) for each in ids] if tokenizer is None else [tokenizer.decode([each]) for each in ids]


def _warn_of_small(grid: Grid) -> None:
    for name, base, source in zip(grid.metrics, grid.base, grid.source, strict=True):
        small = (source - base).abs() <= 1e-3 * torch.maximum(source.abs(), base.abs()).clamp_min(1e-9)
        if small.any():
            pair = int(small.nonzero()[0, 0])
            both = f"{float(base[pair]):.4g} and {float(source[pair]):.4g} in pair {pair}"
            more = f" and {int(small.sum()) - 1} others" if int(small.sum()) > 1 else ""
            warnings.warn(
                f"{name}: base and source give nearly the same ({both}{more}), so that values between them mean "
                "little; choose another metric or pair, or normalize=False",
                stacklevel=4,
            )
