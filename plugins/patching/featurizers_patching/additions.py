"""`logits_with_additions`: the logits of one prompt after each of many edits that add vectors to activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from featurizers import Site
from featurizers.errors import ShapeError, UsageError
from jaxtyping import Float
from torch import Tensor, nn

from featurizers_patching.engine.cells import Cells, Edit, IntArray
from featurizers_patching.engine.clean import Prompts
from featurizers_patching.engine.ending import checked_head
from featurizers_patching.engine.sweep import Report, Sweep

CPU_ROWS: Final = 1024


class Addition(NamedTuple):
    """A vector that is added to the activations of one token at one site.

    Attributes:
        site: such as ``mlp.out:3``.
        token: of the prompt, from 0.
        vector: ``(width,)``.
    """

    site: Site
    token: int
    vector: Tensor


@torch.inference_mode(False)
@torch.no_grad()
def logits_with_additions(
    model: nn.Module,
    tokens: Sequence[int],
    cells: Sequence[Sequence[Addition]],
    *,
    freeze: Sequence[str] = (),
    batch_rows: int = CPU_ROWS,
    verify: int = 2,
    progress: Callable[[float], None] | None = None,
) -> tuple[Float[Tensor, "cells vocab"], Float[Tensor, " vocab"]]:
    """Return the logits of the last token with each cell's vectors added, and without any.

    All cells run together on packed rows, as those of `featurizers.patch` do. Vectors of one cell at one token of one
    site are summed.

    Args:
        model: a decoder of `transformers` with its head, in evaluation mode.
        tokens: of the prompt.
        cells: the additions of each cell; none for the plain run.
        freeze: parts that stay as in the plain run; see `featurizers.patch`.
        batch_rows: tokens that run together at most.
        verify: number of cells to compare with whole runs.
        progress: is called with the share of the work that is done.

    Raises:
        UsageError: the model is in training mode, or a token is not in the prompt.
        SiteError: the model does not have a site.
        ShapeError: the vectors of a site have different widths.
    """
    if model.training:
        raise UsageError("the model is in training mode, so that its runs differ; call model.eval()")
    checked_head(model)
    summed: dict[tuple[int, Site, int], Tensor] = {}
    for number, cell in enumerate(cells):
        for site, token, vector in cell:
            if not 0 <= token < len(tokens):
                raise UsageError(f"the prompt has {len(tokens)} tokens, and a vector is added at {token}")
            key = number, site, token
            summed[key] = summed[key] + vector if key in summed else vector
    sites = list(dict.fromkeys(site for _, site, _ in summed))
    of_site: dict[Site, list[Tensor]] = {site: [] for site in sites}
    place = []
    for (_, site, _), vector in summed.items():
        place.append(len(of_site[site]))
        of_site[site].append(vector)
    for site, vectors in of_site.items():
        if len({tuple(vector.shape) for vector in vectors}) > 1:
            raise ShapeError(f"the vectors that are added at {site} have different shapes")
    places = np.array(place, dtype=np.int64)

    def adding(vectors: Tensor) -> Edit:
        def edit(x: Tensor, numbers: IntArray) -> Tensor:
            return x + vectors[torch.from_numpy(places[numbers])].to(x)

        return edit

    order = {site: number for number, site in enumerate(sites)}
    table = Cells.of(
        np.zeros(len(cells)),
        [number for number, _, _ in summed],
        [order[site] for _, site, _ in summed],
        [token for _, _, token in summed],
    )
    found: dict[int, Tensor] = {}

    def consume(numbers: IntArray, logits: Tensor, _: Tensor) -> None:
        found.update(zip(numbers.tolist(), logits[:, 0].cpu(), strict=True))

    options: dict[str, Any] = {} if progress is None else {"progress": progress}
    sweep = Sweep(
        model,
        Prompts([tuple(tokens)], np.array([[len(tokens) - 1]])),
        table,
        np.zeros(len(table.cell), dtype=bool),
        sites,
        [adding(torch.stack(vectors)) for vectors in of_site.values()],
        freeze,
        verify=verify,
        **options,
    )
    clean = sweep.run(consume, Report(batch_rows=batch_rows))[0, 0].cpu()
    return torch.stack([found.get(number, clean) for number in range(len(cells))]) if cells else clean[:0], clean
