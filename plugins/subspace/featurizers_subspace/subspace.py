"""`SubspaceFeaturizer`: coordinates in an orthonormal basis of a subspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, final

import torch
from featurizers import Error, Featurizer, hookimpl
from featurizers.errors import BasisError, ShapeError
from featurizers.features import FeatureRows, without_autocast
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from featurizers_subspace import stiefel

if TYPE_CHECKING:
    from collections.abc import Callable


class SubspaceConfig(BaseModel):
    """Configuration of a `SubspaceFeaturizer`.

    Attributes:
        d_in: width of the activations.
        n_features: dimension of the subspace, at most ``d_in``.
        seed: seed of the random basis of a new featurizer.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: Annotated[int, Field(gt=0, le=2**24)]
    n_features: Annotated[int, Field(gt=0, le=2**24)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _fits(self) -> SubspaceConfig:
        if self.n_features > self.d_in:
            raise ValueError(f"{self.n_features} orthonormal directions do not fit into {self.d_in} dimensions")
        return self


class _Cached(NamedTuple):
    """Orthonormal basis computed from one state of the parameter; valid until that state changes."""

    parameter: nn.Parameter
    state: tuple[int, int, bool]  # version, address, gradient needed
    basis: Tensor


@final
class SubspaceFeaturizer(Featurizer[SubspaceConfig]):
    """Coordinates in an orthonormal basis Q of a subspace: f = Qᵀx, error = x - Qf.

    Lossless with its error term, which is the part of x outside the subspace. Used by distributed alignment search,
    Geiger et al. 2023 (arXiv:2303.02536), and, made by `fit_pca`, for principal components.

    The basis is the only parameter, ``basis (d_in, n_features)``, and stays orthonormal while it is trained with any
    optimizer and any weight decay: its gradient is tangent to the Stiefel manifold, and the first use after an
    optimizer step puts the parameter back onto the manifold by the polar decomposition, in fp32 at least. Features have
    the dtype of the basis, also under autocast; keep it in fp32 beside a model in bf16 or fp16. To set the basis by
    hand, change it under ``torch.no_grad()``: torch does not count changes through ``.data``, so they are not made
    orthonormal.

    Cost: O(d k) for each activation; O(d k²) time and O(d k) memory for each optimizer step, however often the basis is
    used.

    Examples:
        >>> import torch, featurizers
        >>> f = featurizers.create("subspace", d_in=8, n_features=2, seed=0)
        >>> features, error = f.featurize(torch.randn(5, 8))
        >>> features.shape, error.shape
        (torch.Size([5, 2]), torch.Size([5, 8]))
    """

    kind: ClassVar[str] = "subspace"
    Config: ClassVar[type[BaseModel]] = SubspaceConfig

    def __init__(self, config: SubspaceConfig) -> None:
        super().__init__(config)
        self.d_in, self.n_features = config.d_in, config.n_features
        self.basis = nn.Parameter(_random_basis(config))
        self._orthonormal: _Cached | None = None

    # ------------------------------------------------------------------ constructors

    @classmethod
    def from_basis(cls, basis: Float[Tensor, "d_in n_features"], *, orthonormalize: bool = False) -> SubspaceFeaturizer:
        """Build a featurizer from a basis, whose columns are the directions.

        Args:
            basis: the basis; copied unchanged.
            orthonormalize: use the nearest orthonormal basis (the polar factor) instead.

        Raises:
            BasisError: the basis is not a matrix of at least as many rows as columns, or its columns are linearly
                dependent, or they are not orthonormal to 1e-5 and `orthonormalize` is False.
        """
        if basis.dim() != 2 or not basis.is_floating_point():
            raise BasisError(f"a basis is a real matrix (d_in, n_features), got {basis.dtype} {tuple(basis.shape)}")
        d_in, n_features = basis.shape
        if n_features > d_in or n_features == 0:
            raise BasisError(
                f"a basis of shape {(d_in, n_features)} has more directions than dimensions, or none; its columns are "
                "the directions, so a matrix whose rows are the directions must be transposed"
            )
        basis = basis.detach().clone()
        if not basis.isfinite().all():
            raise BasisError("the basis holds NaN or infinity")
        if orthonormalize:
            if int(torch.linalg.matrix_rank(basis.double())) < n_features:
                raise BasisError(f"the {n_features} columns are linearly dependent; leave out what the others span")
            basis = stiefel.polar(basis.double()).to(basis.dtype)
        _check_orthonormal(basis)
        with torch.device("meta"):
            self = cls(SubspaceConfig(d_in=d_in, n_features=n_features))
        self.basis = nn.Parameter(basis.contiguous())  # the layout that a saved and loaded basis has
        return self

    @classmethod
    def from_directions(cls, directions: Float[Tensor, "n d_in"]) -> SubspaceFeaturizer:
        """Build the subspace that directions span, such as probes or differences of means; each row is a direction.

        The directions are scaled to length 1, and the basis is the orthonormal one nearest to them, so feature i
        belongs to direction i.

        Raises:
            BasisError: the directions are linearly dependent.
        """
        if directions.dim() != 2 or directions.shape[0] > directions.shape[1]:
            raise BasisError(
                f"directions are the rows of a matrix (n, d_in) with n <= d_in, got {tuple(directions.shape)}"
            )
        lengths = directions.norm(dim=-1, keepdim=True)
        if not (lengths > 0).all():
            raise BasisError("a direction has length zero; leave it out")
        return cls.from_basis((directions / lengths).mT, orthonormalize=True)

    @classmethod
    def from_svd(cls, matrix: Float[Tensor, "n d_in"], n_features: int) -> SubspaceFeaturizer:
        """Build a subspace from the first right singular vectors of a matrix, such as a weight; it is not centred.

        Raises:
            BasisError: the matrix has a smaller rank than ``n_features``.
        """
        basis, sizes = _singular(matrix.double(), n_features)
        if sizes[-1] <= sizes[0] * 1e-10:
            raise BasisError(
                f"the matrix {tuple(matrix.shape)} has fewer than {n_features} independent directions; ask for fewer"
            )
        return cls.from_basis(basis.to(matrix.dtype))

    @classmethod
    def fit_pca(cls, x: Float[Tensor, "*n d_in"], n_features: int, *, whiten: bool = False) -> Featurizer[Any]:
        """Fit principal components of activations: ``standardize >> subspace``, where the first subtracts the mean.

        Args:
            x: activations; all axes but the last are examples.
            n_features: number of components, largest variance first.
            whiten: divide each coordinate of x by its standard deviation first.

        Raises:
            BasisError: there are fewer independent examples than components.
        """
        from featurizers_subspace.standardize import StandardizeFeaturizer

        rows = x.detach().reshape(-1, x.shape[-1])
        scaler = StandardizeFeaturizer.fit(rows, scale=whiten)
        centred = scaler.encode(rows)
        return scaler >> cls.from_svd(centred, n_features)

    # ------------------------------------------------------------------ the map

    def orthonormal_basis(self) -> Float[Tensor, "d_in n_features"]:
        """Return the orthonormal basis, with a gradient along the manifold.

        If an optimizer has moved the parameter off the manifold, it is put back in place. A tensor that
        `torch.func.functional_call` substitutes for the parameter is not changed.
        """
        w = self.basis
        if type(w) is not nn.Parameter or torch._C._are_functorch_transforms_active():
            return stiefel.polar(w)
        learning = w.requires_grad and torch.is_grad_enabled()
        cached = self._orthonormal
        if cached is None or cached.parameter is not w or cached.state != (w._version, w.data_ptr(), learning):
            stiefel.retract_(w)
            basis = stiefel.tangent(w) if learning else w.detach()
            cached = self._orthonormal = _Cached(w, (w._version, w.data_ptr(), learning), basis)
        return cached.basis

    def featurize(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch n_features"], Error]:
        """Return the coordinates in the subspace, and the part of x outside it as the error."""
        self.check_width(x)
        basis = self.orthonormal_basis()
        x = x.to(basis.dtype)
        with without_autocast(x):
            features = x @ basis
            return features, x - features @ basis.mT

    def inverse_featurize(
        self, features: Float[Tensor, "*batch n_features"], error: Error
    ) -> Float[Tensor, "*batch d_in"]:
        """Return the point with these coordinates, plus the error unless that is None."""
        self.check_features(features)
        basis = self.orthonormal_basis()
        if isinstance(error, tuple):
            raise ShapeError("the error of a subspace is a tensor or None, got a tuple")
        with without_autocast(basis):
            inside = features.to(basis.dtype) @ basis.mT
        return inside if error is None else inside + error

    def encode(self, x: Float[Tensor, "*batch d_in"], columns: Tensor | None = None) -> Float[Tensor, "*batch k"]:
        """Return the coordinates, all or those in ``columns``."""
        self.check_width(x)
        basis = self._columns(columns)
        with without_autocast(basis):
            return x.to(basis.dtype) @ basis

    def apply_edit(
        self,
        base: Float[Tensor, "*batch d_in"],
        features: Float[Tensor, "*batch k"],
        edited: Float[Tensor, "*batch k"],
        columns: Tensor | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``base + Q (edited - features)``; the part outside the subspace does not change."""
        basis = self._columns(columns)
        with without_autocast(basis):
            return (base + (edited - features).to(basis.dtype) @ basis.mT).to(base.dtype)

    def feature_rows(self, columns: Tensor | None = None) -> FeatureRows:
        """See `Featurizer.feature_rows`."""
        rows = self._columns(columns).mT
        return FeatureRows.linear(rows, rows)

    def check(self) -> None:
        """Raise `BasisError` unless the basis is orthonormal to its dtype's precision."""
        _check_orthonormal(self.basis)

    def _columns(self, columns: Tensor | None) -> Tensor:
        basis = self.orthonormal_basis()
        return basis if columns is None else basis[:, columns]

    # ------------------------------------------------------------------ keeping the basis orthonormal

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.basis.is_meta:
            stiefel.retract_(self.basis)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SubspaceFeaturizer:
        self._orthonormal = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the cached basis, which is part of an autograd graph and cannot be copied."""
        return {**self.__dict__, "_orthonormal": None}


def _random_basis(config: SubspaceConfig) -> Tensor:
    if torch.empty(0).is_meta:  # the weights will be loaded
        return torch.empty(config.d_in, config.n_features)
    generator = torch.Generator("cpu").manual_seed(config.seed)
    normal = torch.randn(config.d_in, config.n_features, generator=generator, device="cpu", dtype=torch.float64)
    return stiefel.polar(normal).to(torch.get_default_dtype())


def _check_orthonormal(basis: Tensor) -> None:
    deviation, allowed = stiefel.deviation(basis), stiefel.tolerance(basis.dtype)
    if not deviation <= allowed:
        raise BasisError(
            f"the columns of the basis {tuple(basis.shape)} are not orthonormal: QᵀQ differs from I by "
            f"{deviation:.2g}, more than {allowed:.2g}; use SubspaceFeaturizer.from_basis(basis, orthonormalize=True)"
        )


def _singular(matrix: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """Return the first right singular vectors ``(d, n_features)`` and their singular values."""
    if matrix.dim() != 2 or not 0 < n_features <= min(matrix.shape):
        raise BasisError(f"a matrix {tuple(matrix.shape)} has no {n_features} singular vectors; give more examples")
    _, sizes, rows = torch.linalg.svd(matrix, full_matrices=False)
    return rows[:n_features].mT.contiguous(), sizes[:n_features]


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kind ``subspace``."""
    register(SubspaceFeaturizer)
