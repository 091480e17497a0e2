"""`LinearMap`: base of the kinds of this plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from featurizers.builtin import rule_with_options
from featurizers.errors import ConfigError, ShapeError, UsageError, explain
from featurizers.features import Group, Indices, Numbering, Rule, Selection, SiteMap, columns_of, select
from jaxtyping import Float
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from featurizers_transcoder.config import LinearMapConfig, check_names
from featurizers_transcoder.reads import normalized_read, pre_activations


class LinearMap(SiteMap[LinearMapConfig]):
    """Map with linear encoders and decoders, an activation rule for each group, and skip connections.

    With n the normalisation of a read and ρ the rule of a group,

        z_g = ρ_g(b_g + Σ_r W_enc_gr n_r(x_r))        ŷ_w = b_w + Σ_g W_dec_gwᵀ z_g + Σ_r W_skip_rwᵀ x_r

    Tensors: ``W_enc.g.r (n, d_r)``, ``b_enc.g (n)``, ``rule_tensors.t.g (n)`` for each tensor t of the group's rule,
    ``W_dec.g.w (n, d_w)``, ``b_dec.w (d_w)``, ``W_skip.w.r (d_r, d_w)``, ``centre.r (d_r)``. A feature is a row
    everywhere, so that a slice is contiguous on disk, and neither its memory nor its time grow with the map. Weights
    have no gradient until ``requires_grad_()`` is called.

    An edit of k features costs O(k d) a token for each read and write, for a rule that acts on each feature alone.

    Sources: Dunefsky et al. 2024 (arXiv:2406.11944), transcoders; Paulo et al. 2025 (arXiv:2501.18823), skips; Ameisen
    et al. 2025, "Circuit Tracing", cross-layer transcoders; Lindsey et al. 2024, "Sparse Crosscoders".
    """

    Config: ClassVar[type[BaseModel]] = LinearMapConfig

    def __init__(self, config: LinearMapConfig) -> None:
        check_names(config)
        super().__init__(
            config,
            groups={name: Group(tuple(group.reads), group.n_features) for name, group in config.groups.items()},
            reads={name: read.width for name, read in config.reads.items()},
            writes=config.writes,
            decoders=[(name, write) for name, group in config.groups.items() for write in group.writes],
        )
        self.special_tokens = tuple(config.special_tokens)
        self.rules = {name: _rule(config, name) for name in config.groups}
        self._add_tensors()

    def _add_tensors(self) -> None:
        config = self.config
        groups = config.groups.items()
        self.W_enc = _by_name({g: {r: (own.n_features, config.reads[r].width) for r in own.reads} for g, own in groups})
        self.W_dec = _by_name({g: {w: (own.n_features, config.writes[w]) for w in own.writes} for g, own in groups})
        rules = self.rules.items()
        self.b_enc = _parameters({g: (config.groups[g].n_features,) for g, rule in rules if rule.encoder_bias})
        names = dict.fromkeys(name for _, rule in rules for name in rule.tensors)
        self.rule_tensors = _by_name(
            {name: {g: (config.groups[g].n_features,) for g, rule in rules if name in rule.tensors} for name in names}
        )
        self.b_dec = _parameters({w: (width,) for w, width in config.writes.items()})
        self.W_skip = _by_name(
            {w: {r: (config.reads[r].width, config.writes[w]) for r in reads} for w, reads in config.skips.items()}
        )
        self.centre = _parameters({r: (read.width,) for r, read in config.reads.items() if read.centre})
        for name, group in groups:
            if group.slice_of is not None:
                self.register_buffer(f"numbers-{name}", torch.arange(group.n_features))

    @classmethod
    def from_tensors(cls, config: LinearMapConfig | Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Build a map from weights, without copying those that are contiguous.

        Args:
            config: of the map, or its fields.
            tensors: by the names in the description of the class. Biases that are left out are zero.

        Raises:
            ConfigError: the config is not valid, or a tensor is missing or unknown.
            ShapeError: a tensor has another shape.
        """
        try:
            checked = cls.Config.model_validate(config if isinstance(config, LinearMapConfig) else dict(config))
        except ValidationError as error:
            raise ConfigError(f"{cls.kind}: {explain(error)}") from error
        with torch.device("meta"):
            self = cls(checked)  # type: ignore[arg-type]
        expected = self.state_dict()
        if unknown := sorted(tensors.keys() - expected.keys()):
            raise ConfigError(f"{cls.kind}: there is no tensor {unknown[0]!r} in this config")
        like = next((t for t in tensors.values() if t.is_floating_point()), torch.zeros(()))
        state = {}
        for name, tensor in expected.items():
            value = tensors.get(name)
            if value is None and not name.startswith(("b_dec.", "b_enc.")):
                raise ConfigError(f"{cls.kind}: the tensor {name!r} is missing")
            value = like.new_zeros(tensor.shape) if value is None else value
            if value.shape != tensor.shape:
                raise ShapeError(f"{name} has shape {tuple(value.shape)}, it must be {tuple(tensor.shape)}")
            if value.is_floating_point() != tensor.is_floating_point():
                raise ConfigError(f"{name} is {value.dtype}, it must be a dtype such as {tensor.dtype}")
            state[name] = value.detach().contiguous()
        self.load_state_dict(state, assign=True)
        self.check()
        return self.eval()

    # ------------------------------------------------------------------ the map
    def encode(
        self, group: str, x: Mapping[str, Float[Tensor, "*batch d_read"]], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch k"]:
        """Return features of a group; a rule that acts on each feature alone reads the chosen rows only."""
        rule, own = self.rules[group], self.config.groups[group]
        rows = columns if rule.elementwise else None
        tensors = {name: _rows(_tensor(self.rule_tensors, name, group), rows) for name in rule.tensors}
        features = rule(self.pre_activations(group, self.inputs(group, x), rows), tensors, own.rule_options)
        return features if columns is None or rule.elementwise else features[..., columns]

    def inputs(self, group: str, x: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the activations at each read of a group as its encoder takes them: centred and normalised."""
        return [self._input(read, x[read]) for read in self.config.groups[group].reads]

    def pre_activations(self, group: str, inputs: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """Return what the rule of a group acts on: that of all features, or of those in ``rows``; see `inputs`."""
        weights = [_rows(_tensor(self.W_enc, group, read), rows) for read in self.config.groups[group].reads]
        return pre_activations(inputs, weights, _rows(self.b_enc[group], rows) if group in self.b_enc else None)

    def decode(
        self, write: str, features: Mapping[str, Tensor], x: Mapping[str, Tensor]
    ) -> Float[Tensor, "*batch d_write"]:
        """Return ``b_w + Σ_g W_dec_gwᵀ z_g + Σ_r W_skip_rwᵀ x_r``."""
        total: Tensor = self.b_dec[write]
        for group in self.config.groups:
            if (group, write) in self.decoders:
                total = total + self.decode_change(write, group, features[group])
        skip = self.skip_change(write, x)
        return total if skip is None else total + skip

    def decode_change(
        self, write: str, group: str, change: Float[Tensor, "*batch k"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch d_write"]:
        """Return ``W_dec_gwᵀ`` times the change; where no gradient is asked, rows of zero changes are not read."""
        weight = _tensor(self.W_dec, group, write)
        change = change.to(weight.dtype)
        if columns is not None:
            return change @ weight[columns]
        if not (torch.is_grad_enabled() and (change.requires_grad or weight.requires_grad)):
            live = (change != 0).reshape(-1, change.shape[-1]).any(dim=0).nonzero().squeeze(-1)
            if 4 * live.numel() < weight.shape[0]:
                return change[..., live] @ weight[live]
        return change @ weight

    def skip_change(
        self, write: str, change: Mapping[str, Float[Tensor, "*batch d_read"]]
    ) -> Float[Tensor, "*batch d_write"] | None:
        """Return ``Σ_r W_skip_rwᵀ x_r``; None if no skip connection ends at this write.

        Raises:
            UsageError: a read of a skip is missing.
        """
        total: Tensor | None = None
        for read in self.config.skips.get(write, ()):
            if read not in change:
                raise UsageError(
                    f"{self.id!r}: the skip connection from {read!r} ends at {write!r}, which comes earlier"
                )
            weight = _tensor(self.W_skip, write, read)
            part = change[read].to(weight.dtype) @ weight
            total = part if total is None else total + part
        return total

    def _input(self, read: str, x: Tensor) -> Tensor:
        """Return the activations of a read as the encoders see them."""
        x = x.to(next(self.parameters()).dtype)
        if read in self.centre:
            x = x - self.centre[read]
        return normalized_read(self.config.reads[read], x)

    # ------------------------------------------------------------------ slices
    def select(self, group: str, indices: Indices, x: Tensor) -> Selection:
        """Check indices, which are numbers of features in the whole group, and turn them into columns."""
        own = self.config.groups[group]
        if own.slice_of is not None and not isinstance(indices, Selection):
            indices = columns_of(indices, self.numbers(group), own.slice_of)
        return select(indices, own.n_features, x.device)

    def numbers(self, group: str) -> Tensor:
        """Return the numbers of the features of a group in the whole map, int64 ``(n,)``."""
        own = self.config.groups[group]
        return torch.arange(own.n_features) if own.slice_of is None else self.get_buffer(f"numbers-{group}")

    def numbering(self) -> Mapping[str | None, Numbering]:
        """See `featurizers.FeatureSpace.numbering`."""
        parts = {g: own.slice_of for g, own in self.config.groups.items() if own.slice_of is not None}
        return {**super().numbering(), **{g: Numbering(self.numbers(g).tolist(), n) for g, n in parts.items()}}

    @classmethod
    def sliced(
        cls, config: LinearMapConfig, columns: Mapping[str, Tensor]
    ) -> tuple[LinearMapConfig, dict[str, Tensor], dict[str, Tensor]]:
        """See `featurizers.FeatureSpace.rows_of_slice`."""
        groups: dict[str, Any] = {}
        rows: dict[str, Tensor] = {}
        added: dict[str, Tensor] = {}
        for name, chosen in columns.items():
            own, rule = config.groups[name], _rule(config, name)
            if torch.equal(chosen.cpu(), torch.arange(own.n_features)):  # the whole group
                groups[name] = own
                continue
            if not rule.elementwise:
                raise UsageError(
                    f"the rule {own.rule!r} compares all features of a token, so that a part of the map gives other "
                    "features; load it whole, and give the indices to the operation"
                )
            if own.slice_of is not None:
                raise UsageError("it is a slice of a map already; load the whole one")
            groups[name] = own.model_copy(update={"n_features": len(chosen), "slice_of": own.n_features})
            rows |= dict.fromkeys(_row_names(config, name, rule), chosen)
            added[f"numbers-{name}"] = chosen
        return config.model_copy(update={"groups": groups}), rows, added

    def row_names(self, group: str) -> list[str]:
        """Return the names of the tensors that have a row for each feature of a group."""
        return _row_names(self.config, group, self.rules[group])

    def take(self, indices: Indices | Mapping[str, Indices]) -> Self:
        """Return the map of these features alone; they keep their numbers.

        Raises:
            UsageError: a rule compares all features of a token, or this is a slice already.
            FeatureIndexError: the map lacks one of the features.
        """
        config, rows, added = self.sliced(self.config, self.checked_columns(indices))
        with torch.device("meta"):
            part = type(self)(config)
        state = self.state_dict()
        state = {name: state[name][rows[name]] if name in rows else state.get(name) for name in part.state_dict()}
        part.load_state_dict({**state, **added}, assign=True)
        part.reads, part.writes = self.reads, self.writes
        return part.described_as(self)

    def check(self) -> None:
        """Raise ConfigError if a number of a slice is invalid."""
        for name, group in self.config.groups.items():
            if group.slice_of is None:
                continue
            numbers = self.numbers(name)
            valid = int(numbers.min()) >= 0 and int(numbers.max()) < group.slice_of
            if not valid or len(set(numbers.tolist())) != len(numbers):
                raise ConfigError(f"the numbers of {name!r} must be distinct and below {group.slice_of}")

    # ------------------------------------------------------------------ pickling
    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the rules, whose names are in the config."""
        return {name: value for name, value in self.__dict__.items() if name != "rules"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, and look up the rules among the installed plugins."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.rules = {name: _rule(self.config, name) for name in self.config.groups}


def _rule(config: LinearMapConfig, group: str) -> Rule:
    """Return the rule of a group, once its options are known to fit it.

    Raises:
        ConfigError: no plugin has the rule, or the options do not fit.
    """
    own = config.groups[group]
    rule = rule_with_options(own.rule, own.rule_options, own.n_features)
    if own.slice_of is not None and not rule.elementwise:
        raise ConfigError(f"the rule {own.rule!r} compares all features, so that {group!r} cannot be a slice")
    return rule


def _row_names(config: LinearMapConfig, group: str, rule: Rule) -> list[str]:
    own = config.groups[group]
    names = [f"W_enc.{group}.{read}" for read in own.reads] + [f"W_dec.{group}.{write}" for write in own.writes]
    names += [f"rule_tensors.{tensor}.{group}" for tensor in rule.tensors]
    return [*names, f"b_enc.{group}"] if rule.encoder_bias else names


def _tensor(tensors: nn.ModuleDict, outer: str, inner: str) -> Tensor:
    result: Tensor = tensors[outer][inner]  # type: ignore[index]
    return result


def _rows(tensor: Any, rows: Tensor | None) -> Tensor:
    result: Tensor = tensor if rows is None else tensor[rows]
    return result


def _parameters(shapes: Mapping[str, tuple[int, ...]]) -> nn.ParameterDict:
    return nn.ParameterDict({n: nn.Parameter(torch.zeros(shape), requires_grad=False) for n, shape in shapes.items()})


def _by_name(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> nn.ModuleDict:
    return nn.ModuleDict({name: _parameters(inner) for name, inner in shapes.items()})
