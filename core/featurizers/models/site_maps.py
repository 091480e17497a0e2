"""Operations through one `SiteMap`, as the hooks of a context carry them out in each forward pass."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from featurizers.errors import PositionError, ShapeError, UsageError, shown
from featurizers.features.indices import Selection
from featurizers.features.precision import is_half, without_autocast
from featurizers.features.site_map import Edit, SiteMap
from featurizers.format.sites import Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.carrying import fit, gather, scatter
from featurizers.models.collecting import Collection, acts_on, check_generate
from featurizers.models.contexts import Context
from featurizers.models.map_edits import MapEdit, overlaid
from featurizers.models.operations import Collect, Operation, SourcedOperation, Writes, given
from featurizers.models.places import Place
from featurizers.models.positions import Pass, are_tokens, columns
from featurizers.models.reading import Sources, read_again
from featurizers.models.site_order import check_order
from featurizers.models.watching import GenerateOptions, Watch

MapPlaces: TypeAlias = "list[tuple[Place, list[str], list[str]]]"
"""Each place of a map once, with the names that are read and those that are written there."""


def places_of(anatomy: Anatomy, site_map: SiteMap[Any]) -> MapPlaces:
    """Find the places of a map in a model.

    Raises:
        UsageError: the map does not say where it belongs.
        SiteError: the model does not have a site.
    """
    if not site_map.reads or not site_map.writes:
        name = next(iter(site_map.read_widths))
        raise UsageError(
            f"{site_map.id!r} does not say where it belongs; set its reads and writes, as in "
            f"f.reads = {{{name!r}: 'mlp.in:8'}}"
        )
    found: dict[Any, tuple[Place, list[str], list[str]]] = {}
    for sites, of_writes in ((site_map.reads, False), (site_map.writes, True)):
        for name, site in sites.items():
            place = anatomy.place(site)
            columns_of_head = None if place.columns is None else (place.columns.start, place.columns.stop)
            key = (place.path, place.side, place.groups, columns_of_head, site.kind == "resid.mid")
            entry = found.setdefault(key, (place, [], []))
            (entry[2] if of_writes else entry[1]).append(name)
    return list(found.values())


@dataclass
class _State:
    """State of one forward pass.

    Attributes:
        current: the pass.
        x: activations at the reads, ``(batch, sequence, d)``.
        base: activations of the same pass without the operations, by site; empty if none needs them.
        edits: of each operation, by its number, and group.
        skipped: numbers of the operations that do not concern this pass.
    """

    current: Pass
    x: dict[str, Tensor] = field(default_factory=dict)
    base: Mapping[Site, Tensor] = field(default_factory=dict)
    edits: dict[tuple[int, str], MapEdit] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()


class MapEdits:
    """Operations through one map in one context.

    In each pass a group is encoded as soon as its reads have been computed, and each operation changes its features in
    turn, so that an operation sees what those before it have set. A write then gets the decoded changes of all groups.

    Args:
        site_map: map of all the operations.
        operations: in their order.
        anatomy: of the model.
        context: in which they act.
        watch: of the model.
        sources: of the operations, by the site of each read.
        collection: where features are collected.
        collected: mapping that the caller sees, by operation.

    Raises:
        UsageError: the options of the operations do not fit the map or each other.
        SiteError: the model does not have a site.
        FeatureIndexError: an operation names features that the map does not have.
    """

    def __init__(
        self,
        site_map: SiteMap[Any],
        operations: Sequence[Operation],
        anatomy: Anatomy,
        context: Context,
        watch: Watch,
        sources: Sources,
        collection: Collection,
        collected: dict[Any, Any],
    ) -> None:
        self._map, self._operations, self._anatomy = site_map, operations, anatomy
        self._context, self._watch, self._sources = context, watch, sources
        self._collection, self._collected = collection, collected
        self._places = places_of(anatomy, site_map)
        self._frozen, writes = _options(site_map, operations)
        self._pinned, self._everywhere = writes in ("pinned", "pinned-everywhere"), writes == "pinned-everywhere"
        self._chosen = [_chosen(site_map, operation) for operation in operations]
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> MapEdits:
        """Return the object itself: a copy of a model in a context is edited as the model is."""
        return self

    def begin_passes(self, hooks: ExitStack) -> None:
        """Be told of each pass before the first block runs, until ``hooks`` closes."""
        hooks.callback(self._anatomy.decoder.register_forward_pre_hook(self._begin).remove)

    def edits(self) -> list[tuple[Place, Callable[[Tensor], Tensor]]]:
        """Return what to do at each place: read features, or write, or both."""
        return [(place, functools.partial(self._pass_through, reads, writes)) for place, reads, writes in self._places]

    def begin_generate(self, options: GenerateOptions) -> None:
        """Raise if an operation cannot be carried out with these options of ``generate``."""
        for operation in self._operations:
            check_generate(self._map.id, operation, options)
        if self._map.encodes_sequences and (options.get("num_beams") or 1) > 1:
            raise UsageError(f"{self._map.id!r} encodes whole sequences, and beam search reorders them; use one beam")

    def end_generate(self, tokens: int) -> None:
        """Do nothing: the collection is trimmed once for all operations of a context."""

    # ------------------------------------------------------------------ one pass
    def _begin(self, *_: Any) -> None:
        """Begin a pass, before any site is computed."""
        if self._context.acts():
            self._local.state = self._new_state(self._watch.current)

    def _state(self) -> _State:
        """Return the state of the current pass; a new one where a pass within this one has taken its place."""
        state: _State | None = getattr(self._local, "state", None)
        if state is None or state.current is not self._watch.current:
            state = self._local.state = self._new_state(self._watch.current)
        return state

    def _new_state(self, current: Pass) -> _State:
        concerns = [
            acts_on(each, self._map.id, current, self._context, has_source=isinstance(each, SourcedOperation))
            for each in self._operations
        ]
        state = _State(current, skipped=frozenset(number for number, acts in enumerate(concerns) if not acts))
        if not (self._frozen or self._pinned) or not any(concerns):
            return state
        if current.start:
            raise UsageError(
                f"{self._map.id!r}: later='frozen' and writes='pinned' need a second pass over all tokens, and this "
                "pass continues from a cache; give positions of the prompt, or run the whole sequence in one pass"
            )
        sites = {*self._map.reads.values(), *(self._map.writes.values() if self._pinned else ())}
        with self._context.paused():
            state.base = read_again(self._anatomy, current, list(sites))
        if self._frozen:
            x = {name: state.base[site] for name, site in self._map.reads.items()}
            for group in self._map.groups:
                self._edit(state, group, x)
        return state

    def _pass_through(self, reads: list[str], writes: list[str], hidden: Tensor) -> Tensor:
        """Note the activations of reads, and return those of writes with the changes added."""
        if not self._context.acts():
            return hidden
        state = self._state()
        with without_autocast(hidden):
            state.x |= dict.fromkeys(reads, hidden)
            for group, own in self._map.groups.items():
                if not self._frozen and not set(reads).isdisjoint(own.reads) and state.x.keys() >= set(own.reads):
                    self._edit(state, group, state.x)
            if writes:
                hidden = self._pin(state, writes[0], hidden)
            for name in writes:
                hidden = self._write(state, name, hidden)
        return hidden

    def _edit(self, state: _State, group: str, x: Mapping[str, Tensor]) -> None:
        """Encode a group for each operation, and let the operation change its features."""
        first = x[self._map.groups[group].reads[0]]
        for number, operation in enumerate(self._operations):
            if number in state.skipped or group not in self._chosen[number]:
                continue
            chosen = self._chosen[number][group]
            sourced = isinstance(operation, SourcedOperation)
            tokens = columns(operation.positions, first, state.current, prompt_only=sourced)
            numbers = chosen.as_columns()
            numbers = None if numbers is None else numbers.to(first.device)
            features = self._encoded(group, x, state.current, tokens, numbers)
            for earlier in range(number):
                if (earlier, group) in state.edits:
                    features = overlaid(features, tokens, numbers, state.edits[earlier, group])
            if isinstance(operation, Collect):
                self._keep(operation, group, features, state.current.start)
                continue
            source = None
            if isinstance(operation, SourcedOperation):
                source = self._source(operation, group, features, numbers, state.current)
            edited = operation.edited(features, source, group)
            if chosen.differs_by_example:
                edited = torch.where(chosen.mask_for(features), edited, features)
            if self._map.special_tokens:
                special = are_tokens(self._map.special_tokens, first, tokens, state.current)
                edited = torch.where(special, features, edited)
            state.edits[number, group] = MapEdit(Edit(features, edited, numbers), tokens)

    def _encoded(
        self, group: str, x: Mapping[str, Tensor], current: Pass, tokens: Tensor | None, numbers: Tensor | None
    ) -> Tensor:
        """Return features of a group at some tokens, ``(batch, n, k)``."""
        reads = self._map.groups[group].reads
        if not self._map.encodes_sequences:
            return self._map.encode(group, {name: gather(x[name], tokens) for name in reads}, numbers)
        history: dict[str, Tensor] = vars(self._local).setdefault("history", {})
        for name in reads:
            before = history.get(name, x[name][:, :0])[:, : current.start]
            if before.shape[1] < current.start:
                raise PositionError(
                    f"{self._map.id!r} encodes whole sequences, and the first tokens of this one were computed before "
                    "the context was entered; run the whole prompt inside it"
                )
            history[name] = torch.cat([before, x[name]], dim=1) if current.start else x[name]
        features = self._map.encode_sequences(
            group, {name: history[name] for name in reads}, _is_token(current), numbers
        )
        return gather(features[:, current.start :], tokens)

    def _source(
        self, operation: SourcedOperation, group: str, features: Tensor, numbers: Tensor | None, current: Pass
    ) -> Tensor:
        """Return the features of the source, in the shape of those to edit."""
        reads = self._map.groups[group].reads
        x = {name: given(self._sources.of(self._map.reads[name], operation, current)) for name in reads}
        if not self._map.encodes_sequences or isinstance(operation.source, Tensor):
            return fit(self._map.encode(group, x, numbers), features, self._map.id)
        mask = operation.source.get("attention_mask")
        of_source = Pass(0, 0, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
        positions = operation.positions if operation.source_positions is None else operation.source_positions
        encoded = self._map.encode_sequences(group, x, _is_token(of_source), numbers)
        return fit(gather(encoded, columns(positions, x[reads[0]], of_source)), features, self._map.id)

    def _keep(self, operation: Collect, group: str, features: Tensor, start: int) -> None:
        """Collect features: a tensor of a map with one group, else a mapping by group."""
        if len(self._map.groups) == 1:
            self._collection.keep(self._collected, operation, (operation,), features, start)
        else:
            results = self._collected.setdefault(operation, {})
            self._collection.keep(results, group, (operation, group), features, start)

    # ------------------------------------------------------------------ writes
    def _pin(self, state: _State, write: str, hidden: Tensor) -> Tensor:
        """Return a write as it is without the operations, at their tokens or at all of them, if they are pinned."""
        if not self._pinned:
            return hidden
        base = state.base[self._map.writes[write]]
        x_base = {name: state.base[site] for name, site in self._map.reads.items()}
        skip = self._map.skip_change(write, {name: x - x_base[name] for name, x in state.x.items()})
        pinned = base if skip is None else (base + skip).to(base.dtype)
        if self._map.special_tokens:
            pinned = torch.where(are_tokens(self._map.special_tokens, hidden, None, state.current), hidden, pinned)
        for number, operation in enumerate(self._operations):
            if number in state.skipped or isinstance(operation, Collect):
                continue
            sourced = isinstance(operation, SourcedOperation)
            tokens = columns(operation.positions, hidden, state.current, prompt_only=sourced)
            tokens = None if self._everywhere else tokens
            hidden = pinned if tokens is None else scatter(hidden, tokens, gather(pinned, tokens))
        return hidden

    def _write(self, state: _State, write: str, hidden: Tensor) -> Tensor:
        """Return a write with the decoded changes added."""
        for number, operation in enumerate(self._operations):
            if number in state.skipped or isinstance(operation, Collect):
                continue
            groups = [group for group in self._chosen[number] if (group, write) in self._map.decoders]
            if late := [group for group in groups if (number, group) not in state.edits]:
                raise UsageError(
                    f"{self._map.id!r}: {self._map.writes[write]} is computed before the reads of {late[0]!r}, whose "
                    "features are written there; take them from a pass before: later='frozen'"
                )
            if not groups:
                continue
            tokens = state.edits[number, groups[0]].tokens
            base = gather(hidden, tokens)
            if base.shape[-1] != self._map.write_widths[write]:
                raise ShapeError(
                    f"{self._map.id!r}: the write {write!r} has width {self._map.write_widths[write]}, and "
                    f"{self._map.writes[write]} has {base.shape[-1]}"
                )
            edits = {group: state.edits[number, group].edit for group in groups}
            result = self._map.apply_edit(write, base, edits)
            if result is base:
                continue
            if is_half(self._map) and not bool((result.isfinite() | ~base.isfinite()).all()):
                raise UsageError(
                    f"{self._map.id!r} is in float16, and activations or features overflow it; convert it first: "
                    ".float() or .bfloat16()"
                )
            hidden = result if tokens is None else scatter(hidden, tokens, result)
        return hidden


def _options(site_map: SiteMap[Any], operations: Sequence[Operation]) -> tuple[bool, Writes | None]:
    """Return whether later features are frozen, and how writes change.

    Raises:
        UsageError: the operations differ, an option must be chosen, or the map cannot be edited in one pass.
    """
    edits = [operation for operation in operations if not isinstance(operation, Collect)]
    if not edits:
        return any(operation.later == "frozen" for operation in operations), None
    if len({(operation.later, operation.writes) for operation in edits}) > 1:
        raise UsageError(f"{site_map.id!r}: operations through one map take the same options later and writes")
    if len(site_map.writes) > 1 and edits[0].writes is None:
        raise UsageError(
            f"{site_map.id!r} writes {len(site_map.writes)} sites, and an early change also reaches the later ones "
            "through the model; say writes='additive' to add the map's change to the model's own, or writes='pinned' "
            "to keep the map's change alone"
        )
    if edits[0].later == "recomputed":
        check_order(site_map)
    return edits[0].later == "frozen", edits[0].writes


def _chosen(site_map: SiteMap[Any], operation: Operation) -> dict[str, Selection]:
    """Return the features that an operation concerns, by group; a group without any is left out.

    Raises:
        UsageError, FeatureIndexError: the map does not have the groups or features.
    """
    values = [getattr(operation, name, None) for name in ("value", "delta", "gate")]
    indices = site_map.by_group(getattr(operation, "indices", None))
    if by_group := next((value for value in values if isinstance(value, Mapping)), None):
        unknown = sorted(map(str, by_group.keys() - site_map.groups.keys()))
        if unknown:
            raise UsageError(f"{site_map.id!r} has no group {shown(unknown[0])}")
        indices = {group: own for group, own in indices.items() if group in by_group}
    elif len(indices) > 1 and any(isinstance(value, Tensor | nn.Module) and _is_long(value) for value in values):
        raise UsageError(f"{site_map.id!r} has several groups; give {type(operation).__name__} its values by group")
    device = next(site_map.parameters(), torch.empty(0))
    chosen = {group: site_map.select(group, own, device) for group, own in indices.items()}
    return {group: each for group, each in chosen.items() if each.columns is None or each.columns.numel()}


def _is_long(value: Tensor | nn.Module) -> bool:
    return isinstance(value, nn.Module) or value.dim() > 0


def _is_token(current: Pass) -> Tensor | None:
    """Return booleans ``(batch, total)`` that are True for tokens and False for padding; None without padding."""
    return None if current.attention_mask is None else current.attention_mask != 0
