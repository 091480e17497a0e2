"""`replaced`: runs a model with the reconstructions of maps in the place of its own activations."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from featurizers.errors import ShapeError, UsageError
from featurizers.features.precision import without_autocast
from featurizers.features.site_map import SiteMap
from featurizers.models.anatomy import Anatomy
from featurizers.models.checkpointing import uncheckpointed
from featurizers.models.compilation import eager
from featurizers.models.contexts import Context
from featurizers.models.hooks import hook
from featurizers.models.positions import Pass, are_tokens
from featurizers.models.site_maps import MapPlaces, places_of
from featurizers.models.site_order import check_order
from featurizers.models.watching import Watch, watching


@contextmanager
def replaced(
    model: object, maps: SiteMap[Any] | Iterable[SiteMap[Any]], *, error: Literal["dropped", "kept"] = "dropped"
) -> Iterator[None]:
    """Run a model with what maps reconstruct in the place of its own activations, while the context lasts.

    With a transcoder for each layer this is the replacement model of Ameisen et al. 2025, "Circuit Tracing". Operations
    of `featurizers.intervene` act on it as on the model: their contexts may be within this one or around it. At the
    special tokens of a map the model's own activations stay.

    Args:
        model: as in `featurizers.intervene`.
        maps: one map or several; each is encoded from the activations of the replaced model.
        error: ``dropped``: a write is the reconstruction alone. ``kept``: every activation keeps its value, equal in
            each element, and gradients go through the reconstruction, with the error held constant.

    Raises:
        UsageError: a map does not say where it belongs, or reads a site after one that it writes.
        SiteError: the model does not have a site.
    """
    if error not in ("dropped", "kept"):
        raise UsageError(f"error is 'dropped' or 'kept', not {error!r}")
    anatomy = Anatomy(model)
    several = [maps] if isinstance(maps, SiteMap) else list(maps)
    for each in several:
        if not isinstance(each, SiteMap):
            raise UsageError(f"replaced takes maps between sites, not {type(each).__name__}")
        if each.encodes_sequences:
            raise UsageError(f"{each.id!r} encodes whole sequences, which is not possible in a replacement")
    places = [places_of(anatomy, each) for each in several]
    for each in several:
        check_order(each)
    with eager(), ExitStack() as hooks:
        hooks.enter_context(uncheckpointed(anatomy.model, [place.path for own in places for place, *_ in own]))
        context, watch = Context(), hooks.enter_context(watching(anatomy))
        for each, own in zip(several, places, strict=True):
            hooks.enter_context(_Replacement(each, own, error == "kept", context, watch).on_model())
        watch.note_opened()
        hooks.enter_context(context.entered())
        yield


class _Replacement:
    """Reconstructions of one map in the passes of a context.

    Writes are replaced before any other hook sees them, and reads are noted after all other hooks, so that edits at
    these sites act on the replaced model, whether their context is around this one or within it.
    """

    def __init__(self, site_map: SiteMap[Any], places: MapPlaces, kept: bool, context: Context, watch: Watch) -> None:
        self._map, self._places, self._kept, self._context, self._watch = site_map, places, kept, context, watch
        self._local = threading.local()
        self._reads = ExitStack()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Replacement:
        """Return the object itself: a copy of a model in a context is replaced as the model is."""
        return self

    @contextmanager
    def on_model(self) -> Iterator[None]:
        """Put the hooks on the model while the context lasts."""
        with ExitStack() as hooks:
            for place, reads, writes in self._places:
                if writes:
                    through = functools.partial(self._pass_through, reads, writes)
                    hooks.callback(hook(place, through, first=True).remove)
            hooks.callback(self._remove_reads)
            self._read_last()
            hooks.enter_context(self._watch.calling_when_opened(self._read_last))
            yield

    def _read_last(self) -> None:
        """Put the hooks of the reads behind those of all contexts."""
        self._remove_reads()
        for place, reads, writes in self._places:
            if not writes:
                self._reads.callback(hook(place, functools.partial(self._pass_through, reads, [])).remove)

    def _remove_reads(self) -> None:
        self._reads.close()

    def _pass_through(self, reads: list[str], writes: list[str], hidden: Tensor) -> Tensor:
        """Note the activations of reads, and replace those of writes."""
        if not self._context.acts():
            return hidden
        state = self._state()
        state.x |= dict.fromkeys(reads, hidden)
        for write in writes:
            hidden = self._write(state, write, hidden)
        return hidden

    def _state(self) -> _State:
        state: _State | None = getattr(self._local, "state", None)
        if state is None or state.current is not self._watch.current:
            state = self._local.state = _State(self._watch.current)
        return state

    def _write(self, state: _State, write: str, hidden: Tensor) -> Tensor:
        if self._kept and not torch.is_grad_enabled():
            return hidden
        with without_autocast(hidden):
            for group, own in self._map.groups.items():
                if (group, write) not in self._map.decoders or group in state.features:
                    continue
                if missing := [name for name in own.reads if name not in state.x]:
                    site, read = self._map.writes[write], self._map.reads[missing[0]]
                    raise UsageError(
                        f"{self._map.id!r}: {site} is computed before {read}, which its features are read from; such a "
                        "map cannot take the place of the model's activations"
                    )
                state.features[group] = self._map.encode(group, state.x)
            value = self._map.decode(write, state.features, state.x).to(hidden.dtype)
        if value.shape != hidden.shape:
            raise ShapeError(
                f"{self._map.id!r} reconstructs {tuple(value.shape)} at {self._map.writes[write]}, which has "
                f"{tuple(hidden.shape)}"
            )
        if self._map.special_tokens:
            value = torch.where(are_tokens(self._map.special_tokens, hidden, None, state.current), hidden, value)
        return _KeptValue.apply(hidden, value) if self._kept else value  # type: ignore[no-untyped-call]


@dataclass
class _State:
    """State of one forward pass: activations at the reads, and features by group."""

    current: Pass
    x: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


class _KeptValue(torch.autograd.Function):
    """Gives the first tensor, and the gradient to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, reconstruction: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]
