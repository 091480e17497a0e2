"""Places of the sites that `featurizers.testing.HolderContract` edits, from paths written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def places(modules: Mapping[str, tuple[str, str]], head_width: int) -> dict[str, Any]:
    """Return the modules of the contract's sites, from paths by kind in which '{}' is the layer.

    Args:
        modules: path and side by kind of site.
        head_width: width of an attention head.
    """
    found: dict[str, Any] = {}
    for kind, (path, side) in modules.items():
        found[kind if kind in ("embed", "norm.out") else f"{kind}:1"] = (path.format(1), side, None)
    if "attn.z:1" in found:
        found["attn.z:1:1"] = (*found["attn.z:1"][:2], slice(head_width, 2 * head_width))
    return found
