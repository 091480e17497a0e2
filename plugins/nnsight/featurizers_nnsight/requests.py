"""What an edit asks a trace of nnsight for: values of modules, in the order in which the model computes them.

nnsight pushes no values: the body of a trace asks for them, and must ask in execution order. An edit at a site is
carried out by the hooks of `featurizers.models.hook` on stand-ins, modules that pass on the value that the trace gave,
so that tuples, heads, packed projections and sums are treated as on the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from featurizers.errors import SiteError, UsageError
from featurizers.models import Place, evaluating, hook, takes, without_cache
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Mediator
from torch import Tensor, nn

from featurizers_nnsight.weights import are_missing

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments of a call, without and with names."""
Location = tuple[str, Literal["input", "output"]]
"""Path of a module, and its side."""


@dataclass(frozen=True)
class Request:
    """A value that an edit needs.

    Attributes:
        site: for which it is needed; errors name it.
        place: of the value.
        stand_in: module with the hook that edits it.
        of_sum: whether the site is a sum, which is edited after its summands.
    """

    site: str
    place: Place
    stand_in: nn.Module
    of_sum: bool

    @property
    def location(self) -> Location:
        """Module and side of the value."""
        return self.place.path, self.place.side

    def carry_out(self, lm: Envoy) -> None:
        """Ask for the value, edit it, and give it back if it has changed.

        Raises:
            UsageError: the pass has gone past the place.
        """
        envoy = envoy_of(lm, self.place)
        check_ahead(lm, f"{envoy.path}.{self.place.side}", self.site)
        if self.place.side == "output":
            value = envoy.output
            edited = self.stand_in(value)
            if edited is not value:
                envoy.output = edited
        else:
            args, kwargs = envoy.inputs
            new_args, new_kwargs = self.stand_in(*args, **kwargs)
            if any(
                new is not old for new, old in zip(_values(new_args, new_kwargs), _values(args, kwargs), strict=True)
            ):
                envoy.inputs = (new_args, new_kwargs)


def requests_of(site: str, place: Place, edit: Callable[[Tensor], Tensor]) -> list[Request]:
    """Return what an edit at a place asks for.

    Args:
        site: that errors name.
        place: of the activations.
        edit: returns the activations to go on with.

    Raises:
        SiteError: the place is a router, whose edit computes what the router returns anew.
    """
    if place.tokens is not None:
        raise SiteError(
            f"{site}: a router is not edited inside a trace, because its weights and indices are computed from its "
            "logits before the trace sees them; use featurizers.intervene(lm, …) around the trace"
        )
    if place.stream is None or place.sum_reader is None:
        stand_in = _stand_in(place)
        hook(replace(place, module=stand_in), edit)
        return [Request(site, place, stand_in, of_sum=False)]
    parts = [replace(place, stream=None, sum_reader=None), place.stream, place.sum_reader]
    added, stream, reader = (replace(part, module=_stand_in(part)) for part in parts)
    hook(replace(added, stream=stream, sum_reader=reader), edit)
    pairs = zip(parts, (added, stream, reader), strict=True)
    return [Request(site, part, own.module, of_sum=True) for part, own in pairs]


def in_order(lm: Envoy, requests: list[Request], call: Callable[[], Call]) -> list[Request]:
    """Return requests in the order in which the model computes their values.

    Args:
        lm: holder of the model.
        requests: to sort.
        call: returns the arguments of the pass, for models that take no token ids.

    Raises:
        SiteError: the model does not compute a value.
    """
    if len({request.location for request in requests}) < 2:
        return sorted(requests, key=lambda each: each.of_sum)
    ranks = _ranks(lm, call)
    for request in requests:
        if request.location not in ranks:
            raise SiteError(f"{request.site}: the model does not call {request.place.path!r}; choose another module")
    return sorted(requests, key=lambda each: (ranks[each.location], each.of_sum))


_known: WeakKeyDictionary[nn.Module, dict[Location, int]] = WeakKeyDictionary()


def _ranks(lm: Envoy, call: Callable[[], Call]) -> dict[Location, int]:
    """Return the order of all modules' inputs and outputs, of one forward pass for each model."""
    module: nn.Module = lm._module
    if module not in _known:
        if takes(module, "input_ids"):
            devices = (parameter.device for parameter in module.parameters() if not parameter.is_meta)
            device = "meta" if are_missing(module) else next(devices, "cpu")  # accelerate moves inputs itself
            given: Call = (), {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device)}
        else:
            given = call()
        _known[module] = _measured(lm, *given)
    return _known[module]


def _measured(lm: Envoy, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Location, int]:
    ranks: dict[Location, int] = {}
    module: nn.Module = lm._module

    def note(path: str, side: Literal["input", "output"]) -> Callable[..., None]:
        def on_event(*_: Any) -> None:
            ranks.setdefault((path, side), len(ranks))

        return on_event

    handles: list[Any] = []
    try:
        for path, each in module.named_modules():
            handles.append(each.register_forward_pre_hook(note(path, "input")))
            handles.append(each.register_forward_hook(note(path, "output")))
        with torch.no_grad(), evaluating(module), stood_down(lm), _fake_where_meta(module):
            module(*args, **{**kwargs, **without_cache(module)})
    finally:
        for handle in handles:
            handle.remove()
    return ranks


def _fake_where_meta(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a model without weights runs, as nnsight's ``scan`` runs it: with shapes alone."""
    if not are_missing(module):
        return nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def stood_down(lm: Envoy) -> Any:
    """Let passes of the model within the context be none of the trace, as nnsight does for calls of an envoy."""
    interleaver = lm.interleaver
    before, interleaver.interleaving = interleaver.interleaving, False
    try:
        yield
    finally:
        interleaver.interleaving = before


def envoy_of(lm: Envoy, place: Place) -> Envoy:
    """Return the envoy of a place's module, whatever the names under which nnsight serves it."""
    if not place.path:
        return lm
    try:
        envoy = lm.get(place.path)
    except AttributeError:
        envoy = None
    if isinstance(envoy, Envoy) and envoy._module is place.module:
        return envoy
    return next(each for each in lm.modules() if each._module is place.module)


def mediator_of(lm: object) -> Mediator:
    """Return the worker that runs the current body of a trace.

    Raises:
        UsageError: no trace is running.
    """
    if not isinstance(lm, Envoy):
        raise UsageError(f"edit takes a model of nnsight, such as TransformersModel, not {type(lm).__name__}")
    try:
        return Mediator.current("featurizers_nnsight.edit")
    except ValueError as error:
        raise UsageError(
            "edit is called in the body of a trace: with lm.trace(…): edit(lm, …); around whole calls of the model "
            "use featurizers.intervene(lm, …)"
        ) from error


def step_of(lm: Envoy, mediator: Mediator) -> int:
    """Return which forward pass a request made now is for: the one that is running, or else the next."""
    step = mediator.iteration
    return int(mediator.occurrence(f"{lm.path}.output") if step is None else step)


def check_ahead(lm: Envoy, location: str, site: str) -> None:
    """Raise UsageError if the pass has gone past a location, which nnsight would only find when the pass has ended."""
    mediator = mediator_of(lm)
    if mediator.occurrence(location) > step_of(lm, mediator):
        raise UsageError(
            f"{site}: this pass has gone past {location!r}. A trace asks for values in the order in which the model "
            "computes them: edit the site before you read or edit what comes later; sites in one call of edit are "
            "sorted"
        )


class _PassesOutput(nn.Module):
    """Stand-in that returns a module's output."""

    def forward(self, value: Any) -> Any:
        return value


class _PassesInputs(nn.Module):
    """Stand-in that returns a module's arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


def _stand_in(place: Place) -> nn.Module:
    return _PassesOutput() if place.side == "output" else _PassesInputs()


def _values(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    return [*args, *kwargs.values()]
