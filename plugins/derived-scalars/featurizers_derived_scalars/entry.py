"""`scalars`: derived scalars of one prompt in one call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final, get_args

from featurizers import Featurizer
from featurizers.errors import UsageError, shown
from torch import Tensor, nn

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.axes import exact
from featurizers_derived_scalars.bases import Basis, Part
from featurizers_derived_scalars.capturing import capture
from featurizers_derived_scalars.circuit import Circuit
from featurizers_derived_scalars.derivers import Deriver
from featurizers_derived_scalars.directions import Direction, MetricGrad, as_direction
from featurizers_derived_scalars.metrics import LogitFunction, Metric
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.places import KINDS, Need, Place
from featurizers_derived_scalars.prompts import Inputs
from featurizers_derived_scalars.results import Scalars
from featurizers_derived_scalars.specs import ScalarSpec, spec
from featurizers_derived_scalars.tracing import NodeMetric, residual_of

Featurizers: TypeAlias = "Mapping[Any, Any] | Iterable[Featurizer[Any]]"
"""Featurizers of places: by `Site`, `Place` or its string (``"mlp.delta:3"``); by kind (``"mlp.delta"``), one or one
for each layer; or a list of featurizers that say their own site."""

REPLACES: Final[Mapping[str, tuple[str, ...]]] = {
    "resid.embed": ("resid.embed",),
    "attn.z": ("attn.probs",),
    "attn.out": ("attn.probs", "attn.bias"),
    "attn.delta": ("attn.probs", "attn.bias"),
    "mlp.neurons": ("mlp.neurons",),
    "mlp.out": ("mlp.neurons", "mlp.bias"),
    "mlp.delta": ("mlp.neurons", "mlp.bias"),
}
"""Bases of units that a featurizer's nodes stand in for, at the layers that it is at, so that nothing counts twice.

Those of the residual stream after its beginning stand in for nothing: they are the sum of what was written before, and
effects of theirs are beside the effects that sum to the total.
"""


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be derived of prompts, made once for many of them.

    Attributes:
        circuit: of the model.
        derivers: of the scalars, in order.
        metric: whose gradient is taken; None if none is.
    """

    circuit: Circuit
    derivers: tuple[Deriver, ...]
    metric: Metric | LogitFunction | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """What must be captured for all of them.

        Raises:
            SiteError: the model lacks a place; the message says which and why.
        """
        return frozenset[Need]().union(*(deriver.needs(self.circuit) for deriver in self.derivers))

    def derive(self, raw: RawActivations) -> Scalars:
        """The scalars of one sequence, each layer computed when it is looked up.

        A scalar that has no result at any layer, since nothing is upstream, is left out.

        Raises:
            SiteError: what they need was not captured.
            UsageError: two have one name.
        """
        found = [deriver for deriver in self.derivers if _has_layers(deriver, raw)]
        return Scalars.union(deriver.derive(raw) for deriver in found)

    def run(self, inputs: Inputs, **options: Any) -> list[tuple[RawActivations, Scalars]]:
        """What was captured, and the scalars, of each sequence; options as `capture`."""
        captured = capture(self.circuit, inputs, self.needs, metric=self.metric, **options)
        return [(raw, self.derive(raw)) for raw in captured]


def _has_layers(deriver: Deriver, raw: RawActivations) -> bool:
    """Whether there is a layer, or there would be one if more had been captured, which is an error to be told."""
    within = deriver.within
    return within is None or any(within(raw.circuit, layer) for layer in (None, *range(raw.circuit.n_layers)))


def plan(
    model: nn.Module | Circuit,
    what: str | Deriver | Iterable[str | Deriver],
    *,
    metric: Metric | LogitFunction | Node | None = None,
    featurizers: Featurizers | None = None,
    layers: Iterable[int] | None = None,
    **options: Any,
) -> Plan:
    """What `scalars` does, for any number of prompts; arguments and errors as there."""
    circuit = model if isinstance(model, Circuit) else Circuit(model)
    by_kind = grouped(featurizers)
    for kind, given in by_kind.items():
        for layer in given if isinstance(given, Mapping) else [0 if KINDS[kind].layered else None]:
            circuit.check(Place(kind, layer))
    if isinstance(metric, Node):
        options = {"direction": MetricGrad(residual_of(metric, circuit)), **options}
        metric = NodeMetric(metric, circuit)
    asked = [what] if isinstance(what, str | Deriver) else list(what)
    if not asked:
        raise UsageError("what is to be derived? Give names such as 'write_to', or derivers")
    derivers: list[Deriver] = []
    unused = set(options) - {"direction"}
    for one in asked:
        if isinstance(one, Deriver):
            derivers.append(one)
            continue
        name, colon, kind = one.partition(":") if isinstance(one, str) else (one, "", "")
        found = spec(name)
        unused -= set(found.config.model_fields)
        own = {key: value for key, value in options.items() if key in found.config.model_fields}
        derivers += _of_spec(found, kind if colon else None, by_kind, own)
    if unused:
        raise UsageError(f"none of {', '.join(map(str, asked))} takes the option {', '.join(sorted(unused))}")
    if layers is not None:
        chosen = frozenset(layers)
        for layer in chosen:
            circuit.check(Place("resid.pre", layer))
        derivers = [deriver.only({None, *chosen}) for deriver in derivers]
    made = Plan(circuit, tuple(derivers), metric)
    _ = made.needs  # what the model lacks is said now, and not after a run
    return made


def scalars(
    model: nn.Module | Circuit,
    prompt: Inputs,
    what: str | Deriver | Iterable[str | Deriver],
    *,
    metric: Metric | LogitFunction | Node | None = None,
    featurizers: Featurizers | None = None,
    layers: Iterable[int] | None = None,
    **options: Any,
) -> Scalars:
    """Derived scalars of one prompt.

    Args:
        model: a decoder of `transformers` with its head, or its `Circuit`.
        prompt: token ids of one sequence, or a tokenizer's output for one.
        what: names of quantities, or derivers. ``"write_to"`` is of all default bases, which together are the residual
            stream; ``"write_to:mlp.neurons"`` of one, spelled as a `Basis` prints; any of transformer-debugger's names
            in lower case will do.
        metric: scalar of the model whose gradient is taken: a `Metric`, a function of the logits, or a `Node`.
        featurizers: bases beside or instead of the units of the places; see `Featurizers`.
        layers: of the results; all if None.
        options: of the quantities, such as ``node``.

    Returns:
        The scalars, by names such as ``"write_to:mlp.neurons"`` and layers; each computed when it is looked up.

    Raises:
        UsageError: a name or an option is not known, or the prompt is not one sequence.
        SiteError: the model lacks a place; the message says which and why.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).eval()
        >>> found = scalars(model, [1, 2, 3], "write_to", metric=lambda logits: logits[-1, 5])
        >>> found["write_to:attn.probs", 1].shape
        torch.Size([3, 3, 2])
        >>> len(found.topk(5, both_ends=True))
        10
    """
    made = plan(model, what, metric=metric, featurizers=featurizers, layers=layers, **options)
    runs = made.run(prompt)
    if len(runs) != 1:
        raise UsageError(f"the prompt is {len(runs)} sequences; give one, or make a plan() and call its run()")
    return runs[0][1]


def direct_total(raw: RawActivations, direction: Direction | Node | Tensor | None = None) -> Tensor:
    """What all direct effects along a direction sum to: the residual stream at its place times the direction.

    What `Scalars.check_complete` takes for the default bases. The direction's place must have been captured.

    Raises:
        SiteError: it was not.
    """
    along = as_direction(direction)
    resid = exact(raw[along.place(raw.circuit), "forward"])
    return (resid.double() * along.vector(raw).double()).sum()


def grouped(featurizers: Featurizers | None) -> dict[str, Featurizer[Any] | Mapping[int, Featurizer[Any]]]:
    """Featurizers by kind of place, one or one for each layer.

    Raises:
        UsageError: one is no featurizer, or does not say where it belongs, or two are at one place.
        SiteError: a site is no place.
    """
    if featurizers is None:
        return {}
    rows: list[tuple[Any, Any]]
    if isinstance(featurizers, Featurizer):
        rows = [(featurizers.site, featurizers)]
    elif isinstance(featurizers, Mapping):
        rows = list(featurizers.items())
    else:
        rows = [(getattr(one, "site", None), one) for one in featurizers]
    found: dict[str, Featurizer[Any] | Mapping[int, Featurizer[Any]]] = {}
    for where, one in rows:
        if where is None:
            raise UsageError(
                f"{shown(one)} does not say where it belongs; give featurizers={{'mlp.delta:3': featurizer}}"
            )
        kind, layers = _where(where, one)
        before = found.get(kind, {})
        if not isinstance(layers, Mapping) or not isinstance(before, Mapping):
            if kind in found:
                raise UsageError(f"{kind} has a featurizer for every layer, and another")
            found[kind] = layers
        elif twice := before.keys() & layers.keys():
            raise UsageError(f"two featurizers are at {kind}:{min(twice)}")
        else:
            found[kind] = {**before, **layers}
    for kind, given in found.items():
        Basis(kind, given)  # which says what cannot be there
    return found


def _where(where: Any, one: Any) -> tuple[str, Featurizer[Any] | Mapping[int, Featurizer[Any]]]:
    if isinstance(where, str) and where in KINDS:
        return where, one
    place = Place.parse(where)
    if isinstance(one, Mapping):
        raise UsageError(f"{place} is one place; give it one featurizer, or the kind {place.kind} one for each layer")
    return place.kind, one if place.layer is None else {place.layer: one}


def _of_spec(
    found: ScalarSpec,
    kind: str | None,
    by_kind: Mapping[str, Featurizer[Any] | Mapping[int, Featurizer[Any]]],
    options: Mapping[str, Any],
) -> list[Deriver]:
    fields = found.config.model_fields
    if "featurizers" in fields and by_kind:
        options = {"featurizers": by_kind, **options}
    if "kind" not in fields or "kind" in options:
        if kind is not None:
            raise UsageError(f"{found.name} is not of a basis of one's choice; leave ':{kind}' out")
        return [found.deriver(**options)]
    if kind is not None:
        basis = _basis(kind, fields)
        parts = get_args(Part) if "part" in fields and basis["kind"] in by_kind else ("features",)
        if "part" in {**basis, **options}:
            return [found.deriver(**{**basis, **options})]
        return [found.deriver(**{**basis, **({"part": part} if len(parts) > 1 else {}), **options}) for part in parts]
    derivers: list[Deriver] = []
    for text in found.bases:
        basis = _basis(text, fields)
        taken = [by_kind[at] for at, gone in REPLACES.items() if basis["kind"] in gone and at in by_kind]
        if any(not isinstance(given, Mapping) for given in taken):
            continue
        deriver = found.deriver(**{**options, **basis, **({"featurizers": {}} if "featurizers" in fields else {})})
        derivers.append(deriver.without({layer for given in taken if isinstance(given, Mapping) for layer in given}))
    if "part" in fields:
        whole = any(text.endswith(" whole") for text in found.bases)
        for at in by_kind:
            derivers.append(found.deriver(**{"kind": at, **options}))
            rest: dict[str, Any] = {"kind": at, "whole": True} if whole else {"kind": at}
            derivers += [found.deriver(**{**rest, "part": part, **options}) for part in ("error", "bias")]
    return derivers


def _basis(text: str, fields: Collection[str]) -> dict[str, Any]:
    """The options of a basis that is spelled as a `Basis` prints: ``mlp.delta error whole``.

    Raises:
        UsageError: a word after the kind is none of these, or the quantity has no such option.
    """
    kind, *words = text.split(" ")
    found: dict[str, Any] = {"kind": kind}
    for word in words:
        option = "whole" if word == "whole" else "part"
        if (word != "whole" and word not in get_args(Part)) or option not in fields or option in found:
            raise UsageError(
                f"cannot read the basis {shown(text)}; write 'mlp.delta', 'mlp.delta error' or 'resid.post whole'"
            )
        found[option] = True if word == "whole" else word
    return found
