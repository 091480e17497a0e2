"""`AutoencoderIntervention`: an interchange in the latent space of an autoencoder, for pyvene."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from featurizers.errors import FeatureIndexError, UsageError
from featurizers.indices import select
from featurizers.pyvene import indices_of_subspaces
from torch import Tensor

from featurizers_autoencoder.layers import AutoencoderLayer, AutoencoderLayerBase, JumpReLUAutoencoderLayer, SizedLayer

with contextlib.redirect_stdout(io.StringIO()):  # it prints which of its own extras are missing
    from pyvene.models.interventions import DistributedRepresentationIntervention, TrainableIntervention


class AutoencoderIntervention(TrainableIntervention, DistributedRepresentationIntervention):  # type: ignore[misc]
    """Base with some latents of the source: base + decode(edited) - decode(latents of base).

    The difference keeps what the autoencoder does not reconstruct: with no latent changed, base comes back equal in
    every element, whatever its dtype. Positions and units are mapped alone. The gradient reaches the autoencoder, base
    and source.

    Attributes:
        autoencoder: the layer.
        interchange_dim: which latents: None for all; one number n for the first n; several for those.
    """

    layer: ClassVar[type[SizedLayer]] = AutoencoderLayer
    autoencoder: AutoencoderLayerBase
    interchange_dim: Tensor | None

    def __init__(self, autoencoder: AutoencoderLayerBase | None = None, **kwargs: Any) -> None:
        """Take an autoencoder, or make one of ``embed_dim`` and ``latent_dim``.

        Raises:
            UsageError: neither is given, or ``latent_dim`` is not a positive number.
        """
        width, latents = kwargs.get("embed_dim"), kwargs.get("latent_dim")
        units = kwargs.get("max_number_of_units") or 1
        super().__init__(**{**kwargs, "embed_dim": None, "keep_last_dim": True})
        self.interchange_dim = None
        if autoencoder is None:
            if width is None or not isinstance(latents, int) or latents < 1:
                raise UsageError(
                    f"{type(self).__name__} needs autoencoder=, or embed_dim= and latent_dim= of a new one; got "
                    f"embed_dim={width!r} and latent_dim={latents!r}"
                )
            autoencoder = self.layer(int(width) // int(units), latents)
        elif not isinstance(autoencoder, AutoencoderLayerBase):
            raise UsageError(f"autoencoder is an AutoencoderLayerBase, not a {type(autoencoder).__name__}")
        self.autoencoder = autoencoder

    def set_interchange_dim(self, interchange_dim: int | Sequence[int] | Tensor | None) -> None:
        """Choose the latents: None for all, a number n for the first n, a list for those.

        Raises:
            FeatureIndexError: they are no latents.
        """
        chosen = None if interchange_dim is None else torch.as_tensor(interchange_dim)
        if chosen is not None and (chosen.dtype.is_floating_point or chosen.dim() > 1 or (chosen < 0).any()):
            raise FeatureIndexError(
                f"interchange_dim is a number of latents or a list of them, not {interchange_dim!r}"
            )
        if chosen is not None and isinstance(self.autoencoder, SizedLayer):
            latents = self.autoencoder.latent_dim
            if (chosen > latents if chosen.dim() == 0 else chosen >= latents).any():
                raise FeatureIndexError(f"interchange_dim {interchange_dim!r} is beyond the {latents} latents")
        self.interchange_dim = chosen

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Base with the chosen latents of the source.

        Args:
            base: ``(batch, units, input_dim)``.
            source: the same.
            subspaces: pyvene's: latents, or parts of ``subspace_partition``, for each example; they narrow
                ``interchange_dim``.
        """
        latents = self.autoencoder.encode(base)
        others = self.autoencoder.encode(source)
        edited = torch.where(self._chosen(latents, subspaces), others, latents)
        change = self.autoencoder.decode(edited) - self.autoencoder.decode(latents)
        return (base.to(change.dtype) + change).to(base.dtype)

    def _chosen(self, latents: Tensor, subspaces: Sequence[Any] | None) -> Tensor:
        """Which latents to swap: booleans that broadcast against them."""
        count = latents.shape[-1]
        chosen = torch.ones(count, dtype=torch.bool, device=latents.device)
        if self.interchange_dim is not None:
            dims = self.interchange_dim.to(latents.device)
            numbers = torch.arange(count, device=latents.device)
            chosen = numbers < dims if dims.dim() == 0 else torch.isin(numbers, dims)
        indices = indices_of_subspaces(subspaces, self.subspace_partition)
        return chosen if indices is None else chosen & select(indices, count, latents.device).mask_for(latents, count)

    def __str__(self) -> str:
        """The class."""
        return f"{type(self).__name__}()"


class JumpReLUAutoencoderIntervention(AutoencoderIntervention):
    """`AutoencoderIntervention` of a `JumpReLUAutoencoderLayer`; pyvene calls latent_dim ``low_rank_dimension``."""

    layer: ClassVar[type[SizedLayer]] = JumpReLUAutoencoderLayer

    def __init__(self, autoencoder: AutoencoderLayerBase | None = None, **kwargs: Any) -> None:
        if kwargs.get("latent_dim") is None:
            kwargs["latent_dim"] = kwargs.get("low_rank_dimension")
        super().__init__(autoencoder, **kwargs)
