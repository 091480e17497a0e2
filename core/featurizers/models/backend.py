"""Native backend: `intervene` and `collect` by plain torch hooks.

How it works, in order:

1. `Anatomy` finds the module, the side and the columns of each site. A site is always a module's input or output, so
   that a plain hook reaches it whatever attention kernel the model uses.
2. `Sources` reads the sources in the form of model inputs from the unedited model, one forward pass for each distinct
   inputs and positions.
3. `watching` notes before each forward pass how many tokens are cached, the mask and the token ids, and calls of
   ``model.generate``.
4. One hook for each site gathers the columns of the positions, applies the site's operations in the order given, and
   puts the edited columns back. Positions and sources belong to the prompt: passes that compute later tokens are
   edited only by operations with ``positions=None`` and no source. A hook acts for its own context only: see `Context`.
5. `collect` stops the forward pass as soon as the last site has run.

When the context ends, also by an error, its hooks are removed; with the last context, ``generate`` is restored.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor

from featurizers.errors import UsageError
from featurizers.features.featurizer import Featurizer
from featurizers.features.site_map import SiteMap
from featurizers.format.sites import Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.calling import with_position_ids
from featurizers.models.carrying import carry_out, features_of
from featurizers.models.checkpointing import uncheckpointed
from featurizers.models.collecting import Collection, acts_on, check_generate
from featurizers.models.compilation import eager
from featurizers.models.contexts import Context
from featurizers.models.detection import submodule
from featurizers.models.hooks import hook
from featurizers.models.operations import Collect, Operation, SourcedOperation
from featurizers.models.places import Place
from featurizers.models.positions import Inputs, Positions
from featurizers.models.reading import Sources, read
from featurizers.models.site_maps import MapEdits, places_of
from featurizers.models.watching import GenerateOptions, Watch, watching

SiteT = TypeVar("SiteT", bound=Site | str | None)
Plan: TypeAlias = "list[tuple[Any, tuple[Operation, ...]]]"
"""Operations with the site or the map that they act at, in the order in which they act."""


@overload
def intervene(
    model: object, operations: Mapping[SiteT, Operation | Sequence[Operation]]
) -> AbstractContextManager[dict[SiteT, Tensor]]: ...
@overload
def intervene(
    model: object, operations: Operation | Sequence[Operation]
) -> AbstractContextManager[dict[Operation, Any]]: ...
def intervene(
    model: object, operations: Mapping[SiteT, Operation | Sequence[Operation]] | Operation | Sequence[Operation]
) -> AbstractContextManager[dict[Any, Any]]:
    """Carry out operations at sites of a model while the context lasts.

    Every forward pass of the model inside the context is edited, also those of ``generate``. Operations with positions
    act on the prompt. Operations with ``positions=None`` act on every token of every pass, unless they have a source:
    then they act on the prompt only, where the source has tokens. Several operations at one site act in their order.
    Sources are read when the context is entered, from the model without the operations of any context around it. When
    the context ends, also by an error, its hooks are removed; no other hook is touched.

    Args:
        model: a decoder of `transformers`, any module that `Anatomy` understands, or an object of another library that
            holds a model, if the library's plugin is installed.
        operations: an operation, or several, for each site; a site is a `Site` or its string. A featurizer's ``site``
            may be None to a type checker, so that None is accepted as a key and refused when it is one. Or one
            operation or a sequence of operations whose featurizers know their sites, which is how maps between sites
            are given; operations through one map are composed in feature space in their order.

    Yields:
        Results of the `Collect` operations, once the model has run, ``(batch, n_positions, k)``: by site, or by
        operation if no sites are given; of a map with several groups a mapping by group. A new prompt replaces them;
        tokens generated after it are appended if ``positions`` is None. A site with several `Collect` operations keeps
        the last result.

    Raises:
        SiteError: the model does not have a site, or a site is None.
        PositionError: a prompt does not have a position.
        ShapeError: a source does not fit the batch, or a featurizer does not fit the site.

    Example:
        >>> import torch, featurizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).eval()
        >>> base, source = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
        >>> f = featurizers.create("identity", d_in=8)
        >>> swap = featurizers.Interchange(f, source={"input_ids": source}, positions=[-1])
        >>> with featurizers.intervene(model, {"resid.post:1": swap}):
        ...     patched = model(base).logits[:, -1]
        >>> torch.equal(patched, model(source).logits[:, -1])
        True
    """
    return _intervening(model, operations)


@contextmanager
def _intervening(model: object, operations: Any) -> Iterator[dict[Any, Any]]:
    with Prepared(model, operations).intervening() as collected:
        yield collected


def prepare(
    model: object, operations: Mapping[SiteT, Operation | Sequence[Operation]] | Operation | Sequence[Operation]
) -> Prepared:
    """Look up the sites, check the operations and read the sources of `intervene` once, to enter it many times.

    Args:
        model: as in `intervene`.
        operations: as in `intervene`.

    Raises:
        SiteError, PositionError, ShapeError: as in `intervene`.

    Example:
        >>> import torch, featurizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).eval()
        >>> swap = featurizers.Interchange(featurizers.create("identity", d_in=8), source=torch.zeros(1, 8))
        >>> edit = featurizers.prepare(model, {"resid.post:1": swap})
        >>> for base in torch.tensor([[[1, 2]], [[3, 4]]]):
        ...     edit.sources(torch.ones(1, 8))
        ...     with edit:
        ...         logits = model(base).logits
    """
    return Prepared(model, operations)


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
        map_paths = [
            place.path for key, _ in self._plan if isinstance(key, SiteMap) for place, *_ in places_of(anatomy, key)
        ]
        collection = Collection()
        collected: dict[Any, Any] = {}
        with eager(), ExitStack() as hooks:
            paths = [*(place.path for place in self._places.values()), *map_paths]
            hooks.enter_context(uncheckpointed(anatomy.model, paths))
            context = Context()
            watch = hooks.enter_context(watching(anatomy))
            edits = _Edits(self._of_sites, context, watch, sources, collection, collected, self._by_site)
            hooks.enter_context(watch.telling(context.acts, edits))
            at_places: list[tuple[Place, Callable[[Tensor], Tensor]]] = []
            for key, own in self._plan:
                if isinstance(key, SiteMap):
                    through = MapEdits(key, own, anatomy, context, watch, sources, collection, collected)
                    hooks.enter_context(watch.telling(context.acts, through))
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


def collect(
    model: object,
    inputs: Inputs,
    sites: Iterable[SiteT] | Mapping[SiteT, Featurizer[Any]],
    *,
    positions: Positions = None,
    grad: bool = False,
) -> dict[SiteT, Tensor]:
    """Return activations of a model at sites, or their features. The forward pass stops after the last site.

    Args:
        model: as in `intervene`.
        inputs: keyword arguments of the model, by their names in `transformers`.
        sites: sites whose activations to return, or a mapping from sites to featurizers whose features to return.
        positions: tokens of each prompt; None for all columns, padding included.
        grad: whether to keep the graph.

    Returns:
        ``(batch, n_positions, d)`` for each site, under the key that was given.

    Raises:
        SiteError, PositionError, ShapeError: as in `intervene`.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20))
        >>> collect(model, {"input_ids": torch.tensor([[1, 2, 3]])}, ["resid.post:0"])["resid.post:0"].shape
        torch.Size([1, 3, 8])
    """
    if isinstance(sites, str | Site):
        raise UsageError(f"sites is a list of sites: [{str(sites)!r}]")
    if not isinstance(inputs, Mapping):
        raise UsageError(
            f"inputs are the keyword arguments of the model, such as {{'input_ids': …}}, not {type(inputs).__name__}"
        )
    featurizers = dict(sites) if isinstance(sites, Mapping) else dict.fromkeys(sites)
    anatomy = Anatomy(model)
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        return read(anatomy, with_position_ids(anatomy.model, inputs), featurizers, positions)


def _plan(
    operations: Mapping[SiteT, Operation | Sequence[Operation]] | Operation | Sequence[Operation],
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
