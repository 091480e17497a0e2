"""`Recorder`: hears a run and keeps what is needed of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import torch
from featurizers.errors import ShapeError, SiteError
from jaxtyping import Int
from torch import Tensor, nn

from featurizers_derived_scalars.activations import Arguments, RawActivations
from featurizers_derived_scalars.attention import Listener, Part
from featurizers_derived_scalars.places import Pass, Place
from featurizers_derived_scalars.replaying import shaped, unshaped
from featurizers_derived_scalars.running import Point

if TYPE_CHECKING:
    from featurizers_derived_scalars.circuit import Circuit

PARTS: Final[Mapping[str, Part]] = {
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.logits": "logits",
    "attn.probs": "probs",
    "attn.z": "z",
}
_SCALES: Final = ("norm.attn.scale", "norm.attn.post.scale", "norm.mlp.scale", "norm.mlp.post.scale")


@final
@dataclass(frozen=True)
class Edit:
    """A change to make while the model runs.

    Attributes:
        place: one that a module or the attention function holds: of ``resid.*``, ``attn.{q,k,v,probs,z,out,delta}``
            and ``mlp.{pre,neurons,out,delta}``.
        function: from the activations of one sequence to those that replace them, of the same shape.

    Raises:
        SiteError: the place is derived from others, and cannot be edited.
    """

    place: Place
    function: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        """Refuse a place that is derived."""
        derived = self.place.kind.startswith("norm.") or self.place.kind.endswith((".bias", "logits"))
        if derived:
            raise SiteError(f"{self.place} is derived from other places, and cannot be edited; edit one of those")


@final
@dataclass(frozen=True)
class Keeper:
    """Copies a tensor to where it is to be kept, without its graph.

    Attributes:
        device: where; where it is if None.
        dtype: as what; as it is if None.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy of its own."""
        return self.exactly(tensor).to(self.dtype)

    def adopted(self, tensor: Tensor) -> Tensor:
        """The tensor itself if it is all of its storage, of which nobody else holds on to anything; else a copy."""
        tensor = tensor.detach()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor.to(self.device, self.dtype) if whole else self(tensor)

    def exactly(self, tensor: Tensor) -> Tensor:
        """A copy in the dtype that it has: for token ids, and for scales, which are divided by."""
        return tensor.detach().to(self.device, copy=True, memory_format=torch.contiguous_format)


@final
class Recorder(Listener):
    """What is needed of one run.

    Args:
        circuit: of the model.
        wanted: places and passes to keep.
        read: what the metric reads, kept with its graph until it was read.
        frozen: norms whose scale is held constant.
        edits: changes to make.
        keep: how to store a tensor.
    """

    def __init__(
        self,
        circuit: Circuit,
        wanted: frozenset[tuple[Place, Pass]],
        read: frozenset[tuple[Place, Pass]],
        frozen: frozenset[str],
        edits: tuple[Edit, ...],
        keep: Keeper,
    ) -> None:
        self._circuit, self._wanted, self._frozen, self._keep = circuit, wanted, frozen, keep
        self._read = frozenset(place for place, _ in read)
        self._edits: dict[Place, list[Callable[[Tensor], Tensor]]] = {}
        for edit in edits:
            self._edits.setdefault(edit.place, []).append(edit.function)
        self._kept: dict[tuple[Place, Pass], Tensor] = {}
        self._held: dict[Place, tuple[Tensor, int]] = {}  # as the model has them, with their graph, and their version
        self._scales: dict[Place, Tensor] = {}
        self._outputs: dict[Place, Tensor] = {}  # of norms
        self._normed = torch.empty(0)  # what the norm that is being run took
        self._before = torch.empty(0)  # what the block that is being run took
        self._layer_of = {
            circuit.model.get_submodule(block.attention): layer for layer, block in enumerate(circuit.layout.blocks)
        }
        self._metric: float | None = None
        self.arguments: dict[int, Arguments] = {}
        self._backward = sorted(place for place, pass_ in wanted if pass_ == "backward")
        self._roots = {_source(place) for place in self._backward}
        self._tapped = {place for place, _ in wanted} | self._read | set(self._edits) | self._roots

    @property
    def graph(self) -> bool:
        """Whether there will be a gradient."""
        return bool(self._backward)

    def _start(self) -> Point:
        """Where the graph begins: the latest stream before all that has a gradient or is read."""
        last = self._circuit.n_layers - 1
        late = ("resid.post", "resid.final", "norm.final.scale", "logits")
        starts = [
            (last if place.layer is None and place.kind in late else place.layer or 0, place.kind in late)
            for place in {*self._backward, *self._read}
        ]
        layer, after = min(starts)
        return self._circuit.layout.blocks[layer].block, "output" if after else "input"

    # ---- what the run is to do

    def stop_after(self) -> str | None:
        """The block after which nothing is needed; None if the logits are."""
        if Place("logits") in self._tapped:
            return None
        blocks = self._circuit.layout.blocks
        if any(place.layer is None and place != Place("resid.embed") for place in self._tapped):
            return self._circuit.layout.final_norm or blocks[-1].block
        return blocks[max((place.layer or 0 for place in self._tapped), default=0)].block

    def tellers(self) -> dict[str, Callable[[Arguments], None]]:
        """For each attention module, what notes its arguments."""
        blocks = enumerate(self._circuit.layout.blocks)
        return {block.attention: functools.partial(self.arguments.__setitem__, layer) for layer, block in blocks}

    def taps(self) -> dict[Point, Callable[[Tensor], Tensor]]:
        """For each point, what is done with its tensor."""
        found: dict[Point, list[Callable[[Tensor], Tensor]]] = {}
        if self.graph:
            found[self._start()] = [_leaf]
        for name, places in self._norm_places().items():
            found.setdefault((name, "input"), []).append(functools.partial(self._measure, places))
            found.setdefault((name, "output"), []).append(functools.partial(self._freeze, places))
        for place in sorted(self._tapped):
            if (point := self._circuit.tap_point(place)) is not None:
                found.setdefault(point, []).append(functools.partial(self._tap, place))
        for place in self._edits:
            if place.kind == "resid.mid":
                self._tap_middle(place, found)
        return {point: functools.partial(_in_turn, todo) for point, todo in found.items()}

    def _norm_places(self) -> dict[str, list[Place]]:
        """The scales that each norm's module has; parallel blocks may use one norm for both halves."""
        circuit = self._circuit
        places = [Place(kind, layer) for layer in range(circuit.n_layers) for kind in _SCALES]
        found: dict[str, list[Place]] = {}
        for place in (*places, Place("norm.final.scale")):
            if (path := circuit.norm_path(place)) is not None:
                found.setdefault(path, []).append(place)
        return found

    # ---- what is heard

    def wants_logits(self, module: nn.Module) -> bool:
        """Whether they are to be kept."""
        return Place("attn.logits", self._layer_of[module]) in self._tapped

    def hear(self, module: nn.Module, part: Part, tensor: Tensor) -> Tensor:
        """A part of attention, edited and kept."""
        place = Place(f"attn.{part}", self._layer_of[module])
        if place in self._edits:
            tensor = unshaped(part, self._edited(place, shaped(part, tensor)))
        return self._hold(place, tensor) if place in self._tapped else tensor

    def _tap(self, place: Place, tensor: Tensor) -> Tensor:
        if place in self._edits and place.kind != "resid.mid":
            value = self._edited(place, self._shaped(place, tensor))
            factor = self._factor(place)
            tensor = (value if factor == 1.0 else value / factor).view(tensor.shape)
        return self._hold(place, tensor)

    def _tap_middle(self, place: Place, found: dict[Point, list[Callable[[Tensor], Tensor]]]) -> None:
        """Edit the stream between attention and MLP, which no module gives, by what attention adds to it."""
        delta, block = Place("attn.delta", place.layer), self._circuit.block(place).block

        def note(tensor: Tensor) -> Tensor:
            self._before = tensor
            return tensor

        def add(tensor: Tensor) -> Tensor:
            middle = self._before + self._factor(delta) * tensor
            edited = self._edited(place, middle[0])[None]
            return tensor + (edited - middle) / self._factor(delta)

        found.setdefault((block, "input"), []).append(note)
        if (point := self._circuit.tap_point(delta)) is not None:
            found.setdefault(point, []).append(add)

    def _edited(self, place: Place, value: Tensor) -> Tensor:
        for function in self._edits[place]:
            edited = function(value)
            if not isinstance(edited, Tensor) or edited.shape != value.shape:
                what = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
                raise ShapeError(f"the edit of {place} takes {tuple(value.shape)} and gives {what}")
            value = edited.to(value.dtype)
        return value

    def _measure(self, places: list[Place], tensor: Tensor) -> Tensor:
        norm = self._circuit.norm(places[0])
        if norm is not None:
            with torch.no_grad():
                scale = norm.scale(tensor.detach() if tensor.dim() == 2 else tensor.detach()[0])
            for place in places:
                self._scales[place] = scale
        self._normed = tensor
        return tensor

    def _freeze(self, places: list[Place], tensor: Tensor) -> Tensor:
        norm, names = self._circuit.norm(places[0]), {_norm_name(place) for place in places}
        if norm is not None and self._normed.requires_grad and names & self._frozen:
            y = norm.frozen(self._normed, self._scales[places[0]])
            # the value stays the module's own to the last bit; the derivative is the formula's
            tensor = tensor.detach() + (y - y.detach()).to(tensor.dtype)
        for place in places:
            if (place, "backward") in self._wanted:
                self._outputs[place] = tensor
        return tensor

    def _hold(self, place: Place, tensor: Tensor) -> Tensor:
        if place in self._roots and not tensor.requires_grad:
            # what an edit put there may have no graph of its own, and has a gradient all the same
            tensor = tensor.detach().requires_grad_()
        wanted = (place, "forward") in self._wanted
        if place in self._roots or place in self._read or (wanted and tensor.requires_grad):
            self._held[place] = tensor, tensor._version
        elif wanted:
            self._kept[place, "forward"] = self._keep(self._shaped(place, tensor))
        return tensor

    def finish(self, answer: Any) -> None:
        """Note the logits, if the run got so far."""
        if Place("logits") in self._tapped:
            self._hold(Place("logits"), answer.logits)

    # ---- what comes of it

    def _factor(self, place: Place) -> float:
        return self._circuit.factor(place) if place.kind.endswith(".delta") else 1.0

    def _shaped(self, place: Place, tensor: Tensor) -> Tensor:
        """A tensor of the model's as its place holds it."""
        if place.kind in PARTS:
            return shaped(PARTS[place.kind], tensor)
        factor, tensor = self._factor(place), tensor[0] if tensor.dim() == 3 else tensor
        return tensor if factor == 1.0 else tensor * factor

    def live(self, tokens: Int[Tensor, " token"]) -> RawActivations:
        """What the metric may read, with its graph, and the scales."""
        found: dict[tuple[Place, Pass], Tensor] = {
            (place, "forward"): self._shaped(place, self._held[place][0]) for place in self._read if place in self._held
        }
        found.update({(place, "forward"): scale for place, scale in self._scales.items()})
        return RawActivations(self._circuit, tokens, found, frozen=self._frozen, arguments=self.arguments)

    def differentiate(self, value: Tensor) -> None:
        """Keep the gradients, and the activations that are wanted, and let the graph go."""
        self._metric = float(value.detach())
        # what only the metric read may go, such as the logits
        needed = self._roots | {place for place, pass_ in self._wanted if pass_ == "forward"}
        self._held = {place: held for place, held in self._held.items() if place in needed}
        roots = [self._root(place) for place in self._backward]
        gradients = list(torch.autograd.grad(value, roots, allow_unused=True)) if roots else []
        # one by one, so that what is kept and what it is made from are not there together
        while roots:
            root, gradient, place = roots.pop(), gradients.pop(), self._backward[len(roots)]
            known = torch.zeros_like(root) if gradient is None else gradient
            self._kept[place, "backward"] = self._keep.adopted(self._gradient(place, root, known))
        self._outputs.clear()
        for place in list(self._held):
            tensor, version = self._held.pop(place)
            if (place, "forward") in self._wanted:
                if tensor._version != version:
                    raise SiteError(f"{place} cannot be captured with a gradient: the model changes it in place later")
                keep = self._keep if place in self._edits else self._keep.adopted
                self._kept[place, "forward"] = keep(self._shaped(place, tensor))

    def _root(self, place: Place) -> Tensor:
        """The tensor of the graph whose gradient gives that of a place."""
        if place in self._outputs:
            return self._outputs[place]
        return self._held[_source(place)][0]

    def _gradient(self, place: Place, root: Tensor, gradient: Tensor) -> Tensor:
        if (norm := self._circuit.norm(place) if place in self._outputs else None) is not None:
            # y = c(x)/s·g + b, so that dy/ds = -(y - b)/s
            y, g = (tensor if tensor.dim() == 2 else tensor[0] for tensor in (root.detach(), gradient))
            y = y if norm.bias is None else y - norm.bias
            return -(y * g).sum(-1, keepdim=True) / self._scales[place]
        if place.kind == "attn.logits":
            # softmax's own derivative; masked pairs have probability and gradient 0
            probs = root.detach()
            return shaped("probs", probs * (gradient - (gradient * probs).sum(-1, keepdim=True)))
        if place.kind in PARTS:
            return shaped(PARTS[place.kind], gradient)
        gradient = gradient[0] if gradient.dim() == 3 else gradient
        if place.kind.endswith((".delta", ".bias")):
            return gradient / self._circuit.factor(place)
        return gradient

    def kept(self, tokens: Int[Tensor, " token"]) -> RawActivations:
        """Everything that is wanted, with the scale of every norm that was run."""
        scales: dict[tuple[Place, Pass], Tensor] = {(place, "forward"): scale for place, scale in self._scales.items()}
        raw = RawActivations(self._circuit, tokens, scales)
        for place, pass_ in self._wanted:
            if pass_ == "forward" and _is_bias(place):
                written = self._circuit.bias_write(place, raw)
                nothing = torch.zeros(len(tokens), self._circuit.d_model, device=tokens.device)
                self._kept[place, pass_] = self._keep(nothing if written is None else written)
        return RawActivations(
            self._circuit,
            self._keep.exactly(tokens),
            {**self._kept, **{key: self._keep.exactly(scale) for key, scale in scales.items()}},
            metric=self._metric,
            frozen=self._frozen,
            arguments={layer: _without_graph(arguments) for layer, arguments in self.arguments.items()},
        )


def _without_graph(value: Any) -> Any:
    """What attention was called with, of which nothing holds on to the graph."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Arguments):
        return Arguments(_without_graph(value.positional), _without_graph(value.named))
    if isinstance(value, dict):
        return {key: _without_graph(each) for key, each in value.items()}
    return tuple(map(_without_graph, value)) if isinstance(value, tuple) else value


def _in_turn(todo: list[Callable[[Tensor], Tensor]], tensor: Tensor) -> Tensor:
    for each in todo:
        tensor = each(tensor)
    return tensor


def _leaf(tensor: Tensor) -> Tensor:
    """Where the graph begins."""
    return tensor.detach().requires_grad_()


def _is_bias(place: Place) -> bool:
    return place.kind.endswith(".bias")


def _source(place: Place) -> Place:
    """The place whose gradient gives that of another; most give their own."""
    if _is_bias(place):
        return Place(place.kind.replace("bias", "delta"), place.layer)
    return Place("attn.probs", place.layer) if place.kind == "attn.logits" else place


def _norm_name(place: Place) -> str:
    return place.kind.removeprefix("norm.").removesuffix(".scale")
