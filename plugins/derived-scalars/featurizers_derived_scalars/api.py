"""`scalars`: derived scalars of one prompt in one call; `plan`: the same for many prompts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final, get_args

from featurizers import Featurizer
from featurizers.errors import UsageError, shown
from torch import Tensor, nn

from featurizers_derived_scalars.capturing import Inputs, LogitFunction, Metric, RawActivations, capture
from featurizers_derived_scalars.circuit import KINDS, Circuit, Need, Place
from featurizers_derived_scalars.nodes import Basis, Node, Part, at_least_float32
from featurizers_derived_scalars.quantities import Deriver, Direction, MetricGrad, NodeMetric, as_direction, residual_of
from featurizers_derived_scalars.registry import spec
from featurizers_derived_scalars.results import Scalars
from featurizers_derived_scalars.specs import ScalarSpec

Featurizers: TypeAlias = "Mapping[Any, Any] | Iterable[Featurizer[Any]]"
"""Featurizers of places: by `Site`, `Place` or its string (``"mlp.delta:3"``); by kind (``"mlp.delta"``), one for all
layers or a mapping from layers; or a list of featurizers that say their own site."""

ByKind: TypeAlias = "Mapping[str, Featurizer[Any] | Mapping[int, Featurizer[Any]]]"
"""Featurizers by kind of place, each one for all layers or a mapping from layers."""

REPLACES: Final[Mapping[str, tuple[str, ...]]] = {
    "resid.embed": ("resid.embed",),
    "attn.z": ("attn.probs",),
    "attn.out": ("attn.probs", "attn.bias"),
    "attn.delta": ("attn.probs", "attn.bias"),
    "mlp.neurons": ("mlp.neurons",),
    "mlp.out": ("mlp.neurons", "mlp.bias"),
    "mlp.delta": ("mlp.neurons", "mlp.bias"),
}
"""Bases of units that a featurizer's nodes replace, at the layers of the featurizer, so that nothing counts twice.

Featurizers of the later residual stream replace nothing: the stream is the sum of what was written before, so their
effects are beside the effects that sum to the total.
"""


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """Derivers, made once for many prompts.

    Attributes:
        circuit: circuit of the model.
        derivers: the scalars to derive, in order.
        metric: metric whose gradient is taken; None without gradients.
    """

    circuit: Circuit
    derivers: tuple[Deriver, ...]
    metric: Metric | LogitFunction | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """Needs of all derivers.

        Raises:
            SiteError: the model lacks a place; the message says which and why.
        """
        return frozenset[Need]().union(*(deriver.needs(self.circuit) for deriver in self.derivers))

    def derive(self, raw: RawActivations) -> Scalars:
        """Return the scalars of one sequence, each layer computed when it is looked up.

        Scalars that have no result at any layer, because nothing is upstream, are left out.

        Raises:
            SiteError: what they need was not captured.
            UsageError: two have one name.
        """
        return Scalars.union(deriver.derive(raw) for deriver in self.derivers if _has_layers(deriver, self.circuit))

    def run(self, inputs: Inputs, **options: Any) -> list[tuple[RawActivations, Scalars]]:
        """Capture each sequence, and return what was captured with the scalars; options as in `capture`."""
        captured = capture(self.circuit, inputs, self.needs, metric=self.metric, **options)
        return [(raw, self.derive(raw)) for raw in captured]


def _has_layers(deriver: Deriver, circuit: Circuit) -> bool:
    """Return True if the deriver has a result at some layer once everything is captured."""
    within = deriver.within
    return within is None or any(within(circuit, layer) for layer in (None, *range(circuit.n_layers)))


def plan(
    model: nn.Module | Circuit,
    what: str | Deriver | Iterable[str | Deriver],
    *,
    metric: Metric | LogitFunction | Node | None = None,
    featurizers: Featurizers | None = None,
    layers: Iterable[int] | None = None,
    **options: Any,
) -> Plan:
    """Return the plan of what `scalars` does, for any number of prompts; arguments and errors as in `scalars`."""
    circuit = model if isinstance(model, Circuit) else Circuit(model)
    by_kind = grouped(featurizers)
    for kind, of_layers in by_kind.items():
        for layer in of_layers if isinstance(of_layers, Mapping) else [0 if KINDS[kind].layered else None]:
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
        name, colon, basis = one.partition(":") if isinstance(one, str) else (one, "", "")
        quantity = spec(name)
        own = {option: value for option, value in options.items() if option in quantity.config.model_fields}
        unused -= set(own)
        derivers += _derivers_of(quantity, basis if colon else None, by_kind, own)
    if unused:
        raise UsageError(f"none of {', '.join(map(str, asked))} takes the option {', '.join(sorted(unused))}")
    if layers is not None:
        chosen = frozenset(layers)
        for layer in chosen:
            circuit.check(Place("resid.pre", layer))
        derivers = [deriver.only({None, *chosen}) for deriver in derivers]
    made = Plan(circuit, tuple(derivers), metric)
    _ = made.needs  # raises now, and not after a run, if the model lacks a place
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
    """Return derived scalars of one prompt.

    Args:
        model: a decoder of `transformers` with its head, or its `Circuit`.
        prompt: token ids of one sequence, or a tokenizer's output for one.
        what: names of quantities, or derivers. ``"write_to"`` is of all default bases, which together are the residual
            stream; ``"write_to:mlp.neurons"`` is of one basis, spelled as a `Basis` prints.
        metric: scalar of the model whose gradient is taken: a `Metric`, a function of the logits, or a `Node`.
        featurizers: bases that replace, or are added to, the units of the places; see `Featurizers`.
        layers: layers of the results; all if None.
        options: options of the quantities, such as ``node``.

    Returns:
        The scalars, by names such as ``"write_to:mlp.neurons"`` and layers; each computed when it is looked up.

    Raises:
        UsageError: a name or an option is unknown, or the prompt is not one sequence.
        SiteError: the model lacks a place; the message says which and why.

    Examples:
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
    """Return the sum of all direct effects along a direction: the residual stream at its place times the direction.

    `Scalars.check_complete` takes it for the default bases. The residual stream there must have been captured.

    Raises:
        SiteError: it was not.
    """
    along = as_direction(direction)
    resid = at_least_float32(raw[along.place(raw.circuit), "forward"])
    return (resid.double() * along.vector(raw).double()).sum()


def grouped(featurizers: Featurizers | None) -> dict[str, Featurizer[Any] | Mapping[int, Featurizer[Any]]]:
    """Return featurizers by kind of place, each one for all layers or a mapping from layers.

    Raises:
        UsageError: an entry is no featurizer, or does not say where it belongs, or two are at one place.
        SiteError: a site is no place.
    """
    if featurizers is None:
        return {}
    if isinstance(featurizers, Mapping):
        return grouped_rows(featurizers.items())
    each = [featurizers] if isinstance(featurizers, Featurizer) else featurizers
    return grouped_rows((getattr(one, "site", None), one) for one in each)


def grouped_rows(rows: Iterable[tuple[Any, Any]]) -> dict[str, Featurizer[Any] | Mapping[int, Featurizer[Any]]]:
    """Do the same as `grouped` for pairs of a site and a featurizer."""
    by_kind: dict[str, Featurizer[Any] | Mapping[int, Featurizer[Any]]] = {}
    for site, one in rows:
        if site is None:
            raise UsageError(
                f"{shown(one)} does not say where it belongs; give featurizers={{'mlp.delta:3': featurizer}}"
            )
        kind, layers = _kind_and_layers(site, one)
        before = by_kind.get(kind, {})
        if not isinstance(layers, Mapping) or not isinstance(before, Mapping):
            if kind in by_kind:
                raise UsageError(f"{kind} has a featurizer for every layer, and another; give one")
            by_kind[kind] = layers
        elif twice := before.keys() & layers.keys():
            raise UsageError(f"two featurizers are at {kind}:{min(twice)}; give one")
        else:
            by_kind[kind] = {**before, **layers}
    for kind, of_layers in by_kind.items():
        Basis(kind, of_layers)  # raises if no featurizer can be there
    return by_kind


def _kind_and_layers(site: Any, one: Any) -> tuple[str, Featurizer[Any] | Mapping[int, Featurizer[Any]]]:
    if isinstance(site, str) and site in KINDS:
        return site, one
    place = Place.parse(site)
    if isinstance(one, Mapping):
        raise UsageError(f"{place} is one place; give it one featurizer, or the kind {place.kind} one for each layer")
    return place.kind, one if place.layer is None else {place.layer: one}


def _derivers_of(quantity: ScalarSpec, text: str | None, by_kind: ByKind, options: Mapping[str, Any]) -> list[Deriver]:
    """Return the derivers of a quantity: of the basis that is named, or of all its default bases and featurizers."""
    fields = quantity.config.model_fields
    if "featurizers" in fields and by_kind:
        options = {"featurizers": by_kind, **options}
    if "kind" not in fields or "kind" in options:
        if text is not None:
            raise UsageError(f"{quantity.name} has no choice of a basis; leave ':{text}' out")
        return [quantity.deriver(**options)]
    if text is not None:
        named = {**_basis_options(text, fields), **options}
        has_parts = "part" in fields and "part" not in named and named["kind"] in by_kind
        parts: list[dict[str, Any]] = [{"part": part} for part in get_args(Part)] if has_parts else [{}]
        return [quantity.deriver(**named, **part) for part in parts]
    derivers: list[Deriver] = []
    units = {**options, "featurizers": {}} if "featurizers" in fields else options
    for default in quantity.bases:
        basis = _basis_options(default, fields)
        replacing = [by_kind[at] for at, replaced in REPLACES.items() if basis["kind"] in replaced and at in by_kind]
        layers = [layer for of_layers in replacing if isinstance(of_layers, Mapping) for layer in of_layers]
        if all(isinstance(of_layers, Mapping) for of_layers in replacing):
            derivers.append(quantity.deriver(**{**units, **basis}).without(layers))
    if "part" in fields:
        whole = {"whole": True} if any(default.endswith(" whole") for default in quantity.bases) else {}
        for kind in by_kind:
            derivers.append(quantity.deriver(**{"kind": kind, **options}))
            for part in ("error", "bias"):
                derivers.append(quantity.deriver(**{"kind": kind, **whole, "part": part, **options}))
    return derivers


def _basis_options(text: str, fields: Collection[str]) -> dict[str, Any]:
    """Return the options of a basis that is spelled as a `Basis` prints: ``mlp.delta error whole``.

    Raises:
        UsageError: a word after the kind is unknown, or the quantity has no such option.
    """
    kind, *words = text.split(" ")
    options: dict[str, Any] = {"kind": kind}
    for word in words:
        option = "whole" if word == "whole" else "part"
        if (word != "whole" and word not in get_args(Part)) or option not in fields or option in options:
            raise UsageError(
                f"cannot read the basis {shown(text)}; write 'mlp.delta', 'mlp.delta error' or 'resid.post whole'"
            )
        options[option] = True if word == "whole" else word
    return options
