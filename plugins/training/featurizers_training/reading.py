"""Reading a model's activations of many prompts, each distinct one once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import torch
from featurizers import Site
from featurizers.models import collect
from torch import Tensor, nn

from featurizers_training.pairs import Tokens
from featurizers_training.restarting import padded

KeyT = TypeVar("KeyT", bound=Hashable)
Where: TypeAlias = tuple[Tokens, Tokens]
"""A prompt, and tokens of it by their numbers from its start."""


@torch.no_grad()
def read_activations(
    model: nn.Module, sites: Sequence[Site], wanted: Sequence[Sequence[Where]], batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """For each site the activations of what is distinct in ``wanted``, and which is whose.

    Args:
        model: a decoder in evaluation mode.
        sites: where to read.
        wanted: of each site, prompts and as many positions of each; sites of which the same is wanted are read at once.
        batch_size: prompts a run.

    Returns:
        For each site ``(n_distinct, n_positions, d)``, in the order of `distinct`, and ``(n,)``.
    """
    device = next(model.parameters()).device
    together: dict[tuple[Where, ...], list[int]] = {}
    for j, keys in enumerate(wanted):
        together.setdefault(tuple(keys), []).append(j)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for keys, numbers in together.items():
        different, row_of = distinct(keys)
        parts = []
        order = sorted(range(len(different)), key=lambda i: len(different[i][0]))  # least padding
        for chunk in chunks(order, batch_size):
            ids, mask = padded([different[i][0] for i in chunk], device)
            positions = torch.tensor([different[i][1] for i in chunk])
            inputs = {"input_ids": ids, "attention_mask": mask.long()}
            parts.append(collect(model, inputs, [sites[j] for j in numbers], positions=positions))
        back = torch.tensor(order).argsort().to(device)
        for j in numbers:
            found[j] = torch.cat([part[sites[j]] for part in parts])[back], row_of
    return [found[j] for j in range(len(sites))]


def distinct(keys: Sequence[KeyT]) -> tuple[list[KeyT], Tensor]:
    """The distinct keys in order, and which of them each one is."""
    numbers: dict[KeyT, int] = {}
    rows = [numbers.setdefault(key, len(numbers)) for key in keys]
    return list(numbers), torch.tensor(rows)


def chunks(order: list[int], size: int) -> Iterator[list[int]]:
    """A list in parts of a size, the last of them the rest."""
    for i in range(0, len(order), size):
        yield order[i : i + size]
