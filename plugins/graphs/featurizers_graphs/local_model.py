"""`LocalModel`: a model at one prompt, with its attention patterns and the scales of its norms held."""

from __future__ import annotations

from typing import Any, Final, final

import torch
from featurizers.errors import SiteError
from featurizers.models import Norm
from featurizers_derived_scalars import Circuit, Need, Place, RawActivations, capture
from jaxtyping import Float, Int
from torch import Tensor

SLACK: Final = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative difference that the linear attention may have from the model's own, by dtype; others are rounded more."""
KEYS: Final = 256
"""Keys of a block of attention."""


@final
class LocalModel:
    """Linear parts of a model at one prompt, in float32 or better.

    With all patterns and scales held, attention is linear in the residual stream plus a constant, and so is every norm.

    Args:
        circuit: of the model.
        tokens: ids of the prompt, ``(T,)``.
        pattern_bytes: memory that the attention patterns of all layers may take. Above it those of a layer are computed
            again each time.

    Attributes:
        circuit: as given.
        tokens: as given.
        raw: activations of the prompt.
        dtype: of the computation.
        device: of the model.

    Raises:
        SiteError: the attention of a layer is not linear in its values, as it is used here.
    """

    def __init__(self, circuit: Circuit, tokens: Int[Tensor, " T"], pattern_bytes: int) -> None:
        self.circuit, self.tokens, self.device = circuit, tokens.to(circuit.token_device), circuit.token_device
        kinds = ["resid.embed", "resid.pre", "resid.final", "attn.delta", "mlp.delta"]
        kinds += ["resid.mid"] if circuit.places("resid.mid") else []
        kinds += ["logits"] if circuit.d_vocab else []
        size = circuit.n_layers * circuit.n_heads * len(tokens) ** 2 * 4
        kinds += ["attn.probs"] if size <= pattern_bytes else []
        (raw,) = capture(circuit, self.tokens, [Need(kind) for kind in kinds])
        patterns = {place: raw[place, "forward"] for place, _ in raw if place.kind == "attn.probs"}
        others = {key: raw[key] for key in raw if key[0] not in patterns}
        self.raw = RawActivations(circuit, self.tokens, others, arguments=raw.arguments)
        self.dtype = torch.promote_types(self.raw[Place("resid.embed"), "forward"].dtype, torch.float32)
        self._values = self._value_matrices()
        self._patterns = {
            place.layer: self._turned(place.layer, each) for place, each in patterns.items() if place.layer is not None
        }
        self._outputs = [self._output_matrix(layer) for layer in range(self.n_layers)]
        for layer in range(self.n_layers):
            self._check_attention(layer)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.circuit.n_layers

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.circuit.d_model

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def at(self, kind: str, layer: int | None = None) -> Tensor:
        """Return the activations of a place."""
        return self._wide(self.raw[Place(kind, layer), "forward"])

    def stream(self, point: int) -> Float[Tensor, "T d"]:
        """Return the residual stream at a point."""
        if point == 2 * self.n_layers:
            return self.at("resid.final")
        return self.at("resid.mid" if point % 2 else "resid.pre", point // 2)

    # ---- norms

    def norm(self, place: Place | None) -> tuple[Norm, Float[Tensor, "T 1"]] | None:
        """Return a norm and the numbers that it divided each token by; None if the model lacks the norm."""
        norm = None if place is None else self.circuit.norm(place)
        return None if norm is None or place is None else (norm, self._wide(self.raw[place, "forward"]))

    def pull_norm(self, place: Place | None, g: Tensor, positions: Any) -> Tensor:
        """Pull directions at a norm's output, at some tokens, back to its input; unchanged where there is no norm."""
        if (known := self.norm(place)) is None:
            return g
        return known[0].pullback(g) / known[1][positions]

    def normed(self, place: Place | None, x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
        """Return a norm's output with its scales held; x where there is no norm."""
        return x if (known := self.norm(place)) is None else known[0].frozen(x, known[1])

    # ---- attention

    def pattern(self, layer: int) -> Float[Tensor, "kv_head key group query"]:
        """Return the attention pattern of a layer, by key-value head and the query heads that share it."""
        if layer in self._patterns:
            return self._patterns[layer]
        resid = self.raw[Place("resid.pre", layer), "forward"]
        return self._turned(layer, self.raw.recompute(Place("attn.probs", layer), resid))

    def _turned(self, layer: int, probabilities: Float[Tensor, "query key head"]) -> Tensor:
        length, kv_heads = self.length, len(self._values[layer])
        turned = self._wide(probabilities.permute(2, 1, 0)).reshape(kv_heads, -1, length, length)
        return turned.transpose(1, 2).contiguous()

    def pull_attention(self, layer: int, g: Float[Tensor, "tokens rows d"]) -> Float[Tensor, "tokens rows d"]:
        """Pull directions after attention back to the stream before it: the part that goes through the values.

        The first ``tokens`` tokens of the prompt are meant. A key is read by later queries alone, so that keys go in
        blocks, each with the queries from its first key on.
        """
        tokens, rows, width = g.shape
        values, outputs, pattern = self._values[layer], self._outputs[layer], self.pattern(layer)
        if (post := self.norm(Place("norm.attn.post.scale", layer))) is not None:
            g = g / post[1][:tokens, None]  # its gain is in the output matrix
        z = g.reshape(tokens * rows, width) @ outputs.flatten(0, 1).T
        z = z.view(tokens, rows, len(values), -1, outputs.shape[1]).permute(2, 3, 0, 1, 4).flatten(3)
        back = torch.empty_like(z[:, 0])  # kv_head, key, (row, inner)
        for start in range(0, tokens, KEYS):
            read = pattern[:, start : min(start + KEYS, tokens), :, start:tokens].flatten(2)
            back[:, start : start + KEYS] = torch.bmm(read, z[:, :, start:].flatten(1, 2))
        back = back.view(len(values), tokens, rows, -1).permute(1, 2, 0, 3)
        out = (back.reshape(tokens * rows, -1) @ values.flatten(0, 1)).view(tokens, rows, width)
        return out if (norm := self.norm(Place("norm.attn.scale", layer))) is None else out / norm[1][:tokens, None]

    def push_attention(self, layer: int, x: Float[Tensor, "T d"]) -> Float[Tensor, "head T d"]:
        """Return what each head adds to the stream for a change of the stream before attention."""
        if (norm := self.norm(Place("norm.attn.scale", layer))) is not None:
            x = x / norm[1]
        values, outputs = self._values[layer], self._outputs[layer]
        v = torch.einsum("td,ged->gte", x, values).repeat_interleave(len(outputs) // len(values), 0)
        pattern = self.pattern(layer).transpose(1, 2).flatten(0, 1)  # head, key, query
        out = (pattern.mT @ v) @ outputs
        return out if (post := self.norm(Place("norm.attn.post.scale", layer))) is None else out / post[1]

    def _output_matrix(self, layer: int) -> Float[Tensor, "head d_value d"]:
        """Return what one unit of each value of each head writes to the stream."""
        place = Place("attn.z", layer)
        matrix = self.circuit.write_matrix(place)
        if matrix is None:
            raise SiteError(f"{place} has no projection to the residual stream")
        return self._wide(matrix)

    def _value_matrices(self) -> list[Float[Tensor, "kv_head d_value d"]]:
        """Return the matrices from the stream, divided by its norm's scale, to the values of each key-value head.

        The values of one token are linear in its normed stream. Their derivative is taken at a prompt of two tokens,
        whatever projections and splits the attention module has.
        """
        two = self.tokens[:2] if self.length > 1 else self.tokens.repeat(2)
        (short,) = capture(self.circuit, two, [Need("resid.pre"), Need("attn.v")])
        return [self._wide(self._value_matrix(short, layer)) for layer in range(self.n_layers)]

    def _value_matrix(self, short: RawActivations, layer: int) -> Tensor:
        circuit, place = self.circuit, Place("attn.v", layer)
        values = short[place, "forward"]
        heads, inner = values.shape[1:]
        divisors = (n for n in range(1, heads) if heads % n == 0)
        groups = next((n for n in divisors if _repeats(values, heads // n)), heads)
        basis = torch.zeros(groups, inner, 2, heads, inner, dtype=values.dtype, device=values.device)
        each, coordinate = torch.arange(groups)[:, None], torch.arange(inner)
        basis[each, coordinate, 0, each * (heads // groups), coordinate] = 1
        resid = short[Place("resid.pre", layer), "forward"]
        derivative: Any = torch.func.vjp(lambda x: short.recompute(place, x), resid)
        matrix: Tensor = torch.vmap(derivative[1], chunk_size=512)(basis.flatten(0, 1))[0][:, 0]
        known = circuit.norm(Place("norm.attn.scale", layer))
        matrix = matrix.to(self.dtype)
        if known is not None:
            matrix = matrix * short.scale("attn", layer)[0].to(matrix)
        return matrix.view(groups, inner, -1)

    def _check_attention(self, layer: int) -> None:
        """Compare the linear attention with the derivative of the model's own, in one random direction."""
        place, resid = Place("attn.delta", layer), self.raw[Place("resid.pre", layer), "forward"]
        noise = torch.randn(resid.shape, generator=torch.Generator().manual_seed(layer)).to(resid)
        result: Any = torch.func.jvp(lambda x: self.raw.recompute(place, x, through="v"), (resid,), (noise,))
        own: Tensor = result[1]
        mine = self.push_attention(layer, self._wide(noise)).sum(0)
        off = float((mine - self._wide(own)).norm() / self._wide(own).norm().clamp(min=1e-30))
        if not off <= SLACK.get(resid.dtype, 5e-2):
            raise SiteError(
                f"{type(self.circuit.model).__name__}: attention of layer {layer} is not linear in its values with the "
                f"pattern held (it differs by {off:.1e}), so that it has no edges"
            )


def _repeats(values: Float[Tensor, "T head d"], times: int) -> bool:
    """Return True if each run of so many heads has the same values: they share a key-value head."""
    by_group = values.view(values.shape[0], -1, times, values.shape[2])
    return bool((by_group == by_group[:, :, :1]).all())
