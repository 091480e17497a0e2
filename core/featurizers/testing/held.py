"""`Held`: a model that a library holds, beside the model itself; and `CELLS`, all edits that are tried with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

import featurizers
from featurizers.models.operations import Operation

ModulePlace: TypeAlias = "tuple[str, Literal['input', 'output'], slice | None]"
"""Path of a module, its side, and the columns of a head or None."""

SITES = (
    "embed",
    "resid.pre:1",
    "attn.z:1",
    "attn.z:1:1",
    "attn.out:1",
    "mlp.act:1",
    "mlp.out:1",
    "resid.post:1",
    "norm.out",
)
"""Sites that are edited, each by steering all tokens."""

SITE = "resid.post:1"
"""Site at which all operations are tried."""

IDS = torch.tensor([[5, 17, 9, 31, 22, 8], [40, 3, 12, 27, 6, 35]])
SOURCE_IDS = torch.tensor([[11, 29, 4, 38, 15, 21], [7, 33, 19, 2, 41, 26]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


class Held:
    """A model as a library holds it, with a copy of the model as it was before.

    Subclass it where calls of the holder differ from those of `transformers`.

    Args:
        holder: what a user gives to `featurizers.intervene`.
        plain: deep copy of the model of transformers, which plain hooks act on. It has two blocks or more, a vocabulary
            of at least 48 tokens, and no end-of-sequence token.
        modules: for each of `SITES` that the model has, the module of ``plain`` that carries it. Other sites must be
            refused.
        hooked: module that takes the hooks, if the holder is no module itself.
    """

    def __init__(
        self, holder: Any, plain: nn.Module, modules: Mapping[str, ModulePlace], *, hooked: nn.Module | None = None
    ) -> None:
        self.holder, self.plain = holder, plain
        self.modules: dict[str, ModulePlace] = dict(modules)
        self.hooked: nn.Module = holder if hooked is None else hooked

    def inputs(self, *, padded: bool = False, source: bool = False) -> dict[str, Tensor]:
        """Return inputs of the plain model: two prompts of six tokens; padded on the left, the first has four."""
        ids = SOURCE_IDS if source else IDS
        if not padded:
            return {"input_ids": ids}
        return {"input_ids": ids, "attention_mask": MASK, "position_ids": (MASK.cumsum(-1) - 1).clamp_min(0)}

    def of_holder(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs of the plain model as the holder takes them."""
        return dict(inputs)

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the holder on inputs of the plain model and return its logits, ``(batch, sequence, vocabulary)``."""
        output = self.holder(**self.of_holder(inputs))
        return output if isinstance(output, Tensor) else output.logits

    def plain_logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the plain model."""
        logits: Tensor = self.plain(**inputs).logits
        return logits

    def run(self, operations: Mapping[str, Operation], inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """Return the logits of an edited run, and what was collected by site."""
        with featurizers.intervene(self.holder, operations) as collected:
            logits = self.logits(inputs)
        return logits, dict(collected)

    def generate(
        self, operations: Mapping[str, Operation], inputs: Mapping[str, Tensor], **options: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the tokens of an edited call of ``generate``, prompt included, and what was collected by site."""
        with featurizers.intervene(self.holder, operations) as collected:
            tokens = self.holder.generate(**self.of_holder(inputs), **options)
        return tokens, dict(collected)


@dataclass(frozen=True)
class Cell:
    """Edit that is tried with a holder.

    Attributes:
        name: for people.
        group: column of the table that it belongs to.
        site: that is edited.
        edit: ``steer``, ``ablate``, ``interchange`` (with activations), ``interchange of inputs``,
            ``interchange with itself``, ``mask``, ``collect``, or ``collect()`` for `featurizers.collect`.
        positions: of the operation.
        padded: whether the prompts are padded on the left.
        gradient: whether the gradient is compared and not the logits.
        options: of ``generate``; None for a forward pass.
    """

    name: str
    group: str
    site: str
    edit: str
    positions: Sequence[Any] | None = None
    padded: bool = False
    gradient: bool = False
    options: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        """Return the name."""
        return self.name


def _operations() -> Iterator[Cell]:
    for padded in (False, True):
        group, suffix = ("left padding", ", padded") if padded else ("operations", "")
        yield Cell(f"steer first and last{suffix}", group, SITE, "steer", [0, -1], padded)
        yield Cell(f"steer a token of each row{suffix}", group, SITE, "steer", [[0], [2]], padded)
        yield Cell(f"ablate{suffix}", group, SITE, "ablate", None, padded)
        yield Cell(f"interchange with activations{suffix}", group, SITE, "interchange", [0, -1], padded)
        yield Cell(f"interchange with inputs{suffix}", group, SITE, "interchange of inputs", [0, -1], padded)
        yield Cell(f"interchange with itself{suffix}", group, SITE, "interchange with itself", None, padded)
        yield Cell(f"mask{suffix}", group, SITE, "mask", [-1], padded)
        yield Cell(f"collect in intervene{suffix}", "collect", SITE, "collect", [-1], padded)
        yield Cell(f"collect(){suffix}", "collect", SITE, "collect()", [0, -1], padded)
        yield Cell(f"gradient of a mask{suffix}", "gradients", SITE, "mask", [-1], padded, gradient=True)


def _generation() -> Iterator[Cell]:
    ways: dict[str, dict[str, Any]] = {"": {}, ", no cache": {"use_cache": False}, ", beams": {"num_beams": 2}}
    for name, options in ways.items():
        yield Cell(f"generate, steer all{name}", "generate", SITE, "steer", options=options)
        yield Cell(f"generate, steer last{name}", "generate", SITE, "steer", [-1], options=options)
    yield Cell("generate, steer first and last, padded", "generate", SITE, "steer", [0, -1], padded=True, options={})
    yield Cell("generate, collect", "generate", SITE, "collect", options={})


CELLS: tuple[Cell, ...] = (
    *(Cell(f"steer {site}", "sites", site, "steer") for site in SITES),
    *_operations(),
    *_generation(),
)
"""All that is tried with a holder."""
