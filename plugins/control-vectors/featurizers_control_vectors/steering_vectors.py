"""Vectors of the library steering-vectors: `to_steering_vector` and `read_steering_vector`.

Its ``SteeringVector`` holds an activation by layer, and the type of the layers whose outputs they are added to. The
library writes no files: people save the object, whose pickle runs code and is never opened, or its two fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from featurizers import DictionaryFeaturizer, Site
from featurizers.errors import ArtefactError, LoweringError, UsageError, WeightsError, shown
from featurizers.files import load_torch, os_errors
from torch import Tensor

from featurizers_control_vectors.edits import Edits, added, featurizer_of

KINDS: Final = {"decoder_block": "resid.post", "self_attn": "attn.out", "mlp": "mlp.out"}
"""Kind of site of each type of layer that is one."""
MAX_LAYERS: Final = 100_000


def to_steering_vector(edits: Edits, path: str | Path, *, all_tokens: bool = False) -> None:
    """Write edits that add a vector, as the fields of a ``SteeringVector``.

    ``SteeringVector(**torch.load(path, weights_only=True))`` is the vector.

    Args:
        edits: as for `to_gguf`; all at sites of one kind: ``resid.post``, ``attn.out`` or ``mlp.out``.
        path: of the new file.
        all_tokens: as for `to_gguf`.

    Raises:
        LoweringError: an edit is no addition at such a site, or has positions; the message says why.
        ArtefactError: there is a file already, or it cannot be written.
    """
    kinds: dict[str, None] = {}

    def check(site: Site) -> int:
        if site.kind not in KINDS.values() or site.layer is None:
            raise LoweringError(f"{site}: a steering vector is added at sites of {', '.join(KINDS.values())}")
        kinds[site.kind] = None
        if len(kinds) > 1:
            raise LoweringError(f"a steering vector is added at sites of one kind, not at {' and '.join(kinds)}")
        return site.layer

    directions = added(edits, check, "a steering vector", all_tokens=all_tokens)
    (layer_type,) = (name for name, kind in KINDS.items() if kind in kinds)
    path = Path(path)
    if path.exists():
        raise ArtefactError(str(path), "there is a file already; choose another name")
    with os_errors(path):
        torch.save({"layer_activations": dict(sorted(directions.items())), "layer_type": layer_type}, path)


def read_steering_vector(vector: object) -> dict[Site, DictionaryFeaturizer]:
    """Return a featurizer for each layer of a steering vector, by its site; its edit adds the vector, as multiplier 1.

    Args:
        vector: a ``SteeringVector`` of the library; or the path of a file that ``torch.save`` wrote of its fields
            (``vars(vector)``, or its ``layer_activations`` alone, which are then those of blocks).

    Raises:
        WeightsError: the file is damaged, or holds something else, such as the object itself.
        UsageError: it is neither, or is added where no site is.
    """
    if isinstance(vector, str | Path):
        where, name = str(vector), Path(vector).name
        fields = load_torch(Path(vector).expanduser(), str(Path(vector).parent))
        if isinstance(fields, dict) and "layer_activations" not in fields:
            fields = {"layer_activations": fields}
    else:
        where, name, fields = type(vector).__name__, type(vector).__name__, getattr(vector, "__dict__", None)
    if not isinstance(fields, dict) or not {"layer_activations"} <= fields.keys() <= {
        "layer_activations",
        "layer_type",
    }:
        raise WeightsError(where, f"{name} has not the fields layer_activations and layer_type of a SteeringVector")
    layer_type, activations = fields.get("layer_type", "decoder_block"), fields["layer_activations"]
    if not isinstance(layer_type, str) or layer_type not in KINDS:
        raise UsageError(
            f"{name} is added to layers of the type {shown(layer_type)}; these are sites: {', '.join(KINDS)}"
        )
    return {
        site: featurizer_of(site, direction, f"steering.{site.layer}")
        for site, direction in _directions(activations, KINDS[layer_type], where, name)
    }


def _directions(activations: Any, kind: str, where: str, name: str) -> list[tuple[Site, Tensor]]:
    """Return the direction at each site, float32 ``(d,)``."""
    if not isinstance(activations, Mapping) or not 0 < len(activations) <= MAX_LAYERS:
        raise WeightsError(where, f"{name} has no activations by layer")
    found: list[tuple[Site, Tensor]] = []
    for layer, activation in activations.items():
        if type(layer) is not int or not 0 <= layer <= MAX_LAYERS:
            raise WeightsError(where, f"{name} names a layer {shown(layer)}, not a number from 0 on")
        if not isinstance(activation, Tensor) or not activation.is_floating_point() or not activation.numel():
            raise WeightsError(where, f"{name} has no tensor of real numbers for layer {layer}")
        if activation.numel() != activation.shape[-1:].numel() or not bool(activation.isfinite().all()):
            raise WeightsError(where, f"{name}: the activation of layer {layer} is not one vector of finite numbers")
        found.append((Site(kind, layer), activation.detach().reshape(-1).float().cpu().clone()))
    if len({len(direction) for _, direction in found}) > 1:
        raise WeightsError(where, f"{name} has activations of several widths")
    return sorted(found, key=lambda pair: pair[0].layer or 0)
