"""`Recorder`: hooks and gradients of one run, and the tensors that are kept of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from featurizers.errors import ShapeError, SiteError
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featurizers_derived_scalars.capturing.activations import RawActivations
from featurizers_derived_scalars.capturing.keeping import Keeper
from featurizers_derived_scalars.capturing.memory import HeapTrimmer
from featurizers_derived_scalars.circuit import Circuit, Listener, Pass, Place
from featurizers_derived_scalars.circuit.attention import PARTS, Part, part_layout, place_layout
from featurizers_derived_scalars.circuit.places import norm_name
from featurizers_derived_scalars.circuit.running import Arguments, Point

_SCALES: Final = ("norm.attn.scale", "norm.attn.post.scale", "norm.mlp.scale", "norm.mlp.post.scale")


@final
@dataclass(frozen=True)
class Edit:
    """A change to make while the model runs.

    Attributes:
        place: a place that a module or the attention function holds: of ``resid.*``,
            ``attn.{q,k,v,probs,z,out,delta}`` and ``mlp.{pre,neurons,out,delta}``.
        function: from the activations of one sequence to the activations that replace them, of the same shape.

    Raises:
        SiteError: the place is derived from others, and cannot be edited.
    """

    place: Place
    function: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        """Check that the place is not derived."""
        if self.place.kind.startswith("norm.") or self.place.kind.endswith((".bias", "logits")):
            raise SiteError(f"{self.place} is derived from other places, and cannot be edited; edit one of those")


@final
class Recorder(Listener):
    """Records one run of a model.

    Args:
        circuit: circuit of the model.
        to_keep: places and passes to keep.
        read: places that the metric reads, kept with their graph until it was computed.
        frozen: norms whose scale is held constant.
        edits: changes to make.
        keeper: stores tensors.
        logit_row: the only token whose logits are computed; None for all.
    """

    def __init__(
        self,
        circuit: Circuit,
        to_keep: frozenset[tuple[Place, Pass]],
        read: frozenset[tuple[Place, Pass]],
        frozen: frozenset[str],
        edits: tuple[Edit, ...],
        keeper: Keeper,
        logit_row: int | None = None,
    ) -> None:
        self._circuit, self._to_keep, self._frozen, self._keeper = circuit, to_keep, frozen, keeper
        self._logit_row, self._heap = logit_row, HeapTrimmer()
        self._hooks: list[RemovableHandle] = []
        self._read = frozenset(place for place, _ in read)
        self._edits: dict[Place, list[Callable[[Tensor], Tensor]]] = {}
        for edit in edits:
            self._edits.setdefault(edit.place, []).append(edit.function)
        self._kept: dict[tuple[Place, Pass], Tensor] = {}
        self._held: dict[Place, tuple[Tensor, int]] = {}  # the model's own tensors, with their graph and version
        self._scales: dict[Place, Tensor] = {}
        self._norm_outputs: dict[Place, Tensor] = {}
        self._norm_input = torch.empty(0)  # of the norm that is being run
        self._block_input = torch.empty(0)  # of the block that is being run
        self._layer_of = {
            circuit.model.get_submodule(block.attention): layer for layer, block in enumerate(circuit.layout.blocks)
        }
        self._metric: float | None = None
        self._arguments: dict[int, Arguments] | None = None
        self._backward = sorted(place for place, pass_ in to_keep if pass_ == "backward")
        self._roots = {_source(place) for place in self._backward}
        self._tapped = {place for place, _ in to_keep} | self._read | set(self._edits) | self._roots

    @property
    def graph(self) -> bool:
        """True if a gradient is taken."""
        return bool(self._backward)

    # ---- what the run must do

    def stop_after(self) -> str | None:
        """Return the last module that must be run; None if the logits are needed."""
        if Place("logits") in self._tapped:
            return None
        blocks = self._circuit.layout.blocks
        if any(place.layer is None and place != Place("resid.embed") for place in self._tapped):
            return self._circuit.layout.final_norm or blocks[-1].block
        return blocks[max((place.layer or 0 for place in self._tapped), default=0)].block

    def argument_receivers(self) -> dict[str, Callable[[Arguments], None]]:
        """Return for each attention module a function that keeps its arguments."""
        by_layer: dict[int, Arguments] = {}
        self._arguments = by_layer
        blocks = enumerate(self._circuit.layout.blocks)
        return {block.attention: functools.partial(by_layer.__setitem__, layer) for layer, block in blocks}

    def taps(self) -> dict[Point, Callable[[Tensor], Tensor]]:
        """Return for each point the function that its tensor goes through."""
        functions: dict[Point, list[Callable[[Tensor], Tensor]]] = {}
        if self.graph:
            functions[self._start()] = [_leaf]
        for name, places in self._norm_places().items():
            functions.setdefault((name, "input"), []).append(functools.partial(self._measure, places))
            functions.setdefault((name, "output"), []).append(functools.partial(self._freeze, places))
        for place in sorted(self._tapped):
            if (point := self._circuit.tap_point(place)) is not None:
                functions.setdefault(point, []).append(functools.partial(self._tap, place))
        for place in self._edits:
            if place.kind == "resid.mid":
                self._tap_middle(place, functions)
        if (point := self.row_point()) is not None:
            functions.setdefault(point, []).append(self._only_row)
        return {point: functools.partial(_in_turn, todo) for point, todo in functions.items()}

    def row_point(self) -> Point | None:
        """Return the point where all tokens but one are left out, before the head; None if none are."""
        head = self._circuit.layout.head
        return None if self._logit_row is None or head is None else (head, "input")

    def _start(self) -> Point:
        """Return the point where the graph begins: the latest before all places that are differentiated or read."""
        last = self._circuit.n_layers - 1
        late = ("resid.post", "resid.final", "norm.final.scale", "logits")
        starts = [
            (last if place.layer is None and place.kind in late else place.layer or 0, place.kind in late)
            for place in {*self._backward, *self._read}
        ]
        layer, after = min(starts)
        return self._circuit.layout.blocks[layer].block, "output" if after else "input"

    def _norm_places(self) -> dict[str, list[Place]]:
        """Return the scales of each norm module; parallel blocks may use one norm for both halves."""
        circuit = self._circuit
        places = [Place(kind, layer) for layer in range(circuit.n_layers) for kind in _SCALES]
        by_path: dict[str, list[Place]] = {}
        for place in (*places, Place("norm.final.scale")):
            if (path := circuit.norm_path(place)) is not None:
                by_path.setdefault(path, []).append(place)
        return by_path

    # ---- what happens while it runs

    def wants_logits(self, module: nn.Module) -> bool:
        """Return True if the logits of this module are to be kept."""
        return Place("attn.logits", self._layer_of[module]) in self._tapped

    def on_event(self, module: nn.Module, part: Part, tensor: Tensor) -> Tensor:
        """Edit a part of attention, and keep it."""
        place = Place(f"attn.{part}", self._layer_of[module])
        if place in self._edits:
            tensor = part_layout(part, self._edited(place, place_layout(part, tensor)))
        return self._hold(place, tensor) if place in self._tapped else tensor

    def _tap(self, place: Place, tensor: Tensor) -> Tensor:
        if place in self._edits and place.kind != "resid.mid":
            value = self._edited(place, self._in_place(place, tensor))
            factor = self._factor(place)
            tensor = (value if factor == 1.0 else value / factor).view(tensor.shape)
        return self._hold(place, tensor)

    def _tap_middle(self, place: Place, functions: dict[Point, list[Callable[[Tensor], Tensor]]]) -> None:
        """Edit the stream between attention and MLP, which no module outputs, by changing what attention adds."""
        delta, block = Place("attn.delta", place.layer), self._circuit.block(place).block

        def note(tensor: Tensor) -> Tensor:
            self._block_input = tensor
            return tensor

        def add(tensor: Tensor) -> Tensor:
            middle = self._block_input + self._factor(delta) * tensor
            edited = self._edited(place, middle[0])[None]
            return tensor + (edited - middle) / self._factor(delta)

        functions.setdefault((block, "input"), []).append(note)
        if (point := self._circuit.tap_point(delta)) is not None:
            functions.setdefault(point, []).append(add)

    def _only_row(self, tensor: Tensor) -> Tensor:
        """Return the input of the head at the only token whose logits are read."""
        return tensor if self._logit_row is None else tensor[..., self._logit_row : self._logit_row + 1, :]

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
        self._norm_input = tensor
        return tensor

    def _freeze(self, places: list[Place], tensor: Tensor) -> Tensor:
        norm, names = self._circuit.norm(places[0]), {norm_name(place.kind) for place in places}
        if norm is not None and self._norm_input.requires_grad and names & self._frozen:
            y = norm.frozen(self._norm_input, self._scales[places[0]])
            # the value stays the module's own to the last bit; the derivative is the formula's
            tensor = tensor.detach() + (y - y.detach()).to(tensor.dtype)
        for place in places:
            if (place, "backward") in self._to_keep:
                self._norm_outputs[place] = tensor
        return tensor

    def _hold(self, place: Place, tensor: Tensor) -> Tensor:
        if place in self._roots and not tensor.requires_grad:
            # the replacement that an edit returned may have no graph, and still has a gradient
            tensor = tensor.detach().requires_grad_()
        kept = (place, "forward") in self._to_keep
        if place in self._roots or place in self._read or (kept and tensor.requires_grad):
            self._held[place] = tensor, tensor._version
            self._heap.note(tensor)
            if place in self._roots:  # its gradient comes to stay as well
                self._hooks.append(tensor.register_hook(self._heap.note))  # type: ignore[no-untyped-call]
        elif kept:
            self._kept[place, "forward"] = self._keeper.copy(self._in_place(place, tensor))
        return tensor

    def finish(self, logits: Tensor | None) -> None:
        """Take the logits of the model's output; None where the run was stopped before them."""
        if Place("logits") in self._tapped and logits is not None:
            self._hold(Place("logits"), logits)

    # ---- results

    def _factor(self, place: Place) -> float:
        return self._circuit.factor(place) if place.kind.endswith(".delta") else 1.0

    def _in_place(self, place: Place, tensor: Tensor) -> Tensor:
        """Return a tensor of the model as its place holds it."""
        if place.kind in PARTS:
            return place_layout(PARTS[place.kind], tensor)
        factor, tensor = self._factor(place), _unbatched(tensor)
        return tensor if factor == 1.0 else tensor * factor

    def live(self, tokens: Int[Tensor, " token"]) -> RawActivations:
        """Return the activations that the metric reads, with their graph, and the scales."""
        values: dict[tuple[Place, Pass], Tensor] = {
            (place, "forward"): self._in_place(place, self._held[place][0])
            for place in self._read
            if place in self._held
        }
        values.update({(place, "forward"): scale for place, scale in self._scales.items()})
        return RawActivations(self._circuit, tokens, values, frozen=self._frozen, arguments=self._arguments)

    def roots(self, value: Tensor) -> list[Tensor]:
        """Note the metric's value, release what only the metric read, and return what to differentiate it by."""
        self._metric = float(value.detach())
        needed = self._roots | {place for place, pass_ in self._to_keep if pass_ == "forward"}
        self._held = {place: held for place, held in self._held.items() if place in needed}
        return [self._root(place) for place in self._backward]

    def keep_gradients(self, roots: list[Tensor], gradients: list[Tensor | None]) -> None:
        """Keep the gradients in the roots and the wanted activations, and release the graph; the lists are emptied."""
        while self._hooks:
            self._hooks.pop().remove()  # a hook on a tensor keeps its graph alive
        # one at a time, so that a gradient and its copy are not all in memory together
        while roots:
            root, gradient, place = roots.pop(), gradients.pop(), self._backward[len(roots)]
            gradient = torch.zeros_like(root) if gradient is None else gradient
            self._kept[place, "backward"] = self._keeper.keep(self._gradient(place, root, gradient))
            del root, gradient
        self._norm_outputs.clear()
        for place in list(self._held):
            tensor, version = self._held.pop(place)
            if (place, "forward") in self._to_keep:
                if tensor._version != version:
                    raise SiteError(f"{place} cannot be captured with a gradient: the model changes it in place later")
                store = self._keeper.copy if place in self._edits else self._keeper.keep
                self._kept[place, "forward"] = store(self._in_place(place, tensor))

    def _root(self, place: Place) -> Tensor:
        """Return the tensor of the graph whose gradient gives the gradient of a place."""
        if place in self._norm_outputs:
            return self._norm_outputs[place]
        return self._held[_source(place)][0]

    def _gradient(self, place: Place, root: Tensor, gradient: Tensor) -> Tensor:
        if (norm := self._circuit.norm(place) if place in self._norm_outputs else None) is not None:
            # y = c(x)/s·g + b, so that dy/ds = -(y - b)/s
            y, g = _unbatched(root.detach()), _unbatched(gradient)
            y = y if norm.bias is None else y - norm.bias
            return -(y * g).sum(-1, keepdim=True) / self._scales[place]
        if place.kind == "attn.logits":
            # softmax's own derivative; masked pairs have probability and gradient 0
            probs = root.detach()
            return place_layout("probs", probs * (gradient - (gradient * probs).sum(-1, keepdim=True)))
        if place.kind in PARTS:
            return place_layout(PARTS[place.kind], gradient)
        gradient = _unbatched(gradient)
        return gradient / self._circuit.factor(place) if place.kind.endswith((".delta", ".bias")) else gradient

    def kept(self, tokens: Int[Tensor, " token"]) -> RawActivations:
        """Return everything that was asked for, with the scale of every norm that was run."""
        scales: dict[tuple[Place, Pass], Tensor] = {(place, "forward"): scale for place, scale in self._scales.items()}
        raw = RawActivations(self._circuit, tokens, scales)
        for place, pass_ in self._to_keep:
            if pass_ == "forward" and place.kind.endswith(".bias"):
                written = raw.bias_write(place)
                nothing = torch.zeros((), device=self._keeper.device or tokens.device, dtype=self._keeper.dtype)
                self._kept[place, pass_] = (
                    nothing.expand(len(tokens), self._circuit.d_model)
                    if written is None
                    else self._keeper.copy(written)
                )
        return RawActivations(
            self._circuit,
            self._keeper.copy_exactly(tokens),
            {**self._kept, **{key: self._keeper.copy_exactly(scale) for key, scale in scales.items()}},
            metric=self._metric,
            frozen=self._frozen,
            arguments=_without_graph(self._arguments),
        )


def _without_graph(value: Any) -> Any:
    """Detach every tensor among the arguments of attention."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Arguments):
        return Arguments(_without_graph(value.positional), _without_graph(value.named))
    if isinstance(value, dict):
        return {key: _without_graph(each) for key, each in value.items()}
    return tuple(map(_without_graph, value)) if isinstance(value, tuple) else value


def _in_turn(functions: list[Callable[[Tensor], Tensor]], tensor: Tensor) -> Tensor:
    for function in functions:
        tensor = function(tensor)
    return tensor


def _leaf(tensor: Tensor) -> Tensor:
    """Begin the graph at a tensor."""
    return tensor.detach().requires_grad_()


def _unbatched(tensor: Tensor) -> Tensor:
    return tensor[0] if tensor.dim() == 3 else tensor


def _source(place: Place) -> Place:
    """Return the place whose gradient gives the gradient of another; for most it is the place itself."""
    if place.kind.endswith(".bias"):
        return Place(place.kind.replace("bias", "delta"), place.layer)
    return Place("attn.probs", place.layer) if place.kind == "attn.logits" else place
