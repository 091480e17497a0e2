"""`edit`: operations at sites inside the body of a trace of nnsight."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import nnsight
import torch
from featurizers import collect
from featurizers.errors import UsageError
from featurizers.models import Anatomy, Collect, Operation, Pass, SourcedOperation, carry_out, features_of, unedited
from nnsight.intervention.envoy import Envoy
from torch import Tensor

from featurizers_nnsight.passes import call_of, is_prompt, needs_pass, padded_as_given, pass_of
from featurizers_nnsight.requests import in_order, mediator_of, requests_of, stood_down

Operations = Mapping[Any, "Operation | Sequence[Operation]"]
"""An operation, or several in their order, for each site."""


def edit(lm: Envoy, operations: Operations) -> dict[Any, Tensor]:
    """Carry out operations in the current pass of a trace, or on the rows of the current invoke.

    Call it in the body of ``lm.trace``, of an invoke or of a step of ``tr.iter``, before values that come later are
    read. The sites of one call are asked for in the order in which the model computes them, whatever the order in the
    mapping; later reads see the edit. Operations with positions or a source act on the prompt alone, and positions
    count the tokens of each prompt without its padding. A source in the form of inputs is read from the model without
    the trace, at the call.

    Args:
        lm: model of nnsight, such as ``TransformersModel``.
        operations: as in `featurizers.intervene`; a key is a `featurizers.Site` or its string.

    Returns:
        Results of the `Collect` operations of this pass by site, ``(batch, n_positions, k)``, saved as by
        ``nnsight.save``.

    Raises:
        UsageError: no trace is running here, or its pass has gone past a site.
        SiteError: the model does not have a site, or it is a router.
        PositionError: a prompt does not have a position.
        ShapeError: a source does not fit the batch, or a featurizer does not fit the site.

    Examples:
        >>> with lm.trace(ids):  # doctest: +SKIP
        ...     edit(lm, {"resid.post:8": featurizers.Steer(f, delta=2.0)})
        ...     logits = lm.output.logits.save()
    """
    mediator_of(lm)
    if not isinstance(operations, Mapping):
        raise UsageError(f"operations are a mapping from sites to operations, not {type(operations).__name__}")
    anatomy = Anatomy(lm._module)
    collected: dict[Any, Tensor] = {}
    requests = []
    for key, value in operations.items():
        own = as_operations(key, value)
        if any(map(needs_pass, own)):
            call_of(lm)  # before any value that comes later
        site, place = str(anatomy.site(key)), anatomy.place(key)
        requests += requests_of(site, place, functools.partial(_edited, lm, site, key, own, collected))
    for request in in_order(lm, requests, functools.partial(call_of, lm)):
        request.carry_out(lm)
    return nnsight.save(collected) if collected else collected


def as_operations(key: object, value: object) -> tuple[Operation, ...]:
    """Return the operations at a site, of one or of several.

    Raises:
        UsageError: there is something else than an operation at one site.
    """
    own = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    for each in own:
        if not isinstance(each, Operation):
            raise UsageError(f"{key}: edit takes operations, such as Steer(f, delta=1.0), not {type(each).__name__}")
        _ = each.of_site  # raises for one through a map
    return own


def _edited(
    lm: Envoy, site: str, key: Any, operations: Sequence[Operation], collected: dict[Any, Tensor], hidden: Tensor
) -> Tensor:
    """Return activations after the operations at a site."""
    for operation in operations:
        if is_prompt(lm, operation, site):
            hidden = _carried_out(lm, site, key, operation, collected, hidden)
    return hidden


def _carried_out(
    lm: Envoy, site: str, key: Any, operation: Operation, collected: dict[Any, Tensor], hidden: Tensor
) -> Tensor:
    current = pass_of(lm, hidden) if needs_pass(operation) else Pass(0, 0, None)
    if isinstance(operation, Collect):
        collected[key] = features_of(operation, hidden, current)
        return hidden
    source = _source(lm, site, operation, padded_as_given(current)) if isinstance(operation, SourcedOperation) else None
    return carry_out(operation, hidden, current, source, name=site)


@torch.no_grad()
def _source(lm: Envoy, site: str, operation: SourcedOperation, as_given: bool) -> Tensor:
    """Return the activations of an operation's source; inputs are run through the model without the trace.

    Args:
        lm: holder of the model.
        site: of the activations.
        operation: with the source.
        as_given: whether to count the positions of a padded source by columns, as the base does.
    """
    if isinstance(operation.source, Tensor):
        return operation.source
    inputs = dict(operation.source)
    ids = inputs.get("input_ids")
    if as_given and inputs.get("position_ids") is None and isinstance(ids, Tensor):
        inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    own = operation.source_positions
    with stood_down(lm), unedited():
        return collect(lm, inputs, [site], positions=operation.positions if own is None else own)[site]
