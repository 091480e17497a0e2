"""`RawActivations`: the captured tensors of one sequence, and what can be computed from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import final

import torch
from featurizers.errors import ArtefactError, FeaturizerError, ShapeError, SiteError
from jaxtyping import Float, Int
from torch import Tensor

from featurizers_derived_scalars.capturing.files import read_activations, write_activations
from featurizers_derived_scalars.capturing.replaying import Replay, Through
from featurizers_derived_scalars.circuit import Circuit, Pass, Place
from featurizers_derived_scalars.circuit.running import Arguments


@final
class RawActivations(Mapping[tuple[Place, Pass], Tensor]):
    """Activations and gradients of one sequence, without padding and without a batch axis. It cannot be changed.

    ``raw[Place("mlp.neurons", 3), "forward"]`` is ``(token, neuron)``. The scales of all norms that were run are
    always there, since writes hold norms at these scales.

    Args:
        circuit: circuit of the model.
        tokens: ids, ``(token,)``.
        values: the tensors; each must have as many axes as its place. Logits may be those of one token, as a metric
            of one position gets them.
        metric: value of the metric, if there was one.
        frozen: names of the norms whose scale the gradients took as constant: ``final``, ``attn``, ``mlp``,
            ``attn.post``, ``mlp.post``.
        arguments: arguments of each attention module, by layer; None to compute them from the tokens when they are
            first needed.

    Raises:
        SiteError: a tensor does not have the axes of its place.
    """

    def __init__(
        self,
        circuit: Circuit,
        tokens: Int[Tensor, " token"],
        values: Mapping[tuple[Place, Pass], Tensor],
        *,
        metric: float | None = None,
        frozen: frozenset[str] = frozenset(),
        arguments: Mapping[int, Arguments] | None = None,
    ) -> None:
        for (place, pass_), value in values.items():
            rows = {len(tokens), 1} if place.kind == "logits" else {len(tokens)}
            if value.dim() != len(place.axes) or value.shape[0] not in rows:
                raise SiteError(
                    f"{place} ({pass_}) has the shape {tuple(value.shape)}; its axes are {', '.join(place.axes)}, "
                    f"and there are {len(tokens)} tokens"
                )
        self._circuit, self._tokens = circuit, tokens
        self._values: Mapping[tuple[Place, Pass], Tensor] = MappingProxyType(dict(values))
        self._metric, self._frozen = metric, frozenset(frozen)
        self._arguments = None if arguments is None else MappingProxyType(dict(arguments))

    @property
    def circuit(self) -> Circuit:
        """Circuit of the model."""
        return self._circuit

    @property
    def tokens(self) -> Int[Tensor, " token"]:
        """Token ids."""
        return self._tokens

    @property
    def metric(self) -> float | None:
        """Value of the metric; None if there was none."""
        return self._metric

    @property
    def frozen(self) -> frozenset[str]:
        """Norms whose scale the gradients took as constant."""
        return self._frozen

    @property
    def arguments(self) -> Mapping[int, Arguments]:
        """Arguments of each attention module, by layer."""
        if self._arguments is None:
            self._arguments = MappingProxyType(dict(self._circuit.arguments(self._tokens)))
        return self._arguments

    def __getitem__(self, key: tuple[Place, Pass]) -> Tensor:
        """Return the tensor of a place and a pass.

        Raises:
            SiteError: it was not captured.
        """
        if key in self._values:
            return self._values[key]
        place, pass_ = key
        known = sorted({f"{known} ({passed})" for known, passed in self._values if known.kind == place.kind})
        raise SiteError(
            f"{place} ({pass_}) was not captured; ask for it with Need({place.kind!r}, {pass_!r}). "
            f"Captured of that kind: {', '.join(known) or 'nothing'}."
        )

    def __contains__(self, key: object) -> bool:
        """Return True if a place and a pass were captured."""
        return key in self._values

    def __iter__(self) -> Iterator[tuple[Place, Pass]]:
        """Iterate over places and passes, in the order of the model."""
        return iter(sorted(self._values, key=lambda key: (key[0], key[1] == "backward")))

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._values)

    def __repr__(self) -> str:
        """Return the numbers of tokens and tensors, and the circuit."""
        return f"RawActivations({len(self._tokens)} tokens, {len(self)} tensors of {self._circuit})"

    def scale(self, norm: str, layer: int | None = None) -> Tensor:
        """Return the number that a norm divided each token by, ``(token, 1)``.

        Args:
            norm: ``final``, ``attn``, ``mlp``, ``attn.post`` or ``mlp.post``.
            layer: its block; None for ``final``.
        """
        return self[Place(f"norm.{norm}.scale", layer), "forward"]

    # ---- writing to the residual stream

    def write_scale(self, place: Place) -> Float[Tensor, "token 1"] | None:
        """Return the scale of the norm behind a place, by which its write is divided; None without such a norm."""
        half = self._circuit.writer(place)
        if half is None or self._circuit.post_norm(place) is None:
            return None
        return self.scale(f"{half}.post", place.layer)

    def write(self, place: Place, x: Float[Tensor, "*batch token *node"]) -> Float[Tensor, "*batch token d_model"]:
        """Return what activations at a place add to the residual stream: linear in x, norms held at their scales.

        Biases are left out (see `bias_write`): for ``attn.z`` it is what the heads add together.

        Args:
            place: ``resid.*``, ``attn.{z,out,delta,bias}`` or ``mlp.{neurons,out,delta,bias}``.
            x: like the place's tensor; ``attn.z`` is ``(head, d_head)`` at each token.

        Raises:
            SiteError: the place does not write by itself; probabilities write through ``attn.z``.
            ShapeError: x has another shape.
        """
        matrix = self._circuit.write_matrix(place)
        node = (self._circuit.d_model,) if matrix is None else tuple(matrix.shape[:-1])
        if x.dim() < len(node) + 1 or tuple(x.shape[-len(node) :]) != node:
            raise ShapeError(f"{place} is (*batch, token, {', '.join(map(str, node))}), not {tuple(x.shape)}")
        if matrix is None:
            return x
        dtype = torch.promote_types(x.dtype, matrix.dtype)
        written = x.to(dtype).flatten(-len(node)) @ matrix.to(x.device, dtype).flatten(0, -2)
        scale = self.write_scale(place)
        return written if scale is None else written / scale.to(x.device, dtype)

    def write_vjp(
        self, place: Place, direction: Float[Tensor, "*batch token d_model"]
    ) -> Float[Tensor, "*batch token *node"]:
        """Pull a direction of the residual stream back to a place: the adjoint of `write`.

        ``(write(place, x) * direction).sum() == (x * write_vjp(place, direction)).sum()``.

        Raises:
            SiteError: the place does not write by itself.
        """
        matrix = self._circuit.write_matrix(place)
        if matrix is None:
            return direction
        dtype = torch.promote_types(direction.dtype, matrix.dtype)
        scale = self.write_scale(place)
        direction = direction.to(dtype)
        if scale is not None:
            direction = direction / scale.to(direction.device, dtype)
        pulled: Tensor = direction @ matrix.to(direction.device, dtype).flatten(0, -2).T
        return pulled.view(*pulled.shape[:-1], *matrix.shape[:-1])

    def bias_write(self, place: Place) -> Float[Tensor, "token d_model"] | None:
        """Return the part of ``attn.delta`` (or ``mlp.delta``) that no head (or neuron) writes; None if it is zero.

        It is the bias of the projection, through a norm behind it, and that norm's own bias.

        Args:
            place: ``attn.{z,out,delta,bias}`` or ``mlp.{neurons,out,delta,bias}``.
        """
        circuit, length, device = self._circuit, len(self._tokens), self._tokens.device
        out = Place(f"{place.kind.partition('.')[0]}.out", place.layer)
        bias, norm = circuit.projection(out)[1], circuit.post_norm(out)
        total = None if bias is None else self.write(out, bias.to(device).expand(length, -1))
        if norm is not None and norm.bias is not None:
            of_norm = (circuit.factor(out) * norm.bias).to(device).expand(length, -1)
            total = of_norm if total is None else total + of_norm
        return total

    # ---- computing again

    def recompute(
        self,
        place: Place,
        resid: Float[Tensor, "token d_model"],
        *,
        through: Through | None = None,
        freeze_norm: bool = True,
    ) -> Tensor:
        """Compute a place's tensor from the residual stream before it, differentiably in both modes of `torch.func`.

        The model's own modules are run, with the mask and the positions of the sequence.

        Args:
            place: ``attn.{q,k,v,logits,probs,z,out,delta}``, ``mlp.{pre,neurons,out,delta}`` or ``logits``.
            resid: replaces the tensor captured at `Circuit.residual_before`.
            through: for attention, follow ``resid`` through only one of q, k and v: derivatives through the others
                are left out, while their values are still computed from ``resid``.
            freeze_norm: hold the norms before (and after) at their captured scales.

        Raises:
            SiteError: the place is none of these.
            UsageError: ``through`` is given outside attention.
            ShapeError: the residual stream has another width or length.
        """
        expected = (len(self._tokens), self._circuit.d_model)
        if tuple(resid.shape) != expected:
            raise ShapeError(f"the residual stream is {expected}, not {tuple(resid.shape)}")
        replay = Replay(self._circuit, self.scale, self.arguments, through, freeze_norm)
        return replay.run(place, resid)

    # ---- files

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, with everything but the tensors as JSON in its header.

        The arguments of attention are not written; `load` computes them again from the tokens.
        """
        about = {"model": self._circuit.fingerprint(), "metric": self._metric, "frozen": sorted(self._frozen)}
        write_activations(path, self._tokens, self._values, about)

    @classmethod
    def load(cls, path: Path | str, circuit: Circuit) -> RawActivations:
        """Read what `save` wrote, for the same model.

        Args:
            path: of the file.
            circuit: of the model; it is run once on the tokens, up to its last block.

        Raises:
            ArtefactError: the file holds no activations, is damaged, or is of a model of another shape.
        """
        stored = read_activations(path, circuit.fingerprint())
        metric, frozen = stored.about.metric, frozenset(stored.about.frozen)
        try:
            raw = cls(circuit, stored.tokens, stored.values, metric=metric, frozen=frozen)
            for place, pass_ in raw:
                if tuple(raw[place, pass_].shape) != (shape := circuit.shape(place, len(stored.tokens))):
                    raise SiteError(f"{place} is {tuple(raw[place, pass_].shape)}; in this model it is {shape}")
            raw._arguments = MappingProxyType(dict(circuit.arguments(stored.tokens)))
        except FeaturizerError as error:
            raise ArtefactError(str(path), str(error)) from error
        return raw
