"""CausalAbstraction's interventions as pyvene classes that call the featurizer's own operations.

Each acts on the features in pyvene's argument ``subspaces``. None means the featurizer's feature set ``selected``, or
all features if there is no such set; ``[]`` means no features. Importing this module imports pyvene.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import featurizers_pyvene
import torch
from featurizers import Featurizer
from featurizers.errors import ConversionError, ShapeError, UsageError
from featurizers.features import Indices, Selection, SigmoidGate
from featurizers.models import GATE_LOGITS, SELECTED
from featurizers_pyvene import FeatureIntervention, FeatureInterventionConfig, bound_class, indices_of_subspaces
from pydantic import BaseModel, Field
from pyvene.models.interventions import DistributedRepresentationIntervention
from torch import Tensor, nn

from featurizers_causalab.pairs import PairFeaturizer


class _Selecting(FeatureIntervention):
    """Base of the interventions: chooses the features to act on."""

    @staticmethod
    def to_featurizer(part: Any) -> Featurizer[Any]:
        """Return the featurizer, which is stored as it is.

        Raises:
            ConversionError: it wraps the caller's own modules, which no file can hold.
        """
        if isinstance(part, PairFeaturizer):
            raise ConversionError(
                part.id,
                "its map is that of modules, which no file can hold. For an autoencoder use the interventions of "
                "as_featurizer(), which are saved; make a class of your own a featurizer of a plugin (docs/plugins.md)",
            )
        return part  # type: ignore[no-any-return]

    def chosen(self, base: Tensor, subspaces: Sequence[Any] | None) -> Selection:
        """Return the features of ``base`` to act on; a row of None means all features of that example."""
        if subspaces is not None and any(row is None for row in subspaces) and not all(r is None for r in subspaces):
            if self.subspace_partition is not None:
                raise UsageError("subspaces name parts of a partition; give them for every example or for none")
            all_features = list(range(self.featurizer.encode(base).shape[-1]))
            subspaces = [all_features if row is None else row for row in subspaces]
        indices: Indices = indices_of_subspaces(subspaces, self.subspace_partition)
        if indices is None:
            indices = self.featurizer.feature_sets.get(SELECTED)
        return self.featurizer.select(indices, base)

    def values(self, source: Tensor, base: Tensor, selection: Selection) -> Tensor:
        """Return the entries of a vector of the feature space that belong to the chosen features.

        Args:
            source: a vector ``(n_features,)``, or a vector for each example or each activation.
            base: activations ``(batch, positions, d)``.
            selection: the chosen features.
        """
        source = _for_positions(source, base)
        columns = selection.as_columns()
        return source if columns is None else source[..., columns]


class FeatureInterchangeIntervention(_Selecting, featurizers_pyvene.FeatureInterchangeIntervention):
    """`Featurizer.interchange` with CausalAbstraction's choice of features."""

    kind = "causalab.interchange"


class FeatureCollectIntervention(_Selecting, featurizers_pyvene.FeatureCollectIntervention):
    """`Featurizer.collect` with CausalAbstraction's choice of features."""

    kind = "causalab.collect"


class MaskConfig(FeatureInterventionConfig):
    """Arguments of a mask that are saved beside its featurizer and its logits.

    Attributes:
        temperature: divides the logits; None until it is set.
        training: True if the gate is soft.
    """

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    training: bool


class FeatureMaskIntervention(_Selecting, DistributedRepresentationIntervention):  # type: ignore[misc]
    """`Featurizer.mask` with a trainable gate.

    The gate is ``sigmoid(mask / temperature)`` in training mode and is rounded to 0 or 1 in evaluation mode. pyvene's
    ``IntervenableModel.eval()`` leaves interventions in training mode; CausalAbstraction relies on this to train.

    Attributes:
        gate: a `featurizers.SigmoidGate`, whose logits are ``mask``.
        temperature: divides the logits; None until it is set.
        tied: True if one logit stands for all features.
    """

    kind = "causalab.mask"
    Config = MaskConfig
    gate: SigmoidGate
    temperature: Tensor | None
    tied: ClassVar[bool] = False

    def attach(self, featurizer: Featurizer[Any]) -> None:
        """Set the featurizer and make a gate for its features.

        Raises:
            UsageError: the featurizer does not say how many features it has.
        """
        if featurizer.n_features is None:
            raise UsageError("a mask needs the number of features; give n_features to the Featurizer")
        super().attach(featurizer)
        self.gate = SigmoidGate(featurizer.n_features, tied=self.tied)
        self.temperature = None

    def get_config(self) -> BaseModel:
        """Return the current arguments."""
        temperature = None if self.temperature is None else self.gate.temperature
        return MaskConfig(**super().get_config().model_dump(), temperature=temperature, training=self.training)

    def set_config(self, config: Any) -> None:
        """Set the arguments."""
        super().set_config(config)
        self.train(config.training)
        if config.temperature is not None:
            self.gate.temperature = config.temperature
            self.temperature = torch.tensor(config.temperature, dtype=self.mask.dtype, device="cpu")

    @property
    def mask(self) -> nn.Parameter:
        """Logits of the gate, ``(n_features,)``, or ``(1,)`` if tied."""
        return self.gate.logits

    def get_temperature(self) -> Tensor:
        """Return the number that divides the logits.

        Raises:
            UsageError: it is not set.
        """
        if self.temperature is None:
            raise UsageError("the temperature of the mask is not set; call set_temperature(…)")
        return self.temperature

    def set_temperature(self, temp: float | Tensor) -> None:
        """Set the number that divides the logits: a positive number, or a tensor of one element."""
        temperature = torch.as_tensor(temp, dtype=self.mask.dtype, device=self.mask.device)
        self.gate.temperature = float(temperature)
        self.temperature = temperature

    def get_sparsity_loss(self) -> Tensor:
        """Return the sum of the soft gates; a tied gate counts once, as in CausalAbstraction."""
        self.get_temperature()
        return self.gate.soft()[: len(self.mask)].sum()

    def keep(self) -> list[int]:
        """Store the mask in the featurizer: its logits as ``gate_logits``, the features that pass as ``selected``.

        Returns:
            The features that pass the hard gate.
        """
        selected = self.gate.selected()
        logits = self.mask.detach().expand(self.gate.n_features).clone()
        self.featurizer.feature_sets |= {GATE_LOGITS: logits, SELECTED: selected}
        return [int(index) for index in selected]

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Return ``base`` with its chosen features moved towards those of ``source`` by the gate."""
        self.get_temperature()
        self.gate.hard = not self.training
        gate = self.gate()
        selection = self.chosen(base, subspaces)
        if not selection.is_everything:
            gate = gate * selection.mask_for(base, self.gate.n_features)
        wide = torch.promote_types(base.dtype, gate.dtype)  # half precision would round the gate coarsely
        return self.featurizer.mask(base.to(wide), source.to(wide), gate).to(base.dtype)


class TiedFeatureMaskIntervention(FeatureMaskIntervention):
    """`FeatureMaskIntervention` with one logit for all features."""

    kind = "causalab.tied-mask"
    tied: ClassVar[bool] = True

    def __str__(self) -> str:
        """Return the class name, the featurizer's id and the word tied."""
        return f"FeatureMaskIntervention(id={self.featurizer.id},tied)"


class FeatureSteeringIntervention(_Selecting, DistributedRepresentationIntervention):  # type: ignore[misc]
    """`Featurizer.steer`: adds the source, a vector of the feature space, to the features."""

    kind = "causalab.steering"

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Return ``base`` with the vector added to its chosen features."""
        selection = self.chosen(base, subspaces)
        return self.featurizer.steer(base, self.values(source, base, selection), selection)


class FeatureReplaceIntervention(_Selecting, DistributedRepresentationIntervention):  # type: ignore[misc]
    """`Featurizer.ablate`: replaces the features by the source, a vector of the feature space."""

    kind = "causalab.replace"

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Return ``base`` with its chosen features replaced by the vector."""
        selection = self.chosen(base, subspaces)
        return self.featurizer.ablate(base, selection, self.values(source, base, selection))


class FeatureInterpolateIntervention(_Selecting, DistributedRepresentationIntervention):  # type: ignore[misc]
    """Replaces the features by a function of those of base and source; not saved, because no file holds a function."""

    _interpolation: tuple[Callable[..., Tensor], dict[str, Any]] | None = None

    def set_interpolation(self, fn: Callable[..., Tensor], **params: Any) -> None:
        """Set the function, which is called with ``f_base=``, ``f_src=`` and the parameters and returns features."""
        self._interpolation = fn, params

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Return ``base`` with its chosen features replaced by the result of the function.

        Raises:
            UsageError: no function is set.
            ShapeError: the function returns another number of features.
        """
        if self._interpolation is None:
            raise UsageError("there is no function to interpolate with; call set_interpolation(fn, …)")
        selection = self.chosen(base, subspaces)
        fn, params = self._interpolation
        features = self.featurizer.collect(base)
        edited = fn(f_base=features, f_src=self.featurizer.collect(source), **params)
        if edited.shape != features.shape:
            raise ShapeError(
                f"the function returned features of shape {tuple(edited.shape)} for features of shape "
                f"{tuple(features.shape)}; the two must be equal"
            )
        return self.featurizer.ablate(base, selection, self.values(edited, base, selection))


class FeatureNoiseIntervention(_Selecting, DistributedRepresentationIntervention):  # type: ignore[misc]
    """Adds Gaussian noise to the features; the source is its standard deviation, a number or a vector of features.

    Each call draws new noise. After `reset_noise_rng` the sequence starts again. Each device has its own sequence.
    """

    kind = "causalab.noise"
    seed: ClassVar[int] = 0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("noise_seed", torch.tensor(self.seed))
        self.reset_noise_rng()

    def reset_noise_rng(self) -> None:
        """Start the sequence of noise again."""
        self._generators: dict[torch.device, torch.Generator] = {}

    def forward(self, base: Tensor, source: Tensor, subspaces: Sequence[Any] | None = None, **_: Any) -> Tensor:
        """Return ``base`` with ``source`` times standard normal noise added to its chosen features."""
        selection = self.chosen(base, subspaces)
        features = self.featurizer.collect(base)
        generator = self._generators.get(features.device)
        if generator is None:
            generator = torch.Generator(features.device).manual_seed(int(self.noise_seed))
            self._generators[features.device] = generator
        noise = torch.randn(features.shape, generator=generator, device=features.device, dtype=features.dtype)
        scaled = noise * _for_positions(source, base).to(noise)
        return self.featurizer.steer(base, self.values(scaled, base, selection), selection)


def _for_positions(source: Tensor, base: Tensor) -> Tensor:
    """Add an axis to vectors ``(batch, features)``, so that they broadcast with ``(batch, positions, features)``."""
    return source.unsqueeze(1) if 1 < source.dim() < base.dim() else source


SAVED = (
    FeatureInterchangeIntervention,
    FeatureCollectIntervention,
    FeatureMaskIntervention,
    TiedFeatureMaskIntervention,
    FeatureSteeringIntervention,
    FeatureReplaceIntervention,
    FeatureNoiseIntervention,
)
"""Classes that a file may name."""


def __getattr__(name: str) -> type:
    return bound_class(__name__, name)
