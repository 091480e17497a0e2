"""Steering edits and control vectors: `to_gguf` and `read_gguf`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from featurizers import DictionaryFeaturizer, Site, lower
from featurizers.errors import ArtefactError, LoweringError
from featurizers.features import Program
from featurizers.files import os_errors
from featurizers.models import Operation
from torch import Tensor

from featurizers_control_vectors.gguf_files import read_directions, write_directions

Edit = Program | Operation
Edits = Mapping[Any, "Edit | Sequence[Edit]"] | Iterable[Edit]
"""Edits by site; or those of featurizers that know their sites."""


def to_gguf(edits: Edits, path: str | Path, *, model_hint: str = "", all_tokens: bool = False) -> None:
    """Write edits that add to the outputs of blocks as a control vector for llama.cpp.

    llama.cpp adds ``direction.N`` to what block N returns, counted from 0, which is the site ``resid.post:N``; it takes
    no direction for block 0. Several edits at one site are added up.

    Args:
        edits: of those that `featurizers.lower` takes and that add a vector, as `Steer` does.
        path: of the new file.
        model_hint: architecture of the model in llama.cpp's names, such as ``llama``; llama.cpp only shows it.
        all_tokens: whether to let edits that leave out special tokens change every token, as llama.cpp does.

    Raises:
        LoweringError: an edit is not an addition to the output of a block after the first, or has positions; the
            message says why.
        ArtefactError: there is a file already, or it cannot be written.

    Example:
        >>> import featurizers, tempfile
        >>> f = featurizers.create("subspace", d_in=4, n_features=2, seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_gguf({"resid.post:3": featurizers.Steer(f, delta=2.0)}, f"{folder}/happy.gguf")
        ...     {str(site): f.d_in for site, f in read_gguf(f"{folder}/happy.gguf").items()}
        {'resid.post:3': 4}
    """
    directions: dict[int, Tensor] = {}
    for site, edit in _listed(edits):
        program = lower(edit) if isinstance(edit, Operation) else edit
        layer, direction = _direction(program, program.site if site is None else site, all_tokens)
        if layer in directions and directions[layer].shape != direction.shape:
            raise LoweringError(f"resid.post:{layer} has edits of widths {len(directions[layer])} and {len(direction)}")
        directions[layer] = directions[layer] + direction if layer in directions else direction
    if len({len(direction) for direction in directions.values()}) != 1:
        widths = sorted({len(direction) for direction in directions.values()})
        raise LoweringError(f"the directions of a control vector have one width, and there are {widths or 'no edits'}")
    path = Path(path)
    where = str(path)
    if path.exists():
        raise ArtefactError(where, "there is a file already; choose another name")
    with os_errors(path):
        write_directions(directions, path, model_hint)


def read_gguf(path: str | Path) -> dict[Site, DictionaryFeaturizer]:
    """Return a featurizer for each direction of a control vector, by its site.

    ``Steer(f, delta=1.0)`` of each adds its direction, as llama.cpp does with the scale 1. A feature is read as the
    coefficient of the direction in the activations, which the file says nothing about.

    Raises:
        WeightsError: the file is damaged, or holds something else.
    """
    return {
        Site("resid.post", layer): featurizer_of(layer, direction)
        for layer, direction in read_directions(Path(path), str(path)).items()
    }


def featurizer_of(layer: int, direction: Tensor) -> DictionaryFeaturizer:
    """Return the featurizer of one direction: its feature grows by 1 when the direction is added."""
    squared = direction.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    featurizer = DictionaryFeaturizer.from_tensors(
        W_enc=(direction / squared).unsqueeze(0),
        W_dec=direction.unsqueeze(0),
        b_enc=torch.zeros(1),
        b_dec=torch.zeros(len(direction)),
        rule="identity",
    )
    featurizer.site = Site("resid.post", layer)
    featurizer.id = f"direction.{layer}"
    return featurizer


def _listed(edits: Any) -> list[tuple[Any, Edit]]:
    """Return edits with their sites, None for those of the featurizers."""
    if isinstance(edits, Program | Operation):
        return [(None, edits)]
    if not isinstance(edits, Mapping):
        return [(None, edit) for edit in edits]
    return [
        (site, edit) for site, own in edits.items() for edit in ([own] if isinstance(own, Program | Operation) else own)
    ]


def _direction(program: Program, site: Site | str | None, all_tokens: bool) -> tuple[int, Tensor]:
    """Return the layer and the direction of an edit."""
    if site is None:
        raise LoweringError("the featurizer does not say where it belongs; give its site: {'resid.post:8': operation}")
    site = Site.parse(site)
    if site.kind != "resid.post" or site.layer is None:
        raise LoweringError(
            f"{site}: a control vector is added to the outputs of blocks, 'resid.post:N'; 'resid.pre:N' is the output "
            "of block N - 1"
        )
    if site.layer == 0:
        raise LoweringError("resid.post:0: llama.cpp takes no direction for block 0; choose a later block")
    if program.positions is not None:
        raise LoweringError(f"{site}: a control vector changes every token, and the edit has positions")
    if program.special_tokens and not all_tokens:
        raise LoweringError(
            f"{site}: a control vector changes every token, and the edit leaves out the special tokens "
            f"{list(program.special_tokens)}; to change these too, give all_tokens=True"
        )
    if (vector := program.vector) is None:
        raise LoweringError(
            f"{site}: a control vector adds the same to every activation, and what this edit adds depends on them; "
            "write a Steer"
        )
    return site.layer, vector.float()
