"""transformer-debugger's classes by their own names, over `Deriver`, `RawActivations` and the layer maps.

Code that composes its scalar derivers runs here with its imports changed, on any decoder. A `ScalarDeriver` makes a
`Deriver` for each pass that it can be derived in. Two things differ on purpose: a transformed deriver offers the pass
whose output it transforms and no other, where there it gives forward values under the name of the backward pass; and no
call changes the store.
"""

from featurizers_derived_scalars.compat.derivers import (
    DerivedScalarSource,
    RawScalarSource,
    ScalarDeriver,
    ScalarSource,
    make_scalar_deriver,
)
from featurizers_derived_scalars.compat.names import (
    DEFAULT_LAYER_INDEXER,
    ActivationLocationType,
    ConstantLayerIndexer,
    DerivedScalarType,
    IdentityLayerIndexer,
    LayerIndex,
    LayerIndexer,
    LocationWithinLayer,
    NoLayersLayerIndexer,
    OffsetLayerIndexer,
    PassType,
    StaticLayerIndexer,
)
from featurizers_derived_scalars.compat.stores import (
    ActivationLocationTypeAndPassType,
    ActivationsAndMetadata,
    DerivedScalarTypeAndPassType,
    DstConfig,
    RawActivationStore,
)

__all__ = [
    "DEFAULT_LAYER_INDEXER",
    "ActivationLocationType",
    "ActivationLocationTypeAndPassType",
    "ActivationsAndMetadata",
    "ConstantLayerIndexer",
    "DerivedScalarSource",
    "DerivedScalarType",
    "DerivedScalarTypeAndPassType",
    "DstConfig",
    "IdentityLayerIndexer",
    "LayerIndex",
    "LayerIndexer",
    "LocationWithinLayer",
    "NoLayersLayerIndexer",
    "OffsetLayerIndexer",
    "PassType",
    "RawActivationStore",
    "RawScalarSource",
    "ScalarDeriver",
    "ScalarSource",
    "StaticLayerIndexer",
    "make_scalar_deriver",
]
