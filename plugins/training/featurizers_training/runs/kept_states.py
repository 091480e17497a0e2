"""`KeptStates`: hidden states, keys and values of clean runs, from which runs with edits begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from featurizers.models import (
    Anatomy,
    Wrap,
    cache_argument,
    eager,
    empty_cache,
    first_tensor,
    is_keys,
    restarted,
    takes,
    takes_cache,
    wrap_like,
)
from torch import Tensor, nn

from featurizers_training.records import Tokens
from featurizers_training.runs.activations import padded


class KeptStates:
    """States of clean runs, kept so that a run with edits computes only what an edit can reach.

    Of each clean run are kept the outputs of the blocks where a run with edits may begin, at the tokens from the first
    edited one on, and in all later blocks the keys and values of the tokens before it. If that is more than the budget
    allows, the outputs of those blocks are kept at all tokens instead; if that is too much as well, nothing is kept.

    Args:
        anatomy: of the model.
        runs: the distinct clean runs: tokens, and the position of the first edited one.
        starts: blocks after which a run with edits may begin, ascending; -1 for the embedding.
        budget: bytes that may be kept.

    Attributes:
        kept: what a run with edits leaves out: ``tokens`` before the first edited one, ``layers``, or nothing.
    """

    def __init__(
        self, anatomy: Anatomy, runs: Sequence[tuple[Tokens, int]], starts: Sequence[int], budget: int
    ) -> None:
        self.anatomy, self.runs, self.starts, self._budget = anatomy, list(runs), list(starts), budget
        self.model, self.device = anatomy.model, next(anatomy.model.parameters()).device
        self.kept: tuple[str, ...] = ()
        self._recording = budget > 0
        self._hidden: dict[int, Tensor] = {}
        self._wraps: dict[int, Wrap] = {}
        self._keys: dict[int, tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Keep nothing from now on."""
        self.kept, self._recording = (), False
        self._hidden, self._keys = {}, {}

    # ------------------------------------------------------------------ recording clean runs

    @contextmanager
    def recording(self, rows: list[int]) -> Iterator[dict[str, Any]]:
        """Record the clean run of these rows, padded on the right, while the context lasts.

        Yields:
            Arguments that the model needs for it, beside the tokens and their mask.
        """
        cache = empty_cache() if self._recording and takes_cache(self.model) else None
        outputs: dict[int, Tensor] = {}
        with eager(), ExitStack() as hooks:
            for start in [start for start in self.starts if start >= 0 and self._recording]:
                blocks: Any = self.anatomy.layers
                hooks.callback(blocks[start].register_forward_hook(self._note(start, outputs)).remove)
            yield {"use_cache": cache is not None, **cache_argument(self.model, cache)}
        if self._recording:
            self._recording = self._store(rows, outputs, cache)

    def _note(self, start: int, outputs: dict[int, Tensor]) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            outputs[start] = first_tensor(output)
            self._wraps[start] = wrap_like(output)

        return note

    def _store(self, rows: list[int], outputs: dict[int, Tensor], cache: Any) -> bool:
        """Store the states of one clean run; return False if the budget does not allow it."""
        if not self.kept and not self._allocate(outputs, getattr(cache, "layers", [])):
            return False
        for i, row in enumerate(rows):
            tokens, first = self.runs[row]
            for start, x in outputs.items():
                self._hidden[start][row, : len(tokens) - first] = x[i, first : len(tokens)]
            for layer, kept in self._keys.items():
                for room, x in zip(kept, (cache.layers[layer].keys, cache.layers[layer].values), strict=True):
                    # the tokens before end where the others begin, so that their padding is on the left
                    room[row, :, room.shape[2] - first :] = x[i, :, :first]
        return True

    def _allocate(self, outputs: dict[int, Tensor], layers: Sequence[Any]) -> bool:
        """Allocate tensors for all runs, given the states of the first; return False if the budget is too small."""
        n, blocks = len(self.runs), range(self.starts[0] + 1, self.anatomy.n_layers)
        longest = max(first for _, first in self.runs)
        usable = longest > 0 and len(layers) == self.anatomy.n_layers and all(is_keys(layers[i]) for i in blocks)
        states = {i: (layers[i].keys, layers[i].values) for i in blocks} if usable else {}
        token_bytes = sum(x.shape[-1] * x.element_size() for x in outputs.values())
        key_bytes = sum(x[0, :, 0].numel() * x.element_size() * longest for pair in states.values() for x in pair)
        width = max(len(tokens) - first for tokens, first in self.runs)
        if not usable or n * (key_bytes + token_bytes * width) > self._budget:
            states, width = {}, max(len(tokens) for tokens, _ in self.runs)
            self.runs = [(tokens, 0) for tokens, _ in self.runs]
            if not outputs or n * token_bytes * width > self._budget:
                return False
        self._hidden = {start: x.new_zeros(n, width, x.shape[-1]) for start, x in outputs.items()}
        for i, (k, v) in states.items():
            k_shape, v_shape = ((n, x.shape[1], longest, x.shape[3]) for x in (k, v))
            self._keys[i] = k.new_zeros(k_shape), v.new_zeros(v_shape)
        self.kept = ("tokens",) * bool(states) + ("layers",) * bool(outputs)
        return True

    # ------------------------------------------------------------------ runs that begin from them

    @contextmanager
    def resumed(self, rows: Tensor, last_clean: int) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Let the model begin from what is kept of these runs while the context lasts.

        Args:
            rows: of the runs.
            last_clean: the last block that no edit reaches, or -1.

        Yields:
            Arguments of the model, for the tokens from the first edited one on, and how many tokens of each run come
            before it, ``(n,)``.
        """
        start = max(known for known in self.starts if known <= last_clean)
        inputs, prefix = self._inputs(rows, start)
        with ExitStack() as stack:
            if start >= 0:
                blocks: Any = self.anatomy.layers
                hidden = self._hidden[start][rows][:, : inputs["input_ids"].shape[1]]
                stack.enter_context(restarted(blocks, start, hidden, self._wraps[start]))
            yield inputs, prefix

    def _inputs(self, rows: Tensor, start: int) -> tuple[dict[str, Any], Tensor]:
        runs = [self.runs[i] for i in rows.tolist()]
        prefix = torch.tensor([first for _, first in runs])
        ids, mask = padded([tokens[first:] for tokens, first in runs], self.device)
        longest = int(prefix.max())
        if not self._keys or not longest:
            return {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}, prefix
        before = torch.arange(longest) >= (longest - prefix).unsqueeze(-1)
        mask = torch.cat([before.to(self.device), mask], dim=1).long()
        cache = self._cache(rows, start, longest)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": True, **cache_argument(self.model, cache)}
        if takes(self.model, "position_ids"):
            offsets = torch.arange(ids.shape[1], device=self.device)
            inputs["position_ids"] = prefix.unsqueeze(-1).to(self.device) + offsets
        return inputs, prefix

    def _cache(self, rows: Tensor, start: int, longest: int) -> Any:
        """Return a cache of the tokens before the first edited one; blocks that do not run get only a length."""
        from transformers import DynamicCache

        states = []
        for layer in range(self.anatomy.n_layers):
            if layer <= start:
                stand_in = torch.zeros(1, 1, 1, 1, device=self.device).expand(len(rows), 1, longest, 1)
                states.append((stand_in, stand_in))
            else:
                keys, values = (x[rows][:, :, x.shape[2] - longest :] for x in self._keys[layer])
                states.append((keys, values))
        return DynamicCache(states)
