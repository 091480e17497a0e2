"""The peers: pyvene, and a rotation under torch's orthogonal parametrization as pyvene's interventions hold it."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

import torch
from timing import Skipped
from torch import Tensor, nn


def pyvene() -> Any:
    """The module `pyvene`.

    Raises:
        Skipped: it is not installed.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which of its own extras are missing
            return importlib.import_module("pyvene")
    except ImportError as error:
        raise Skipped(f"the peer, pyvene, cannot be imported: {error}") from error


def pyvene_model(model: nn.Module, layer: int, intervention: str) -> Any:
    """A pyvene model with one intervention, named as in pyvene, on the output of a block."""
    pv = pyvene()
    # without keep_last_dim it joins the positions to one long vector and collects only the first d of its elements
    made = getattr(pv, intervention)(keep_last_dim=True)
    with contextlib.redirect_stdout(io.StringIO()):
        intervenable = pv.IntervenableModel(
            {"layer": layer, "component": "block_output", "intervention": made}, model=model
        )
    intervenable.set_device(next(model.parameters()).device)
    return intervenable


class ParametrizedSubspace(nn.Module):
    """A subspace whose basis torch recomputes whenever it is used.

    pyvene's `LowRankRotateLayer` under `torch.nn.utils.parametrizations.orthogonal`, as in pyvene's own
    `LowRankRotatedSpaceIntervention`, split into a featurizer and its inverse. Each reads ``rotate.weight`` once,
    and each reading computes the matrix from its parameters again.
    """

    def __init__(self, d_in: int, n_features: int) -> None:
        super().__init__()
        pyvene()
        layers = importlib.import_module("pyvene.models.layers")
        self.rotate = torch.nn.utils.parametrizations.orthogonal(layers.LowRankRotateLayer(d_in, n_features))

    def featurize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates, and the part outside the subspace."""
        weight = self.rotate.weight
        x = x.to(weight.dtype)
        features = x @ weight
        return features, x - features @ weight.mT

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates alone: the source's error is not needed, and leaving it out favours this peer."""
        return self.rotate(x)

    def inverse_featurize(self, features: Tensor, error: Tensor) -> Tensor:
        """The point with these coordinates."""
        return features @ self.rotate.weight.mT + error

    def interchange(self, base: Tensor, source: Tensor) -> Tensor:
        """``base`` with all coordinates of ``source``: the basis is computed three times."""
        _, error = self.featurize(base)
        return self.inverse_featurize(self.encode(source), error).to(base.dtype)
