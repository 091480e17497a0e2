"""`Bank`: the edits of one site as tensors of fixed shape, so that a compiled or captured pass never changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from featurizers import Program
from jaxtyping import Float, Int
from torch import Tensor, nn

SCALARS: Final = ("bias", "threshold", "slope", "offset", "floor", "constant", "factor")
"""Numbers of each row, as in `featurizers.Program`."""
FREE: Final = -2
"""Owner of a row that no edit has."""
NOBODY: Final = -1
"""Slot of a token that is not edited."""


@dataclass
class _Slot:
    """A slot that is taken: its number, and how many requests use it."""

    number: int
    users: int


class Bank(nn.Module):
    """Edits of the activations at one site, of all requests of a batch at once.

    A stage is the n-th operation of a request at this site. Each stage has rows, the features of `Program`; a slot owns
    some of them, and each token of the batch belongs to one slot or to none. The pass computes all rows for all
    tokens, and keeps those of the token's own slot: two thin matrix products, and no branch that depends on data.

    Args:
        width: of the activations.
        features: rows that each of ``requests`` can have in a stage, so that an admitted request always finds room.
        requests: most requests in a batch.
        tokens: most tokens in a batch.
        stages: most operations of a request here.
        device: of the tensors.
    """

    read: Float[Tensor, "stages rows width"]
    write: Float[Tensor, "stages rows width"]
    bias: Float[Tensor, "stages rows"]
    threshold: Float[Tensor, "stages rows"]
    slope: Float[Tensor, "stages rows"]
    offset: Float[Tensor, "stages rows"]
    floor: Float[Tensor, "stages rows"]
    constant: Float[Tensor, "stages rows"]
    factor: Float[Tensor, "stages rows"]
    owner: Int[Tensor, "stages rows"]
    slot: Int[Tensor, "stages tokens"]

    def __init__(
        self,
        width: int,
        *,
        features: int,
        requests: int,
        tokens: int,
        stages: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        rows = features * requests
        options: dict[str, Any] = {"device": device, "dtype": torch.float32}
        for name in ("read", "write"):
            self.register_buffer(name, torch.zeros(stages, rows, width, **options), persistent=False)
        for name in SCALARS:
            self.register_buffer(name, torch.zeros(stages, rows, **options), persistent=False)
        integers: dict[str, Any] = {"device": device, "dtype": torch.int32}
        self.register_buffer("owner", torch.full((stages, rows), FREE, **integers), persistent=False)
        self.register_buffer("slot", torch.full((stages, tokens), NOBODY, **integers), persistent=False)
        self.stages = stages
        self._taken: list[dict[str, _Slot]] = [{} for _ in range(stages)]
        self._rows: list[dict[int, list[int]]] = [{} for _ in range(stages)]
        self._free = [list(range(rows)) for _ in range(stages)]
        self._numbers = [list(range(requests)) for _ in range(stages)]

    def forward(self, hidden: Float[Tensor, "tokens width"], residual: Tensor | None) -> Tensor:
        """Return what takes the place of ``hidden``, so that ``hidden + residual`` are the edited activations.

        Args:
            hidden: what a layer or a module adds.
            residual: the stream without it; None if ``hidden`` are the activations.
        """
        x = hidden.float() if residual is None else hidden.float() + residual.float()
        total = torch.zeros_like(x)
        for stage in range(self.stages):
            pre = x @ self.read[stage].mT + self.bias[stage]
            active = torch.maximum(self.slope[stage] * pre + self.offset[stage], self.floor[stage])
            gate = torch.where(pre > self.threshold[stage], active, 0.0)
            amount = self.constant[stage] + self.factor[stage] * gate
            mine = self.slot[stage].narrow(0, 0, hidden.shape[0]).unsqueeze(1) == self.owner[stage].unsqueeze(0)
            change = torch.where(mine, amount, 0.0) @ self.write[stage]
            x, total = x + change, total + change
        return (hidden.float() + total).to(hidden.dtype)

    @torch.no_grad()
    def acquire(self, stage: int, key: str, program: Program) -> int:
        """Return the slot of an edit, whose rows are written if no other request has them.

        Args:
            stage: of the edit.
            key: equal for equal edits.
            program: in float32.
        """
        taken = self._taken[stage]
        if key not in taken:
            count = len(program.constant)
            if count > len(self._free[stage]) or not self._numbers[stage]:
                raise RuntimeError("the bank is full: more requests are in the batch than it was made for")
            number = self._numbers[stage].pop()
            rows, self._free[stage] = self._free[stage][:count], self._free[stage][count:]
            self._write(stage, rows, number, program)
            self._rows[stage][number] = rows
            taken[key] = _Slot(number, 0)
        taken[key].users += 1
        return taken[key].number

    @torch.no_grad()
    def release(self, stage: int, key: str) -> None:
        """Give back an edit that `acquire` gave; its rows are free when no request has it."""
        slot = self._taken[stage][key]
        slot.users -= 1
        if not slot.users:
            rows = self._rows[stage].pop(slot.number)
            self.owner[stage, self._index(rows)] = FREE
            self._free[stage] += rows
            self._numbers[stage].append(slot.number)
            del self._taken[stage][key]

    @property
    def slots(self) -> int:
        """Number of slots that are taken, in all stages."""
        return sum(map(len, self._taken))

    def _write(self, stage: int, rows: Sequence[int], number: int, program: Program) -> None:
        index = self._index(rows)
        given, gate = program.rows, program.rows.gate
        like = program.constant
        parts = {"write": given.write, "constant": program.constant, "factor": program.factor}
        if gate is None or not program.factor.any():  # nothing is read; a gate that is never open
            parts |= {"read": torch.zeros_like(given.write), "bias": torch.zeros_like(like)}
            parts |= {"threshold": torch.full_like(like, torch.inf), "slope": torch.zeros_like(like)}
            parts |= {"offset": torch.zeros_like(like), "floor": torch.zeros_like(like)}
        else:
            parts |= {"read": given.read, "bias": given.bias, "threshold": gate.threshold, "slope": gate.slope}
            parts |= {"offset": gate.offset, "floor": gate.floor}
        for name, part in parts.items():
            buffer = self.get_buffer(name)
            buffer[stage, index] = part.to(buffer)
        self.owner[stage, index] = number

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.owner.device)
