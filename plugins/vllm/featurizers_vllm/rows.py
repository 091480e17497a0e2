"""`Rows`: the edited requests of a worker, and their tokens in each forward pass.

The adapters of vLLM's two model runners tell it of requests that come, move and go, and of each pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from featurizers.format import Site
from torch import Tensor

from featurizers_vllm.admission import Edit
from featurizers_vllm.bank import NOBODY, Bank


@dataclass(frozen=True)
class _Request:
    """Edited request: its edits, and the number of tokens of its prompt."""

    edits: tuple[Edit, ...]
    prompt: int


class Rows:
    """Edited requests of one worker.

    A request is known by a number below ``requests``, its place in the runner's batch or in its table of requests.

    Args:
        banks: by armed site.
        requests: how many numbers there are.
    """

    def __init__(self, banks: Mapping[Site, Bank], requests: int) -> None:
        self.banks = dict(banks)
        self._requests: dict[int, _Request] = {}
        self._slots = {
            site: np.full((bank.stages, requests), NOBODY, dtype=np.int32) for site, bank in self.banks.items()
        }
        self._filled = 0

    # ------------------------------------------------------------------ requests
    @property
    def edited(self) -> tuple[int, ...]:
        """Numbers of the edited requests, in ascending order."""
        return tuple(sorted(self._requests))

    def add(self, number: int, edits: Sequence[Edit], prompt: int) -> None:
        """Take up a request in the place of one that had the number before.

        Args:
            number: of the request.
            edits: of the request; none if it is not edited.
            prompt: number of tokens of its prompt.
        """
        self.remove(number)
        for edit in edits:
            slot = self.banks[edit.site].acquire(edit.stage, edit.key, edit.program)
            self._slots[edit.site][edit.stage, number] = slot
        if edits:
            self._requests[number] = _Request(tuple(edits), prompt)

    def remove(self, number: int) -> None:
        """Forget a request; do nothing if it is not edited."""
        request = self._requests.pop(number, None)
        for edit in request.edits if request else ():
            self.banks[edit.site].release(edit.stage, edit.key)
            self._slots[edit.site][edit.stage, number] = NOBODY

    def move(self, source: int, target: int) -> None:
        """Give a request another number, in the place of the one that had it."""
        self.remove(target)
        self.swap(source, target)

    def swap(self, one: int, other: int) -> None:
        """Exchange the numbers of two requests; either may have no edits."""
        first, second = self._requests.pop(one, None), self._requests.pop(other, None)
        if first:
            self._requests[other] = first
        if second:
            self._requests[one] = second
        for slots in self._slots.values():
            slots[:, [one, other]] = slots[:, [other, one]]

    # ------------------------------------------------------------------ passes
    @torch.no_grad()
    def fill(
        self,
        order: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        positions: Tensor,
        tokens: Tensor,
    ) -> None:
        """Write which slot each token of the next pass belongs to.

        Args:
            order: numbers of the requests in the pass, in the order of their tokens, ``(n,)``.
            starts: first token of each of them, and the end of the last one, ``(n + 1,)``.
            positions: of the tokens in their requests.
            tokens: their ids.
        """
        if not self._requests:
            return self.clear()
        end = int(starts[-1])
        for site, bank in self.banks.items():
            slots = np.repeat(self._slots[site][:, order], np.diff(starts), axis=1)
            bank.slot[:, :end] = torch.from_numpy(slots).to(bank.slot.device)
            bank.slot[:, end : self._filled] = NOBODY
        self._filled = end
        for place, number in enumerate(order.tolist()):
            if request := self._requests.get(number):
                span = slice(int(starts[place]), int(starts[place + 1]))
                self._restrict(request, span, positions[span], tokens[span])
        return None

    def clear(self) -> None:
        """Write that no token of the next pass is edited."""
        if self._filled:
            for bank in self.banks.values():
                bank.slot[:, : self._filled] = NOBODY
            self._filled = 0

    def _restrict(self, request: _Request, span: slice, positions: Tensor, tokens: Tensor) -> None:
        """Take out the tokens of a request that its edits leave alone."""
        for edit in request.edits:
            if edit.is_everywhere:
                continue
            chosen = torch.ones_like(positions, dtype=torch.bool)
            if edit.positions is not None:
                wanted = [each + request.prompt if each < 0 else each for each in edit.positions]
                chosen &= torch.isin(positions, torch.tensor(wanted, dtype=positions.dtype, device=positions.device))
            elif edit.prompt_only:
                chosen &= positions < request.prompt
            if edit.special_tokens:
                special = torch.tensor(edit.special_tokens, dtype=tokens.dtype, device=tokens.device)
                chosen &= ~torch.isin(tokens, special)
            self.banks[edit.site].slot[edit.stage, span].masked_fill_(~chosen, NOBODY)
