"""`Request`: the arguments of one call of `patch`, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from featurizers import Featurizer, Site
from torch import nn

from featurizers_patching.metrics import Metric
from featurizers_patching.operations import Options
from featurizers_patching.pairs import Pair, Tokens
from featurizers_patching.positions import Column


@dataclass(frozen=True)
class Method:
    """Method by which effects are found.

    Attributes:
        name: "exact"; "gradient" for a first-order estimate at the base; "integrated" for one with gradients averaged
            between base and source.
        steps: number of gradients that are averaged.
        screen: number of rows × columns with the largest estimates that are run exactly; None for none of them.
    """

    name: str = "exact"
    steps: int = 1
    screen: int | None = None


@dataclass(frozen=True)
class Request:
    """One call of `patch`.

    Attributes:
        model: a decoder with its head.
        pairs: of prompts.
        sites: rows of the grid.
        through: featurizer of each site; None for whole activations.
        columns: of the grid.
        at: tokens of each base and each source whose logits are read.
        options: what a cell does.
        metrics: by name, with the token ids of the pairs.
        freeze: parts that are kept as in the clean run.
        batch_rows: tokens that run together.
        skip_equal: whether cells of tokens before the first difference are not run.
        verify: number of cells to compare with whole runs.
        normalize: whether the values of the grid are shares of the difference of base and source.
        progress: is called with the share of the work that is done.
        method: how effects are found.
        receivers: sites that alone read what the edits change; empty for all.
    """

    model: nn.Module
    pairs: list[Pair]
    sites: list[Site]
    through: list[Featurizer[Any] | None]
    columns: list[Column]
    at: list[tuple[Tokens, Tokens]]
    options: Options
    metrics: dict[str, Metric]
    freeze: tuple[str, ...]
    batch_rows: int
    skip_equal: bool
    verify: int
    normalize: bool
    progress: Callable[[float], None]
    method: Method = Method()
    receivers: tuple[Site, ...] = ()
