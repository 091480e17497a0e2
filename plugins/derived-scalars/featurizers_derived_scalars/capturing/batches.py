"""`Batch`: one run of several padded sequences; each is recorded as if it were alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping, Sequence
from typing import Final, TypeAlias, final

import torch
from featurizers.errors import SiteError
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from featurizers_derived_scalars.capturing.recording import Recorder
from featurizers_derived_scalars.circuit import Listener
from featurizers_derived_scalars.circuit.attention import Part
from featurizers_derived_scalars.circuit.running import Point

Function: TypeAlias = Callable[[Tensor], Tensor]

_TOKEN_AXES: Final[dict[Part, tuple[int, ...]]] = {
    "q": (2,),
    "k": (2,),
    "v": (2,),
    "logits": (2, 3),
    "probs": (2, 3),
    "z": (1,),
}
"""Axes of tokens in the parts of attention, as `Listener` gets them."""


@final
class Batch(Listener):
    """Cuts each tensor of a padded run into sequences, and gives each to the recorder of its sequence.

    Each sequence is padded on the right with its last token. No mask is needed: causal attention does not see what
    comes later, and this is checked in every layer.

    Args:
        recorders: one for each sequence, with the same needs.
        prompts: ids of each sequence.
    """

    def __init__(self, recorders: Sequence[Recorder], prompts: Sequence[Int[Tensor, " token"]]) -> None:
        self._recorders = recorders
        self._lengths = [len(tokens) for tokens in prompts]
        self._width = width = max(self._lengths)
        self.ids: Int[Tensor, "batch token"] = torch.stack(
            [torch.cat([tokens, tokens[-1:].expand(width - len(tokens))]) for tokens in prompts]
        )
        # Piece of one sequence -> (tensor of the model, number of the sequence, axes of tokens). The model goes on with
        # the tensor, so that the gradient is taken there and not in the piece.
        self._wholes: MutableMapping[Tensor, tuple[Tensor, int, tuple[int, ...]]] = WeakIdKeyDictionary()

    def taps(self) -> dict[Point, Function]:
        """Return for each point the function that its tensor goes through."""
        each, row_point = [recorder.taps() for recorder in self._recorders], self._recorders[0].row_point()
        return {
            point: functools.partial(self._tap, [taps[point] for taps in each], point == row_point) for point in each[0]
        }

    def wants_logits(self, module: nn.Module) -> bool:
        """Return True if the logits of this module are to be kept."""
        return self._recorders[0].wants_logits(module)

    def on_event(self, module: nn.Module, part: Part, tensor: Tensor) -> Tensor:
        """Give each sequence's part of attention to its recorder.

        Raises:
            SiteError: a token attends to a later one, so that padding would change it.
        """
        if part == "probs":
            for n, length in enumerate(self._lengths):
                if tensor[n, :, :length, length:].any():
                    raise SiteError(
                        f"{type(module).__name__} attends to later tokens, so that padding changes what is captured; "
                        "run one sequence at a time, with batch_size=1"
                    )
        functions = [functools.partial(recorder.on_event, module, part) for recorder in self._recorders]
        return self._in_each(functions, tensor, _TOKEN_AXES[part])

    def finish(self, logits: Tensor | None) -> None:
        """Give each recorder its logits."""
        one_row = self._recorders[0].row_point() is not None
        for n, recorder in enumerate(self._recorders):
            if logits is None:
                recorder.finish(None)
            else:
                recorder.finish(logits[n : n + 1] if one_row else self._cut(logits, n, (1,)))

    def gradients(self, values: Sequence[Tensor], roots: Sequence[Sequence[Tensor]]) -> list[list[Tensor | None]]:
        """Return the gradient of each sequence's value in each of its roots, by one backward pass.

        Sequences do not meet, so the gradient of the sum of all values is that of the sequence's own.
        """
        each = [[self._wholes.get(root, (root, None, ())) for root in own] for own in roots]
        tensors = {id(tensor): tensor for own in each for tensor, _, _ in own}
        found = torch.autograd.grad(list(values), list(tensors.values()), allow_unused=True) if tensors else ()
        by_id = dict(zip(tensors, found, strict=True))

        def of_piece(tensor: Tensor, number: int | None, axes: tuple[int, ...]) -> Tensor | None:
            gradient = by_id[id(tensor)]
            return gradient if gradient is None or number is None else self._cut(gradient, number, axes)

        return [[of_piece(*one) for one in own] for own in each]

    def _tap(self, functions: list[Function], only_row: bool, tensor: Tensor) -> Tensor:
        if only_row:
            return torch.cat([function(self._cut(tensor, n, (1,))) for n, function in enumerate(functions)])
        return self._in_each(functions, tensor, (1,))

    def _in_each(self, functions: Sequence[Function], tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Return the tensor with each sequence sent through its function; the tensor itself if nothing changed."""
        pieces = [self._cut(tensor, n, axes) for n in range(len(functions))]
        if tensor.requires_grad:
            for n, piece in enumerate(pieces):
                self._wholes[piece] = tensor, n, axes
        after = [function(piece) for function, piece in zip(functions, pieces, strict=True)]
        if all(new is old for new, old in zip(after, pieces, strict=True)):
            return tensor
        if tensor.dim() == 2:
            apart = tensor.view(len(after), -1, tensor.shape[-1])
            return torch.cat([_widened(piece[None], apart[n : n + 1], (1,)) for n, piece in enumerate(after)]).flatten(
                0, 1
            )
        return torch.cat([_widened(piece, tensor[n : n + 1], axes) for n, piece in enumerate(after)])

    def _cut(self, tensor: Tensor, number: int, axes: tuple[int, ...]) -> Tensor:
        """Return the part of one sequence, with a batch axis of 1, if the tensor has one, and without padding."""
        if tensor.dim() == 2:  # some models run their MLP on tokens of all sequences in one row
            return tensor[number * self._width :][: self._lengths[number]]
        piece = tensor[number : number + 1]
        for axis in axes:
            piece = piece.narrow(axis, 0, self._lengths[number])
        return piece


def _widened(piece: Tensor, whole: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return a sequence's part with the padding of the tensor that it was cut from."""
    size = {axis: piece.shape[axis] for axis in axes}
    for axis in reversed(axes):
        rest = whole.detach()
        for before in axes:
            if before < axis:
                rest = rest.narrow(before, 0, size[before])
        rest = rest.narrow(axis, size[axis], whole.shape[axis] - size[axis])
        piece = torch.cat([piece, rest.to(piece.dtype)], axis)
    return piece
