"""`Circuit`: a decoder as a residual stream that heads, neurons and biases read and write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, final

from jaxtyping import Float, Int
from torch import Tensor, nn

from featurizers.sites import Side

from featurizers_derived_scalars.activations import Arguments, RawActivations
from featurizers_derived_scalars.places import Place

Through: TypeAlias = Literal["q", "k", "v"]


@final
class Circuit:
    """The circuit of one model (interface; bodies follow).

    Args:
        model: a decoder of `transformers` with its language-model head.

    Attributes: ``model``, ``n_layers``, ``n_heads``, ``d_model``, ``d_head`` (of q and k), ``d_value`` (of v and z),
    ``n_neurons``, ``d_vocab``, ``parallel`` (whether blocks run attention and MLP side by side).
    """

    model: nn.Module
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_value: int
    n_neurons: int
    d_vocab: int
    parallel: bool

    def __init__(self, model: nn.Module) -> None:
        raise NotImplementedError

    def places(self, kind: str) -> tuple[Place, ...]:
        """The places of a kind, by layer; empty if this model has none."""
        raise NotImplementedError

    def check(self, place: Place) -> None:
        """Refuse a place that the model does not have.

        Raises:
            SiteError: it does not; the message says why.
        """
        raise NotImplementedError

    def tap_point(self, place: Place) -> tuple[str, Side] | None:
        """Module path and side where a place is read; None for one that is not what a module takes or gives."""
        raise NotImplementedError

    def order(self, place: Place) -> tuple[int, int]:
        """When a place is computed: layer and stage. What feeds another place has a smaller order.

        In parallel blocks attention and MLP have one stage, since neither feeds the other.
        """
        raise NotImplementedError

    def residual_before(self, place: Place) -> Place:
        """The residual stream that a place is computed from: ``resid.pre``, ``resid.mid`` or ``resid.final``."""
        raise NotImplementedError

    def write_matrix(self, place: Place) -> Float[Tensor, "*node d_model"] | None:
        """What one unit of each node writes, but for the scale of a norm behind it; None where it is the identity.

        ``mlp.neurons`` ``(neuron, d_model)``, ``attn.z`` ``(head, d_head, d_model)``. float32 or better.
        """
        raise NotImplementedError

    def write_scale(self, place: Place, raw: RawActivations) -> Float[Tensor, "token 1"] | None:
        """What a norm behind the place divides its write by, at each token; None if there is no such norm."""
        raise NotImplementedError

    def write(
        self, place: Place, x: Float[Tensor, "*batch token *node"], raw: RawActivations
    ) -> Float[Tensor, "*batch token d_model"]:
        """What activations at a place add to the residual stream, norms behind it held at their scales: linear in x.

        Places: ``resid.*``, ``attn.{z,out,delta,bias}``, ``mlp.{neurons,out,delta,bias}``. ``attn.z`` takes (head,
        d_head). Probabilities write through ``attn.z``: multiply them by ``attn.v`` first.
        """
        raise NotImplementedError

    def write_vjp(
        self, place: Place, direction: Float[Tensor, "*batch token d_model"], raw: RawActivations
    ) -> Float[Tensor, "*batch token *node"]:
        """A direction of the residual stream seen from a place: ``(write(x) * direction).sum() == (x * this).sum()``."""
        raise NotImplementedError

    def bias_write(self, place: Place, raw: RawActivations) -> Float[Tensor, "token d_model"] | None:
        """What ``attn.delta`` (or ``mlp.delta``) holds that no head (or neuron) writes; None if that is nothing.

        Places: ``attn.{z,delta,bias}`` and ``mlp.{neurons,delta,bias}``.
        """
        raise NotImplementedError

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

        Args:
            place: ``attn.{q,k,v,logits,probs,z,out,delta}``, ``mlp.{pre,neurons,out,delta}`` or ``logits``.
            resid: instead of what was captured at `residual_before`.
            raw: of the sequence: its attention mask and positions, and the scales of its norms.
            through: for attention, which one of q, k and v follows ``resid``; the others are held constant.
            freeze_norm: hold the norm before (and after) at its captured scale.
        """
        raise NotImplementedError

    def unembed(self, direction: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """The logits that a direction writes per unit of ``1 / norm.final.scale``: through the final norm's centring
        and gain, and the unembedding; no bias, no softcap."""
        raise NotImplementedError

    def token_embeddings(self) -> Float[Tensor, "vocab d_model"]:
        """What each token's embedding is in the residual stream, without positions."""
        raise NotImplementedError

    def arguments(self, tokens: Int[Tensor, " token"]) -> Mapping[int, Arguments]:
        """What each attention module is called with for a prompt."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, str | int]:
        """Class and sizes of the model, by which saved activations are told apart."""
        raise NotImplementedError
