"""Reductions: derivers of fewer axes, and of the difference from another prompt."""

from __future__ import annotations

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.axes import Axis
from featurizers_derived_scalars.derivers import Deriver


def sum_over(deriver: Deriver, axis: Axis, *, keep_one: bool = False) -> Deriver:
    """The sum over one axis."""
    raise NotImplementedError


def sum_keys(deriver: Deriver) -> Deriver:
    """The sum over keys: what each head does at each token."""
    raise NotImplementedError


def sum_heads(deriver: Deriver) -> Deriver:
    """The sum over heads."""
    raise NotImplementedError


def sum_nodes(deriver: Deriver) -> Deriver:
    """The sum over the nodes of each token, ``(token, one)``, or ``(token, d_model)`` of writes."""
    raise NotImplementedError


def sum_channels(deriver: Deriver) -> Deriver:
    """The sum over the last axis of vectors (``d_model``, ``d_head``), ``one`` if none but tokens is left."""
    raise NotImplementedError


def pairs(deriver: Deriver) -> Deriver:
    """Axes token and key as one axis ``pair``, keys not after the token alone."""
    raise NotImplementedError


def minus_baseline(deriver: Deriver, baseline: RawActivations) -> Deriver:
    """Less the same scalar of another prompt of as many tokens."""
    raise NotImplementedError
