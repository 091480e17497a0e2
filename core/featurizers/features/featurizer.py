"""`Featurizer`: an invertible map between a model's activations and a feature space, and the operations through it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

import featurizers
from featurizers.errors import LoweringError, ShapeError, UsageError
from featurizers.features.active import Active, SparseFeatures, nonzero, side_by_side
from featurizers.features.derivatives import Derivatives, Error
from featurizers.features.feature_space import ConfigT, FeatureSpace, Numbering
from featurizers.features.indices import Indices, Selection, check_broadcast, select, values_like
from featurizers.features.placement import check_device
from featurizers.features.precision import without_autocast, without_overflow
from featurizers.features.programs import FeatureRows
from featurizers.format.sites import Site


class Featurizer(Derivatives, FeatureSpace[ConfigT]):
    """Map of activations into a feature space and back: x → (features, error) → x̂.

    A kind implements `featurize` and `inverse_featurize`; everything else follows from them. It may also implement
    `encode`, `apply_edit` and `blend` where it has closed forms that are cheaper than the defaults. Laws, which
    `featurizers.testing.FeaturizerContract` checks for every kind:

    - ``inverse_featurize(*featurize(x)) == x`` to rounding. For a lossless kind the error is None or zero.
    - An operation that changes no feature returns ``base``, equal in every element in fp32, fp16 and bf16, because
      edits are applied as a difference: ``base + decode(edited) - decode(features)``.
    - The error carries all that the inverse needs besides the features; nothing is kept on the module.
    - Features, and what `inverse_featurize` returns, have the dtype of the featurizer's own tensors, fp32 as a rule,
      for activations in half precision and under autocast too; operations return the dtype of ``base``.
    - ``indices=None`` means every feature, ``[]`` means no feature.
    - Inputs are never changed in place, returned as the same tensor, or detached; gradients reach the features, the
      parameters and the inputs.

    The attributes are those of `FeatureSpace`, and:

    Attributes:
        d_in: width of the activations, None if any width will do.
        site: model and place that it belongs to, if known.
    """

    d_in: int | None

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config)
        self.site = None

    @property
    def site(self) -> Site | None:
        """Place that it belongs to; a string such as ``resid.post:8`` may be assigned."""
        return self._site

    @site.setter
    def site(self, site: Site | str | None) -> None:
        self._site = None if site is None else Site.parse(site)

    @property
    def sites(self) -> Mapping[str, Site]:
        """Its site under the name ``site``; empty if it is not known."""
        return {} if self.site is None else {"site": self.site}

    @property
    def sites_text(self) -> str | None:
        """Its site as a string."""
        return None if self.site is None else str(self.site)

    def numbering(self) -> Mapping[str | None, Numbering]:
        """See `FeatureSpace.numbering`. Kinds whose features are numbered otherwise override it."""
        count = self.n_features or self.d_in or 2**31  # of any width
        return {None: Numbering(range(count), count)}

    # ------------------------------------------------------------------ what a kind implements
    @abstractmethod
    def featurize(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch n_features"], Error]:
        """Return the features of x, and the error term that the inverse needs."""

    @abstractmethod
    def inverse_featurize(
        self, features: Float[Tensor, "*batch n_features"], error: Error
    ) -> Float[Tensor, "*batch d_in"]:
        """Return the activations that have these features and this error term."""

    def encode(self, x: Float[Tensor, "*batch d_in"], columns: Tensor | None = None) -> Float[Tensor, "*batch k"]:
        """Return the features without the error: all, or those in ``columns`` (int64, ``(k,)``).

        Kinds override it where this is cheaper than `featurize`. It may return x itself.
        """
        features, _ = self.featurize(x)
        return features if columns is None else features[..., columns]

    def encode_active(self, x: Float[Tensor, "*batch d_in"]) -> Active:
        """Return the features that are not 0 in flat form, without a place for those that are.

        The tokens are numbered in their order, whatever ``*batch`` is. Kinds override it where they need not compute
        the features that are 0; the default searches `encode` for them.
        """
        features = self.encode(self.flatten(x))
        return nonzero(features.reshape(-1, features.shape[-1]))

    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> SparseFeatures:
        """Return the features that are not 0 as values and indices ``(*batch, k)``; k is the largest count of a token.

        The indices are columns.
        """
        return side_by_side(self.encode_active(x), self.flatten(x).shape[:-1])

    def reconstruct(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch n_features"], Float[Tensor, "*batch d_in"]]:
        """Return the features of x and the activations that they stand for by themselves, x̂ without the error term.

        The second has the shape of x, and is x to rounding for a lossless kind.
        """
        features, error = self.featurize(x)
        return features, self.inverse_featurize(features, self.without_residual(error))

    def without_residual(self, error: Error) -> Error:
        """Return the error term that activations would have if their features reconstructed them: zeros by default.

        Kinds override it whose error holds more than a residual, such as statistics that the inverse needs.
        """
        if isinstance(error, tuple):
            return tuple(self.without_residual(part) for part in error)
        return torch.zeros_like(error) if isinstance(error, Tensor) else error

    def apply_edit(
        self,
        base: Float[Tensor, "*batch d_in"],
        features: Float[Tensor, "*batch k"],
        edited: Float[Tensor, "*batch k"],
        columns: Tensor | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``base + decode(edited) - decode(features)``, in the dtype of ``base``.

        Every operation goes through this method. The default costs one `featurize` and two inverses; a kind with
        a linear decoder overrides it to decode the difference once.

        Args:
            base: activations to edit.
            features: ``encode(base, columns)``.
            edited: new values of those features.
            columns: numbers of those features, None for all.
        """
        full, error = self.featurize(base)
        if columns is not None:
            features = full.index_copy(-1, columns, features.to(full.dtype))
            edited = full.index_copy(-1, columns, edited.to(full.dtype))
        change = self.inverse_featurize(edited, error) - self.inverse_featurize(features, error)
        return (base + change).to(base.dtype)

    def blend(
        self, base: Float[Tensor, "*batch d_in"], source: Float[Tensor, "*#batch d_in"], gate: Tensor | None
    ) -> Float[Tensor, "*batch d_in"]:
        """Move the features of ``base`` towards those of ``source``: an interchange or a mask of many features.

        The default encodes both and applies the edit. Kinds whose features are mostly zero override it.

        Args:
            base: activations to edit.
            source: activations to take features from.
            gate: None to take every feature; booleans that are True for the features to take; or how far to move
                each feature, from 0 to 1. Its shape broadcasts against the features.
        """
        features = self.encode(base)
        target = self.encode(source).to(features.dtype).expand_as(features)
        if gate is None:
            edited = target
        elif gate.dtype == torch.bool:
            edited = torch.where(gate, target, features)
        else:  # lerp is exact at 0, at 1 and where both ends are equal
            edited = torch.lerp(features, target, gate.to(features.dtype).expand_as(features))
        result = self.apply_edit(base, features, edited)
        # a closed form may return its argument, as the identity's does, and that may be the caller's tensor
        return result.clone() if result is base or (gate is None and result is edited) else result

    def feature_rows(self, columns: Tensor | None = None) -> FeatureRows:
        """Return features, all or those in ``columns``, as rows that are read and written: see `featurizers.lower`.

        Kinds override it whose features are each an affine function of the activations, followed by a gate of their
        own, and which decode linearly.

        Raises:
            LoweringError: the features have no such form.
        """
        raise LoweringError(
            f"the features of {self.id!r} ({self.kind}) are not known as rows, so that its edits have no fixed form"
        )

    def flatten(self, x: Tensor) -> Float[Tensor, "*batch d_in"]:
        """Return x with the activations on the last axis. Kinds override it to accept other layouts, such as heads.

        Raises:
            ShapeError: x does not have width ``d_in``.
        """
        self.check_width(x)
        return x

    def select(self, indices: Indices, x: Tensor) -> Selection:
        """Check ``indices`` against the features of x. Kinds whose features are numbered otherwise override it.

        Raises:
            FeatureIndexError: an index is out of range, repeated, or not an integer.
        """
        return select(indices, self._count(x), x.device)

    @classmethod
    def sliced(cls, config: ConfigT, columns: Tensor) -> tuple[ConfigT, set[str], dict[str, Tensor]]:
        """Describe how to load some features alone. Kinds whose features are rows of their tensors override it.

        Args:
            config: of the whole featurizer.
            columns: int64 ``(k,)``, numbers of the features to load.

        Returns:
            The config of the slice, the names of the tensors to read only the rows ``columns`` of, and the extra
            tensors that the slice has.

        Raises:
            UsageError: the kind can only be loaded whole.
        """
        raise UsageError(
            f"a featurizer of kind {cls.kind!r} is loaded whole; give the indices to the operation instead"
        )

    @classmethod
    @final
    def rows_of_slice(cls, config: ConfigT, columns: Any) -> tuple[ConfigT, dict[str, Tensor], dict[str, Tensor]]:
        """See `FeatureSpace.rows_of_slice`."""
        part, names, added = cls.sliced(config, columns)
        return part, dict.fromkeys(names, columns), added

    @final
    def checked_columns(self, indices: Any) -> Tensor:
        """See `FeatureSpace.checked_columns`."""
        # raises for a kind that cannot load some of its features, whatever the indices are
        self.sliced(self.config, torch.zeros(1, dtype=torch.long))
        columns = select(indices, self.n_features or 0).as_columns()
        if columns is None or not columns.numel():
            raise UsageError("give the features to load as a list of numbers, the same for every example")
        return columns

    # ------------------------------------------------------------------ operations, final
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch n_features"], Error]:
        """Return `featurize` of x."""
        return self.featurize(x)

    @final
    def interchange(
        self,
        base: Float[Tensor, "*batch d_in"],
        source: Float[Tensor, "*#batch d_in"],
        indices: Indices = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``base`` with the chosen features taken from ``source``.

        Interchange intervention of Geiger et al. 2021 (arXiv:2106.02997), through a featurizer as in distributed
        alignment search (arXiv:2303.02536).

        Raises:
            ShapeError: base or source does not have width ``d_in``, or they do not broadcast.
            FeatureIndexError: indices that this featurizer does not have.
        """
        shape, base, source = base.shape, self.flatten(base), self.flatten(source)
        check_broadcast("source", source, base.shape)
        selection = self.select(indices, base)
        columns = selection.columns
        # masking is faster than gathering where many features are chosen
        mostly_dense = columns is not None and 4 * columns.numel() > self._count(base)
        if columns is not None and columns.numel() == 0:
            return base.clone().reshape(shape)
        with without_autocast(base):
            if columns is None or mostly_dense:
                gate = None if selection.is_everything else selection.mask_for(base, self._count(base))
                return self._blended(base, source, gate).reshape(shape)
            features = self.encode(base, columns)
            target = self.encode(source, columns).to(features.dtype).expand_as(features)
            result = self._applied(base, features, target, columns)
            return without_overflow(self, result, base, source, lambda: (base == source).all(dim=-1)).reshape(shape)

    @final
    def mask(
        self,
        base: Float[Tensor, "*batch d_in"],
        source: Float[Tensor, "*#batch d_in"],
        gate: Float[Tensor, "*#batch n_features"],
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``base`` with each feature moved towards that of ``source`` by its gate: 0 keeps it, 1 swaps it.

        Differential binary masking, De Cao et al. 2020 (arXiv:2004.14992).

        Raises:
            ShapeError: base, source or gate has another width, or they do not broadcast.
            UsageError: the gate is no tensor.
        """
        shape, base, source = base.shape, self.flatten(base), self.flatten(source)
        if not isinstance(gate, Tensor):
            raise UsageError(f"a gate is a tensor with a number for each feature, not {type(gate).__name__}")
        if gate.shape[-1:] != (self._count(base),):
            raise ShapeError(f"the gate has shape {tuple(gate.shape)}, but there are {self._count(base)} features")
        check_broadcast("source", source, base.shape)
        check_broadcast("gate", gate, (*base.shape[:-1], self._count(base)))
        gate = gate if gate.is_floating_point() else gate.to(base.dtype)
        with without_autocast(base):
            return self._blended(base, source, gate).reshape(shape)

    @final
    def collect(self, x: Float[Tensor, "*batch d_in"], indices: Indices = None) -> Float[Tensor, "*batch k"]:
        """Return the features of x, all or those chosen in the order given, in the featurizer's own dtype.

        Raises:
            ShapeError: x does not have width ``d_in``.
            FeatureIndexError: an index is out of range.
            UsageError: the indices differ by example, so that the result would not be a tensor.
        """
        x = self.flatten(x)
        selection = self.select(indices, x)
        if selection.differs_by_example:
            raise UsageError("collect takes the same indices for every example; collect all and index the result")
        with without_autocast(x):
            features = self.encode(x, selection.as_columns())
        return features.clone() if features is x else features

    @final
    def steer(
        self, base: Float[Tensor, "*batch d_in"], delta: float | Tensor, indices: Indices = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``base`` with ``delta`` added to the chosen features.

        Args:
            base: activations.
            delta: in units of the features: a number, or a tensor whose last axis follows ``indices`` (or has all
                features if the indices are None or differ by example).
            indices: features to change.
        """
        return self._edit(base, indices, delta, add=True)

    @final
    def ablate(
        self, base: Float[Tensor, "*batch d_in"], indices: Indices = None, value: float | Tensor = 0.0
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``base`` with the chosen features set to ``value``: zero, a mean, or any other.

        Args:
            base: activations.
            indices: features to change.
            value: a number, or a tensor whose last axis follows ``indices`` as in `steer`.
        """
        return self._edit(base, indices, value, add=False)

    def _edit(self, base: Tensor, indices: Indices, value: float | Tensor, *, add: bool) -> Tensor:
        """Set the chosen features of base to ``value``, or add it to them."""
        shape, base = base.shape, self.flatten(base)
        selection = self.select(indices, base)
        columns = selection.as_columns()
        if columns is not None and columns.numel() == 0:
            return base.clone().reshape(shape)
        with without_autocast(base):
            features = self.encode(base, columns)
            values = values_like(value, features)
            edited = features + values if add else values
            chosen = selection.mask_for(features, self._count(base)) if selection.differs_by_example else None
            edited = edited if chosen is None else torch.where(chosen, edited, features)
            result = self._applied(base, features, edited, columns)

            def kept() -> Tensor:
                changes = values != 0 if add else torch.ones_like(values, dtype=torch.bool)
                return ~(changes if chosen is None else changes & chosen).any(dim=-1)

            return without_overflow(self, result, base, None, kept).reshape(shape)

    def _blended(self, base: Tensor, source: Tensor, gate: Tensor | None) -> Tensor:
        """Blend, and check the range."""

        def kept() -> Tensor:
            same = (base == source).all(dim=-1)
            return same if gate is None else same | (gate == 0).all(dim=-1)

        return without_overflow(self, self.blend(base, source, gate), base, source, kept)

    def _applied(self, base: Tensor, features: Tensor, edited: Tensor, columns: Tensor | None) -> Tensor:
        """Apply an edit, and copy the result if a closed form returned its argument, as the identity's does."""
        result = self.apply_edit(base, features, edited, columns)
        return result.clone() if result is base or result is edited else result

    # ------------------------------------------------------------------ composition, pyvene
    @final
    def __rshift__(self, other: Featurizer[Any]) -> Featurizer[Any]:
        """Return ``a >> b``: the features of a, featurized by b."""
        return featurizers.compose(self, other)

    @final
    def get_interchange_intervention(self) -> type:
        """Return a pyvene intervention class that interchanges through this featurizer; needs pyvene."""
        return featurizers.pyvene.bind(featurizers.pyvene.FeatureInterchangeIntervention, self)

    @final
    def get_collect_intervention(self) -> type:
        """Return a pyvene intervention class that collects this featurizer's features; needs pyvene."""
        return featurizers.pyvene.bind(featurizers.pyvene.FeatureCollectIntervention, self)

    @final
    def get_mask_intervention(self) -> type:
        """Return a pyvene intervention class with a trainable gate on each feature; needs pyvene."""
        return featurizers.pyvene.bind(featurizers.pyvene.FeatureMaskIntervention, self)

    # ------------------------------------------------------------------ helpers for kinds
    @final
    def check_width(self, x: Tensor) -> None:
        """Raise `ShapeError` unless the last axis of x has ``d_in`` elements and x is floating point.

        Raises:
            UsageError: x is on another device.
        """
        self._check_last(x, self.d_in, "activations")

    @final
    def check_features(self, features: Tensor) -> None:
        """Raise as `check_width` does, for features."""
        self._check_last(features, self.n_features, "features")

    def _check_last(self, x: Tensor, width: int | None, what: str) -> None:
        if not x.dim() or (width is not None and x.shape[-1] != width):
            raise ShapeError(f"{self.id!r} ({self.kind}) takes {what} of width {width}, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ShapeError(f"{self.id!r} ({self.kind}) takes floating-point {what}, got {x.dtype}")
        check_device(self, x, lambda: f"{self.id!r} ({self.kind})")

    def _count(self, x: Tensor) -> int:
        return x.shape[-1] if self.n_features is None else self.n_features

    def extra_repr(self) -> str:
        """Return the text that ``print`` shows after the class name."""
        return f"id={self.id!r}, d_in={self.d_in}, n_features={self.n_features}"
