"""`Circuit`: a decoder as a residual stream that heads, neurons and biases read and write."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, final

import torch
from featurizers.errors import PluginError, SiteError, UsageError, shown
from featurizers.models import Norm, Unembedding, evaluating, projection
from featurizers.registry import host
from jaxtyping import Float, Int
from torch import Tensor, nn

from featurizers_derived_scalars.circuit.attention import NullListener
from featurizers_derived_scalars.circuit.checks import check_layout
from featurizers_derived_scalars.circuit.embedding import token_embeddings
from featurizers_derived_scalars.circuit.layout import Layout, trace_layout
from featurizers_derived_scalars.circuit.places import Place
from featurizers_derived_scalars.circuit.probing import HELP
from featurizers_derived_scalars.circuit.running import Arguments, run
from featurizers_derived_scalars.circuit.wiring import Wiring

Half: TypeAlias = Literal["attn", "mlp"]


@final
class Circuit(Wiring):
    """Circuit of one model: where its parts are, and the weights by which they write.

    The constructor follows one prompt of five tokens through the model. It checks that every block is its input plus
    what attention and MLP add, that heads are ``Σ A·v``, and that every norm has the form of `Norm`. It is made for the
    weights as they are; make another after they change.

    Works for any decoder of `transformers` whose attention goes through its ``AttentionInterface`` and whose MLPs have
    one down projection: sequential or parallel blocks, norms before or after, grouped queries, windows, softcaps.

    Args:
        model: the decoder, with or without its language-model head.

    Raises:
        SiteError: the model is no such decoder; the message names what is missing.
    """

    def __init__(self, model: nn.Module) -> None:
        # this package's own answer comes last
        layout = host().ask("featurizers_circuits", model=model)
        if not isinstance(layout, Layout):
            raise PluginError(f"a plugin's featurizers_circuits gives {shown(layout)}; it gives a Layout, or None")
        trace = trace_layout(model, layout)
        check_layout(model, layout, trace)
        super().__init__(model, layout, 0 if trace.logits is None else trace.logits.shape[-1])
        first = layout.blocks[0]
        parts = trace.attention(first.attention)
        stream, neurons = trace.output(first.block), trace.input(first.down_projection)
        if stream is None or neurons is None:
            raise SiteError(f"{first.block} was not run")
        self._device = stream.device
        self._sizes = {
            "layers": self.n_layers,
            "heads": parts["q"].shape[1],
            "d_model": stream.shape[-1],
            "d_head": parts["q"].shape[-1],
            "d_value": parts["v"].shape[-1],
            "neurons": neurons.shape[-1],
            "vocab": self.d_vocab,
        }
        self._norms = self._find_norms(torch.promote_types(stream.dtype, torch.float32))

    # ---- modules and sizes

    @property
    def n_heads(self) -> int:
        """Number of query heads of a block."""
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
        """Number of neurons of the first block; use `shape` where blocks differ."""
        return self._sizes["neurons"]

    def __repr__(self) -> str:
        """Return the class of the model and its sizes."""
        return f"Circuit({type(self._model).__name__}, {self.n_layers} layers, d_model {self.d_model})"

    def fingerprint(self) -> dict[str, str | int]:
        """Return class and sizes of the model, which tell saved activations of different models apart."""
        return {"model": type(self._model).__name__, **self._sizes}

    def norm(self, place: Place) -> Norm | None:
        """Return the norm whose scale a place is; None if the model lacks it."""
        path = self.norm_path(place)
        return None if path is None else self._norms[path]

    def shape(self, place: Place, length: int) -> tuple[int, ...]:
        """Return the shape of a place's tensor for a number of tokens.

        Raises:
            SiteError: the model does not have the place.
        """
        self.check(place)
        sizes = {"token": length, "key": length, "head": self.n_heads, "d_model": self.d_model, "one": 1}
        sizes |= {"vocab": self.d_vocab, "d_head": self.d_head if place.kind in ("attn.q", "attn.k") else self.d_value}
        if "neuron" in place.axes:
            sizes["neuron"] = self.projection(place)[0].shape[0]
        return tuple(sizes[axis] for axis in place.axes)

    def check_tokens(self, tokens: Int[Tensor, " token"]) -> None:
        """Check that the model has an embedding for each id.

        Raises:
            UsageError: some are not in the vocabulary.
        """
        embeddings: Any = self._model.get_input_embeddings()  # type: ignore[operator]
        size, lowest, highest = embeddings.weight.shape[0], int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= size:
            raise UsageError(f"token {lowest if lowest < 0 else highest} is not in the vocabulary, which has {size}")

    # ---- writing to the residual stream

    def writer(self, place: Place) -> Half | None:
        """Return the half of the block that a place writes through; None if it is a vector of the stream already.

        Raises:
            SiteError: the place does not write to the residual stream by itself.
        """
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

    def write_matrix(self, place: Place) -> Float[Tensor, "*node d_model"] | None:
        """Return what one unit of each node writes, without the scale of a norm behind it; None for the identity.

        ``mlp.neurons`` ``(neuron, d_model)``, ``attn.z`` ``(head, d_head, d_model)``, in float32 or better;
        ``attn.out`` and ``mlp.out`` have one where a norm or a factor is behind them.

        Raises:
            SiteError: the place does not write to the residual stream by itself.
        """
        if self.writer(place) is None:
            return None
        norm, factor = self.post_norm(place), self.factor(place)
        if place.kind.endswith(".out"):
            if norm is None and factor == 1.0:
                return None
            matrix = torch.eye(self.d_model, device=self._device)
        else:
            matrix = self.projection(place)[0]
        matrix = factor * (matrix if norm is None else norm.linear(matrix))
        return matrix.view(self.n_heads, self.d_value, -1) if place.kind == "attn.z" else matrix

    def post_norm(self, place: Place) -> Norm | None:
        """Return the norm behind the half of the block that a place is in; None if the model lacks it."""
        return self.norm(Place(f"norm.{_half(place)}.post.scale", place.layer))

    def projection(self, place: Place) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(inputs, outputs)`` and bias of the projection that ends a place's half of the block."""
        block = self.block(place)
        path = block.out_projection if _half(place) == "attn" else block.down_projection
        return projection(self._model.get_submodule(path), HELP)

    def arguments(self, tokens: Int[Tensor, " token"]) -> Mapping[int, Arguments]:
        """Run the model on a prompt, and return the arguments of each attention module, by layer."""
        self.check_tokens(tokens)
        by_layer: dict[int, Arguments] = {}
        blocks = self._layout.blocks
        receivers = {block.attention: functools.partial(by_layer.__setitem__, n) for n, block in enumerate(blocks)}
        tokens, last = tokens.to(self.token_device), blocks[-1].block
        with torch.no_grad(), evaluating(self._model):
            run(self._model, tokens, {}, listener=NullListener(), on_arguments=receivers, stop_after=last)
        return MappingProxyType(by_layer)

    @property
    def token_device(self) -> torch.device:
        """Device that the model takes token ids on."""
        embeddings: Any = self._model.get_input_embeddings()  # type: ignore[operator]
        device: torch.device = embeddings.weight.device
        return device

    # ---- tokens

    @functools.cached_property
    def unembedding(self) -> Unembedding:
        """Map from the final norm's output to logits, found when it is first used.

        Raises:
            SiteError: the model has no head, or its head does not read the final norm's output.
        """
        if self._layout.head is None:
            raise SiteError(f"{type(self._model).__name__}: it has no language-model head")
        final = self._layout.final_norm or self._layout.blocks[-1].block
        head, final_norm = map(self._model.get_submodule, (self._layout.head, final))
        return Unembedding.of(self._model, head=head, final_norm=final_norm)

    def unembed(self, direction: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Return the logits that a direction writes, times the final norm's scale: its centring, its gain and the head.

        Divide by ``raw.scale("final")``. Biases and a softcap are left out.

        Raises:
            SiteError: the model has no head.
        """
        norm = self.norm(Place("norm.final.scale"))
        weight = self.unembedding.weight
        normed = direction if norm is None else norm.linear(direction)
        return normed.to(weight.dtype) @ weight

    def token_embeddings(self) -> Float[Tensor, "vocab d_model"]:
        """Return each token's embedding in the residual stream, without positions, in float32 or better.

        Raises:
            SiteError: the residual stream does not begin with a multiple of the embedding's weight.
        """
        return token_embeddings(self._model, self._layout)

    def _find_norms(self, dtype: torch.dtype) -> dict[str, Norm]:
        paths = [self._layout.final_norm]
        for block in self._layout.blocks:
            paths += [block.attn_norm, block.mlp_norm, block.attn_post_norm, block.mlp_post_norm]
        norms = {}
        for path in dict.fromkeys(path for path in paths if path is not None):
            module = self._model.get_submodule(path)
            norm = Norm.of(module, self.d_model)
            if norm is None:
                raise SiteError(
                    f"{path} ({type(module).__name__}) is not a norm of the form (x - mean) / scale * gain + bias, "
                    f"so its scale cannot be held constant. {HELP}"
                )
            norms[path] = norm.to(dtype=dtype)
        return norms


def _half(place: Place) -> Half:
    return "attn" if place.kind.startswith("attn.") else "mlp"
