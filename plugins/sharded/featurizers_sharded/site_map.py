"""`ShardedMap`: a transcoder or a crosscoder whose features are divided over the processes of a mesh."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from featurizers.errors import ShapeError, UsageError
from featurizers.features import Active, Edit, Indices, SiteMap
from featurizers_transcoder import LinearMap, LinearMapConfig, pre_activations
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor

from featurizers_sharded.collectives import spread, total
from featurizers_sharded.divided import FETCHED, Divided
from featurizers_sharded.ranks import Ranks, reported
from featurizers_sharded.saving import SavedTogether, Saver


@final
@reported(
    *("featurize", "inverse_featurize", "encode", "encode_active", "decode", "decode_change", "skip_change"),
    *("apply_edit", "by_group", "select", "take", "saving"),
)
class ShardedMap(SavedTogether, SiteMap[LinearMapConfig]):
    """Map whose features are divided over the processes of a mesh; `featurizers.load` with ``mesh=`` makes it.

    It is the `featurizers_transcoder.LinearMap` of the same kind and config, which has the formulas. Each process holds
    the rows of its features of every group; biases of the writes, skip connections and centres are whole in each. All
    processes call the same methods in the same order with the same tensors, and all get what the whole map gives, as
    with `ShardedDictionary`, which says what that costs.

    Attributes:
        ranks: the processes.
        divided: by group, how its features are divided.
        saver: saves it.
        share: the weights that this process holds, under the names of the whole map.
    """

    kind: ClassVar[str] = "transcoder"
    Config: ClassVar[type[BaseModel]] = LinearMapConfig

    share: LinearMap

    def __init__(self, whole: LinearMap, ranks: Ranks) -> None:
        config = whole.config
        self.kind = whole.kind  # type: ignore[misc]  # one class for the three kinds
        super().__init__(
            config,
            groups=whole.groups,
            reads=whole.read_widths,
            writes=whole.write_widths,
            decoders=whole.decoders,
        )
        if any(group.slice_of is not None for group in config.groups.values()):
            raise UsageError(f"{whole.id!r} is a slice of a map, and whole ones alone are divided over a mesh")
        self.special_tokens, self.ranks = whole.special_tokens, ranks
        self.divided = {
            name: Divided(ranks, whole.rules[name], own.rule_options, own.n_features, f"group {name!r}: ")
            for name, own in config.groups.items()
        }
        with torch.device("meta"):
            self.share = type(whole)(config)
        for name, rows in self.rows().items():
            parameter = self.share.get_parameter(name)
            parameter.data = parameter.data[rows]
        sizes = {name: each.sizes for group, each in self.divided.items() for name in self.share.row_names(group)}
        self.saver = Saver(self.share, sizes, ranks)

    def __getattr__(self, name: str) -> Any:
        """Say where the weights are, if one is asked for."""
        share = self.__dict__.get("_modules", {}).get("share")
        if share is not None and name in share._modules:
            raise AttributeError(f"each rank of the mesh holds some rows of {name!r}: see share.{name}, or take()")
        return super().__getattr__(name)

    def rows(self) -> dict[str, slice]:
        """Return which rows of each tensor of the map are here; tensors without a row for each feature are left out."""
        return {
            name: slice(each.start, each.stop)
            for group, each in self.divided.items()
            for name in self.share.row_names(group)
        }

    # ------------------------------------------------------------------ the map
    def encode(
        self, group: str, x: Mapping[str, Float[Tensor, "*batch d_read"]], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch k"]:
        """Return features of a group: all, or those in ``columns``."""
        own = self._checked(group, x)
        divided, rule = self.divided[group], self.share.rules[group]
        with self.ranks.together("encode", group, *own.values(), columns, self._trains()):
            if columns is not None and rule.elementwise and len(columns) <= FETCHED:
                return self._encode_fetched(group, own, columns)
            features = divided.features(self._pre(group, own), self._rule_tensors(group))
            return divided.every(features) if columns is None else divided.some(features, columns)

    def encode_active(self, group: str, x: Mapping[str, Float[Tensor, "*batch d_read"]]) -> Active:
        """See `featurizers.SiteMap.encode_active`; all processes get the features of all."""
        own = self._checked(group, x)
        with self.ranks.together("encode_active", group, *own.values(), self._trains()):
            pre = self._pre(group, own)
            pre = pre.reshape(-1, pre.shape[-1])
            return self.divided[group].active(pre, self._rule_tensors(group)).nonzero()

    def decode(
        self, write: str, features: Mapping[str, Tensor], x: Mapping[str, Tensor]
    ) -> Float[Tensor, "*batch d_write"]:
        """Return ``b_w + Σ_g W_dec_gwᵀ z_g + Σ_r W_skip_rwᵀ x_r``; the sum over groups is one over the processes."""
        skip = self.skip_change(write, x)
        edits = {group: (features[group], None) for group in self.groups if (group, write) in self.decoders}
        result: Tensor = self.share.b_dec[write]
        result = result + self._decoded("decode", write, edits) if edits else result
        return result if skip is None else result + skip

    def decode_change(
        self, write: str, group: str, change: Float[Tensor, "*batch k"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch d_write"]:
        """Return ``W_dec_gwᵀ`` times the change of all features of a group, or of those in ``columns``."""
        return self._decoded("decode_change", write, {group: (change, columns)})

    def skip_change(
        self, write: str, change: Mapping[str, Float[Tensor, "*batch d_read"]]
    ) -> Float[Tensor, "*batch d_write"] | None:
        """See `featurizers.SiteMap.skip_change`; each process has the skip connections whole."""
        return self.share.skip_change(write, change)

    def apply_edit(
        self, write: str, base: Float[Tensor, "*batch d_write"], edits: Mapping[str, Edit]
    ) -> Float[Tensor, "*batch d_write"]:
        """See `featurizers.SiteMap.apply_edit`; all groups are decoded in one call."""
        changes = {
            group: (edit.edited - edit.features, edit.columns)
            for group, edit in edits.items()
            if edit.edited is not edit.features and (group, write) in self.decoders
        }
        return (base + self._decoded("apply_edit", write, changes)).to(base.dtype) if changes else base

    # ------------------------------------------------------------------ slices
    @classmethod
    def sliced(
        cls, config: LinearMapConfig, columns: Mapping[str, Tensor]
    ) -> tuple[LinearMapConfig, dict[str, Tensor], dict[str, Tensor]]:
        """See `featurizers.SiteMap.sliced`."""
        return LinearMap.sliced(config, columns)

    def take(self, indices: Indices | Mapping[str, Indices]) -> LinearMap:
        """Return the map of these features alone, on no mesh, as `featurizers_transcoder.LinearMap.take` does.

        Raises:
            UsageError: a rule compares all features of a token.
            FeatureIndexError: the map lacks one of the features.
        """
        chosen = self.checked_columns(indices)
        config, _, added = self.sliced(self.config, chosen)
        with torch.device("meta"):
            part = type(self.share)(config)
        with self.ranks.together("take", *chosen, *chosen.values()), torch.no_grad():
            state = {name: tensor.detach().clone() for name, tensor in self.share.state_dict().items()}
            for group, columns in chosen.items():
                for name in self.share.row_names(group):
                    state[name] = self.divided[group].fetched(state[name], columns.to(state[name].device))
        part.load_state_dict({**{name: state.get(name) for name in part.state_dict()}, **added}, assign=True)
        part.reads, part.writes = self.reads, self.writes
        return part.described_as(self)

    # ------------------------------------------------------------------ helpers
    def _trains(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.share.parameters())

    def _checked(self, group: str, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the reads of a group.

        Raises:
            ShapeError: one is missing, or has another width.
        """
        reads = self.groups[group].reads
        self.check_widths(x, {read: self.read_widths[read] for read in reads}, "read")
        return {read: x[read] for read in reads}

    def _rule_tensors(self, group: str) -> dict[str, Tensor]:
        names = self.share.rules[group].tensors
        return {name: self.share.get_parameter(f"rule_tensors.{name}.{group}") for name in names}

    def _pre(self, group: str, x: Mapping[str, Tensor]) -> Tensor:
        """Return pre-activations of the features of this process."""
        inputs = [spread(each, self.ranks) for each in self.share.inputs(group, x)]
        return self.share.pre_activations(group, inputs)

    def _encode_fetched(self, group: str, x: Mapping[str, Tensor], columns: Tensor) -> Tensor:
        """Return some features of a rule that acts on each alone, computed from their rows."""
        rows = {
            name: self.divided[group].fetched(self.share.get_parameter(name), columns)
            for name in self.share.row_names(group)
            if not name.startswith("W_dec.")
        }
        weights = [rows[f"W_enc.{group}.{read}"] for read in x]
        pre = pre_activations(self.share.inputs(group, x), weights, rows.get(f"b_enc.{group}"))
        rule = self.share.rules[group]
        tensors = {name: rows[f"rule_tensors.{name}.{group}"] for name in rule.tensors}
        return rule(pre, tensors, self.config.groups[group].rule_options)

    def _decoded(self, call: str, write: str, changes: Mapping[str, tuple[Tensor, Tensor | None]]) -> Tensor:
        """Return the decoded changes of features, summed over groups.

        Rows of some features are fetched; of more features, each process decodes its own, and these are summed.

        Args:
            call: name of the call, for the other processes.
            write: name of the write.
            changes: by group, one or more: changes of the features and their columns, None for all.

        Raises:
            ShapeError: there is not one change for each feature.
        """
        for group, (change, columns) in changes.items():
            n = self.groups[group].n_features if columns is None else len(columns)
            if not change.dim() or change.shape[-1] != n:
                raise ShapeError(f"{self.id!r}: the group {group!r} takes {n} features, got {tuple(change.shape)}")
        given = [part for each in changes.values() for part in each]
        with self.ranks.together(call, write, *changes, *given, self._trains()):
            fetched: list[Tensor] = []
            own: list[Tensor] = []
            for group, (change, columns) in changes.items():
                divided = self.divided[group]
                if columns is not None and len(columns) <= FETCHED:
                    weight = divided.fetched(self.share.get_parameter(f"W_dec.{group}.{write}"), columns)
                    fetched.append(change.to(weight.dtype) @ weight)
                elif columns is None:
                    own.append(self.share.decode_change(write, group, divided.own(change)))
                else:
                    here, rows = divided.here(columns)
                    part = spread(change, self.ranks)[..., here]
                    own.append(self.share.decode_change(write, group, part, rows[here]))
            summed = [total(functools.reduce(torch.add, own), self.ranks)] if own else []
            return functools.reduce(torch.add, [*fetched, *summed])
