"""Compositions: ``a >> b`` featurizes the features of ``a`` by ``b``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, final

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from featurizers.errors import ConfigError, LoweringError, ShapeError
from featurizers.features.active import Active
from featurizers.features.derivatives import Error
from featurizers.features.featurizer import Featurizer
from featurizers.features.programs import FeatureRows
from featurizers.registry.hookspecs import hookimpl
from featurizers.registry.plugin_host import build, host


class StageConfig(BaseModel):
    """Kind, name and configuration of a stage."""

    model_config = ConfigDict(strict=True, extra="forbid")
    kind: Annotated[str, Field(max_length=128)]
    id: Annotated[str, Field(min_length=1, max_length=256)]
    config: dict[str, Any]


class CompositionConfig(BaseModel):
    """Configuration of a `Composition`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    stages: Annotated[list[StageConfig], Field(min_length=2, max_length=64)]


@final
class Composition(Featurizer[CompositionConfig]):
    """Several featurizers in a row; made by ``a >> b``, which flattens compositions.

    The features are those of the last stage, and the error is the tuple of the stages' errors. An edit of the
    features is applied from the last stage to the first, each in its own closed form, so that a composition of
    lossless stages is lossless and an edit that changes nothing returns the base exactly. Cost: the sum over the
    stages.

    Examples:
        >>> import torch, featurizers
        >>> a = featurizers.create("subspace", d_in=8, n_features=4)
        >>> b = featurizers.create("subspace", d_in=4, n_features=2)
        >>> (a >> b).collect(torch.zeros(3, 8)).shape
        torch.Size([3, 2])
    """

    kind: ClassVar[str] = "composition"
    Config: ClassVar[type[BaseModel]] = CompositionConfig

    def __init__(self, config: CompositionConfig) -> None:
        super().__init__(config)
        stages = []
        for stage in config.stages:
            if stage.kind == self.kind:
                raise ConfigError("a stage of a composition is not a composition itself; list its stages")
            stages.append(build(host().featurizer_class(stage.kind), stage.config))
            stages[-1].id = stage.id
        self._set_stages(stages)

    @classmethod
    def of(cls, stages: list[Featurizer[Any]]) -> Composition:
        """Return the composition of these featurizers, which stay shared with the caller."""
        self = cls.__new__(cls)
        records = [StageConfig(kind=s.kind, id=s.id, config=s.config.model_dump(mode="json")) for s in stages]
        Featurizer.__init__(self, CompositionConfig(stages=records))
        self._set_stages(stages)
        return self

    def _set_stages(self, stages: list[Featurizer[Any]]) -> None:
        width = None
        for i, stage in enumerate(stages):
            if width is not None and stage.d_in is not None and stage.d_in != width:
                before = stages[i - 1]
                raise ShapeError(
                    f"cannot compose {before.id!r} ({before.kind}, {width} features) with {stage.id!r} "
                    f"({stage.kind}), which takes {stage.d_in}"
                )
            width = stage.n_features if stage.n_features is not None else stage.d_in or width
        self.stages: nn.ModuleList = nn.ModuleList(stages)
        self.d_in: int | None = next((stage.d_in for stage in stages if stage.d_in is not None), None)
        self.n_features = width
        self.id: str = " >> ".join(stage.id for stage in stages)
        self.site = stages[0].site
        self.special_tokens: tuple[int, ...] = tuple(token for stage in stages for token in stage.special_tokens)

    def _stages(self) -> list[Featurizer[Any]]:
        return list(self.stages)  # type: ignore[arg-type]  # a ModuleList does not know its elements

    def featurize(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch n_features"], Error]:
        """Return the features of the last stage, and the errors of all stages, first to last."""
        errors = []
        for stage in self._stages():
            x, error = stage.featurize(x)
            errors.append(error)
        return x, tuple(errors)

    def inverse_featurize(
        self, features: Float[Tensor, "*batch n_features"], error: Error
    ) -> Float[Tensor, "*batch d_in"]:
        """Apply the inverses of the stages, last to first."""
        if not isinstance(error, tuple) or len(error) != len(self.stages):
            raise ShapeError(f"the error of {self.id!r} must be a tuple of {len(self.stages)}, an error for each stage")
        for stage, stage_error in zip(reversed(self._stages()), reversed(error), strict=True):
            features = stage.inverse_featurize(features, stage_error)
        return features

    def without_residual(self, error: Error) -> Error:
        """Return the errors of the stages, each without its residual."""
        if not isinstance(error, tuple) or len(error) != len(self.stages):
            return super().without_residual(error)
        return tuple(stage.without_residual(own) for stage, own in zip(self._stages(), error, strict=True))

    def encode(self, x: Float[Tensor, "*batch d_in"], columns: Tensor | None = None) -> Float[Tensor, "*batch k"]:
        """Return the features of the last stage, without any errors."""
        *first, last = self._stages()
        for stage in first:
            x = stage.encode(x)
        return last.encode(x, columns)

    def encode_active(self, x: Float[Tensor, "*batch d_in"]) -> Active:
        """See `Featurizer.encode_active`; the last stage does it."""
        *first, last = self._stages()
        for stage in first:
            x = stage.encode(x)
        return last.encode_active(x)

    def apply_edit(
        self,
        base: Float[Tensor, "*batch d_in"],
        features: Float[Tensor, "*batch k"],
        edited: Float[Tensor, "*batch k"],
        columns: Tensor | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Apply the edit to the last stage, its result as an edit of the stage before, and so on to the first."""
        inputs = self._inputs(base)
        return self._undo(inputs, self._stages()[-1].apply_edit(inputs[-1], features, edited, columns))

    def blend(
        self, base: Float[Tensor, "*batch d_in"], source: Float[Tensor, "*#batch d_in"], gate: Tensor | None
    ) -> Float[Tensor, "*batch d_in"]:
        """Blend in the last stage, apply the result as an edit of the stage before, and so on to the first."""
        inputs = self._inputs(base)
        return self._undo(inputs, self._stages()[-1].blend(inputs[-1], self._inputs(source)[-1], gate))

    def _inputs(self, x: Tensor) -> list[Tensor]:
        """Return the input of each stage."""
        inputs = [x]
        for stage in self._stages()[:-1]:
            inputs.append(stage.encode(inputs[-1]))
        return inputs

    def _undo(self, inputs: list[Tensor], edited: Tensor) -> Tensor:
        """Turn an edited input of the last stage into the edited input of the first."""
        stages = self._stages()[:-1]
        for stage, x, produced in zip(reversed(stages), reversed(inputs[:-1]), reversed(inputs[1:]), strict=True):
            edited = stage.apply_edit(x, produced, edited)
        return edited

    def feature_rows(self, columns: Tensor | None = None) -> FeatureRows:
        """See `Featurizer.feature_rows`: the rows of the last stage, read and written through the stages before.

        Raises:
            LoweringError: a stage has no rows, or one before the last is not affine.
        """
        *first, last = self._stages()
        rows = last.feature_rows(columns)
        for stage in reversed(first):
            before = stage.feature_rows()
            gate = before.gate
            if gate is None or not gate.is_affine:
                raise LoweringError(f"{stage.id!r} ({stage.kind}) stands before another stage and is not affine")
            bias = rows.bias + rows.read @ (gate.slope * before.bias + gate.offset)
            rows = FeatureRows(rows.read * gate.slope @ before.read, bias, rows.gate, rows.write @ before.write)
        return rows

    def check(self) -> None:
        """Check every stage."""
        for stage in self._stages():
            stage.check()


def compose(first: Featurizer[Any], second: Featurizer[Any]) -> Composition:
    """Return ``first >> second``, flattened.

    Raises:
        ShapeError: the width of the second is not the number of features of the first.
    """
    stages: list[Featurizer[Any]] = []
    for part in (first, second):
        stages += part._stages() if isinstance(part, Composition) else [part]
    return Composition.of(stages)


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kind ``composition``."""
    register(Composition)
