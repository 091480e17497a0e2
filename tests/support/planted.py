"""Counterfactual pairs whose answers follow from a planted subspace of a random model, by a plain torch hook."""

from __future__ import annotations

from typing import Any

import torch
from featurizers_subspace import SubspaceFeaturizer
from featurizers_training import Pairs
from torch import Tensor

from tests.support.models import VOCABULARY, WIDTH, hooked, module_of, read, tiny_model

ARCHITECTURE, LAYER, SITE = "llama", 1, "resid.post:1"
SIZE = 4
PLANTED: Tensor = SubspaceFeaturizer.from_basis(
    torch.randn(WIDTH, SIZE, generator=torch.Generator().manual_seed(77)), orthonormalize=True
).basis.detach()
"""The basis of the subspace, ``(d, k)``."""


def model() -> Any:
    """The model; it is shared, and frozen."""
    return tiny_model(ARCHITECTURE)


@torch.no_grad()
def planted_pairs(count: int, seed: int = 0, length: int = 5) -> Pairs:
    """Pairs of random prompts; the label is what the model says with the source's part in the planted subspace."""
    generator = torch.Generator().manual_seed(seed)
    base, source = (torch.randint(1, VOCABULARY, (count, length), generator=generator) for _ in range(2))
    module, side = module_of(model(), ARCHITECTURE, "resid.post", LAYER)
    there = read(model(), module, side, input_ids=source)

    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, -1] += (there[:, -1] - hidden[:, -1]) @ PLANTED @ PLANTED.T
        return hidden

    before = model()(base).logits[:, -1].argmax(-1)
    with hooked(module, side, edit):
        label = model()(base).logits[:, -1].argmax(-1)
    rows = zip(base.tolist(), source.tolist(), label.tolist(), before.tolist(), strict=True)
    return Pairs.of({"base": b, "source": s, "label": y, "base_label": x} for b, s, y, x in rows)


def overlap(basis: Tensor) -> float:
    """Share of the planted subspace that is in the span of an orthonormal basis, 0 to 1."""
    return float((basis.T @ PLANTED).square().sum()) / SIZE
