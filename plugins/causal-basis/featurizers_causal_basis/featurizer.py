"""`CausalBasisFeaturizer`: coordinates in a causal basis, with the energy of each direction."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from featurizers import Error, Featurizer, Site
from featurizers.errors import BasisError, ShapeError, SiteError, UsageError
from featurizers.features import FeatureRows
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from featurizers_causal_basis.record import BasisRecord, Mode

SITES = {"input": "resid.pre", "output": "resid.post"}
"""Kind of site of each side of a block."""

TOLERANCE = 1e-5
"""Largest difference between VᵀV and the identity in fp32."""


class CausalBasisConfig(BaseModel):
    """Configuration of a `CausalBasisFeaturizer`.

    Attributes:
        d_in: width of the activations.
        n_features: number of directions, at most ``d_in``.
        record: how the directions were found.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: Annotated[int, Field(gt=0, le=2**24)]
    n_features: Annotated[int, Field(gt=0, le=2**24)]
    record: BasisRecord

    @model_validator(mode="after")
    def _fits(self) -> CausalBasisConfig:
        if self.n_features > self.d_in:
            raise ValueError(f"{self.n_features} orthonormal directions do not fit into {self.d_in} dimensions")
        if self.record.steps is not None and len(self.record.steps) != self.n_features:
            raise ValueError(f"the record has {len(self.record.steps)} steps for {self.n_features} vectors")
        return self


@final
class CausalBasisFeaturizer(Featurizer[CausalBasisConfig]):
    """Coordinates in an orthonormal causal basis V, most important direction first: f = Vᵀx, error = x - Vf.

    Lossless with its error term. The basis is fixed: extraction finds it, and no gradient changes it. Belrose et al.
    2023 (arXiv:2303.08112), section 4.

    The energy of a direction v is the mean over tokens of KL(p(x) ‖ p(x - v vᵀ(x - m))), in nats per token, where p
    is a readout of the activations, and m is their mean, zero, or another token's activations (``record.mode``). It
    is the energy of ablating v alone. Energies are not cumulative: they hold for any prefix of the basis, and their
    sum is not the energy of ablating all.

    Stored with one direction per row, as ``directions (n_features, d_in)``, so that a prefix can be loaded alone;
    ``energies (n_features)`` in non-increasing order; ``mean (d_in)`` of the activations. Features have the dtype of
    the directions. Cost: O(d k) per activation.

    Examples:
        >>> import torch
        >>> record = BasisRecord(mode="mean", side="output", readout="logit-lens", n_tokens=100)
        >>> f = CausalBasisFeaturizer.of(torch.eye(4)[:, :2], torch.tensor([0.5, 0.1]), torch.ones(4), record)
        >>> f.ablate(torch.zeros(4), [0], f.ablation_values()[:1])
        tensor([1., 0., 0., 0.])
        >>> f.min_energy(0.2).n_features
        1
    """

    kind: ClassVar[str] = "causal-basis"
    Config: ClassVar[type[BaseModel]] = CausalBasisConfig

    d_in: int
    n_features: int
    directions: Tensor
    energies: Tensor
    mean: Tensor

    def __init__(self, config: CausalBasisConfig) -> None:
        super().__init__(config)
        self.d_in, self.n_features = config.d_in, config.n_features
        self.register_buffer("directions", torch.eye(config.n_features, config.d_in))
        self.register_buffer("energies", torch.zeros(config.n_features))
        self.register_buffer("mean", torch.zeros(config.d_in))

    # ------------------------------------------------------------------ constructors

    @classmethod
    def of(
        cls,
        vectors: Float[Tensor, "d_in n_features"],
        energies: Float[Tensor, " n_features"],
        mean: Float[Tensor, " d_in"],
        record: BasisRecord,
        *,
        site: Site | str | None = None,
    ) -> CausalBasisFeaturizer:
        """Return the featurizer of a basis; the tensors are copied.

        Args:
            vectors: orthonormal columns, by descending energy.
            energies: of ablating each vector alone, nats per token.
            mean: of the activations.
            record: how the basis was found.
            site: where the activations are, and in which model.

        Raises:
            BasisError: the vectors are not orthonormal; the energies are not finite and descending; shapes do not fit.
            SiteError: the record names the other side of the block.
        """
        if vectors.dim() != 2 or not vectors.is_floating_point() or not 0 < vectors.shape[1] <= vectors.shape[0]:
            raise BasisError(
                "vectors are the columns of a real matrix (d_in, n_features) with n_features <= d_in, got "
                f"{vectors.dtype} {tuple(vectors.shape)}"
            )
        d_in, n_features = vectors.shape
        if record.steps is not None and len(record.steps) != n_features:
            raise BasisError(f"the record has {len(record.steps)} steps for {n_features} vectors")
        with torch.device("meta"):
            self = cls(CausalBasisConfig(d_in=d_in, n_features=n_features, record=record))
        self.directions = vectors.detach().mT.clone(memory_format=torch.contiguous_format)
        self.energies, self.mean = energies.detach().clone(), mean.detach().clone()
        self.site = None if site is None else Site.parse(site)
        self.check()
        return self.eval()

    @property
    def record(self) -> BasisRecord:
        """Record of how the basis was found."""
        return self.config.record

    @property
    def vectors(self) -> Float[Tensor, "d_in n_features"]:
        """Directions as columns."""
        return self.directions.mT

    # ------------------------------------------------------------------ parts

    def truncate(self, k: int) -> CausalBasisFeaturizer:
        """Return the basis of the first k directions, with record, site, name and metadata; the tensors are copied.

        Raises:
            UsageError: k is not from 1 to the number of directions.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.n_features:
            raise UsageError(f"{self.id!r} has {self.n_features} directions; keep 1 to {self.n_features}, not {k!r}")
        record = self.record.first(k, self.n_features)
        part = self.of(self.vectors[:, :k], self.energies[:k], self.mean, record, site=self.site)
        part.id, part.revision, part.metadata = self.id, self.revision, dict(self.metadata)
        part.special_tokens = self.special_tokens
        part.labels = None if self.labels is None else self.labels.only({None: range(k)})
        part.feature_sets = {name: _first(chosen, k) for name, chosen in self.feature_sets.items()}
        return part

    def min_energy(self, threshold: float) -> CausalBasisFeaturizer:
        """Return the basis of the directions whose energy is at least ``threshold`` nats per token.

        Raises:
            UsageError: no direction has so much.
        """
        k = int((self.energies >= threshold).sum())
        if k == 0:
            raise UsageError(
                f"no direction of {self.id!r} has an energy of {threshold} nats per token; the greatest is "
                f"{float(self.energies[0]):.6g}"
            )
        return self.truncate(k)

    @classmethod
    def sliced(
        cls, config: CausalBasisConfig, columns: Tensor
    ) -> tuple[CausalBasisConfig, set[str], dict[str, Tensor]]:
        """See `Featurizer.sliced`: only a prefix can be read, such as ``indices=range(4)``."""
        k = len(columns)
        if not torch.equal(columns, torch.arange(k, device=columns.device)):
            raise UsageError(f"only the first directions of a causal basis can be loaded alone: indices=range({k})")
        part = config.model_copy(update={"n_features": k, "record": config.record.first(k, config.n_features)})
        return part, {"directions", "energies"}, {}

    # ------------------------------------------------------------------ ablation

    def ablation_values(self, mode: Mode | None = None) -> Float[Tensor, " n_features"]:
        """Return the values that ablation sets features to: ``Ablate(f, indices=[j], value=f.ablation_values()[[j]])``.

        Args:
            mode: ``mean``, the features of the stored mean, or ``zero``; the record's mode if None.

        Raises:
            UsageError: the mode is ``resample``, which has no constant values.
        """
        mode = self.record.mode if mode is None else mode
        if mode == "mean":
            return self.mean.to(self.directions.dtype) @ self.vectors
        if mode == "zero":
            return torch.zeros_like(self.energies, dtype=self.directions.dtype)
        if mode == "resample":
            raise UsageError(
                "resample has no constant values: interchange with the activations of other tokens instead"
            )
        raise UsageError(f"a mode of ablation is 'mean', 'zero' or 'resample', not {mode!r}")

    # ------------------------------------------------------------------ the map

    def featurize(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch n_features"], Error]:
        """Return the coordinates in the basis, and the part of x outside it."""
        self.check_width(x)
        x = x.to(self.directions.dtype)
        features = x @ self.vectors
        return features, x - features @ self.directions

    def inverse_featurize(
        self, features: Float[Tensor, "*batch n_features"], error: Error
    ) -> Float[Tensor, "*batch d_in"]:
        """Return the point with these coordinates, plus the error if given."""
        self.check_features(features)
        if isinstance(error, tuple):
            raise ShapeError("the error of a causal basis is one tensor, got a tuple")
        inside = features.to(self.directions.dtype) @ self.directions
        return inside if error is None else inside + error

    def encode(self, x: Float[Tensor, "*batch d_in"], columns: Tensor | None = None) -> Float[Tensor, "*batch k"]:
        """Return the coordinates alone, all or some."""
        self.check_width(x)
        return x.to(self.directions.dtype) @ self._rows(columns).mT

    def apply_edit(
        self,
        base: Float[Tensor, "*batch d_in"],
        features: Float[Tensor, "*batch k"],
        edited: Float[Tensor, "*batch k"],
        columns: Tensor | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``base + V (edited - features)``, which leaves the part outside the basis unchanged."""
        rows = self._rows(columns)
        return (base + (edited - features).to(rows.dtype) @ rows).to(base.dtype)

    def feature_rows(self, columns: Tensor | None = None) -> FeatureRows:
        """See `Featurizer.feature_rows`."""
        rows = self._rows(columns)
        return FeatureRows.linear(rows, rows)

    def _rows(self, columns: Tensor | None) -> Tensor:
        return self.directions if columns is None else self.directions[columns]

    def check(self) -> None:
        """Check that the tensors and the site are those of a causal basis.

        Raises:
            BasisError: the vectors are not orthonormal to their dtype's precision; the energies are not finite and
                non-increasing; a tensor has another shape.
            SiteError: the record names the other side of the block.
        """
        shapes = {"energies": (self.n_features,), "mean": (self.d_in,), "directions": (self.n_features, self.d_in)}
        for name, shape in shapes.items():
            tensor = self.get_buffer(name)
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise BasisError(f"the {name} must be real of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            if not tensor.isfinite().all():
                raise BasisError(f"the {name} hold NaN or infinity")
        rows = self.directions.double()
        off = float((rows @ rows.mT - torch.eye(self.n_features, device=rows.device, dtype=rows.dtype)).abs().max())
        if not off <= (allowed := max(TOLERANCE, torch.finfo(self.directions.dtype).eps)):
            raise BasisError(
                f"the vectors are not orthonormal: VᵀV differs from I by {off:.2g}, more than {allowed:.2g}"
            )
        if not (self.energies[1:] <= self.energies[:-1]).all():
            raise BasisError("the energies are not in descending order; sort the vectors by them")
        if self.site is not None and self.site.kind in SITES.values() and self.site.kind != SITES[self.record.side]:
            raise SiteError(
                f"the site is {str(self.site)!r}, but the record says the {self.record.side} of the block, "
                f"which is a site of kind {SITES[self.record.side]!r}"
            )


def _first(chosen: Tensor, k: int) -> Tensor:
    """Return the part of a feature set among the first k features: int64 holds numbers, any other dtype a mask."""
    return chosen[chosen < k] if chosen.dtype == torch.int64 else chosen[..., :k]
