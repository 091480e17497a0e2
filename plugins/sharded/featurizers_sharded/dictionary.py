"""`ShardedDictionary`: a dictionary whose features are divided over the processes of a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

import torch
from featurizers import DictionaryFeaturizer
from featurizers.builtin import DENSE, LinearDecoderFeaturizer, times_rows, times_rows_of_each
from featurizers.errors import ConfigError, FeatureIndexError, LoweringError
from featurizers.features import Active, FeatureRows, Rule, SparseFeatures, nonzero, without_autocast
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional

from featurizers_sharded.collectives import spread, total
from featurizers_sharded.divided import FETCHED
from featurizers_sharded.ranks import Ranks, reported
from featurizers_sharded.saving import SavedTogether, Saver
from featurizers_sharded.share import Share


@final
@reported(
    *("featurize", "inverse_featurize", "reconstruct", "encode", "encode_active", "encode_sparse", "decode"),
    *("decode_change", "decode_sparse", "blend", "apply_edit", "feature_rows", "take"),
    *("interchange", "mask", "collect", "steer", "ablate", "splice", "saving"),
)
class ShardedDictionary(SavedTogether, LinearDecoderFeaturizer[Any]):
    """Dictionary whose features are divided over the processes of a mesh; `featurizers.load` with ``mesh=`` makes it.

    It is the `DictionaryFeaturizer` of the same config, and `DictionaryFeaturizer` has the formulas. Each process holds
    the rows of its features. All processes call the same methods in the same order with the same tensors, and all get
    what the whole dictionary gives: numbers of features are those of the whole. Gradients are those of a loss that all
    processes compute, not of a sum of their losses.

    Cost of a token, with r processes: encoding and decoding divided by r; of the network, d_in numbers for a decoding,
    2 r k for a selection of k, n_features for features that are not sparse. Memory is n_features / r rows, and what the
    features themselves take: ``encode`` of all features gives all of them to each process, ``encode_sparse`` those that
    fire. An operation on up to `FETCHED` features fetches their rows, and then has the bits of the whole dictionary.

    Attributes:
        ranks: the processes.
        divided: how the features are divided.
        saver: saves it.
        share: the weights that this process holds.
    """

    kind: ClassVar[str] = "dictionary"
    Config: ClassVar[type[BaseModel]] = DictionaryFeaturizer.Config

    def __init__(self, whole: DictionaryFeaturizer, ranks: Ranks) -> None:
        config = whole.config
        super().__init__(
            config,
            d_in=config.d_in,
            n_features=config.n_features,
            normalize=config.normalize,
            input_scale=config.input_scale,
            n_heads=config.n_heads,
            special_tokens=config.special_tokens,
        )
        self.ranks, self.share = ranks, Share(whole, ranks)
        self.divided = self.share.divided
        self.saver = Saver(self.share, dict.fromkeys(self.share.rows(), self.divided.sizes), ranks)

    def __getattr__(self, name: str) -> Any:
        """Say where the weights are, if one is asked for."""
        share = self.__dict__.get("_modules", {}).get("share")
        if share is not None and share.tensor(name) is not None:
            raise AttributeError(f"each rank of the mesh holds some rows of {name!r}: see share.{name}, or take()")
        return super().__getattr__(name)

    @property
    def rule(self) -> Rule:
        """Activation rule."""
        return self.divided.rule

    def rows(self) -> dict[str, slice]:
        """Return which rows of each tensor of the dictionary are here; b_dec, which has none, is left out."""
        return self.share.rows()

    # ------------------------------------------------------------------ the map
    @property
    def encoder_dtype(self) -> torch.dtype:
        """Dtype of ``W_enc``."""
        return self.share.W_enc.dtype

    @property
    def decoder_dtype(self) -> torch.dtype:
        """Dtype of ``W_dec``."""
        return self.share.W_dec.dtype

    def encode_normalized(
        self, normal: Float[Tensor, "*batch d_in"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch k"]:
        """Return features of normalised activations: all, or those in ``columns``."""
        with self.ranks.together("encode", normal, columns, self.share.trains()):
            if columns is not None and self.rule.elementwise and len(columns) <= FETCHED:
                return self._encode_fetched(normal, columns)
            own = self._scaled(self._own(normal))
            return self.divided.every(own) if columns is None else self.divided.some(own, columns)

    def decode(self, features: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch d_in"]:
        """Return ``W_decᵀ f + b_dec``, before the normalisation is undone."""
        return self.decode_change(features) + self.share.b_dec

    def decode_change(
        self, change: Float[Tensor, "*batch k"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``W_decᵀ f`` of all features, or of those in ``columns``."""
        if columns is None:
            self.check_features(change)
        with self.ranks.together("decode", change, columns, self.share.trains()):
            if columns is None:
                return total(self._decode_own(self.divided.own(change)), self.ranks)
            if len(columns) <= FETCHED:
                norm = self._fetched("decoder_norm", columns) if self._has_norms else None
                raw = change if norm is None else change / norm
                weight = self._fetched("W_dec", columns)
                return raw.to(weight.dtype) @ weight
            here, rows = self.divided.here(columns)
            own = spread(change, self.ranks)[..., here]
            raw = own / self.share.get_buffer("decoder_norm")[rows[here]] if self._has_norms else own
            return total(raw.to(self.decoder_dtype) @ self.share.W_dec[rows[here]], self.ranks)

    def encode_active(self, x: Float[Tensor, "*batch d_in"]) -> Active:
        """See `Featurizer.encode_active`; all processes get the features of all."""
        return self._active(self.flatten(x)).nonzero()

    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> SparseFeatures:
        """See `Featurizer.encode_sparse`; a rule that selects k features gives k."""
        x = self.flatten(x)
        values, indices = self._active(x).padded(x.shape[:-1].numel())
        shape = (*x.shape[:-1], values.shape[-1])
        return SparseFeatures(values.reshape(shape), indices.reshape(shape))

    def decode_sparse(self, features: SparseFeatures) -> Float[Tensor, "*batch d_in"]:
        """Return `decode` of features in the form of `encode_sparse`; the gradient reaches them alone."""
        with self.ranks.together("decode_sparse", features.values, features.indices):
            here, rows = self.divided.here(features.indices)
            values = torch.where(here, spread(features.values, self.ranks), 0)
            if self._has_norms:
                values = values / self.share.get_buffer("decoder_norm")[rows]
            return total(times_rows_of_each(values, rows, self.share.W_dec), self.ranks) + self.share.b_dec

    def blend(
        self, base: Float[Tensor, "*batch d_in"], source: Float[Tensor, "*#batch d_in"], gate: Tensor | None
    ) -> Float[Tensor, "*batch d_in"]:
        """Move the features of ``base`` towards those of ``source``; no process sees the features of another."""
        flat, other = (self.flatten(t).to(self.encoder_dtype) for t in (base, source))
        normal, target = self._normalize(flat)[0], self._normalize(other)[0]
        with self.ranks.together("blend", normal, target, gate, self.share.trains()):
            before, after = (self._scaled(self._own(t)) for t in (normal, target))
            after = after.expand_as(before)
            if gate is not None and gate.dtype == torch.bool:
                after = torch.where(gate[..., self.share.start : self.share.stop], after, before)
            elif gate is not None:
                own = self.divided.own(gate.to(before.dtype))
                after = torch.lerp(before, after, own.expand_as(before))
            change = total(self._decode_own(after - before), self.ranks)
        return self._add(base, change)

    def feature_rows(self, columns: Tensor | None = None) -> FeatureRows:
        """See `Featurizer.feature_rows`; the rows of some features alone.

        Raises:
            LoweringError: all features are asked for, or the normalisation depends on the token.
        """
        if columns is None or len(columns) > FETCHED:
            raise LoweringError(
                f"{self.id!r} is divided over a mesh, and a program holds the rows of all features that it edits: give "
                f"up to {FETCHED} indices"
            )
        # its rule concerns the gate alone, which a rule that selects has not
        rows = self._part(columns, None if self.rule.elementwise else "relu").feature_rows()
        return rows if self.rule.elementwise else replace(rows, gate=None)

    # ------------------------------------------------------------------ slices and checks
    def take(self, indices: Sequence[int] | Tensor) -> DictionaryFeaturizer:
        """Return the dictionary of these features alone, on no mesh, as `DictionaryFeaturizer.take` does.

        Raises:
            UsageError: the rule compares all features of a token.
            FeatureIndexError: an index is out of range.
        """
        columns = self.select(indices, self.share.W_enc[:1]).as_columns()
        if columns is None:
            raise FeatureIndexError("take needs a list of features, the same for every example")
        part = self._part(columns)
        part.site = self.site
        return part.described_as(self)

    def check(self) -> None:
        """Raise `ConfigError` if a norm of the units is not positive."""
        if self._has_norms and not (self.share.get_buffer("decoder_norm") > 0).all():
            raise ConfigError("decoder_norm is not positive")

    # ------------------------------------------------------------------ helpers
    @property
    def _has_norms(self) -> bool:
        return bool(self.config.units == "decoder-norm")

    def _scaled(self, own: Tensor) -> Tensor:
        """Return raw features of this process in the units of the config."""
        return own * self.share.get_buffer("decoder_norm") if self._has_norms else own

    def _pre(self, normal: Tensor) -> Tensor:
        """Return pre-activations of the features of this process."""
        share = self.share
        centred = spread(normal - share.b_dec if self.config.pre_bias else normal, self.ranks)
        bias = share.get_parameter("b_enc") if self.rule.encoder_bias else None
        return functional.linear(centred, share.W_enc, bias)

    def _own(self, normal: Tensor) -> Tensor:
        """Return raw features of this process."""
        return self.divided.features(self._pre(normal), self.share.tensors(self.rule.tensors))

    def _active(self, x: Float[Tensor, "*batch d_in"]) -> Active:
        """Return the features that fire, and those of value 0 that the rule selects."""
        with without_autocast(x):
            normal = self._normalize(x.to(self.encoder_dtype))[0].reshape(-1, self.d_in)
            with self.ranks.together("encode_sparse", normal, self.share.trains()):
                scale = self.share.get_buffer("decoder_norm") if self._has_norms else None
                return self.divided.active(self._pre(normal), self.share.tensors(self.rule.tensors), scale)

    def _encode_fetched(self, normal: Tensor, columns: Tensor) -> Tensor:
        """Return some features of a rule that acts on each alone, computed from their rows."""
        bias = self._fetched("b_enc", columns) if self.rule.encoder_bias else None
        centred = normal - self.share.b_dec if self.config.pre_bias else normal
        tensors = {name: self._fetched(name, columns) for name in self.rule.tensors}
        pre = functional.linear(centred, self._fetched("W_enc", columns), bias)
        features = self.rule(pre, tensors, self.config.rule_options)
        return features * self._fetched("decoder_norm", columns) if self._has_norms else features

    def _fetched(self, name: str, columns: Tensor) -> Tensor:
        """Return the rows of some features of a tensor, in every process."""
        tensor = self.share.tensor(name)
        if tensor is None:
            raise ValueError(f"there is no tensor {name!r}")
        return self.divided.fetched(tensor, columns)

    def _part(self, columns: Tensor, rule: str | None = None) -> DictionaryFeaturizer:
        """Return a dictionary of some features, with the rule of another name if one is given."""
        config = self.config if rule is None else self.config.model_copy(update={"rule": rule, "rule_options": {}})
        config, names, added = DictionaryFeaturizer.sliced(config, columns, columns)
        with torch.device("meta"):
            part = DictionaryFeaturizer(config)
        with self.ranks.together("take", columns), torch.no_grad():
            state = {name: self._fetched(name, columns) for name in part.state_dict() if name in names - added.keys()}
        part.load_state_dict({**state, "b_dec": self.share.b_dec.detach().clone(), **added}, assign=True)
        return part.requires_grad_(False).eval()

    def _decode_own(self, own: Tensor) -> Tensor:
        """Return ``W_decᵀ f`` of the features here; with mostly zeros and no gradient, of the others alone."""
        raw = own / self.share.get_buffer("decoder_norm") if self._has_norms else own
        raw, weight = raw.to(self.decoder_dtype), self.share.W_dec
        differentiable = torch.is_grad_enabled() and (raw.requires_grad or weight.requires_grad)
        if not differentiable and not torch._C._are_functorch_transforms_active():
            rows = raw.reshape(-1, raw.shape[-1])
            few = rows.numel() * self.d_in >= 2**24 and int(rows.count_nonzero()) <= DENSE * rows.numel()
            if few:
                decoded = times_rows(nonzero(rows), weight, len(rows))
                return decoded.reshape(*raw.shape[:-1], self.d_in)
        return raw @ weight
