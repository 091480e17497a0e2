"""Clean runs: activations of a model without edits, for `collect` and for the sources of operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from featurizers.errors import PositionError, UsageError
from featurizers.features.active import SparseFeatures
from featurizers.features.featurizer import Featurizer
from featurizers.features.precision import without_autocast
from featurizers.features.site_map import SiteMap
from featurizers.format.sites import Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.caches import CACHE_NAMES
from featurizers.models.calling import with_position_ids, without_cache
from featurizers.models.carrying import gather
from featurizers.models.checkpointing import uncheckpointed
from featurizers.models.compilation import eager
from featurizers.models.contexts import is_reading, reading, unedited
from featurizers.models.hooks import hook
from featurizers.models.operations import Operation, SourcedOperation
from featurizers.models.positions import Inputs, Pass, Positions, columns
from featurizers.models.stopping import stoppable
from featurizers.models.watching import Watch, watching

SiteT = TypeVar("SiteT", bound=Site | str | None)
ValueT = TypeVar("ValueT")


def read(
    anatomy: Anatomy,
    inputs: Inputs,
    featurizers: Mapping[SiteT, Featurizer[Any] | None],
    positions: Positions,
    module: nn.Module | None = None,
) -> dict[SiteT, Tensor]:
    """Return activations, or features where a site has a featurizer; the forward pass stops after the last site.

    Args:
        anatomy: of the model.
        inputs: keyword arguments of the module.
        featurizers: by site; None for the activations themselves.
        positions: tokens of each prompt.
        module: part of the model to call; None for the model.
    """

    def take(key: SiteT, x: Tensor) -> Tensor:
        featurizer = featurizers[key]
        # cloned: a later layer may write into its input
        return x.clone() if featurizer is None else featurizer.collect(x)

    return _read(anatomy, inputs, featurizers, positions, take, module)


def read_sparse(
    anatomy: Anatomy, inputs: Inputs, featurizers: Mapping[SiteT, Featurizer[Any]], positions: Positions
) -> dict[SiteT, SparseFeatures]:
    """Return the features that are not 0 at sites, as `read` does."""

    def take(key: SiteT, x: Tensor) -> SparseFeatures:
        with without_autocast(x):
            return featurizers[key].encode_sparse(x)

    return _read(anatomy, inputs, featurizers, positions, take)


def _read(
    anatomy: Anatomy,
    inputs: Inputs,
    keys: Iterable[SiteT],
    positions: Positions,
    take: Callable[[SiteT, Tensor], ValueT],
    module: nn.Module | None = None,
) -> dict[SiteT, ValueT]:
    """Return what ``take`` makes of the activations at each site."""
    places = {key: anatomy.place(key) for key in keys}
    found: dict[SiteT, ValueT] = {}

    def keep(key: SiteT, watch: Watch, mark: object, stop: Callable[[], NoReturn], hidden: Tensor) -> Tensor:
        if not is_reading(mark):
            return hidden
        if watch.current.start and positions is not None:
            raise PositionError(
                f"{key}: the first tokens of the prompt are in a cache already, so its positions are not known; "
                "collect from the whole prompt"
            )
        chosen = gather(hidden, columns(positions, hidden, watch.current))
        found[key] = take(key, chosen)
        if len(found) == len(places):
            stop()
        return hidden

    with eager(), stoppable() as stop, ExitStack() as hooks:
        hooks.enter_context(uncheckpointed(anatomy.model, (place.path for place in places.values())))
        watch = hooks.enter_context(watching(anatomy))
        hooks.enter_context(watch.aside())
        mark = hooks.enter_context(reading())
        for key, place in places.items():
            hooks.callback(hook(place, functools.partial(keep, key, watch, mark, stop), only_reads=True).remove)
        called = anatomy.model if module is None else module
        arguments = inputs if called is not anatomy.model else anatomy.arguments(inputs)
        called(**{**without_cache(called), **arguments})
    if missing := [str(key) for key in places if key not in found]:
        raise UsageError(f"the model ran without passing through {', '.join(missing)}")
    return found


def read_again(anatomy: Anatomy, current: Pass, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Run the inputs of a pass once more, without its cache, and return the activations of all its tokens.

    Call it while the pass that is repeated has not reached the blocks yet.

    Args:
        anatomy: of the model.
        current: pass to repeat, which computes the whole prompt.
        sites: to read.

    Returns:
        ``(batch, sequence, d)`` for each site, without gradient.
    """
    module, arguments = current.call if current.call is not None else (anatomy.model, {})
    dropped = {*CACHE_NAMES, "self", "use_cache", "labels"}
    inputs = {name: value for name, value in arguments.items() if name not in dropped}
    with torch.no_grad():
        return read(anatomy, inputs, dict.fromkeys(sites), None, module)


@dataclass
class _Run:
    """Inputs that several operations read in one pass."""

    inputs: Inputs
    positions: Positions
    readers: list[tuple[Any, Operation]]


class Sources:
    """Activations for the operations with a source; those with the same inputs and positions share a pass.

    A padded source is run with the position ids that ``generate`` would derive, so that it is computed as the same
    prompt alone; if the base itself is padded and run without position ids, so is the source, so that an interchange
    with itself changes nothing.
    """

    def __init__(self, anatomy: Anatomy, plan: Iterable[tuple[Any, Sequence[Operation]]]) -> None:
        self._anatomy: Anatomy = anatomy
        self._read: dict[tuple[Any, Operation], Tensor] = {}
        self._as_given: dict[tuple[Any, Operation], Tensor] = {}
        self._runs: dict[tuple[Any, Operation], _Run] = {}  # those whose position ids were derived
        runs: dict[tuple[int, str], _Run] = {}
        for key, operations in plan:
            for operation in operations:
                if not isinstance(operation, SourcedOperation):
                    continue
                if isinstance(operation.source, Tensor):
                    self._read[key, operation] = operation.source
                else:
                    own = operation.source_positions
                    positions = operation.positions if own is None else own
                    if isinstance(operation.featurizer, SiteMap) and operation.featurizer.encodes_sequences:
                        positions = None
                    name = repr(positions.tolist() if isinstance(positions, Tensor) else positions)
                    run = runs.setdefault((id(operation.source), name), _Run(operation.source, positions, []))
                    run.readers.append((key, operation))
        for run in runs.values():
            inputs = with_position_ids(anatomy.model, run.inputs, of_padding=True)
            self._read |= self._activations(run, inputs)
            if inputs is not run.inputs:
                self._runs |= dict.fromkeys(run.readers, run)

    def of(self, key: Any, operation: Operation, current: Pass) -> Tensor | None:
        """Return the activations for an operation at a site in a pass; None if it has no source."""
        reader = (key, operation)
        run = self._runs.get(reader)
        if run is None or current.start or current.has_position_ids or not _is_padded(current):
            return self._read.get(reader)
        if reader not in self._as_given:
            self._as_given |= self._activations(run, run.inputs)
        return self._as_given[reader]

    @torch.no_grad()
    def _activations(self, run: _Run, inputs: Inputs) -> dict[tuple[Any, Operation], Tensor]:
        with unedited():
            activations = read(self._anatomy, inputs, dict.fromkeys(key for key, _ in run.readers), run.positions)
        return {(key, operation): activations[key] for key, operation in run.readers}


def _is_padded(current: Pass) -> bool:
    return current.attention_mask is not None and not bool((current.attention_mask != 0).all())
