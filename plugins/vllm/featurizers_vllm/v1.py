"""vLLM's V1 model runner: requests come from the batch updates of a logits processor, tokens from the forward context.

Nothing here imports vLLM; it is given vLLM's objects.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featurizers_vllm.admission import Admission
from featurizers_vllm.rows import Rows


def update(rows: Rows, admission: Admission, batch_update: Any) -> None:
    """Follow a change of the batch, in the order that vLLM documents: removed, added, moved.

    Args:
        rows: of the worker.
        admission: which admitted the requests.
        batch_update: vLLM's ``BatchUpdate``; None if nothing changed.
    """
    if batch_update is None:
        return
    for number in batch_update.removed:
        rows.remove(number)
    for number, params, prompt, _ in batch_update.added:
        edits = admission.of(params.extra_args)
        rows.add(number, edits, len(prompt or ()))
    for source, target, direction in batch_update.moved:
        if direction.name == "SWAP":
            rows.swap(source, target)
        else:
            rows.move(source, target)


def starts(metadata: Any) -> npt.NDArray[np.int64] | None:
    """Return the first token of each request in a pass, and the end, ``(n + 1,)``; None in a pass that serves nobody.

    Args:
        metadata: ``attn_metadata`` of the forward context.
    """
    if not metadata:
        return None
    for each in metadata.values():
        found = getattr(each, "query_start_loc", None)
        if found is not None:
            return np.asarray(found.cpu(), dtype=np.int64)
    raise RuntimeError("this attention backend of vLLM does not say which tokens are whose")


def fill(rows: Rows, metadata: Any, positions: Any, tokens: Any) -> None:
    """Tell `Rows` of a forward pass, before it runs."""
    if not rows.edited:
        return rows.clear()
    found = starts(metadata)
    if found is None:
        return rows.clear()
    if rows.edited[-1] >= len(found) - 1:
        raise RuntimeError("a request whose edits were admitted is not in the batch that runs")
    end = int(found[-1])
    return rows.fill(np.arange(len(found) - 1), found, positions[:end], tokens[:end])
