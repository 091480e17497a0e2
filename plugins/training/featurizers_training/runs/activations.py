"""Read a model's activations for many prompts; each distinct prompt is run once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import torch
from featurizers import Site
from featurizers.models import collect
from torch import Tensor, nn

from featurizers_training.records import Tokens

KeyT = TypeVar("KeyT", bound=Hashable)
PromptTokens: TypeAlias = tuple[Tokens, Tokens]
"""A prompt, and positions of tokens in it."""


@torch.no_grad()
def read_activations(
    model: nn.Module, sites: Sequence[Site], prompts: Sequence[Sequence[PromptTokens]], batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Read the activations at each site of each distinct prompt.

    Args:
        model: a decoder in evaluation mode.
        sites: where to read.
        prompts: for each site, prompts with the same number of positions; sites with the same prompts share runs.
        batch_size: prompts in a run.

    Returns:
        For each site the activations ``(n_distinct, n_positions, d)`` of its distinct prompts, in the order of
        `distinct`, and for each prompt the row of its activations, ``(n,)``.
    """
    device = next(model.parameters()).device
    sites_of: dict[tuple[PromptTokens, ...], list[int]] = {}
    for j, of_site in enumerate(prompts):
        sites_of.setdefault(tuple(of_site), []).append(j)
    read: dict[int, tuple[Tensor, Tensor]] = {}
    for same, numbers in sites_of.items():
        different, row_of = distinct(same)
        parts = []
        order = sorted(range(len(different)), key=lambda i: len(different[i][0]))  # least padding
        for chunk in chunks(order, batch_size):
            ids, mask = padded([different[i][0] for i in chunk], device)
            positions = torch.tensor([different[i][1] for i in chunk])
            inputs = {"input_ids": ids, "attention_mask": mask.long()}
            parts.append(collect(model, inputs, [sites[j] for j in numbers], positions=positions))
        back = torch.tensor(order).argsort().to(device)
        for j in numbers:
            read[j] = torch.cat([part[sites[j]] for part in parts])[back], row_of
    return [read[j] for j in range(len(sites))]


def each_token_once(read: Iterable[tuple[Sequence[PromptTokens], Tensor]]) -> Tensor:
    """Return activations ``(n, d)``, those of each token of a prompt once, in order of first use.

    Args:
        read: prompts with positions, and their activations ``(prompts, n_positions, d)``.
    """
    by_token: dict[tuple[Tokens, int], Tensor] = {}
    for prompts, activations in read:
        for (prompt, positions), rows in zip(prompts, activations, strict=True):
            for position, row in zip(positions, rows, strict=True):
                by_token.setdefault((prompt, position), row)
    return torch.stack(list(by_token.values()))


def distinct(keys: Sequence[KeyT]) -> tuple[list[KeyT], Tensor]:
    """Return the distinct keys in order of first use, and for each key its index among them, ``(n,)``."""
    numbers: dict[KeyT, int] = {}
    rows = [numbers.setdefault(key, len(numbers)) for key in keys]
    return list(numbers), torch.tensor(rows)


def chunks(order: list[int], size: int) -> Iterator[list[int]]:
    """Yield a list in parts of ``size``; the last part may be shorter."""
    for i in range(0, len(order), size):
        yield order[i : i + size]


def padded(rows: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids padded on the right, and a mask that is true for tokens; both ``(n, longest)``."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=device)
    return ids, mask
