"""CausalAbstraction's interventions as pyvene classes. Their arithmetic is the featurizer's own; pyvene is needed here.

All of them act on the features that ``subspaces`` name: ``None`` is every feature, or those of the featurizer's feature
set ``selected``; ``[]`` is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import torch
from featurizers import Featurizer
from featurizers.errors import ConversionError, ShapeError, UsageError
from featurizers.features import Indices, Selection, SigmoidGate
from featurizers.models import GATE_LOGITS, SELECTED
from featurizers_pyvene import FeatureIntervention, FeatureInterventionConfig, bound_class, indices_of_subspaces
from pydantic import BaseModel, Field
from pyvene.models.interventions import (
    CollectIntervention,
    DistributedRepresentationIntervention,
    SourcelessIntervention,
)
from torch import Tensor, nn

from featurizers_causalab.pairs import PairFeaturizer


class _Selecting(FeatureIntervention):
    """What all classes share: which features they act on."""

    @staticmethod
    def to_featurizer(part: Any) -> Featurizer[Any]:
        """The featurizer to store.

        Raises:
            ConversionError: the map is that of modules, which no file can hold.
        """
        if isinstance(part, PairFeaturizer):
            raise ConversionError(
                part.id,
                "its map is that of modules, which no file can hold; an autoencoder's featurizer is as_featurizer(), "
                "whose interventions are saved, and a class of your own a plugin's (docs/plugins.md)",
            )
        return part  # type: ignore[no-any-return]

    def chosen(self, base: Tensor, subspaces: Sequence[Any] | None) -> Selection:
        """The features of base that ``subspaces`` mean; a row of None is all of them for that example."""
        if subspaces is not None and any(row is None for row in subspaces) and not all(r is None for r in subspaces):
            if self.subspace_partition is not None:
                raise UsageError("parts of a partition are named for every example or for none")
            every = list(range(self.featurizer.encode(base).shape[-1]))
            subspaces = [every if row is None else row for row in subspaces]
        indices: Indices = indices_of_subspaces(subspaces, self.subspace_partition)
        if indices is None:
            indices = self.featurizer.feature_sets.get(SELECTED)
        return self.featurizer.select(indices, base)

    def values(self, source: Tensor, base: Tensor, selection: Selection) -> Tensor:
        """A vector of the feature space, one for all or one an example, as the chosen features of base take it."""
        if 1 < source.dim() < base.dim():
            source = source.unsqueeze(1)  # (batch, features) beside (batch, positions, d)
        columns = selection.as_columns()
        return source if columns is None else source[..., columns]


class FeatureInterchangeIntervention(_Selecting, DistributedRepresentationIntervention):  # type: ignore[misc]
    """Features from the source: `Featurizer.interchange`."""

    kind = "causalab.interchange"

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Base with the chosen features of the source."""
        return self.featurizer.interchange(base, source, self.chosen(base, subspaces))


class FeatureCollectIntervention(_Selecting, SourcelessIntervention, CollectIntervention):  # type: ignore[misc]
    """Features of the base: `Featurizer.collect`."""

    kind = "causalab.collect"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_source_constant = True  # a trainable intervention unsets it, which is what makes pyvene save it

    def forward(
        self, base: Tensor, source: Tensor | None = None, subspaces: Sequence[Any] | None = None, **_: Any
    ) -> Tensor:
        """The chosen features of base, all ``n_features`` of them unless fewer are named."""
        return self.featurizer.collect(base, self.chosen(base, subspaces))


class MaskConfig(FeatureInterventionConfig):
    """What is saved of a mask beside its featurizer and its logits.

    Attributes:
        temperature: what the logits are divided by; None until it is set.
        training: whether the gate is soft.
    """

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    training: bool


class FeatureMaskIntervention(_Selecting, DistributedRepresentationIntervention):  # type: ignore[misc]
    """Features moved towards the source by a trainable gate: `Featurizer.mask`.

    The gate is ``sigmoid(mask / temperature)`` in training mode and its rounding in evaluation mode. pyvene's
    ``IntervenableModel.eval()`` leaves an intervention in training mode, and so CausalAbstraction trains it.

    Attributes:
        gate: a `featurizers.SigmoidGate`; its logits are ``mask``, one a feature.
        temperature: what the logits are divided by; None until it is set.
    """

    kind = "causalab.mask"
    Config = MaskConfig
    gate: SigmoidGate
    temperature: Tensor | None
    logits: ClassVar[int | None] = None
    """How many logits there are; None for one a feature."""

    def attach(self, featurizer: Featurizer[Any]) -> None:
        """Take the featurizer, and make the gate on its features."""
        if featurizer.n_features is None:
            raise UsageError("`n_features` must be given to the Featurizer for a mask, which has a logit a feature")
        super().attach(featurizer)
        self.gate = SigmoidGate(self.logits or featurizer.n_features)
        self.temperature = None

    def get_config(self) -> BaseModel:
        """The arguments as they are now."""
        temperature = None if self.temperature is None else self.gate.temperature
        return MaskConfig(**super().get_config().model_dump(), temperature=temperature, training=self.training)

    def set_config(self, config: Any) -> None:
        """Take the arguments of a config."""
        super().set_config(config)
        self.train(config.training)
        if config.temperature is not None:
            self.gate.temperature = config.temperature
            self.temperature = torch.tensor(config.temperature, dtype=self.mask.dtype, device="cpu")

    @property
    def mask(self) -> nn.Parameter:
        """The gate's logits."""
        return self.gate.logits

    def get_temperature(self) -> Tensor:
        """What the logits are divided by.

        Raises:
            UsageError: it was not set.
        """
        if self.temperature is None:
            raise UsageError("the temperature of the mask is not set; set_temperature(…) sets it")
        return self.temperature

    def set_temperature(self, temp: float | Tensor) -> None:
        """Set what the logits are divided by: a positive number, or a tensor that holds one."""
        temperature = torch.as_tensor(temp, dtype=self.mask.dtype, device=self.mask.device)
        self.gate.temperature = float(temperature)
        self.temperature = temperature

    def get_sparsity_loss(self) -> Tensor:
        """The sum of the soft gates."""
        self.get_temperature()
        return self.gate.sparsity_loss()

    def keep(self) -> list[int]:
        """Store the mask in the featurizer: its logits as ``gate_logits``, the features it takes as ``selected``.

        Returns:
            The features that it takes.
        """
        logits = self.mask.detach().expand(self.featurizer.n_features or 1).clone()
        taken = (logits > 0).nonzero()[:, 0]
        self.featurizer.feature_sets |= {GATE_LOGITS: logits, SELECTED: taken}
        return [int(index) for index in taken]

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Base with its features moved towards the source by the gate, which is 0 for features that are not chosen."""
        self.get_temperature()
        self.gate.hard = not self.training
        gate = self.gate().expand(self.featurizer.n_features or 1)
        selection = self.chosen(base, subspaces)
        if not selection.is_everything:
            gate = gate * selection.mask_for(base, self.featurizer.n_features)
        wide = torch.promote_types(base.dtype, gate.dtype)  # of the gate in half precision little would be left
        return self.featurizer.mask(base.to(wide), source.to(wide), gate).to(base.dtype)


class TiedFeatureMaskIntervention(FeatureMaskIntervention):
    """A mask with one logit for all features."""

    kind = "causalab.tied-mask"
    logits: ClassVar[int | None] = 1

    def __str__(self) -> str:
        """The featurizer's id, and that the mask is tied."""
        return f"FeatureMaskIntervention(id={self.featurizer.id},tied)"


class FeatureSteeringIntervention(_Selecting, DistributedRepresentationIntervention):  # type: ignore[misc]
    """The source, a vector of the feature space, added to the features: `Featurizer.steer`."""

    kind = "causalab.steering"

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Base with the vector added to its chosen features."""
        selection = self.chosen(base, subspaces)
        return self.featurizer.steer(base, self.values(source, base, selection), selection)


class FeatureReplaceIntervention(_Selecting, DistributedRepresentationIntervention):  # type: ignore[misc]
    """The features replaced by the source, a vector of the feature space: `Featurizer.ablate` with its values."""

    kind = "causalab.replace"

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Base with the vector in place of its chosen features."""
        selection = self.chosen(base, subspaces)
        return self.featurizer.ablate(base, selection, self.values(source, base, selection))


class FeatureInterpolateIntervention(_Selecting, DistributedRepresentationIntervention):  # type: ignore[misc]
    """Features that a function makes of those of base and source; no file holds it, because of the function."""

    _interpolation: tuple[Callable[..., Tensor], dict[str, Any]] | None = None

    def set_interpolation(self, fn: Callable[..., Tensor], **params: Any) -> None:
        """Set the function: it gets ``f_base=``, ``f_src=`` and the parameters, and returns features."""
        self._interpolation = fn, params

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Base with what the function makes of its features and the source's in place of the chosen ones."""
        if self._interpolation is None:
            raise UsageError("there is no function to interpolate with; set_interpolation(fn, …) sets one")
        selection = self.chosen(base, subspaces)
        fn, params = self._interpolation
        features = self.featurizer.collect(base)
        edited = fn(f_base=features, f_src=self.featurizer.collect(source), **params)
        if edited.shape != features.shape:
            raise ShapeError(f"the function made features of shape {tuple(edited.shape)} of {tuple(features.shape)}")
        return self.featurizer.ablate(base, selection, self.values(edited, base, selection))


class FeatureNoiseIntervention(_Selecting, DistributedRepresentationIntervention):  # type: ignore[misc]
    """Gaussian noise added to the features, as large as the source says: a number, or one a feature.

    The noise goes on from call to call, and is the same again after `reset_noise_rng`, on each device by itself.
    """

    kind = "causalab.noise"
    seed: ClassVar[int] = 0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("noise_seed", torch.tensor(self.seed))
        self.reset_noise_rng()

    def reset_noise_rng(self) -> None:
        """Begin the noise anew."""
        self._generators: dict[torch.device, torch.Generator] = {}

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Base with ``source`` times standard normal noise added to its chosen features."""
        selection = self.chosen(base, subspaces)
        features = self.featurizer.collect(base)
        generator = self._generators.get(features.device)
        if generator is None:
            generator = torch.Generator(features.device).manual_seed(int(self.noise_seed))
            self._generators[features.device] = generator
        noise = torch.randn(features.shape, generator=generator, device=features.device, dtype=features.dtype)
        scale = source.unsqueeze(1) if 1 < source.dim() < base.dim() else source
        return self.featurizer.steer(base, self.values(noise * scale.to(noise), base, selection), selection)


SAVED = (
    FeatureInterchangeIntervention,
    FeatureCollectIntervention,
    FeatureMaskIntervention,
    TiedFeatureMaskIntervention,
    FeatureSteeringIntervention,
    FeatureReplaceIntervention,
    FeatureNoiseIntervention,
)
"""The classes that a file may name."""


def __getattr__(name: str) -> type:
    return bound_class(__name__, name)
