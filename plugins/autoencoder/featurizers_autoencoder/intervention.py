"""`AutoencoderIntervention`: an interchange in the latent space of an autoencoder, for pyvene."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

import torch
from featurizers import DictionaryFeaturizer, Featurizer
from featurizers.errors import FeatureIndexError, ManifestError, ShapeError, UsageError, explain, shown
from featurizers.features import select
from featurizers_pyvene import SavedIntervention, indices_of_subspaces
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from featurizers_autoencoder.layers import (
    SAVED,
    AutoencoderLayer,
    AutoencoderLayerBase,
    JumpReLUAutoencoderLayer,
    SizedLayer,
    layer_of,
)

with contextlib.redirect_stdout(io.StringIO()):  # it prints its missing extras
    from pyvene.models.interventions import DistributedRepresentationIntervention, TrainableIntervention

Count = Annotated[int, Field(gt=0, le=2**31)]


class AutoencoderConfig(BaseModel):
    """Arguments of an intervention that are saved beside its autoencoder.

    Attributes:
        interchange_dim: as `AutoencoderIntervention.interchange_dim`.
        subspace_partition: the latents of each part.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    interchange_dim: int | list[int] | None = None
    subspace_partition: list[list[Annotated[int, Field(ge=0)]]] | None = None


class _State(AutoencoderConfig):
    """Extra state of an intervention in pyvene's state dict.

    Attributes:
        autoencoder: name of the autoencoder's class, None if files may not name it.
        sizes: ``[input_dim, latent_dim]``, None if the class has no name.
    """

    autoencoder: str | None
    sizes: Annotated[list[Count], Field(min_length=2, max_length=2)] | None


class AutoencoderIntervention(SavedIntervention, TrainableIntervention, DistributedRepresentationIntervention):  # type: ignore[misc]
    """Interchange of latents: base + decode(edited latents) - decode(latents of base).

    The difference keeps what the autoencoder does not reconstruct: if no latent changes, base comes back equal in every
    element, whatever its dtype. Each position and unit is mapped by itself. The gradient reaches the autoencoder, base
    and source.

    The state dict holds the registered name and the sizes of the autoencoder and the latents to interchange, so that
    pyvene's own files load again, even where pyvene cannot tell the width of a place.

    Attributes:
        autoencoder: the autoencoder layer.
        interchange_dim: latents to interchange: None for all, a number n for the first n, a vector for a list.
    """

    kind: ClassVar[str] = "autoencoder"
    Config: ClassVar[type[BaseModel]] = AutoencoderConfig
    part: ClassVar[str] = "autoencoder"
    layer: ClassVar[type[SizedLayer]] = AutoencoderLayer
    autoencoder: AutoencoderLayerBase
    interchange_dim: Tensor | None

    def __init__(self, autoencoder: AutoencoderLayerBase | None = None, **kwargs: Any) -> None:
        """Take an autoencoder, or make one of the sizes ``embed_dim`` and ``latent_dim``.

        If pyvene passes a component but no sizes, the autoencoder is made when a state dict names them.

        Raises:
            UsageError: neither an autoencoder nor sizes are given, ``latent_dim`` is not a positive integer, or the
                arguments fix a source.
        """
        if kwargs.get("source_representation") is not None or kwargs.get("hidden_source_representation") is not None:
            self.set_source_representation(None)
        width, latents = kwargs.get("embed_dim"), kwargs.get("latent_dim")
        units = kwargs.get("max_number_of_units") or 1
        super().__init__(**{**kwargs, "embed_dim": None, "keep_last_dim": True})
        self.interchange_dim = None
        if autoencoder is None and "component" in kwargs and (width is None or latents is None):
            return
        if autoencoder is None:
            if width is None or not isinstance(latents, int) or latents < 1:
                raise UsageError(
                    f"{type(self).__name__} needs autoencoder=, or embed_dim= and latent_dim= to make a new one; got "
                    f"embed_dim={width!r} and latent_dim={latents!r}"
                )
            autoencoder = self.layer(int(width) // int(units), latents)
        elif not isinstance(autoencoder, AutoencoderLayerBase):
            raise UsageError(f"autoencoder is an AutoencoderLayerBase, not a {type(autoencoder).__name__}")
        self.autoencoder = autoencoder

    def set_interchange_dim(self, interchange_dim: int | Sequence[int] | Tensor | None) -> None:
        """Choose the latents to interchange: None for all, a number n for the first n, or a list of latents.

        Raises:
            FeatureIndexError: the autoencoder lacks one of them, or the argument is of another form.
        """
        chosen = None if interchange_dim is None else _integers(interchange_dim)
        if chosen is None or chosen.dim() > 1 or (chosen < 0).any():
            if interchange_dim is not None:
                raise FeatureIndexError(
                    f"interchange_dim is a number of latents, a list of latents or None, not {interchange_dim!r}"
                )
        elif isinstance(layer := self._modules.get("autoencoder"), SizedLayer):
            latents = layer.latent_dim
            longest = max(latents, layer.input_dim)  # pyvene's load first sets the width of the model
            if (chosen > longest if chosen.dim() == 0 else chosen >= latents).any():
                raise FeatureIndexError(f"interchange_dim {interchange_dim!r} is beyond the {latents} latents")
        self.interchange_dim = chosen

    def set_source_representation(self, source_representation: Tensor | None) -> None:
        """Raise `UsageError`: a source is passed when the model is called, and is never fixed."""
        raise UsageError(
            f"{type(self).__name__} takes its source from each call; pass source_representations= to the intervenable"
        )

    def get_config(self) -> AutoencoderConfig:
        """Return the latents and the partition."""
        dims, parts = self.interchange_dim, self.subspace_partition
        return AutoencoderConfig(
            interchange_dim=None if dims is None else dims.tolist(),
            subspace_partition=None if parts is None else [[int(i) for i in part] for part in parts],
        )

    def set_config(self, config: AutoencoderConfig) -> None:
        """Set the latents and the partition.

        Raises:
            FeatureIndexError: the autoencoder lacks one of the latents.
        """
        self.subspace_partition = config.subspace_partition
        self.set_interchange_dim(config.interchange_dim)

    @classmethod
    def from_config(cls, config: AutoencoderConfig, part: AutoencoderLayerBase) -> Self:
        """Build an intervention from a config around an autoencoder, which other interventions may share."""
        self = cls(autoencoder=part)
        self.set_config(config)
        return self

    def check(self) -> None:
        """Raise `FeatureIndexError` if the partition has a latent that the autoencoder lacks."""
        if isinstance(self.autoencoder, SizedLayer):
            for part in self.subspace_partition or ():
                select(part, self.autoencoder.latent_dim)

    @staticmethod
    def to_featurizer(part: AutoencoderLayerBase) -> DictionaryFeaturizer:
        """Convert the autoencoder to a dictionary.

        Raises:
            UsageError: no file may name its class.
        """
        if not isinstance(part, SizedLayer) or type(part) is not SAVED.get(part.name):
            raise UsageError(
                f"an autoencoder is a {type(part).__name__}, which no file may name. Register it as a kind of "
                "featurizer and use its get_interchange_intervention()"
            )
        return part.as_featurizer()

    @staticmethod
    def of_featurizer(featurizer: Featurizer[Any]) -> SizedLayer:
        """Convert a dictionary of the rule relu or jumprelu to an autoencoder.

        Raises:
            UsageError: the featurizer is of another kind or rule.
        """
        if not isinstance(featurizer, DictionaryFeaturizer):
            raise UsageError(f"an autoencoder is made from a dictionary, not from a {featurizer.kind!r} featurizer")
        return layer_of(featurizer)

    def get_extra_state(self) -> str:
        """Return the name and sizes of the autoencoder, the latents and the partition, as JSON."""
        layer = self._modules.get("autoencoder")
        known = isinstance(layer, SizedLayer) and type(layer) is SAVED.get(layer.name)
        state = _State(
            autoencoder=layer.name if known else None,
            sizes=[layer.input_dim, layer.latent_dim] if known else None,
            **self.get_config().model_dump(),
        )
        return state.model_dump_json()

    def set_extra_state(self, state: str) -> None:
        """Build the autoencoder that the state names, unless there is one, and set the latents and the partition.

        Raises:
            ManifestError: the state is malformed, or an autoencoder of its sizes does not fit in memory.
            UsageError: there is no autoencoder, and the state does not name a class of this package.
            FeatureIndexError: the autoencoder lacks one of the latents.
        """
        where = f"the state of {type(self).__name__}"
        try:
            record = _State.model_validate_json(state)
        except ValidationError as error:
            raise ManifestError(where, explain(error)) from error
        if "autoencoder" not in self._modules:
            if record.autoencoder not in SAVED or record.sizes is None:
                raise UsageError(
                    f"the state names the autoencoder {shown(record.autoencoder)}, not one of {', '.join(SAVED)}; "
                    "pass yours as autoencoder="
                )
            width, latents = record.sizes
            try:
                self.autoencoder = SAVED[record.autoencoder](width, latents)
            except (RuntimeError, MemoryError) as error:
                raise ManifestError(where, f"an autoencoder of {width} by {latents} cannot be made: {error}") from error
        self.set_config(record)

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Return ``base`` with the chosen latents taken from ``source``.

        Args:
            base: activations ``(batch, units, input_dim)``.
            source: activations of the same shape.
            subspaces: pyvene's argument: latents, or parts of ``subspace_partition``, for each example. Only latents
                that ``interchange_dim`` allows too are interchanged.

        Raises:
            ShapeError: the activations are not as wide as the autoencoder.
            UsageError: there is no autoencoder yet.
            FeatureIndexError: the autoencoder lacks a latent of ``subspaces``.
        """
        if "autoencoder" not in self._modules:
            raise UsageError(
                "there is no autoencoder yet; give latent_dim in the config of a place that pyvene knows, "
                "or an intervention= made with autoencoder="
            )
        if isinstance(self.autoencoder, SizedLayer) and base.shape[-1] != self.autoencoder.input_dim:
            raise ShapeError(
                f"the activations have {base.shape[-1]} dimensions, but the autoencoder takes "
                f"{self.autoencoder.input_dim}"
            )
        latents = self.autoencoder.encode(base)
        source_latents = self.autoencoder.encode(source)
        edited = torch.where(self._chosen(latents, subspaces), source_latents, latents)
        change = self.autoencoder.decode(edited) - self.autoencoder.decode(latents)
        return (base + change).to(base.dtype)  # the sum is computed in the wider dtype

    def _chosen(self, latents: Tensor, subspaces: Sequence[Any] | None) -> Tensor:
        """Return a boolean mask of the latents to interchange, which broadcasts against ``latents``."""
        count = latents.shape[-1]
        chosen = torch.ones(count, dtype=torch.bool, device=latents.device)
        if self.interchange_dim is not None:
            dims = self.interchange_dim.to(latents.device)
            numbers = torch.arange(count, device=latents.device)
            chosen = numbers < dims if dims.dim() == 0 else torch.isin(numbers, dims)
        indices = indices_of_subspaces(subspaces, self.subspace_partition)
        return chosen if indices is None else chosen & select(indices, count, latents.device).mask_for(latents, count)

    def __str__(self) -> str:
        """Return the class name."""
        return f"{type(self).__name__}()"


class JumpReLUAutoencoderIntervention(AutoencoderIntervention):
    """`AutoencoderIntervention` of a `JumpReLUAutoencoderLayer`; also takes latent_dim as ``low_rank_dimension``."""

    kind: ClassVar[str] = "autoencoder.jumprelu"
    layer: ClassVar[type[SizedLayer]] = JumpReLUAutoencoderLayer

    def __init__(self, autoencoder: AutoencoderLayerBase | None = None, **kwargs: Any) -> None:
        if kwargs.get("latent_dim") is None:
            kwargs["latent_dim"] = kwargs.get("low_rank_dimension")
        super().__init__(autoencoder, **kwargs)


def _integers(values: Any) -> Tensor | None:
    """Convert integers to a tensor; return None if the values are of another type."""
    if isinstance(values, Sequence) and not len(values):
        return torch.zeros(0, dtype=torch.long, device="cpu")
    try:
        numbers = torch.as_tensor(values, device="cpu")  # the default device may be meta
    except (TypeError, ValueError, RuntimeError):  # not numbers, lists of unequal lengths, or more than 64 bits
        return None
    return None if numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.is_complex() else numbers
