"""`Prepared`: operations at sites of a model, looked up and checked, with the hooks that carry them out."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor

from featurizers.errors import UsageError
from featurizers.features.featurizer import Featurizer
from featurizers.features.site_map import SiteMap
from featurizers.format.sites import Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.carrying import carry_out, features_of
from featurizers.models.checkpointing import uncheckpointed
from featurizers.models.collecting import Collection, acts_on, check_generate
from featurizers.models.compilation import eager
from featurizers.models.contexts import Context
from featurizers.models.detection import submodule
from featurizers.models.hooks import hook
from featurizers.models.operations import Collect, Operation, SourcedOperation
from featurizers.models.places import Place
from featurizers.models.positions import Inputs
from featurizers.models.reading import Sources
from featurizers.models.site_maps import MapEdits, places_of
from featurizers.models.watching import GenerateOptions, Watch, watching

Plan: TypeAlias = "list[tuple[Any, tuple[Operation, ...]]]"
"""Operations with the site or the map that they act at, in the order in which they act."""


def _with(source: Tensor | Inputs, operation: Operation) -> Operation:
    """Return an operation with another source, if it has one."""
    return replace(operation, source=source) if isinstance(operation, SourcedOperation) else operation


class _Entered(threading.local):
    """Contexts that a thread has entered, the latest last."""

    def __init__(self) -> None:
        self.stack: list[AbstractContextManager[Any]] = []


class Prepared:
    """Operations at sites of a model, with all that `intervene` finds out before it puts hooks on the model.

    Enter it as often as you like, also within itself or in several threads; each time yields new results. The model
    must keep its modules: an edit of a module that was replaced is refused. Sources in the form of inputs were read
    when the object was made; call `sources` after the weights have changed.

    Args:
        model: as in `intervene`.
        operations: as in `intervene`.

    Raises:
        SiteError, PositionError, ShapeError: as in `intervene`.
    """

    def __init__(self, model: object, operations: Any) -> None:
        self._anatomy: Anatomy = Anatomy(model)
        self._by_site = isinstance(operations, Mapping)
        self._plan: Plan = _plan(operations)
        self._places = {key: self._anatomy.place(key) for key, _ in self._of_sites}
        self._paths = [place.path for place in self._places.values()]
        self._sources = self._read_sources()
        self._entered = _Entered()

    @property
    def _of_sites(self) -> Plan:
        return [(key, own) for key, own in self._plan if not isinstance(key, SiteMap)]

    def _read_sources(self) -> Sources:
        of_maps: Plan = [(key, own) for key, own in self._plan if isinstance(key, SiteMap)]
        return Sources(
            self._anatomy,
            [*self._of_sites, *((site, own) for key, own in of_maps for site in set(key.reads.values()))],
        )

    def sources(self, source: Tensor | Inputs | None = None) -> None:
        """Read the sources again, or give all operations that have a source another one.

        Args:
            source: activations or inputs of the model, as in `Interchange`; None for those of before.

        Raises:
            PositionError, ShapeError: as in `intervene`.
        """
        if source is not None:
            self._plan = [(key, tuple(_with(source, each) for each in own)) for key, own in self._plan]
        self._sources = self._read_sources()

    def __enter__(self) -> dict[Any, Any]:
        """Put the hooks on the model; return the results of `Collect`, as `intervene` does."""
        entered = self.intervening()
        collected = entered.__enter__()
        self._entered.stack.append(entered)
        return collected

    def __exit__(self, *error: Any) -> bool | None:
        """Remove the hooks that were put on last in this thread.

        Raises:
            UsageError: this thread has put on none.
        """
        if not self._entered.stack:
            raise UsageError("a prepared edit ends in the thread that entered it; use intervene to end it in another")
        return self._entered.stack.pop().__exit__(*error)

    @contextmanager
    def intervening(self) -> Iterator[dict[Any, Any]]:
        """Return a context as `intervene` does, which may end in another thread than the one that entered it."""
        anatomy, sources = self._anatomy, self._sources
        self._check_modules()
        maps = [key for key, _ in self._plan if isinstance(key, SiteMap)]
        paths = [*self._paths, *(place.path for key in maps for place, *_ in places_of(anatomy, key))]
        collection = Collection()
        collected: dict[Any, Any] = {}
        with eager(), ExitStack() as hooks:
            hooks.enter_context(uncheckpointed(anatomy.model, paths))
            context = Context()
            watch = hooks.enter_context(watching(anatomy))
            edits = _Edits(self._of_sites, context, watch, sources, collection, collected, self._by_site)
            hooks.callback(watch.tell(context.acts, edits))
            at_places: list[tuple[Place, Callable[[Tensor], Tensor]]] = []
            for key, own in self._plan:
                if isinstance(key, SiteMap):
                    through = MapEdits(key, own, anatomy, context, watch, sources, collection, collected)
                    hooks.callback(watch.tell(context.acts, through))
                    through.begin_passes(hooks)
                    at_places += through.edits()
                else:
                    at_places.append((self._places[key], functools.partial(edits.carry_out, key, own)))
            # a sum is edited after its summands, whatever the order in which they are given
            for place, edit in sorted(at_places, key=lambda each: each[0].stream is not None):
                hooks.callback(hook(place, edit).remove)
            watch.note_opened()
            hooks.enter_context(context.entered())
            yield collected

    def _check_modules(self) -> None:
        """Raise UsageError if a module was replaced since it was looked up."""
        for key, place in self._places.items():
            try:
                module = submodule(self._anatomy.model, place.path)
            except AttributeError:
                module = None
            if module is not place.module:
                raise UsageError(
                    f"{key}: the module {place.path!r} was replaced since the operations were prepared; call "
                    "featurizers.prepare again"
                )


def _plan(
    operations: Mapping[Any, Operation | Sequence[Operation]] | Operation | Sequence[Operation],
) -> Plan:
    """Return operations with the site or the map that they act at, in the order in which they act.

    Raises:
        UsageError: something else than an operation is given, or an operation does not know its site.
    """
    if isinstance(operations, Mapping):
        plan = [(key, _as_operations(key, value)) for key, value in operations.items()]
        for operation in (each for _, own in plan for each in own):
            _ = operation.of_site  # raises for one through a map
        return plan
    listed: Plan = []
    for operation in _as_operations("intervene", operations):
        featurizer = operation.featurizer
        key: Any = featurizer if isinstance(featurizer, SiteMap) else site_of(featurizer)
        same: list[int] = [number for number, (other, _) in enumerate(listed) if other is featurizer]
        if same:  # operations through one map are composed
            listed[same[0]] = (key, (*listed[same[0]][1], operation))
        else:
            listed.append((key, (operation,)))
    return listed


def _as_operations(key: object, value: object) -> tuple[Operation, ...]:
    operations = tuple(value) if isinstance(value, Sequence) else (value,)
    for operation in operations:
        if not isinstance(operation, Operation):
            raise UsageError(
                f"{key}: expected an operation such as Interchange(...), or a list of them, got {operation!r}"
            )
    return operations


def site_of(featurizer: Featurizer[Any]) -> Site:
    """Return the site of a featurizer.

    Raises:
        UsageError: the featurizer has none.
    """
    if featurizer.site is None:
        raise UsageError(
            f"{featurizer.id!r} does not say where it belongs; set its site: f.site = featurizers.Site('resid.post', 8)"
        )
    return featurizer.site


class _Edits:
    """Operations at sites of one context, as its hooks carry them out.

    Args:
        plan: operations by site.
        context: in which they act.
        watch: of the model.
        sources: of the operations.
        collection: where features are collected.
        collected: mapping that the caller sees.
        by_site: whether its keys are the sites; else they are the operations.
    """

    def __init__(
        self,
        plan: Sequence[tuple[Any, Sequence[Operation]]],
        context: Context,
        watch: Watch,
        sources: Sources,
        collection: Collection,
        collected: dict[Any, Any],
        by_site: bool,
    ) -> None:
        self._plan, self._context, self._watch, self._sources = plan, context, watch, sources
        self._collection, self._collected, self._by_site = collection, collected, by_site

    def carry_out(self, key: Any, operations: Sequence[Operation], hidden: Tensor) -> Tensor:
        """Return ``hidden`` after the operations at a site in one forward pass."""
        if not self._context.acts():
            return hidden
        for operation in operations:
            hidden = self._carry_out(key, operation, hidden)
        return hidden

    def _carry_out(self, key: Any, operation: Operation, hidden: Tensor) -> Tensor:
        current = self._watch.current
        source = self._sources.of(key, operation, current)
        if not acts_on(operation, key, current, self._context, has_source=source is not None):
            return hidden
        if isinstance(operation, Collect):
            result_key = key if self._by_site else operation
            features = features_of(operation, hidden, current)
            self._collection.keep(self._collected, result_key, (operation, key), features, current.start)
            return hidden
        return carry_out(operation, hidden, current, source, name=key)

    def begin_generate(self, options: GenerateOptions) -> None:
        """Raise if the operations cannot be carried out with these options of ``generate``."""
        for key, operations in self._plan:
            for operation in operations:
                check_generate(key, operation, options)

    def end_generate(self, tokens: int) -> None:
        """Drop what was collected for candidates that assisted decoding rejected last."""
        self._collection.trim(tokens)
