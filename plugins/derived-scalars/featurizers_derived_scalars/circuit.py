"""`Circuit`: a decoder as a residual stream that heads, neurons and biases read and write."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, final

import torch
from featurizers.errors import PluginError, ShapeError, SiteError, UsageError, shown
from featurizers.models import evaluating
from featurizers.registry import host
from jaxtyping import Float, Int
from torch import Tensor, nn

from featurizers_derived_scalars.activations import Arguments, RawActivations
from featurizers_derived_scalars.attention import Deaf
from featurizers_derived_scalars.layout import BlockLayout, Layout, projection, trace_layout
from featurizers_derived_scalars.layout_checks import check_layout
from featurizers_derived_scalars.norms import Norm
from featurizers_derived_scalars.places import Place
from featurizers_derived_scalars.replaying import Through, replay
from featurizers_derived_scalars.running import run
from featurizers_derived_scalars.unembedding import Unembedding, embedding_multiplier
from featurizers_derived_scalars.wiring import Wiring

Half: TypeAlias = Literal["attn", "mlp"]


@final
class Circuit(Wiring):
    """The circuit of one model: where its parts are, what they write and read, and how to compute one anew.

    Made by looking at the model: one prompt of five tokens is followed through it, and every block is checked to be
    its input plus what attention and MLP add, heads to be ``Σ A·v``, and every norm to be one (see `Norm`). It is made
    for the weights as they are; make another after they change.

    Works for any decoder of `transformers` whose attention goes through its ``AttentionInterface`` and whose MLPs have
    one down projection: sequential or parallel blocks, norms before or after, grouped queries, windows, softcaps.

    Args:
        model: the decoder, with or without its language-model head.

    Raises:
        SiteError: the model is no such decoder; the message names what is missing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # this package's own answer is asked for last
        layout = host().ask("featurizers_circuits", model=model)
        if not isinstance(layout, Layout):
            raise PluginError(f"a plugin's featurizers_circuits gives {shown(layout)}; it gives a Layout, or None")
        self._layout = layout
        trace = trace_layout(model, self._layout)
        check_layout(model, self._layout, trace)
        first = self._layout.blocks[0]
        heard = trace.attention(first.attention)
        stream, neurons = trace.given(first.block), trace.taken(first.down_projection)
        if stream is None or neurons is None:
            raise SiteError(f"{first.block} was not run")
        self._device, self._dtype = stream.device, stream.dtype
        self._sizes = {
            "layers": len(self._layout.blocks),
            "heads": heard["q"].shape[1],
            "d_model": stream.shape[-1],
            "d_head": heard["q"].shape[-1],
            "d_value": heard["v"].shape[-1],
            "neurons": neurons.shape[-1],
            "vocab": trace.logits.shape[-1] if trace.logits is not None else 0,
        }
        self._norms = self._find_norms()
        self._unembedding = Unembedding.of(model, self._layout, trace)

    # ---- what there is

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model

    @property
    def layout(self) -> Layout:
        """Paths of its modules."""
        return self._layout

    @property
    def n_heads(self) -> int:
        """Query heads of a block."""
        return self._sizes["heads"]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._sizes["d_model"]

    @property
    def d_head(self) -> int:
        """Width of a query and of a key."""
        return self._sizes["d_head"]

    @property
    def d_value(self) -> int:
        """Width of a value."""
        return self._sizes["d_value"]

    @property
    def n_neurons(self) -> int:
        """Neurons of the first block; where blocks differ, `shape` tells."""
        return self._sizes["neurons"]

    @property
    def d_vocab(self) -> int:
        """Number of logits; 0 for a model without a head."""
        return self._sizes["vocab"]

    def __repr__(self) -> str:
        """Model and sizes."""
        return f"Circuit({type(self._model).__name__}, {self.n_layers} layers, d_model {self.d_model})"

    def fingerprint(self) -> dict[str, str | int]:
        """Class and sizes of the model, by which saved activations are told apart."""
        return {"model": type(self._model).__name__, **self._sizes}

    def norm(self, place: Place) -> Norm | None:
        """The norm whose scale a place is; None if there is no such norm."""
        path = self.norm_path(place)
        return None if path is None else self._norms[path]

    def shape(self, place: Place, length: int) -> tuple[int, ...]:
        """The shape of a place's tensor for so many tokens.

        Raises:
            SiteError: the model does not have it.
        """
        self.check(place)
        sizes = {"token": length, "key": length, "head": self.n_heads, "d_model": self.d_model, "one": 1}
        sizes |= {"vocab": self.d_vocab, "d_head": self.d_head if place.kind in ("attn.q", "attn.k") else self.d_value}
        if "neuron" in place.axes:
            sizes["neuron"] = self._projection(self.block(place), "mlp")[0].shape[0]
        return tuple(sizes[axis] for axis in place.axes)

    def check_tokens(self, tokens: Int[Tensor, " token"]) -> None:
        """Refuse ids that the model has no embedding for.

        Raises:
            UsageError: some are not in the vocabulary.
        """
        embeddings: Any = self._model.get_input_embeddings()  # type: ignore[operator]
        size, lowest, highest = embeddings.weight.shape[0], int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= size:
            raise UsageError(f"token {lowest if lowest < 0 else highest} is not in the vocabulary, which has {size}")

    # ---- what it writes

    def write_matrix(self, place: Place) -> Float[Tensor, "*node d_model"] | None:
        """What one unit of each node writes, but for the scale of a norm behind it; None where it is the identity.

        ``mlp.neurons`` ``(neuron, d_model)``, ``attn.z`` ``(head, d_head, d_model)``, in float32 or better;
        ``attn.out`` and ``mlp.out`` have one where a norm or a factor is behind them.

        Raises:
            SiteError: the place does not write to the residual stream by itself.
        """
        half = self._writer(place)
        if half is None:
            return None
        block, norm = self.block(place), self._post_norm(place)
        if place.kind.endswith(".out"):
            if norm is None and self.factor(place) == 1.0:
                return None
            matrix = torch.eye(self.d_model, device=self._device)
        else:
            matrix = self._projection(block, half)[0]
        matrix = self.factor(place) * (matrix if norm is None else norm.linear(matrix))
        return matrix.view(self.n_heads, self.d_value, -1) if place.kind == "attn.z" else matrix

    def write_scale(self, place: Place, raw: RawActivations) -> Float[Tensor, "token 1"] | None:
        """What a norm behind the place divides its write by, at each token; None if there is no such norm."""
        half = self._writer(place)
        if half is None or self._post_norm(place) is None:
            return None
        return raw.scale(f"{half}.post", place.layer)

    def write(
        self, place: Place, x: Float[Tensor, "*batch token *node"], raw: RawActivations
    ) -> Float[Tensor, "*batch token d_model"]:
        """What activations at a place add to the residual stream, norms behind it held at their scales: linear in x.

        Biases are not in it (see `bias_write`), so that for ``attn.z`` it is what the heads add together.

        Args:
            place: ``resid.*``, ``attn.{z,out,delta,bias}`` or ``mlp.{neurons,out,delta,bias}``.
            x: like the place's tensor; ``attn.z`` is ``(head, d_head)`` at each token.
            raw: of the sequence.

        Raises:
            SiteError: the place does not write by itself; probabilities write through ``attn.z``.
            ShapeError: x has another shape.
        """
        matrix = self.write_matrix(place)
        self._check_shape(place, x, matrix)
        if matrix is None:
            return x
        dtype, axes = torch.promote_types(x.dtype, matrix.dtype), matrix.dim() - 1
        written = x.to(dtype).flatten(-axes) @ matrix.to(x.device, dtype).flatten(0, -2)
        scale = self.write_scale(place, raw)
        return written if scale is None else written / scale.to(x.device, dtype)

    def write_vjp(
        self, place: Place, direction: Float[Tensor, "*batch token d_model"], raw: RawActivations
    ) -> Float[Tensor, "*batch token *node"]:
        """A direction of the residual stream seen from a place: ``(write(x) * direction) == (x * this)`` when summed.

        Raises:
            SiteError: the place does not write by itself.
        """
        matrix = self.write_matrix(place)
        if matrix is None:
            return direction
        dtype = torch.promote_types(direction.dtype, matrix.dtype)
        scale = self.write_scale(place, raw)
        direction = direction.to(dtype)
        if scale is not None:
            direction = direction / scale.to(direction.device, dtype)
        seen: Tensor = direction @ matrix.to(direction.device, dtype).flatten(0, -2).T
        return seen.view(*seen.shape[:-1], *matrix.shape[:-1])

    def bias_write(self, place: Place, raw: RawActivations) -> Float[Tensor, "token d_model"] | None:
        """What ``attn.delta`` (or ``mlp.delta``) holds that no head (or neuron) writes; None if that is nothing.

        The bias of the projection, through a norm behind it, and that norm's own.

        Args:
            place: ``attn.{z,out,delta,bias}`` or ``mlp.{neurons,out,delta,bias}``.
            raw: of the sequence.
        """
        half: Half = "attn" if place.kind.startswith("attn.") else "mlp"
        out = Place(f"{half}.out", place.layer)
        bias, norm = self._projection(self.block(place), half)[1], self._post_norm(out)
        length, device = len(raw.tokens), raw.tokens.device
        total = None
        if bias is not None:
            total = self.write(out, bias.to(device).expand(length, -1), raw)
        if norm is not None and norm.bias is not None:
            own = (self.factor(out) * norm.bias).to(device).expand(length, -1)
            total = own if total is None else total + own
        return total

    def _writer(self, place: Place) -> Half | None:
        """Which half of a block a place writes through; None if it is a vector of the residual stream already."""
        self.check(place)
        if place.kind.startswith("resid.") or place.kind in ("attn.delta", "attn.bias", "mlp.delta", "mlp.bias"):
            return None
        if place.kind in ("attn.z", "attn.out"):
            return "attn"
        if place.kind in ("mlp.neurons", "mlp.out"):
            return "mlp"
        hint = "; multiply it with attn.v, as attn.z" if place.kind == "attn.probs" else ""
        raise SiteError(
            f"{place} does not write to the residual stream by itself{hint}. What does: resid.*, "
            "attn.z, attn.out, attn.delta, attn.bias, mlp.neurons, mlp.out, mlp.delta, mlp.bias."
        )

    def _post_norm(self, place: Place) -> Norm | None:
        half = "attn" if place.kind.startswith("attn.") else "mlp"
        return self.norm(Place(f"norm.{half}.post.scale", place.layer))

    def _projection(self, block: BlockLayout, half: Half) -> tuple[Tensor, Tensor | None]:
        path = block.out_projection if half == "attn" else block.down_projection
        return projection(self._model.get_submodule(path))

    def _check_shape(self, place: Place, x: Tensor, matrix: Tensor | None) -> None:
        node = (self.d_model,) if matrix is None else tuple(matrix.shape[:-1])
        if x.dim() < len(node) + 1 or tuple(x.shape[-len(node) :]) != node:
            raise ShapeError(f"{place} is (*batch, token, {', '.join(map(str, node))}), not {tuple(x.shape)}")

    # ---- how it is computed

    def recompute(
        self,
        place: Place,
        resid: Float[Tensor, "token d_model"],
        raw: RawActivations,
        *,
        through: Through | None = None,
        freeze_norm: bool = True,
    ) -> Tensor:
        """A place's tensor, computed from the residual stream before it, differentiable both ways (`torch.func`).

        The model's own modules are run, with the mask and the positions of the sequence.

        Args:
            place: ``attn.{q,k,v,logits,probs,z,out,delta}``, ``mlp.{pre,neurons,out,delta}`` or ``logits``.
            resid: instead of what was captured at `residual_before`.
            raw: of the sequence: what its attention was called with, and the scales of its norms.
            through: for attention, which one of q, k and v follows ``resid``; derivatives through the others are
                left out, while their values are those that ``resid`` gives.
            freeze_norm: hold the norm before (and after) at its captured scale.

        Raises:
            SiteError: the place is none of these, or ``through`` is given outside attention.
            ShapeError: the residual stream is of another width or length.
        """
        if resid.dim() != 2 or tuple(resid.shape) != (len(raw.tokens), self.d_model):
            raise ShapeError(f"the residual stream is {(len(raw.tokens), self.d_model)}, not {tuple(resid.shape)}")
        return replay(self, place, resid, raw, through=through, freeze_norm=freeze_norm)

    def arguments(self, tokens: Int[Tensor, " token"]) -> Mapping[int, Arguments]:
        """What each attention module is called with for a prompt, by layer; runs the model once."""
        self.check_tokens(tokens)
        found: dict[int, Arguments] = {}
        tell = {block.attention: functools.partial(found.__setitem__, n) for n, block in enumerate(self._layout.blocks)}
        with torch.no_grad(), evaluating(self._model):
            tokens = tokens.to(self.token_device)
            run(self._model, tokens, {}, listener=Deaf(), arguments=tell, stop_after=self._layout.blocks[-1].block)
        return MappingProxyType(found)

    @property
    def token_device(self) -> torch.device:
        """Where the model wants its token ids."""
        embeddings: Any = self._model.get_input_embeddings()  # type: ignore[operator]
        device: torch.device = embeddings.weight.device
        return device

    # ---- tokens

    @property
    def unembedding(self) -> Unembedding:
        """What turns the final norm's output into logits.

        Raises:
            SiteError: the model has no head, or one that is not found right behind the final norm.
        """
        if isinstance(self._unembedding, str):
            raise SiteError(f"{type(self._model).__name__}: {self._unembedding}")
        return self._unembedding

    def unembed(self, direction: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """The logits that a direction writes, times the final norm's scale: by its centring and gain, and the head.

        Divide by ``raw.scale("final")``. Without biases, and before a softcap.

        Raises:
            SiteError: the model has no head.
        """
        norm = self.norm(Place("norm.final.scale"))
        weight = self.unembedding.weight
        pushed = direction if norm is None else norm.linear(direction)
        return pushed.to(weight.dtype) @ weight

    def token_embeddings(self) -> Float[Tensor, "vocab d_model"]:
        """What each token's embedding is in the residual stream, without positions; float32 or better.

        Raises:
            SiteError: the residual stream does not begin with a multiple of the embedding's weight.
        """
        return embedding_multiplier(self)

    def _find_norms(self) -> dict[str, Norm]:
        paths = [self._layout.final_norm]
        for block in self._layout.blocks:
            paths += [block.attn_norm, block.mlp_norm, block.attn_post_norm, block.mlp_post_norm]
        wanted = {path for path in paths if path is not None}
        modules = {path: self._model.get_submodule(path) for path in wanted}
        found = {}
        for path, module in modules.items():
            device = next((parameter.device for parameter in module.parameters()), self._device)
            found[path] = Norm.of(module, self.d_model, path, device)
        return found
