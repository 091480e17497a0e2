"""CausalAbstraction's ``neural.featurizers`` under its own names: ``from featurizers_causalab.featurizers import *``.

A `Featurizer` of this module is a pair of modules, as in CausalAbstraction. A featurizer of this library carries out
its interventions: `Featurizer.as_featurizer` returns it, and `Featurizer.of` wraps one.
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
    """Pair of modules, ``x → (features, error)`` and its inverse; an identity unless they are given.

    Args:
        featurizer: maps activations to features and an error.
        inverse_featurizer: maps features and an error to activations.
        n_features: number of features; needed by a mask.
        id: a name, which the interventions show; an identity with the id ``"null"`` is trivial and is not saved.
        tie_masks: give a mask one logit for all features.

    Raises:
        UsageError: only one of the two modules is given.
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
            raise UsageError("a featurizer and its inverse are given together; leave out both for an identity")
        if featurizer is None or inverse_featurizer is None:
            featurizer, inverse_featurizer = IdentityFeaturizerModule(), IdentityInverseFeaturizerModule()
        self.featurizer, self.inverse_featurizer = featurizer, inverse_featurizer
        self.n_features, self.id, self.tie_masks = n_features, id, tie_masks
        self._cached: tuple[Any, ...] = ()

    @classmethod
    def of(cls, core: featurizers.Featurizer[Any], *, tie_masks: bool = False) -> Featurizer:
        """Wrap a featurizer of this library; the two share their parameters."""
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
        """Call `featurize`."""
        return self.featurizer(x)

    def featurize(self, x: Tensor) -> Any:
        """Return the features and the error of x."""
        return self.featurizer(x)

    def inverse_featurize(self, x: Tensor, error: Any) -> Any:
        """Return the activations with these features and this error."""
        return self.inverse_featurizer(x, error)

    def is_trivial(self) -> bool:
        """Return True for an identity without a name, which is not saved."""
        return self.id == "null" and isinstance(self.featurizer, IdentityFeaturizerModule)

    def set_feature_indices(self, feature_indices: Sequence[int] | None) -> None:
        """Set the features that interventions act on by default: None for all, ``[]`` for none.

        Raises:
            FeatureIndexError: a feature is out of range or repeated.
        """
        sets = self._core().feature_sets
        if feature_indices is None:
            sets.pop(SELECTED, None)
        else:
            columns = torch.tensor(list(feature_indices), dtype=torch.long)
            select(columns, self.n_features or MOST_FEATURES)
            sets[SELECTED] = columns

    def get_feature_indices(self) -> list[int] | None:
        """Return the features that were set, None for all."""
        return selected_of(self._core())

    def as_featurizer(self) -> featurizers.Featurizer[Any]:
        """Return the same map as a featurizer of this library, which can be saved, pushed and passed to `intervene`.

        The result shares the parameters of an identity or a subspace. For a sparse autoencoder it is a copy.

        Raises:
            ConversionError: the modules are the caller's own.
            MissingDependencyError: it is a sparse autoencoder, and `featurizers-sae-lens` is not installed.
        """
        if isinstance(self.featurizer, SAEFeaturizerModule):
            try:
                from featurizers_sae_lens import wrap
            except ImportError as error:
                raise MissingDependencyError(
                    "a sparse autoencoder as a featurizer", "featurizers-sae-lens", "pip install featurizers-sae-lens"
                ) from error
            core = wrap(self.featurizer.sae)
            if not isinstance(core, featurizers.Featurizer):
                raise ConversionError(self.id, "it holds a map between sites, which has no single site")
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
        """Return the featurizer of the current modules; it is rebuilt if one of them was replaced."""
        key = (self.featurizer, self.inverse_featurizer, self.n_features)
        if self._cached[:-1] != key:
            self._cached = (*key, featurizer_of_modules(*key, self.id))
        core: featurizers.Featurizer[Any] = self._cached[-1]
        core.id = self.id
        return core

    # ------------------------------------------------------------------ interventions

    def get_interchange_intervention(self) -> type:
        """Return a pyvene class that takes features from the source."""
        return bound("FeatureInterchangeIntervention", self._core())

    def get_collect_intervention(self) -> type:
        """Return a pyvene class that collects features."""
        return bound("FeatureCollectIntervention", self._core())

    def get_mask_intervention(self) -> type:
        """Return a pyvene class with a trainable gate for each feature, or one gate for all if ``tie_masks``.

        Raises:
            UsageError: the number of features is not known.
        """
        if self.n_features is None:
            raise UsageError("`n_features` must be given to the Featurizer for a mask, which has a logit per feature")
        return mask_class(self._core(), self.tie_masks)

    def get_steering_intervention(self) -> type:
        """Return a pyvene class that adds the source, a vector of the feature space."""
        return bound("FeatureSteeringIntervention", self._core())

    def get_replace_intervention(self) -> type:
        """Return a pyvene class that replaces the features by the source, a vector of the feature space."""
        return bound("FeatureReplaceIntervention", self._core())

    def get_interpolation_intervention(self) -> type:
        """Return a pyvene class that replaces the features by a function of those of base and source."""
        return bound("FeatureInterpolateIntervention", self._core())

    def get_noise_intervention(self, seed: int = 0) -> type:
        """Return a pyvene class that adds noise to the features."""
        return bound("FeatureNoiseIntervention", self._core(), seed=seed)

    # ------------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any] | None:
        """Return what causalab saves, a description and two state dicts; None for a trivial featurizer.

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
        """Rebuild a featurizer from the dict that `to_dict`, here or in causalab, returned.

        Raises:
            ManifestError: the description is malformed or names an unknown class.
            WeightsError: the tensors are malformed or contradict each other.
        """
        parts = [data.get(key) for key in ("model_info", "featurizer_state_dict", "inverse_state_dict")]
        payload = Payload(*parts)
        return cls._loaded(featurizer_of(payload, "from_dict"), payload.info)

    def save_modules(self, path: str | Path) -> tuple[str | None, str | None]:
        """Write ``PATH_featurizer`` and ``PATH_inverse_featurizer``, replacing existing files; the folder is created.

        These files cannot hold a sparse autoencoder. For one, nothing is written and a warning says how to save it;
        CausalAbstraction's experiments accept None for the paths.

        Returns:
            The two paths; twice None for a sparse autoencoder.

        Raises:
            ConversionError: the modules are of a class that no loader knows.
            ArtefactError: the files cannot be written.
        """
        if isinstance(self.featurizer, SAEFeaturizerModule):
            warnings.warn(
                f"no file is written: CausalAbstraction's files cannot hold the autoencoder {self.id!r}; save it with "
                "as_featurizer().save_pretrained(folder)",
                stacklevel=2,
            )
            return None, None
        triplets.write(self._storable(), Path(path), tie_masks=self.tie_masks, indices=False)
        return f"{path}{triplets.FORWARD}", f"{path}{triplets.INVERSE}"

    @classmethod
    def load_modules(cls, path: str | Path) -> Featurizer:
        """Read the files that `save_modules`, here or in CausalAbstraction, wrote, onto the CPU.

        The list of features is not read.

        Raises:
            ManifestError: a file is missing, or the description is malformed or names an unknown class.
            WeightsError: the files are damaged or contradict each other.
            UsageError: the files hold a featurizer of another class than this one.
        """
        source, name = triplets.at(path)
        payload = triplets.read_payload(source, name)
        return cls._loaded(featurizer_of(payload, str(path)), payload.info)

    @classmethod
    def _loaded(cls, core: featurizers.Featurizer[Any], info: dict[str, Any]) -> Featurizer:
        loaded = Featurizer.of(core, tie_masks=info.get("tie_masks", False))
        if not isinstance(loaded, cls):
            raise UsageError(f"what was saved is a {type(loaded).__name__}, not a {cls.__name__}; load it as that")
        loaded.id = info.get("featurizer_id") or "loaded"
        return loaded

    def _storable(self) -> featurizers.Featurizer[Any]:
        """Return a featurizer with the same map; the rotation layer of another library is copied to a subspace."""
        if isinstance(self.featurizer, SubspaceFeaturizerModule) and isinstance(self._core(), PairFeaturizer):
            weight: Any = self.featurizer.rotate.weight
            core = subspace_of(weight)
            core.id = self.id
            return core.requires_grad_(any(p.requires_grad for p in self.featurizer.parameters()))
        return self.as_featurizer()


class SubspaceFeaturizer(Featurizer):
    """Coordinates in a subspace; the basis stays orthonormal while it is trained.

    Args:
        shape: ``(d, k)``, for a random basis drawn from torch's generator.
        rotation_subspace: a basis ``(d, k)`` whose columns are orthonormal to the precision of its dtype.
        trainable: let the basis require gradients.
        id: a name.
        tie_masks: give a mask one logit for all features.

    Raises:
        UsageError: neither or both of ``shape`` and ``rotation_subspace`` are given.
        BasisError: the columns are not orthonormal, or there are more columns than rows.
        ConfigError: ``shape`` has more columns than rows.
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
        sae: the autoencoder. It is copied; the copy shares the memory of its parameters, whose ``requires_grad`` is
            not changed.
        trainable: let the copy's parameters require gradients.
        id: a name.
        tie_masks: give a mask one logit for all features.

    Raises:
        UsageError: ``sae`` is not a sparse autoencoder, or it is a transcoder.
    """

    def __init__(self, sae: Any, *, trainable: bool = False, id: str = "sae", tie_masks: bool = False) -> None:
        sae, n_features = checked_sae(sae, trainable)
        super().__init__(
            SAEFeaturizerModule(sae), SAEInverseFeaturizerModule(sae), n_features=n_features, id=id, tie_masks=tie_masks
        )
