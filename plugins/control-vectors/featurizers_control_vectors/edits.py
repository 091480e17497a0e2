"""Edits that add a vector, taken from operations and artefacts; and featurizers of such vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from featurizers import DictionaryFeaturizer, Featurizer, Site, Steer, lower
from featurizers.errors import LoweringError
from featurizers.features import Program
from featurizers.models import Operation
from torch import Tensor

Edit = Program | Operation
Edits = Mapping[Any, "Edit | Sequence[Edit]"] | Iterable["Edit | Featurizer[Any]"] | Featurizer[Any]
"""Edits by site; those of featurizers that know their sites; or featurizers that hold edits."""


def featurizer_of(site: Site, direction: Tensor, name: str) -> DictionaryFeaturizer:
    """Return the featurizer of one direction, with the edit that adds it: its feature grows by 1 then."""
    squared = direction.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    featurizer = DictionaryFeaturizer.from_tensors(
        W_enc=(direction / squared).unsqueeze(0),
        W_dec=direction.unsqueeze(0),
        b_enc=torch.zeros(1),
        b_dec=torch.zeros(len(direction)),
        rule="identity",
    )
    featurizer.site, featurizer.id = site, name
    featurizer.edits = [Steer(featurizer, delta=1.0)]
    return featurizer


def added(edits: Any, check: Callable[[Site], int], what: str, *, all_tokens: bool) -> dict[int, Tensor]:
    """Return the vector that edits add at each layer, float32 ``(d,)``; several at one layer are added up.

    Args:
        edits: see `Edits`.
        check: returns the layer of a site, and raises for one that the format does not have.
        what: name of the format in errors.
        all_tokens: whether to let edits that leave out special tokens change every token.

    Raises:
        LoweringError: an edit is no addition at such a site, or has positions; the message says why.
    """
    directions: dict[int, Tensor] = {}
    for given, edit in _listed(edits):
        program = lower(edit) if isinstance(edit, Operation) else edit
        if (site := program.site if given is None else given) is None:
            raise LoweringError(
                "the featurizer does not say where it belongs; give its site: {'resid.post:8': operation}"
            )
        site = Site.parse(site)
        layer, direction = check(site), _vector(program, site, what, all_tokens)
        if layer in directions and directions[layer].shape != direction.shape:
            raise LoweringError(f"{site} has edits of widths {len(directions[layer])} and {len(direction)}")
        directions[layer] = directions[layer] + direction if layer in directions else direction
    if len({len(direction) for direction in directions.values()}) != 1:
        widths = sorted({len(direction) for direction in directions.values()})
        raise LoweringError(f"the directions of {what} have one width, and there are {widths or 'no edits'}")
    return directions


def _listed(edits: Any) -> list[tuple[Any, Edit]]:
    """Return edits with their sites, None for those of the featurizers."""
    if isinstance(edits, Mapping):
        return [(site, edit) for site, own in edits.items() for edit in _each(own)]
    return [(None, edit) for edit in _each(edits)]


def _each(edits: Any) -> list[Edit]:
    """Return edits one by one, those that featurizers hold in their place."""
    listed: list[Edit] = []
    for each in [edits] if isinstance(edits, Program | Operation | Featurizer) else edits:
        if isinstance(each, Featurizer) and not each.edits:
            raise LoweringError(f"{each.id!r} holds no edits; give operations, such as Steer(f, delta=1.0)")
        listed += each.edits if isinstance(each, Featurizer) else [each]
    return listed


def _vector(program: Program, site: Site, what: str, all_tokens: bool) -> Tensor:
    """Return the vector that an edit adds."""
    if program.positions is not None:
        raise LoweringError(f"{site}: {what} changes every token, and the edit has positions")
    if program.special_tokens and not all_tokens:
        raise LoweringError(
            f"{site}: {what} changes every token, and the edit leaves out the special tokens "
            f"{list(program.special_tokens)}; to change these too, give all_tokens=True"
        )
    if (vector := program.vector) is None:
        raise LoweringError(
            f"{site}: {what} adds the same to every activation, and what this edit adds depends on them; write a Steer"
        )
    return vector.float()
