"""`RawActivations`: what was captured of one sequence, with what it takes to compute more from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, final

from featurizers.errors import ArtefactError, FeaturizerError, SiteError, one_line, shown
from jaxtyping import Int
from torch import Tensor

from featurizers_derived_scalars.places import KINDS, Pass, Place

if TYPE_CHECKING:
    from featurizers_derived_scalars.circuit import Circuit

FORMAT: Final = "featurizers-raw-activations"
VERSION: Final = 1


@dataclass(frozen=True)
class Arguments:
    """What an attention module was called with beside the residual stream: mask, positions, and so on.

    Attributes:
        positional: after the residual stream.
        named: by name, without the residual stream.
    """

    positional: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)


@final
class RawActivations(Mapping[tuple[Place, Pass], Tensor]):
    """Activations and gradients of one sequence, without padding and without a batch axis. It cannot be changed.

    ``raw[Place("mlp.neurons", 3), "forward"]`` is ``(token, neuron)``. The scales of all norms that were run are
    always there, since writes are made with norms held at them.

    Args:
        circuit: of the model that was run.
        tokens: ids, ``(token,)``.
        values: the tensors; each must have as many axes as its place.
        metric: value of the metric, if there was one.
        frozen: names of the norms whose scale the gradients took as constant: ``final``, ``attn``, ``mlp``,
            ``attn.post``, ``mlp.post``.
        arguments: what each attention module was called with, by layer.

    Raises:
        SiteError: a tensor has not the axes of its place.
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
            if value.dim() != len(place.axes) or value.shape[0] != len(tokens):
                raise SiteError(
                    f"{place} ({pass_}) has the shape {tuple(value.shape)}; its axes are {', '.join(place.axes)}, "
                    f"and there are {len(tokens)} tokens"
                )
        self._circuit, self._tokens = circuit, tokens
        self._values: Mapping[tuple[Place, Pass], Tensor] = MappingProxyType(dict(values))
        self._metric, self._frozen = metric, frozenset(frozen)
        self._arguments: Mapping[int, Arguments] = MappingProxyType(dict(arguments or {}))

    @property
    def circuit(self) -> Circuit:
        """The circuit of the model that was run."""
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
        """What each attention module was called with, by layer."""
        return self._arguments

    def __getitem__(self, key: tuple[Place, Pass]) -> Tensor:
        """The tensor of a place and a pass.

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
        """Whether a place and a pass were captured."""
        return key in self._values

    def __iter__(self) -> Iterator[tuple[Place, Pass]]:
        """Places and passes, in the order of the model."""
        return iter(sorted(self._values, key=lambda key: (key[0], key[1] == "backward")))

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._values)

    def __repr__(self) -> str:
        """How much there is, and of what."""
        return f"RawActivations({len(self._tokens)} tokens, {len(self)} tensors of {self._circuit})"

    def scale(self, norm: str, layer: int | None = None) -> Tensor:
        """What a norm divided by, ``(token, 1)``.

        Args:
            norm: ``final``, ``attn``, ``mlp``, ``attn.post`` or ``mlp.post``.
            layer: its block; None for ``final``.
        """
        return self[Place(f"norm.{norm}.scale", layer), "forward"]

    def save(self, path: Path | str) -> None:
        """Write one safetensors file: the tensors, and what else there is as JSON in its header.

        What attention was called with is not written; `load` computes it again from the tokens.
        """
        from safetensors.torch import save_file

        tensors = {f"{place}/{pass_}": _stored(value) for (place, pass_), value in self._values.items()}
        about = {
            "format": FORMAT,
            "version": VERSION,
            "model": self._circuit.fingerprint(),
            "metric": self._metric,
            "frozen": sorted(self._frozen),
        }
        save_file({**tensors, "tokens": _stored(self._tokens)}, path, metadata={"featurizers": json.dumps(about)})

    @classmethod
    def load(cls, path: Path | str, circuit: Circuit) -> RawActivations:
        """What `save` wrote, for the same model.

        Args:
            path: of the file.
            circuit: of the model; it is run once on the tokens, up to its last block.

        Raises:
            ArtefactError: the file is no such file, is damaged, or is of a model of another shape.
        """
        from safetensors import SafetensorError, safe_open

        where = str(path)
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("featurizers", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise ArtefactError(where, f"these are no captured activations: {one_line(error)}") from error
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ArtefactError(where, "these are no captured activations: the header does not say so")
        if about.get("version") != VERSION:
            raise ArtefactError(where, f"format version {shown(about.get('version'))}; this reads version {VERSION}")
        if about.get("model") != circuit.fingerprint():
            raise ArtefactError(where, f"it is of {shown(about.get('model'))}, the model is {circuit.fingerprint()}")
        metric, frozen = about.get("metric"), about.get("frozen")
        known = [name for name in frozen if isinstance(name, str) and name in NORMS] if isinstance(frozen, list) else []
        if not isinstance(metric, float | None) or known != frozen:
            raise ArtefactError(where, "the header's metric or frozen norms are not what they should be")
        tokens = tensors.pop("tokens", None)
        if tokens is None or tokens.dim() != 1 or tokens.is_floating_point():
            raise ArtefactError(where, "it has no row of token ids")
        try:
            values = {_key(name): value for name, value in tensors.items()}
            raw = cls(circuit, tokens, values, metric=metric, frozen=frozenset(known))
            for place, pass_ in raw:
                if tuple(raw[place, pass_].shape) != (shape := circuit.shape(place, len(tokens))):
                    raise SiteError(f"{place} is {tuple(raw[place, pass_].shape)}; in this model it is {shape}")
            arguments = circuit.arguments(tokens)
        except FeaturizerError as error:
            raise ArtefactError(where, str(error)) from error
        return cls(circuit, tokens, values, metric=metric, frozen=raw.frozen, arguments=arguments)


NORMS: Final = frozenset(kind.removeprefix("norm.").removesuffix(".scale") for kind in KINDS if kind[:4] == "norm")
"""Names of the norms: ``final``, ``attn``, ``mlp``, ``attn.post`` and ``mlp.post``."""


def _key(name: str) -> tuple[Place, Pass]:
    text, _, pass_ = name.partition("/")
    if pass_ == "forward":
        return Place.parse(text), "forward"
    if pass_ == "backward":
        return Place.parse(text), "backward"
    raise SiteError(f"{shown(name)} names no place and pass")


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()
