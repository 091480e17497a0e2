"""CausalAbstraction's ``neural.featurizers`` under its own names: ``from featurizers_causalab.featurizers import *``.

A `Featurizer` here is a pair of modules, as there; what is done through it is done by a featurizer of this library,
which `Featurizer.as_featurizer` gives and `Featurizer.of` takes.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import featurizers
import torch
from featurizers.errors import ConversionError, MissingDependencyError, UsageError
from featurizers.features import select
from featurizers.models import SELECTED
from featurizers_identity import IdentityFeaturizer
from featurizers_subspace import SubspaceFeaturizer as CoreSubspace
from torch import Tensor, nn

from featurizers_causalab import triplets
from featurizers_causalab.builders import (
    bound,
    build_feature_collect_intervention,
    build_feature_interchange_intervention,
    build_feature_interpolation_intervention,
    build_feature_mask_intervention,
    build_feature_noise_intervention,
    build_feature_replace_intervention,
    build_feature_steering_intervention,
    mask_class,
)
from featurizers_causalab.modules import (
    CoreFeaturizerModule,
    CoreInverseFeaturizerModule,
    IdentityFeaturizerModule,
    IdentityInverseFeaturizerModule,
    Rotation,
    SAEFeaturizerModule,
    SAEInverseFeaturizerModule,
    SubspaceFeaturizerModule,
    SubspaceInverseFeaturizerModule,
    checked_sae,
)
from featurizers_causalab.pairs import PairFeaturizer, featurizer_of_modules
from featurizers_causalab.payloads import MOST_FEATURES, Payload, featurizer_of, payload_of, selected_of
from featurizers_causalab.rotations import subspace_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Featurizer",
    "IdentityFeaturizerModule",
    "IdentityInverseFeaturizerModule",
    "SAEFeaturizer",
    "SAEFeaturizerModule",
    "SAEInverseFeaturizerModule",
    "SubspaceFeaturizer",
    "SubspaceFeaturizerModule",
    "SubspaceInverseFeaturizerModule",
    "build_feature_collect_intervention",
    "build_feature_interchange_intervention",
    "build_feature_interpolation_intervention",
    "build_feature_mask_intervention",
    "build_feature_noise_intervention",
    "build_feature_replace_intervention",
    "build_feature_steering_intervention",
]


class Featurizer(nn.Module):
    """A pair of modules, ``x → (features, error)`` and back; an identity unless they are given.

    Args:
        featurizer: maps activations to features and an error.
        inverse_featurizer: maps these back.
        n_features: number of features; a mask needs it.
        id: a name, shown by the interventions; ``"null"`` where there is nothing to keep.
        tie_masks: whether a mask has one logit for all features.
    """

    def __init__(
        self,
        featurizer: nn.Module | None = None,
        inverse_featurizer: nn.Module | None = None,
        *,
        n_features: int | None = None,
        id: str = "null",
        tie_masks: bool = False,
    ) -> None:
        super().__init__()
        if (featurizer is None) != (inverse_featurizer is None):
            raise UsageError("a featurizer and its inverse are given together, or neither for an identity")
        if featurizer is None or inverse_featurizer is None:
            featurizer, inverse_featurizer = IdentityFeaturizerModule(), IdentityInverseFeaturizerModule()
        self.featurizer, self.inverse_featurizer = featurizer, inverse_featurizer
        self.n_features, self.id, self.tie_masks = n_features, id, tie_masks
        self._made: tuple[Any, ...] = ()

    @classmethod
    def of(cls, core: featurizers.Featurizer[Any], *, tie_masks: bool = False) -> Featurizer:
        """Any featurizer of this library as one of CausalAbstraction's; the two share their parameters."""
        options: dict[str, Any] = {"n_features": core.n_features, "id": core.id, "tie_masks": tie_masks}
        if isinstance(core, IdentityFeaturizer):
            self = Featurizer(**options)
            self.set_feature_indices(selected_of(core))
            return self
        if isinstance(core, CoreSubspace):
            return SubspaceFeaturizer._around(core, options)
        return Featurizer(CoreFeaturizerModule(core), CoreInverseFeaturizerModule(core), **options)

    # ------------------------------------------------------------------ the map

    def forward(self, x: Tensor) -> Any:
        """The same as `featurize`."""
        return self.featurizer(x)

    def featurize(self, x: Tensor) -> Any:
        """Features and error of x."""
        return self.featurizer(x)

    def inverse_featurize(self, x: Tensor, error: Any) -> Any:
        """The activations that have these features and this error."""
        return self.inverse_featurizer(x, error)

    def is_trivial(self) -> bool:
        """Whether it is an identity without a name, of which there is nothing to keep."""
        return self.id == "null" and isinstance(self.featurizer, IdentityFeaturizerModule)

    def set_feature_indices(self, feature_indices: Sequence[int] | None) -> None:
        """Set the features that interventions act on where they are told no others; None for all, ``[]`` for none.

        Raises:
            FeatureIndexError: a feature is not there, or is named twice.
        """
        sets = self._core().feature_sets
        if feature_indices is None:
            sets.pop(SELECTED, None)
        else:
            columns = torch.tensor(list(feature_indices), dtype=torch.long)
            select(columns, self.n_features or MOST_FEATURES)
            sets[SELECTED] = columns

    def get_feature_indices(self) -> list[int] | None:
        """The features that were set, None for all."""
        return selected_of(self._core())

    def as_featurizer(self) -> featurizers.Featurizer[Any]:
        """The same map as a featurizer of this library, which can be saved, pushed and given to `intervene`.

        An identity and a subspace share their parameters with it; a sparse autoencoder's is a copy in rows.

        Raises:
            ConversionError: the modules are the caller's own.
            MissingDependencyError: it is a sparse autoencoder, and the plugin for these is not installed.
        """
        if isinstance(self.featurizer, SAEFeaturizerModule):
            try:
                from featurizers_sae_lens import wrap
            except ImportError as error:
                raise MissingDependencyError(
                    "a sparse autoencoder as a featurizer", "featurizers-sae-lens", "pip install featurizers-sae-lens"
                ) from error
            core = wrap(self.featurizer.sae)
            core.id, core.feature_sets = self.id, dict(self._core().feature_sets)
            return core
        core = self._core()
        if isinstance(core, PairFeaturizer):
            raise ConversionError(
                self.id,
                f"its map is that of a {type(self.featurizer).__name__}, which no file can hold; make the class a "
                "featurizer of a plugin (docs/plugins.md)",
            )
        return core

    def _core(self) -> featurizers.Featurizer[Any]:
        """The featurizer that acts through the modules that are there now."""
        key = (self.featurizer, self.inverse_featurizer, self.n_features)
        if self._made[:-1] != key:  # a module was put in the place of another
            self._made = (*key, featurizer_of_modules(*key, self.id))
        core: featurizers.Featurizer[Any] = self._made[-1]
        core.id = self.id
        return core

    # ------------------------------------------------------------------ interventions

    def get_interchange_intervention(self) -> type:
        """A pyvene class that takes features from the source."""
        return bound("FeatureInterchangeIntervention", self._core())

    def get_collect_intervention(self) -> type:
        """A pyvene class that collects features."""
        return bound("FeatureCollectIntervention", self._core())

    def get_mask_intervention(self) -> type:
        """A pyvene class with a trainable gate on each feature, or on all.

        Raises:
            UsageError: the number of features is not known.
        """
        if self.n_features is None:
            raise UsageError("`n_features` must be given to the Featurizer for a mask, which has a logit a feature")
        return mask_class(self._core(), self.tie_masks)

    def get_steering_intervention(self) -> type:
        """A pyvene class that adds the source, a vector of the feature space."""
        return bound("FeatureSteeringIntervention", self._core())

    def get_replace_intervention(self) -> type:
        """A pyvene class that puts the source, a vector of the feature space, in place of the features."""
        return bound("FeatureReplaceIntervention", self._core())

    def get_interpolation_intervention(self) -> type:
        """A pyvene class that puts what a function makes of both in place of the features."""
        return bound("FeatureInterpolateIntervention", self._core())

    def get_noise_intervention(self, seed: int = 0) -> type:
        """A pyvene class that adds noise to the features."""
        return bound("FeatureNoiseIntervention", self._core(), seed=seed)

    # ------------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any] | None:
        """What causalab writes of it: a description and two state dicts; None for what is trivial.

        Raises:
            ConversionError: causalab has no class for its map.
        """
        if self.is_trivial():
            return None
        payload = payload_of(self._storable(), self.id, tie_masks=self.tie_masks)
        return {
            "model_info": payload.info,
            "featurizer_state_dict": payload.state,
            "inverse_state_dict": payload.inverse,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Featurizer:
        """What `to_dict` wrote, or causalab.

        Raises:
            ManifestError, WeightsError: it contradicts itself, or is of a class that is not known.
        """
        parts = [data.get(key) for key in ("model_info", "featurizer_state_dict", "inverse_state_dict")]
        payload = Payload(*parts)
        return cls._loaded(featurizer_of(payload, "from_dict"), payload.info)

    def save_modules(self, path: str | Path) -> tuple[str | None, str | None]:
        """Write ``PATH_featurizer`` and ``PATH_inverse_featurizer``, in place of what was there; the folder is made.

        Returns:
            The two paths; of a sparse autoencoder, which these files cannot hold, twice None, which CausalAbstraction's
            experiments go on with, and a warning.

        Raises:
            ConversionError: it is of a class that no loader knows.
            ArtefactError: the files cannot be written.
        """
        if isinstance(self.featurizer, SAEFeaturizerModule):
            warnings.warn(
                f"no file is written of the autoencoder {self.id!r}, which CausalAbstraction's files cannot hold; "
                "save it with as_featurizer().save_pretrained(folder)",
                stacklevel=2,
            )
            return None, None
        triplets.write(self._storable(), Path(path), tie_masks=self.tie_masks, indices=False)
        return f"{path}{triplets.FORWARD}", f"{path}{triplets.INVERSE}"

    @classmethod
    def load_modules(cls, path: str | Path) -> Featurizer:
        """What `save_modules` wrote, here or in CausalAbstraction, on the CPU, without the list of features.

        Raises:
            ManifestError, WeightsError: the files are missing, damaged, or contradict each other.
            UsageError: they hold a featurizer of another class than the one that was asked.
        """
        source, name = triplets.at(path)
        payload = triplets.read_payload(source, name)
        return cls._loaded(featurizer_of(payload, str(path)), payload.info)

    @classmethod
    def _loaded(cls, core: featurizers.Featurizer[Any], info: dict[str, Any]) -> Featurizer:
        loaded = Featurizer.of(core, tie_masks=info.get("tie_masks", False))
        if not isinstance(loaded, cls):
            raise UsageError(f"a {type(loaded).__name__} was saved there, and not a {cls.__name__}")
        loaded.id = info.get("featurizer_id") or "loaded"
        return loaded

    def _storable(self) -> featurizers.Featurizer[Any]:
        """A featurizer that holds the map, also where a rotation of another library does."""
        if isinstance(self.featurizer, SubspaceFeaturizerModule) and isinstance(self._core(), PairFeaturizer):
            weight: Any = self.featurizer.rotate.weight
            core = subspace_of(weight)
            core.id = self.id
            return core.requires_grad_(any(p.requires_grad for p in self.featurizer.parameters()))
        return self.as_featurizer()


class SubspaceFeaturizer(Featurizer):
    """Coordinates in a subspace, whose basis stays orthonormal while it is trained.

    Args:
        shape: ``(d, k)``, for a random basis drawn from torch's generator.
        rotation_subspace: ``(d, k)``, a basis with orthonormal columns, to the precision of its dtype.
        trainable: whether the basis learns.
        id: a name.
        tie_masks: whether a mask has one logit for all features.

    Raises:
        UsageError: not one of the two is given.
        BasisError, ConfigError: the columns are not orthonormal, or are more than the rows.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int] | None = None,
        rotation_subspace: Tensor | None = None,
        trainable: bool = True,
        id: str = "subspace",
        tie_masks: bool = False,
    ) -> None:
        if (shape is None) == (rotation_subspace is None):
            raise UsageError("Provide either `shape` or `rotation_subspace`, and not both")
        if rotation_subspace is None:
            d_in, n_features = map(int, shape or ())
            seed = int(torch.randint(2**62, ()))
            core = featurizers.create("subspace", d_in=d_in, n_features=n_features, seed=seed)
        else:
            core = subspace_of(rotation_subspace)
        core.requires_grad_(trainable)
        self._build(core, {"n_features": core.n_features, "id": id, "tie_masks": tie_masks})

    @classmethod
    def _around(cls, core: CoreSubspace, options: dict[str, Any]) -> Self:
        self = cls.__new__(cls)
        self._build(core, options)
        return self

    def _build(self, core: Any, options: dict[str, Any]) -> None:
        rotate = Rotation(core)
        super().__init__(SubspaceFeaturizerModule(rotate), SubspaceInverseFeaturizerModule(rotate), **options)


class SAEFeaturizer(Featurizer):
    """Features of a sparse autoencoder of SAELens.

    Args:
        sae: shares its memory with this one; its own flags of what learns stay.
        trainable: whether the autoencoder learns.
        id: a name.
        tie_masks: whether a mask has one logit for all features.

    Raises:
        UsageError: it is no autoencoder, or a transcoder.
    """

    def __init__(self, sae: Any, *, trainable: bool = False, id: str = "sae", tie_masks: bool = False) -> None:
        sae, n_features = checked_sae(sae, trainable)
        super().__init__(
            SAEFeaturizerModule(sae), SAEInverseFeaturizerModule(sae), n_features=n_features, id=id, tie_masks=tie_masks
        )
