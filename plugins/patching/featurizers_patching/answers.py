"""Answers of several tokens: prompts with the answer after them, and the tokens at which it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from featurizers.errors import UsageError, shown

from featurizers_patching.metrics import Metric
from featurizers_patching.pairs import Pair, Tokens
from featurizers_patching.positions import read_tokens

Read: TypeAlias = list[tuple[Tokens, Tokens]]
"""Tokens of each base and each source whose logits are read."""


def prompts_of(
    metrics: Mapping[str, Metric], pairs: Sequence[Pair], at: Any
) -> Iterator[tuple[dict[str, Metric], list[Pair], Read]]:
    """Yield metrics that are read in the same runs, with the prompts of these runs.

    An answer of several tokens is put after both prompts of its pair but for its last token, so that the model reads
    the tokens of the answer that come before. Columns of the grid are of the prompts without it.

    Raises:
        UsageError: a prompt does not have a token, or ``at`` is given with an answer of several tokens.
    """
    groups: dict[tuple[Tokens, ...] | None, dict[str, Metric]] = {}
    for name, metric in metrics.items():
        groups.setdefault(metric.continuation, {})[name] = metric
    for after, each in groups.items():
        if after is None:
            yield each, list(pairs), read_tokens(at, pairs)
            continue
        if type(at) is not int or at != -1:
            raise UsageError(
                f"an answer of several tokens is read after the prompt; leave at={shown(at)} out, or measure other "
                "metrics in a call of their own"
            )
        n = max(map(len, after)) + 1
        longer, read = [], []
        for pair, tokens in zip(pairs, after, strict=True):
            longer.append(replace(pair, base=pair.base + tokens, source=pair.source + tokens))
            steps = [min(step, len(tokens)) for step in range(n)]
            base, source = (tuple(len(side) - 1 + step for step in steps) for side in (pair.base, pair.source))
            read.append((base, source))
        yield each, longer, read
