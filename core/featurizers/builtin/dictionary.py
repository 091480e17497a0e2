"""`DictionaryFeaturizer`: sparse autoencoders of every make, in one canonical form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, final

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from featurizers.builtin import sparse
from featurizers.builtin.dictionary_config import DictionaryConfig, Units, validate_rule
from featurizers.builtin.normalization import Normalization, denormalize, normalize
from featurizers.builtin.sparse import Active, SparseFeatures
from featurizers.builtin.units import convert
from featurizers.errors import ConfigError, FeatureIndexError, ShapeError, UsageError, explain
from featurizers.features.derivatives import Error
from featurizers.features.featurizer import Featurizer
from featurizers.features.indices import Indices, Selection, positions_of, select
from featurizers.features.rules import BUILT_IN
from featurizers.registry.hookspecs import hookimpl

SMALL = 2**24
"""Multiplications of an encoding, n d_in n_features, below which looking for the zeros costs more than they do."""

CHUNK = 4096
"""Features encoded at a time where only those that fire are kept: their pre-activations stay in the cache."""


@final
class DictionaryFeaturizer(Featurizer[DictionaryConfig]):
    """An autoencoder with one linear encoder and a linear decoder: sparse autoencoders and their kin.

    With n the normalisation of a token's activations and ρ the activation rule (`featurizers.features.rules`),

        z = n(x) - b_dec if pre_bias else n(x)        f = ρ(W_enc z + b_enc)        x̂ = n⁻¹(W_decᵀ f + b_dec) + e

    Lossy by itself, lossless with the error term e. The error is e alone or, where n depends on the token, the tuple
    of e and its statistics: mean and standard deviation (``layer-norm``), the factor (``constant-norm``).
    An edit decodes the difference of the features only, in the statistics of the base.

    ``W_enc`` and ``W_dec`` are ``(n_features, d_in)``: a feature is a row, so that a slice is contiguous on disk. The
    weights are not trained unless ``requires_grad_()`` says so. Cost of an edit of k features, where the rule acts on
    each alone: O(k d_in) a token; of all of them: one encoding of base and source each, and O(m d_in) for the m that
    fire.

    Sources: Bricken et al. 2023, "Towards Monosemanticity"; Gao et al. 2024 (arXiv:2406.04093); Rajamanoharan et al.
    2024 (arXiv:2404.16014, arXiv:2407.14435). Normalisations as in SAELens.

    A slice keeps the numbers that its features have in the whole dictionary: ``indices`` of operations are those
    numbers, and columns of features follow ``numbers``.

    Example:
        >>> import torch, featurizers
        >>> f = featurizers.DictionaryFeaturizer.from_tensors(torch.eye(4, 3), torch.eye(4, 3))
        >>> f.encode(torch.tensor([[1.0, -1.0, 2.0]]))
        tensor([[1., 0., 2., 0.]])
        >>> f.encode_sparse(torch.tensor([[1.0, -1.0, 2.0]])).indices
        tensor([[0, 2]])
    """

    kind: ClassVar[str] = "dictionary"
    Config: ClassVar[type[BaseModel]] = DictionaryConfig

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    d_in: int
    n_features: int

    def __init__(self, config: DictionaryConfig) -> None:
        super().__init__(config)
        self.rule = validate_rule(config)
        self.d_in, self.n_features = config.d_in, config.n_features
        self.special_tokens = tuple(config.special_tokens)
        f, d = config.n_features, config.d_in
        shapes = {
            "W_enc": (f, d),
            **({"b_enc": (f,)} if self.rule.encoder_bias else {}),
            "W_dec": (f, d),
            "b_dec": (d,),
        }
        for name, shape in {**shapes, **dict.fromkeys(self.rule.tensors, (f,))}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
        if config.units != "raw":
            self.register_buffer("decoder_norm", torch.ones(f))
        if config.slice_of is not None:
            self.register_buffer("numbers", torch.arange(f))

    @classmethod
    def from_tensors(
        cls,
        W_enc: Float[Tensor, "n_features d_in"],
        W_dec: Float[Tensor, "n_features d_in"],
        b_enc: Float[Tensor, " n_features"] | None = None,
        b_dec: Float[Tensor, " d_in"] | None = None,
        *,
        rule: str = "relu",
        rule_options: Mapping[str, int | float] | None = None,
        pre_bias: bool = False,
        normalize: Normalization = "none",
        input_scale: float = 1.0,
        n_heads: int | None = None,
        special_tokens: Sequence[int] = (),
        numbers: Tensor | None = None,
        slice_of: int | None = None,
        **tensors: Tensor | float,
    ) -> Self:
        """The dictionary of these weights, which it goes on sharing where their layout is its own.

        Args:
            W_enc: encoder, a feature a row.
            W_dec: decoder, a feature a row.
            b_enc: bias of the encoder, zero if None.
            b_dec: bias of the decoder, zero if None.
            rule: activation rule.
            rule_options: its numbers.
            pre_bias: as in `DictionaryConfig`, like the next four.
            normalize: as there.
            input_scale: as there.
            n_heads: as there.
            special_tokens: as there.
            numbers: of the features, for a slice.
            slice_of: how many features the whole dictionary has, for a slice.
            tensors: those of the rule, ``(n_features,)``, or one number for all.

        Raises:
            ShapeError: the tensors do not fit each other.
            ConfigError: the rule or an option is not known.
        """
        if W_enc.dim() != 2 or W_enc.shape != W_dec.shape:
            raise ShapeError(
                f"W_enc and W_dec are (n_features, d_in) both, got {tuple(W_enc.shape)} and {tuple(W_dec.shape)}"
            )
        f, d = W_enc.shape
        try:
            config = DictionaryConfig(
                d_in=d,
                n_features=f,
                rule=rule,
                rule_options=dict(rule_options or {}),
                pre_bias=pre_bias,
                normalize=normalize,
                input_scale=input_scale,
                n_heads=n_heads,
                special_tokens=list(special_tokens),
                slice_of=slice_of,
            )
        except ValidationError as error:
            raise ConfigError(f"dictionary: {explain(error)}") from error
        with torch.device("meta"):
            self = cls(config)
        given: dict[str, Tensor | float | None] = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec, **tensors}
        given |= {"b_enc": b_enc} if b_enc is not None or self.rule.encoder_bias else {}
        given |= {"numbers": numbers} if slice_of is not None else {}
        expected = self.state_dict()
        if unknown := sorted(given.keys() ^ expected.keys()):
            raise ConfigError(
                f"the rule {rule!r} has the tensors {sorted(expected)!r}; missing or unknown: {unknown!r}"
            )
        state = {}
        for name, tensor in expected.items():
            value = given[name]
            if not isinstance(value, Tensor):
                value = W_enc.new_zeros(()) if value is None else W_enc.new_tensor(value)
            if value.shape != tensor.shape and (value.dim() or tensor.dim() != 1):
                raise ShapeError(f"{name} has shape {tuple(value.shape)}, it must be {tuple(tensor.shape)}")
            if value.is_floating_point() != tensor.is_floating_point():
                raise ConfigError(f"{name} is {value.dtype}, it must be one such as {tensor.dtype}")
            state[name] = value.detach().expand(tensor.shape).contiguous()
        self.load_state_dict(state, assign=True)
        self.check()
        return self

    # ------------------------------------------------------------------ the map
    def featurize(self, x: Float[Tensor, "..."]) -> tuple[Float[Tensor, "... n_features"], Error]:
        """Features, and the error with the normalisation's statistics; x is ``(*batch, d_in)``, or has heads apart."""
        flat = self.flatten(x).to(self.W_enc.dtype)
        normal, statistics = self._normalize(flat)
        features = self._encode(normal)
        error = (flat - self._reconstruct(features, statistics)).reshape(x.shape)
        return features, (error, *statistics) if statistics else error

    def inverse_featurize(self, features: Float[Tensor, "... n_features"], error: Error) -> Float[Tensor, "..."]:
        """The decoded features, and the error."""
        residual, *statistics = error if isinstance(error, tuple) else (error,)
        if not isinstance(residual, Tensor):
            raise UsageError("inverse_featurize needs the error that featurize gave")
        return self._reconstruct(features, tuple(statistics)).reshape(residual.shape) + residual

    def encode(self, x: Float[Tensor, "..."], columns: Tensor | None = None) -> Float[Tensor, "... k"]:
        """Features, all or some: a rule that acts on each alone needs the rows of those only."""
        normal, _ = self._normalize(self.flatten(x).to(self.W_enc.dtype))
        if columns is None or self.rule.elementwise:
            return self._encode(normal, columns)
        return self._encode(normal)[..., columns]

    def decode(self, features: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch d_in"]:
        """``W_decᵀ f + b_dec``, before the normalisation is undone."""
        return self._times_decoder(features) + self.b_dec

    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> SparseFeatures:
        """The features that fire, as values and indices ``(*batch, k)``; k is that of the token with the most.

        The indices are columns. The gradient reaches x, and not the weights.
        """
        x = self.flatten(x).to(self.W_enc.dtype)
        normal, _ = self._normalize(x)
        rows = normal.reshape(-1, self.d_in)
        active = self._active(rows, share=1.0) if self._has_coordinates() else None
        if active is None:
            active = sparse.nonzero(self._encode(rows))
        elif self.config.units == "decoder-norm":
            active = active._replace(values=active.values * self._scale(active.columns))
        values, indices = active.padded(len(rows))
        shape = (*x.shape[:-1], values.shape[-1])
        return SparseFeatures(values.reshape(shape), indices.reshape(shape))

    def decode_sparse(self, features: SparseFeatures) -> Float[Tensor, "*batch d_in"]:
        """The same as `decode`, of features as `encode_sparse` gives them, in O(k d_in) a token."""
        values = self._raw(features.values, features.indices)
        return sparse.times_rows_of_each(values, features.indices, self.W_dec) + self.b_dec

    # ------------------------------------------------------------------ edits
    def apply_edit(
        self,
        base: Float[Tensor, "*batch d_in"],
        features: Float[Tensor, "*batch k"],
        edited: Float[Tensor, "*batch k"],
        columns: Tensor | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """``base`` and the decoded difference of the features: what does not change is not decoded."""
        change = (edited - features).to(self.W_dec.dtype)
        decoded = self._times_decoder(change) if columns is None else self._raw(change, columns) @ self.W_dec[columns]
        return self._add(base, decoded)

    def blend(
        self,
        base: Float[Tensor, "*batch d_in"],
        source: Float[Tensor, "*#batch d_in"],
        gate: Tensor | None,
    ) -> Float[Tensor, "*batch d_in"]:
        """``base`` moved towards the features of ``source``: only what fires in either is decoded."""
        if not self._can_skip_zeros() or base.numel() * self.n_features < SMALL:
            return super().blend(base, source, gate)
        flat, other = (self.flatten(t).to(self.W_enc.dtype) for t in (base, source))
        other = other.expand_as(flat)
        n, f = flat.shape[:-1].numel(), self.n_features
        active = [self._active(self._normalize(t)[0].reshape(n, self.d_in)) for t in (flat, other)]
        if active[0] is None or active[1] is None:
            return super().blend(base, source, gate)
        rows, columns, before, target = sparse.union(active[0], active[1], f)
        if gate is None:
            after = target
        else:
            chosen = gate[columns] if gate.dim() == 1 else gate.expand(*flat.shape[:-1], f).reshape(n, f)[rows, columns]
            after = (
                torch.where(chosen, target, before)
                if gate.dtype == torch.bool
                else before.lerp(target, chosen.to(before.dtype))
            )
        change = sparse.times_rows(Active(rows, columns, after - before), self.W_dec, n)
        return self._add(base, change.reshape(flat.shape))

    def _add(self, base: Tensor, change: Tensor) -> Tensor:
        """``base`` and a change of what is decoded, in the statistics of the base."""
        _, statistics = self._normalize(base.to(self.W_dec.dtype))
        change = denormalize(change, self.config.normalize, self.config.input_scale, statistics, offset=False)
        return (base + change).to(base.dtype)  # of two dtypes the wider: no bit of the base is lost

    # ------------------------------------------------------------------ slices and units
    def take(self, indices: Sequence[int] | Tensor) -> DictionaryFeaturizer:
        """The dictionary of these features alone, in the order given; they keep their numbers.

        Raises:
            UsageError: the rule needs all features of a token.
            FeatureIndexError: a feature that this dictionary does not have.
        """
        columns = self.select(indices, self.W_enc[:1]).as_columns()
        if columns is None:
            raise FeatureIndexError("take needs a list of features")
        config, rows, added = self.sliced(self.config, columns, self._numbers()[columns])
        part = type(self)(config)
        state = {name: tensor[columns] if name in rows else tensor for name, tensor in self.state_dict().items()}
        part.load_state_dict({**state, **added}, assign=True)
        return part._described_as(self)

    @classmethod
    def sliced(
        cls, config: DictionaryConfig, columns: Tensor, numbers: Tensor | None = None
    ) -> tuple[DictionaryConfig, set[str], dict[str, Tensor]]:
        """See `Featurizer.sliced`."""
        rule = validate_rule(config)
        if not rule.elementwise:
            raise UsageError(
                f"the rule {config.rule!r} compares all features of a token, so that a part of the dictionary gives "
                "other features; load it whole, and give the indices to the operation"
            )
        if config.slice_of is not None and numbers is None:
            raise UsageError("it is a slice of a dictionary already; load it whole and call take()")
        part = config.model_copy(update={"n_features": len(columns), "slice_of": config.slice_of or config.n_features})
        rows = {"W_enc", "b_enc", "W_dec", "decoder_norm", "numbers", *rule.tensors}
        return part, rows, {"numbers": columns if numbers is None else numbers}

    def select(self, indices: Indices, x: Tensor) -> Selection:
        """The columns of the features with these numbers."""
        if self.config.slice_of is not None and not isinstance(indices, Selection):
            indices = positions_of(indices, self._numbers(), self.config.slice_of)
        return select(indices, self.n_features, x.device)

    def _numbers(self) -> Int[Tensor, " n_features"]:
        """What the features are called: their numbers in the whole dictionary."""
        if self.config.slice_of is not None:
            return self.get_buffer("numbers")
        return torch.arange(self.n_features, device=self.W_enc.device)

    def in_units(self, units: Units) -> DictionaryFeaturizer:
        """The same dictionary with its features in other units; x̂ is the same, to rounding.

        Args:
            units: as in `DictionaryConfig`.

        Raises:
            UsageError: the rule's selection would change with the units (``folded`` of topk and its kin), or a decoder
                row is zero.
        """
        if units not in ("raw", "decoder-norm", "folded"):
            raise UsageError(f"units are 'raw', 'decoder-norm' or 'folded', not {units!r}")
        state = convert(self.state_dict(), self.rule, self.config.units, units)
        converted = type(self)(self.config.model_copy(update={"units": units}))
        converted.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        return converted._described_as(self)

    def _described_as(self, other: DictionaryFeaturizer) -> Self:
        self.id, self.site, self.revision, self.metadata = other.id, other.site, other.revision, dict(other.metadata)
        self.feature_sets = dict(other.feature_sets)  # of numbers, which a slice keeps, or masks of the whole
        return self.eval()

    def check(self) -> None:
        """Raise `ConfigError` unless the norms of the units are positive and the numbers of a slice exist."""
        if self.config.units != "raw" and not (self.get_buffer("decoder_norm") > 0).all():
            raise ConfigError("decoder_norm is not positive")
        if (whole := self.config.slice_of) is not None:
            numbers = self.get_buffer("numbers")
            if int(numbers.min()) < 0 or int(numbers.max()) >= whole or len(set(numbers.tolist())) != len(numbers):
                raise ConfigError(f"the numbers of the features are not different ones below {whole}")

    # ------------------------------------------------------------------ arithmetic
    def flatten(self, x: Tensor) -> Tensor:
        """Heads side by side, where there are heads."""
        heads = self.config.n_heads
        apart = x.dim() > 1 and x.shape[-1] != self.d_in and x.shape[-2:].numel() == self.d_in
        if heads is not None and apart and heads in (0, x.shape[-2]):
            x = x.flatten(-2)
        self.check_width(x)
        return x

    def _normalize(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return normalize(x, self.config.normalize, self.config.input_scale)

    def _reconstruct(self, features: Tensor, statistics: tuple[Any, ...]) -> Tensor:
        return denormalize(self.decode(features), self.config.normalize, self.config.input_scale, statistics)

    def _tensors(self, columns: Tensor | slice | None = None) -> dict[str, Tensor]:
        where = slice(None) if columns is None else columns
        return {name: self.get_parameter(name)[where] for name in self.rule.tensors}

    def _pre(self, normal: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        """Pre-activations of normalised activations."""
        where = slice(None) if columns is None else columns
        bias = self.get_parameter("b_enc")[where] if self.rule.encoder_bias else None
        return nn.functional.linear(self._centred(normal), self.W_enc[where], bias)

    def _centred(self, normal: Tensor) -> Tensor:
        return normal - self.b_dec if self.config.pre_bias else normal

    def _encode(self, normal: Tensor, columns: Tensor | None = None) -> Tensor:
        raw = self.rule(self._pre(normal, columns), self._tensors(columns), self.config.rule_options)
        return raw * self._scale(columns) if self.config.units == "decoder-norm" else raw

    def _scale(self, columns: Tensor | None) -> Tensor:
        norm = self.get_buffer("decoder_norm")
        return norm if columns is None else norm[columns]

    def _raw(self, features: Tensor, columns: Tensor | None) -> Tensor:
        """Features in the units that ``W_dec`` takes."""
        return features / self._scale(columns) if self.config.units == "decoder-norm" else features

    def _times_decoder(self, features: Tensor) -> Tensor:
        """``W_decᵀ f``: by the rows of the features that are not zero, where these are few and no gradient is asked."""
        features = self._raw(features, None).to(self.W_dec.dtype)
        differentiable = torch.is_grad_enabled() and (features.requires_grad or self.W_dec.requires_grad)
        if not differentiable and not torch._C._are_functorch_transforms_active():
            rows = features.reshape(-1, self.n_features)
            few = rows.numel() * self.d_in >= SMALL and int(rows.count_nonzero()) <= sparse.DENSE * rows.numel()
            if few:
                change = sparse.times_rows(sparse.nonzero(rows), self.W_dec, len(rows))
                return change.reshape(*features.shape[:-1], self.d_in)
        return features @ self.W_dec

    def _can_skip_zeros(self) -> bool:
        """Whether features that are zero need no arithmetic: neither the rule nor the weights want their gradient."""
        frozen = not (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()))
        return (
            self.rule.sparse and self._has_coordinates() and frozen and not torch._C._are_functorch_transforms_active()
        )

    def _has_coordinates(self) -> bool:
        """Whether a feature follows from its own pre-activation, once it is known which may fire."""
        return self.rule.elementwise or self.rule.select is not None

    def _active(self, normal: Float[Tensor, "n d_in"], share: float = sparse.DENSE) -> Active | None:
        """Raw features of n tokens that fire, or None if they are more than a share of all.

        The gradient reaches ``normal``, and not the weights.
        """
        n, f = len(normal), self.n_features
        z = self._centred(normal)
        with torch.no_grad():
            if self.rule.select is not None:
                pre = self._pre(normal)
                chosen = self.rule.select(pre, **self.config.rule_options)
                if chosen.numel() > share * n * f:
                    return None
                rows = torch.arange(n, device=z.device).repeat_interleave(chosen.shape[-1])
                columns, values = chosen.reshape(-1), pre.gather(-1, chosen).reshape(-1)
            else:
                found, count = [], 0
                step = CHUNK if z.device.type == "cpu" else f
                for start in range(0, f, step):
                    part = slice(start, start + step)
                    pre = self._pre(normal, part)
                    fired = self.rule(pre, self._tensors(part), self.config.rule_options)
                    rows, columns = fired.nonzero(as_tuple=True)
                    count += len(rows)
                    if count > share * n * min(start + step, f):
                        return None
                    found.append((rows, columns + start, pre[rows, columns]))
                rows, columns, values = map(torch.cat, zip(*found, strict=True))
                order = rows.argsort(stable=True)
                rows, columns, values = rows[order], columns[order], values[order]
        values = sparse.pre_activations(z, values, rows, columns, self.W_enc)
        options = {} if self.rule.select is not None else self.config.rule_options
        return Active(rows, columns, self.rule.function(values, **self._tensors(columns), **options))


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kind ``dictionary``."""
    register(DictionaryFeaturizer)


@hookimpl
def featurizers_rules(register: Any) -> None:
    """Register the activation rules of the core."""
    for rule in BUILT_IN:
        register(rule)
