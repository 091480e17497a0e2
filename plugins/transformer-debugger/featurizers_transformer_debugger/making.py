"""`make_scalar_deriver`: the ready deriver of each name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

from featurizers_derived_scalars import Deriver, MetricGrad, quantities
from featurizers_derived_scalars.quantities import DerivedSource, RawSource

from featurizers_transformer_debugger.activations import ActivationLocationTypeAndPassType
from featurizers_transformer_debugger.config import DstConfig
from featurizers_transformer_debugger.derivers import ScalarDeriver
from featurizers_transformer_debugger.indexers import DEFAULT_LAYER_INDEXER, LayerIndexer, NoLayersLayerIndexer
from featurizers_transformer_debugger.names import (
    ActivationLocationType,
    LocationWithinLayer,
    NamedLocation,
    NamedScalar,
    PassType,
    location_of,
)
from featurizers_transformer_debugger.scalars import upstream
from featurizers_transformer_debugger.sources import RawScalarSource, ScalarSource


def make_scalar_deriver(dst: NamedScalar, dst_config: DstConfig | None = None) -> ScalarDeriver:
    """Return the deriver of one of the 106 names: for raw locations in both passes, for the others forward.

    Raises:
        UsageError: the configuration lacks an option that the name needs.
    """
    config = DstConfig() if dst_config is None else dst_config
    if dst.is_raw_activation_type:
        location = dst.to_activation_location_type()
        at = NoLayersLayerIndexer() if location.has_no_layers else DEFAULT_LAYER_INDEXER
        both = tuple(PassType) if config.derive_gradients else (PassType.FORWARD,)
        sources = tuple(RawScalarSource(location, pass_type, at) for pass_type in both)
        return ScalarDeriver(
            dst, config, sources, lambda tensors, _, pass_type: tensors[both.index(pass_type)], passes=both
        )
    inner = upstream(dst.value, featurizers=config.featurizers, node=config.node, latent=config.latent)
    passes = (PassType.FORWARD,)
    return ScalarDeriver(dst, config, (_Upstream(dst, inner),), lambda tensors, _, __: tensors[0], passes=passes)


def make_scalar_deriver_for_activation_location_type(
    activation_location_type: NamedLocation, derive_gradients: bool = False
) -> ScalarDeriver:
    """Return the deriver of a raw location's value."""
    return make_scalar_deriver(activation_location_type.dst, DstConfig(derive_gradients=derive_gradients))


@final
@dataclass(frozen=True)
class _Upstream(ScalarSource):
    """A scalar as `upstream` derives it, forward."""

    name: NamedScalar
    inner: Deriver
    pass_type: PassType = PassType.FORWARD
    layer_indexer: LayerIndexer = DEFAULT_LAYER_INDEXER
    exists_by_default: ClassVar[bool] = False

    @property
    def dst(self) -> NamedScalar:
        return self.name

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        return None if self.inner.basis is None else location_of(self.inner.basis.kind)

    @property
    def sub_activation_location_type_and_pass_types(self) -> tuple[ActivationLocationTypeAndPassType, ...]:
        by_kind = {location.kind: location for location in ActivationLocationType}
        pairs = [(by_kind[kind], pass_) for kind, pass_ in _captured(self.inner) if kind in by_kind]
        return tuple(
            ActivationLocationTypeAndPassType(location, PassType(pass_)) for location, pass_ in dict.fromkeys(pairs)
        )

    @property
    def source(self) -> quantities.ScalarSource:
        return DerivedSource(self.inner)


def _captured(deriver: Deriver) -> Iterator[tuple[str, str]]:
    """Yield kinds and passes of the raw sources below a deriver; the final gradient is that after the last block."""
    for source in deriver.sources:
        if isinstance(source, RawSource):
            yield source.kind, source.pass_
        elif isinstance(source, DerivedSource):
            yield from _captured(source.deriver)
        elif isinstance(source, MetricGrad):
            yield "resid.post", "backward"
