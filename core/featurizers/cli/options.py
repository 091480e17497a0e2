"""Options that several commands share: layers, and the dtype of a model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from featurizers.errors import UsageError

if TYPE_CHECKING:
    import torch

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")


def layer_numbers(text: str, n_layers: int | None = None) -> list[int]:
    """Parse layers such as ``4,8,12`` or ``0-29``, or both; each layer once, in the order of the text.

    Args:
        text: of the option.
        n_layers: number of layers of the model; None if it is not known yet.

    Raises:
        UsageError: the text is not of that form, or names a layer that the model does not have.

    Examples:
        >>> layer_numbers("4,0-2,1")
        [4, 0, 1, 2]
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if not match:
            raise UsageError(
                f"layers are numbers with commas between, and ranges, such as 4,8,12 or 0-11, not {text!r}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"the layers {part.strip()!r} end before they begin")
        if n_layers is not None and last >= n_layers:
            raise UsageError(
                f"the layers {part.strip()!r} are not in the model, which has those from 0 to {n_layers - 1}"
            )
        layers += range(first, last + 1)
    return list(dict.fromkeys(layers))


def dtype_named(name: str) -> torch.dtype | None:
    """Return the dtype of a name; None for ``auto``, the dtype that the model is stored in.

    Raises:
        UsageError: there is no dtype of that name.
    """
    if name not in DTYPES:
        raise UsageError(f"a dtype is one of {', '.join(DTYPES)}, not {name!r}")
    import torch

    dtype: torch.dtype | None = None if name == "auto" else getattr(torch, name)
    return dtype
