"""`Wiring`: which places a decoder has, where they are read, and in which order they are computed."""

from __future__ import annotations

from featurizers.errors import SiteError
from featurizers.format import Side
from torch import nn

from featurizers_derived_scalars.circuit.layout import BlockLayout, Layout
from featurizers_derived_scalars.circuit.places import KINDS, Place, check_kind


class Wiring:
    """Places of one model: the base of `featurizers_derived_scalars.Circuit`.

    Args:
        model: the decoder.
        layout: paths of its modules.
        d_vocab: number of logits; 0 for a model without a head.
    """

    def __init__(self, model: nn.Module, layout: Layout, d_vocab: int) -> None:
        self._model, self._layout, self._d_vocab = model, layout, d_vocab

    @property
    def model(self) -> nn.Module:
        """Model that the places are of."""
        return self._model

    @property
    def layout(self) -> Layout:
        """Paths of its modules."""
        return self._layout

    @property
    def d_vocab(self) -> int:
        """Number of logits; 0 for a model without a head."""
        return self._d_vocab

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self._layout.blocks)

    @property
    def parallel(self) -> bool:
        """True if any block runs attention and MLP side by side."""
        return any(block.parallel for block in self._layout.blocks)

    def block(self, place: Place) -> BlockLayout:
        """Return the modules of a place's block.

        Raises:
            SiteError: the place has no layer, or the model has fewer layers.
        """
        if place.layer is None:
            raise SiteError(f"{place} is in no block")
        if place.layer >= self.n_layers:
            last = self.n_layers - 1
            raise SiteError(f"{place}: {type(self.model).__name__} has {self.n_layers} layers, 0 to {last}")
        return self.layout.blocks[place.layer]

    def check(self, place: Place) -> None:
        """Check that the model has a place.

        Raises:
            SiteError: it does not; the message says why.
        """
        name, missing = type(self.model).__name__, None
        block = self.block(place) if place.layer is not None else None
        if place.kind == "resid.mid" and block is not None and block.parallel:
            missing = "its attention and MLP run side by side, so that there is no residual stream between them"
        elif place.kind == "mlp.pre" and block is not None and block.activation is None:
            missing = "its activation function is no module, or has an unknown name"
        elif place.kind.startswith("norm.") and self.norm_path(place) is None:
            missing = "it has no such norm"
        elif place.kind == "logits" and not self.d_vocab:
            missing = "it has no language-model head"
        if missing:
            raise SiteError(f"{name} has no {place}: {missing}")

    def has(self, place: Place) -> bool:
        """Return True if the model has a place."""
        try:
            self.check(place)
        except SiteError:
            return False
        return True

    def places(self, kind: str) -> tuple[Place, ...]:
        """Return the places of a kind, by layer; empty if this model has none.

        Raises:
            SiteError: the kind is unknown.
        """
        check_kind(kind)
        layers: list[int | None] = list(range(self.n_layers)) if KINDS[kind].layered else [None]
        return tuple(place for place in (Place(kind, layer) for layer in layers) if self.has(place))

    # ---- where it is

    def tap_point(self, place: Place) -> tuple[str, Side] | None:
        """Return module path and side where a place is read; None for parts of attention and for derived places.

        ``attn.delta`` and ``mlp.delta`` are the tensors there times the block's factor, which is 1 except in Granite.
        """
        self.check(place)
        if place.kind == "resid.embed":
            return self.layout.blocks[0].block, "input"
        if place.kind == "resid.final":
            return self.layout.blocks[-1].block, "output"
        if place.layer is None:
            return None
        block = self.block(place)
        points: dict[str, tuple[str | None, Side]] = {
            "resid.pre": (block.block, "input"),
            "resid.mid": (block.mlp_norm or block.mlp or block.up_projection, "input"),
            "resid.post": (block.block, "output"),
            "attn.out": (block.attention, "output"),
            "attn.delta": (block.attn_post_norm or block.attention, "output"),
            "mlp.pre": (block.activation, "input"),
            "mlp.neurons": (block.down_projection, "input"),
            "mlp.out": (block.mlp_output, "output"),
            "mlp.delta": (block.mlp_post_norm or block.mlp_output, "output"),
        }
        path, side = points.get(place.kind, (None, "output"))
        return None if path is None else (path, side)

    def norm_path(self, place: Place) -> str | None:
        """Return the module of a norm, for a place such as ``norm.mlp.scale:3``; None if the model lacks the norm."""
        if place.kind == "norm.final.scale":
            return self.layout.final_norm
        block = self.block(place)
        return {
            "norm.attn.scale": block.attn_norm,
            "norm.mlp.scale": block.mlp_norm,
            "norm.attn.post.scale": block.attn_post_norm,
            "norm.mlp.post.scale": block.mlp_post_norm,
        }.get(place.kind)

    def factor(self, place: Place) -> float:
        """Return the number that ``attn.delta`` (or ``mlp.delta``) multiplies its module's output by."""
        block = self.block(place)
        return block.attn_factor if place.kind.startswith("attn.") else block.mlp_factor

    def order(self, place: Place) -> tuple[int, int]:
        """Return layer and stage of a place. A place that feeds another has a smaller order.

        In parallel blocks attention and MLP have the same stage, since neither feeds the other.
        """
        self.check(place)
        stage = KINDS[place.kind].stage
        if place.layer is None:
            return (0 if place.kind == "resid.embed" else self.n_layers - 1), stage
        return place.layer, 1 if place.kind.startswith(("mlp.", "norm.mlp")) and self.block(place).parallel else stage

    def residual_before(self, place: Place) -> Place:
        """Return the residual stream that a place is computed from: ``resid.pre``, ``resid.mid`` or ``resid.final``.

        Raises:
            SiteError: the place is a residual stream itself, or the model lacks it.
        """
        self.check(place)
        if place.kind in ("logits", "norm.final.scale"):
            return Place("resid.final")
        if place.kind.startswith("resid."):
            raise SiteError(f"{place} is a residual stream, and not computed from one")
        late = place.kind.startswith(("mlp.", "norm.mlp")) and not self.block(place).parallel
        return Place("resid.mid" if late else "resid.pre", place.layer)
