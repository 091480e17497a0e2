"""`DictionaryFeaturizer`: sparse autoencoders of every library, in one canonical form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, final

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from featurizers.builtin import sparse
from featurizers.builtin.dictionary_config import DictionaryConfig, Units, validate_rule
from featurizers.builtin.encoder import Encoder
from featurizers.builtin.linear_decoder import LinearDecoderFeaturizer
from featurizers.builtin.normalization import Normalization
from featurizers.builtin.units import convert
from featurizers.errors import ConfigError, FeatureIndexError, LoweringError, ShapeError, UsageError, explain
from featurizers.features.active import Active, SparseFeatures, nonzero, side_by_side
from featurizers.features.feature_space import Numbering
from featurizers.features.indices import Indices, Selection, columns_of, select
from featurizers.features.programs import FeatureRows
from featurizers.features.rules import BUILT_IN, Rule
from featurizers.registry.hookspecs import hookimpl

SMALL = 2**24
"""Multiplications of an encoding, n d_in n_features, below which the dense form is faster than a search for zeros."""


@final
class DictionaryFeaturizer(LinearDecoderFeaturizer[DictionaryConfig]):
    """Autoencoder with one linear encoder, an activation rule and a linear decoder: sparse autoencoders and their kin.

    With n the normalisation of a token's activations and ρ the activation rule (`featurizers.features.rules`),

        z = n(x) - b_dec if pre_bias else n(x)        f = ρ(W_enc z + b_enc)        x̂ = n⁻¹(W_decᵀ f + b_dec) + e

    Lossy by itself, lossless with the error term e; see `LinearDecoderFeaturizer` for the error and for edits.

    ``W_enc`` and ``W_dec`` are ``(n_features, d_in)``: a feature is a row, so that a slice is contiguous on disk. The
    weights have no gradient until ``requires_grad_()`` is called. Cost of an edit of k features, for a rule that acts
    on each alone: O(k d_in) a token; of all features: an encoding of base and source each, and O(m d_in) for the m
    features that fire.

    A slice keeps the numbers that its features have in the whole dictionary. ``indices`` of operations are those
    numbers; the columns of the features follow the buffer ``numbers``.

    Sources: Bricken et al. 2023, "Towards Monosemanticity"; Gao et al. 2024 (arXiv:2406.04093); Rajamanoharan et al.
    2024 (arXiv:2404.16014, arXiv:2407.14435). Normalisations as in SAELens.

    Examples:
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
    b_dec: Tensor
    numbers: Tensor
    """Of a slice: the numbers of its features in the whole dictionary."""

    def __init__(self, config: DictionaryConfig) -> None:
        super().__init__(
            config,
            d_in=config.d_in,
            n_features=config.n_features,
            normalize=config.normalize,
            input_scale=config.input_scale,
            n_heads=config.n_heads,
            special_tokens=config.special_tokens,
        )
        self.rule: Rule = validate_rule(config)
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
        """Build a dictionary from weights. Tensors that already have the stored layout are not copied.

        Args:
            W_enc: encoder, a row for each feature.
            W_dec: decoder, a row for each feature.
            b_enc: bias of the encoder, zero if None.
            b_dec: bias of the decoder, zero if None.
            rule: activation rule.
            rule_options: numbers of the rule.
            pre_bias: see `DictionaryConfig`, as for the next four.
            normalize: see there.
            input_scale: see there.
            n_heads: see there.
            special_tokens: see there.
            numbers: for a slice, the numbers of its features in the whole dictionary.
            slice_of: for a slice, the number of features of the whole dictionary.
            tensors: parameters of the rule, ``(n_features,)`` each, or a number for all features.

        Raises:
            ShapeError: the tensors do not fit each other.
            ConfigError: the rule or an option is not known, or a tensor is missing or unknown.
        """
        if W_enc.dim() != 2 or W_enc.shape != W_dec.shape:
            raise ShapeError(
                f"W_enc and W_dec must both be (n_features, d_in), got {tuple(W_enc.shape)} and {tuple(W_dec.shape)}"
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
        values: dict[str, Tensor | float | None] = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec, **tensors}
        values |= {"b_enc": b_enc} if b_enc is not None or self.rule.encoder_bias else {}
        values |= {"numbers": numbers} if slice_of is not None else {}
        expected = self.state_dict()
        if unknown := sorted(values.keys() ^ expected.keys()):
            raise ConfigError(
                f"the rule {rule!r} has the tensors {sorted(expected)!r}; missing or unknown: {unknown!r}"
            )
        state = {}
        for name, tensor in expected.items():
            value = values[name]
            if not isinstance(value, Tensor):
                value = W_enc.new_zeros(()) if value is None else W_enc.new_tensor(value)
            if value.shape != tensor.shape and (value.dim() or tensor.dim() != 1):
                raise ShapeError(f"{name} has shape {tuple(value.shape)}, it must be {tuple(tensor.shape)}")
            if value.is_floating_point() != tensor.is_floating_point():
                raise ConfigError(f"{name} is {value.dtype}, it must be a dtype such as {tensor.dtype}")
            state[name] = value.detach().expand(tensor.shape).contiguous()
        self.load_state_dict(state, assign=True)
        self.check()
        return self

    # ------------------------------------------------------------------ the map
    @property
    def encoder_dtype(self) -> torch.dtype:
        """Dtype of ``W_enc``."""
        return self.W_enc.dtype

    def encode_normalized(
        self, normal: Float[Tensor, "*batch d_in"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch k"]:
        """Return features of normalised activations: all, or those in ``columns``."""
        raw = self._encoder().features(normal, columns)
        return raw * self._scale(columns) if self.config.units == "decoder-norm" else raw

    def decode(self, features: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch d_in"]:
        """Return ``W_decᵀ f + b_dec``, before the normalisation is undone."""
        return self.decode_change(features) + self.b_dec

    def decode_change(
        self, change: Float[Tensor, "*batch k"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``W_decᵀ f``; with mostly zero features and no gradient, only rows of the others are read."""
        if columns is not None:
            return self._raw(change, columns) @ self.W_dec[columns]
        features = self._raw(change, None).to(self.W_dec.dtype)
        differentiable = torch.is_grad_enabled() and (features.requires_grad or self.W_dec.requires_grad)
        if not differentiable and not torch._C._are_functorch_transforms_active():
            rows = features.reshape(-1, self.n_features)
            few = rows.numel() * self.d_in >= SMALL and int(rows.count_nonzero()) <= sparse.DENSE * rows.numel()
            if few:
                decoded = sparse.times_rows(nonzero(rows), self.W_dec, len(rows))
                return decoded.reshape(*features.shape[:-1], self.d_in)
        return features @ self.W_dec

    def encode_active(self, x: Float[Tensor, "*batch d_in"]) -> Active:
        """See `Featurizer.encode_active`; the gradient reaches x, and not the weights."""
        return self._active(self.flatten(x)).nonzero()

    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> SparseFeatures:
        """See `Featurizer.encode_sparse`; a rule that selects k features gives k. The gradient reaches x alone."""
        x = self.flatten(x)
        return side_by_side(self._active(x), x.shape[:-1])

    def _active(self, x: Float[Tensor, "*batch d_in"]) -> Active:
        """Return the features that fire, and those of value 0 that the rule selects."""
        normal, _ = self._normalize(x.to(self.W_enc.dtype))
        rows = normal.reshape(-1, self.d_in)
        active = self._encoder().active(rows, share=1.0) if self.rule.separable else None
        if active is None:
            return nonzero(self.encode_normalized(rows))
        if self.config.units == "decoder-norm":
            return active._replace(values=active.values * self._scale(active.columns))
        return active

    def decode_sparse(self, features: SparseFeatures) -> Float[Tensor, "*batch d_in"]:
        """Return `decode` of features in the form of `encode_sparse`, in O(k d_in) a token."""
        values = self._raw(features.values, features.indices)
        return sparse.times_rows_of_each(values, features.indices, self.W_dec) + self.b_dec

    def blend(
        self,
        base: Float[Tensor, "*batch d_in"],
        source: Float[Tensor, "*#batch d_in"],
        gate: Tensor | None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Move the features of ``base`` towards those of ``source``; only features that fire in either are decoded."""
        if not self._can_skip_zeros() or base.numel() * self.n_features < SMALL:
            return super().blend(base, source, gate)
        flat, other = (self.flatten(t).to(self.W_enc.dtype) for t in (base, source))
        other = other.expand_as(flat)
        n, f, encoder = flat.shape[:-1].numel(), self.n_features, self._encoder()
        active = [encoder.active(self._normalize(t)[0].reshape(n, self.d_in)) for t in (flat, other)]
        if active[0] is None or active[1] is None:
            return super().blend(base, source, gate)
        rows, columns, before, target = sparse.union(active[0], active[1], f)
        if gate is None:
            after = target
        else:
            gates = gate[columns] if gate.dim() == 1 else gate.expand(*flat.shape[:-1], f).reshape(n, f)[rows, columns]
            after = (
                torch.where(gates, target, before)
                if gate.dtype == torch.bool
                else before.lerp(target, gates.to(before.dtype))
            )
        change = sparse.times_rows(Active(rows, columns, after - before), self.W_dec, n)
        return self._add(base, change.reshape(flat.shape))

    def feature_rows(self, columns: Tensor | None = None) -> FeatureRows:
        """See `Featurizer.feature_rows`; a rule that compares all features gives rows that can only be added to.

        Raises:
            LoweringError: the normalisation depends on the token.
        """
        if self._normalization in ("layer-norm", "constant-norm"):
            how = f"{self.id!r} normalises each token by its own {self._normalization}"
            raise LoweringError(f"{how}, so that an edit of its features has no fixed form")
        encoder = self._encoder()
        where = slice(None) if columns is None else columns
        read, write = encoder.weight[where] * self._input_scale, self.W_dec[where] / self._input_scale
        bias = read.new_zeros(len(read)) if encoder.bias is None else encoder.bias[where]
        if encoder.centre is not None:
            bias = bias - encoder.weight[where] @ encoder.centre
        gate_of = self.rule.gate
        gate = None if gate_of is None else gate_of(bias, **{n: t[where] for n, t in encoder.tensors.items()})
        if self.config.units == "decoder-norm":
            norm = self._scale(columns)
            gate, write = gate and gate.scaled(norm), write / norm[:, None]
        return FeatureRows(read, bias, gate, write)

    # ------------------------------------------------------------------ slices and units
    def take(self, indices: Sequence[int] | Tensor) -> DictionaryFeaturizer:
        """Return the dictionary of these features alone, in the order given; they keep their numbers.

        Raises:
            UsageError: the rule compares all features of a token.
            FeatureIndexError: this dictionary lacks one of the features.
        """
        columns = self.select(indices, self.W_enc[:1]).as_columns()
        if columns is None:
            raise FeatureIndexError("take needs a list of features, the same for every example")
        config, rows, added = self.sliced(self.config, columns, self._numbers()[columns])
        part = type(self)(config)
        state = {name: tensor[columns] if name in rows else tensor for name, tensor in self.state_dict().items()}
        part.load_state_dict({**state, **added}, assign=True)
        return _as_described(part, self)

    @classmethod
    def sliced(
        cls, config: DictionaryConfig, columns: Tensor, numbers: Tensor | None = None
    ) -> tuple[DictionaryConfig, set[str], dict[str, Tensor]]:
        """See `Featurizer.sliced`; ``numbers`` are those of the features, if ``config`` is of a slice already."""
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
        """Check ``indices``, which are numbers of features in the whole dictionary, and turn them into columns."""
        if self.config.slice_of is not None and not isinstance(indices, Selection):
            indices = columns_of(indices, self._numbers(), self.config.slice_of)
        return select(indices, self.n_features, x.device)

    def numbering(self) -> Mapping[str | None, Numbering]:
        """See `FeatureSpace.numbering`."""
        if self.config.slice_of is None:
            return super().numbering()
        return {None: Numbering(self._numbers().tolist(), self.config.slice_of)}

    def _numbers(self) -> Int[Tensor, " n_features"]:
        """Return the numbers of the features in the whole dictionary."""
        if self.config.slice_of is not None:
            return self.get_buffer("numbers")
        return torch.arange(self.n_features, device=self.W_enc.device)

    def in_units(self, units: Units) -> DictionaryFeaturizer:
        """Return the same dictionary with its features in other units; x̂ is the same, to rounding.

        Args:
            units: as in `DictionaryConfig`.

        Raises:
            UsageError: the rule would select other features in these units (``folded`` of topk and its kin), or a
                decoder row is zero.
        """
        if units not in ("raw", "decoder-norm", "folded"):
            raise UsageError(f"units must be 'raw', 'decoder-norm' or 'folded', not {units!r}")
        state = convert(self.state_dict(), self.rule, self.config.units, units)
        converted = type(self)(self.config.model_copy(update={"units": units}))
        converted.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        return _as_described(converted, self)

    def check(self) -> None:
        """Raise `ConfigError` if a norm of the units is not positive, or a number of a slice is invalid."""
        if self.config.units != "raw" and not (self.get_buffer("decoder_norm") > 0).all():
            raise ConfigError("decoder_norm is not positive")
        if (whole := self.config.slice_of) is not None:
            numbers = self.get_buffer("numbers")
            if int(numbers.min()) < 0 or int(numbers.max()) >= whole or len(set(numbers.tolist())) != len(numbers):
                raise ConfigError(f"the numbers of the features must be distinct and below {whole}")

    # ------------------------------------------------------------------ pickling
    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the rule, whose name is in the config."""
        return {name: value for name, value in self.__dict__.items() if name != "rule"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, and look up the rule among the installed plugins."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.rule = validate_rule(self.config)

    # ------------------------------------------------------------------ helpers
    def _encoder(self) -> Encoder:
        bias = self.get_parameter("b_enc") if self.rule.encoder_bias else None
        tensors = {name: self.get_parameter(name) for name in self.rule.tensors}
        centre = self.b_dec if self.config.pre_bias else None
        return Encoder(self.W_enc, bias, centre, self.rule, tensors, self.config.rule_options)

    def _scale(self, columns: Tensor | None) -> Tensor:
        norm = self.get_buffer("decoder_norm")
        return norm if columns is None else norm[columns]

    def _raw(self, features: Tensor, columns: Tensor | None) -> Tensor:
        """Return features in raw units, which ``W_dec`` decodes."""
        return features / self._scale(columns) if self.config.units == "decoder-norm" else features

    def _can_skip_zeros(self) -> bool:
        """Return True if zero features need no arithmetic: neither the rule nor the weights need a gradient there."""
        frozen = not (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()))
        return self.rule.sparse and self.rule.separable and frozen and not torch._C._are_functorch_transforms_active()


def _as_described(part: DictionaryFeaturizer, whole: DictionaryFeaturizer) -> DictionaryFeaturizer:
    """Return ``part`` with the description and the site of ``whole``."""
    part.site = whole.site
    return part.described_as(whole)


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kind ``dictionary``."""
    register(DictionaryFeaturizer)


@hookimpl
def featurizers_rules(register: Any) -> None:
    """Register the activation rules of the core."""
    for rule in BUILT_IN:
        register(rule)
