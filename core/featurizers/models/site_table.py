"""Table of the sites of a model: each kind with its layers, heads and widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featurizers.errors import FeaturizerError
from featurizers.format.sites import BLOCK_KINDS, HEAD_KINDS, MODEL_KINDS, Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.widths import width_of


@dataclass(frozen=True)
class SiteRow:
    """Sites of one kind that have one width.

    Attributes:
        kind: of the sites.
        layers: numbers of the blocks that have it; empty for a kind that a model has once.
        heads: number of heads that a site may name; None if it has none.
        width: of the activations, all heads together; None if it is not known without a run of the model.
        meaning: of the kind, in words.
    """

    kind: str
    layers: tuple[int, ...]
    heads: int | None
    width: int | None
    meaning: str

    @property
    def ranges(self) -> str:
        """Layers in short, such as ``0-2,5``."""
        starts = [n for n in self.layers if n - 1 not in self.layers]
        ends = [n for n in self.layers if n + 1 not in self.layers]
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def sites_of(model: Any) -> tuple[list[SiteRow], dict[str, str]]:
    """Return the sites of a model, and why it does not have those of the other kinds, by kind.

    Args:
        model: as `Anatomy` takes it; parameters on the meta device are enough.

    Raises:
        SiteError: the blocks of the model were not found.

    Examples:
        >>> from transformers import GPT2Config, GPT2Model
        >>> rows, missing = sites_of(GPT2Model(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=5)))
        >>> rows[0].kind, rows[0].ranges, rows[0].width
        ('resid.pre', '0-2', 8)
    """
    anatomy = Anatomy(model)
    rows: list[SiteRow] = []
    missing: dict[str, str] = {}
    for kind, meaning in {**BLOCK_KINDS, **MODEL_KINDS}.items():
        found: dict[tuple[int | None, int | None], list[int]] = {}
        for layer in range(anatomy.n_layers) if kind in BLOCK_KINDS else (None,):
            site = Site(kind, layer)
            try:
                width = width_of(anatomy, site)
            except FeaturizerError as error:
                missing.setdefault(kind, str(error))
                continue
            heads = anatomy.n_heads(site) if kind in HEAD_KINDS else None
            found.setdefault((heads, width), []).extend(() if layer is None else (layer,))
        rows += (SiteRow(kind, tuple(layers), heads, width, meaning) for (heads, width), layers in found.items())
        if found:
            missing.pop(kind, None)
    return rows, missing
