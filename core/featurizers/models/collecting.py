"""Results of `Collect` operations over the passes of a context, and the passes that an operation concerns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featurizers.errors import PositionError, UsageError
from featurizers.models.contexts import Context
from featurizers.models.operations import Collect, Operation, SourcedOperation
from featurizers.models.positions import Pass
from featurizers.models.watching import GenerateOptions


class Collection:
    """Features that `Collect` operations collect, put together over the passes of generated tokens."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[dict[Any, Any], Any, int, Tensor]] = {}

    def keep(self, results: dict[Any, Any], key: Any, reader: tuple[Any, ...], features: Tensor, start: int) -> None:
        """Put features after those of the tokens that are cached, in place of any candidates that were rejected.

        Args:
            results: mapping that the caller sees.
            key: under which to put the features in it.
            reader: operation that collects, and whatever else tells it from others.
            features: of this pass, ``(batch, n, k)``.
            start: number of tokens that are cached.
        """
        *_, first, before = self._kept.get(reader, (results, key, start, features[:, :0]))
        if start > first:
            features = torch.cat([before[:, : start - first], features], dim=1)
        else:
            first = start
        results[key] = features
        self._kept[reader] = (results, key, first, features)

    def trim(self, tokens: int) -> None:
        """Drop what was collected for candidates that assisted decoding rejected last."""
        for reader, (results, key, first, features) in self._kept.items():
            if _operation_of(reader).positions is None and features.shape[1] > tokens - first:
                trimmed = features[:, : tokens - first]
                if results.get(key) is features:
                    results[key] = trimmed
                self._kept[reader] = (results, key, first, trimmed)


def acts_on(operation: Operation, key: object, current: Pass, context: Context, *, has_source: bool) -> bool:
    """Return whether an operation concerns a pass: one with positions or a source concerns the prompt alone.

    Args:
        operation: to carry out.
        key: site or map that errors name.
        current: pass.
        context: of the operation.
        has_source: whether the operation takes features from a source.

    Raises:
        PositionError: the prompt was computed before the context was entered.
    """
    if not current.start or (operation.positions is None and not has_source):
        return True
    if current.began < context.opened:
        raise PositionError(
            f"{key}: the first tokens of the prompt are in a cache already, so its positions cannot be edited; "
            "run the whole prompt inside the context"
        )
    return False


def check_generate(key: object, operation: Operation, options: GenerateOptions) -> None:
    """Raise if an operation cannot be carried out with these options of ``generate``.

    Raises:
        UsageError: tokens of returned sequences cannot be collected as they are generated.
        PositionError: a second prompt passes through the model.
    """
    if isinstance(operation, Collect) and operation.positions is None:
        if (options.get("num_beams") or 1) > 1:
            raise UsageError(
                f"{key}: beam search computes beams that it does not return; collect from the returned sequences with "
                "`featurizers.collect`, or give Collect positions of the prompt"
            )
        assisted = options.get("assistant_model") is not None or options.get("prompt_lookup_num_tokens") is not None
        if assisted and not options.trims:
            raise UsageError(
                f"{key}: intervene on the model whose `generate` is called, to collect in assisted decoding"
            )
    of_prompt = operation.positions is not None or isinstance(operation, Collect | SourcedOperation)
    if of_prompt and options.texts:
        raise PositionError(
            f"{key}: `generate` was given texts, so that the columns of the prompt are not known; turn them into token "
            "ids first, or use operations with positions=None and no source"
        )
    if of_prompt and (options.get("guidance_scale") or 1) != 1:
        raise PositionError(
            f"{key}: with guidance_scale a second, unconditional prompt passes through the model; generate "
            "without it, or use operations with positions=None and no source"
        )


def _operation_of(reader: tuple[Any, ...]) -> Operation:
    operation: Operation = reader[0]
    return operation
