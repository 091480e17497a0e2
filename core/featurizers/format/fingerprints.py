"""Fingerprints of tensors: a hash that is equal where dtypes, shapes and bytes are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from featurizers.format.pieces import Pieces, Stored

if TYPE_CHECKING:
    from torch import Tensor


def fingerprint(tensors: Iterable[Tensor] | Mapping[str, Stored], about: str | None = None) -> str:
    """Return a SHA-256, in hexadecimal, of the dtypes, shapes and bytes of tensors in their order.

    The digest is the same on every device. It is stored in files, so that it never changes.

    Args:
        tensors: whose fingerprint it is; the names of a mapping enter it.
        about: text that enters it first, such as a kind and a config.

    Examples:
        >>> import torch
        >>> fingerprint([torch.ones(2)]) == fingerprint([torch.ones(2)])
        True
        >>> fingerprint([torch.ones(2)]) == fingerprint([torch.ones(2, 1)])
        False
    """
    import torch

    digest = hashlib.sha256()
    if about is not None:
        digest.update(f"{about};".encode())
    named = tensors.items() if isinstance(tensors, Mapping) else ((None, tensor) for tensor in tensors)
    for name, tensor in named:
        label = "" if name is None else f"{name} "
        digest.update(f"{label}{tensor.dtype} {tuple(tensor.shape)};".encode())
        for piece in tensor.read() if isinstance(tensor, Pieces) else (tensor,):
            flat = piece.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
