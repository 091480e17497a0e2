"""`pair_attribution`: what all heads write at each pair of tokens, along every feature's gradient."""

from __future__ import annotations

import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_derived_scalars.axes import exact
from featurizers_derived_scalars.bases import HEADS, Basis
from featurizers_derived_scalars.derivers import Context, Deriver
from featurizers_derived_scalars.places import Place
from featurizers_derived_scalars.reach import anywhere
from featurizers_derived_scalars.sources import RawSource
from featurizers_derived_scalars.views import View

SITES = ("attn.delta", "attn.out")


def pair_attribution(basis: Basis) -> Deriver:
    """What all heads of a layer write from a key to a token, along each feature's gradient: ``(token, key, feature)``.

    The encoder's JVP of the write of each key, so that any featurizer will do: with a TopK or JumpReLU dictionary the
    features that do not fire have none. Summed over keys it is the JVP of what the heads write together, that is of
    the site without its bias. Cost: one encoding for each pair of tokens.

    Args:
        basis: the features of a featurizer at ``attn.delta``; or at ``attn.out``, in models without a norm or
            a factor behind it.

    Raises:
        UsageError: the basis is another.
    """
    if basis.featurizer is None or basis.part != "features" or basis.whole or basis.kind not in SITES:
        raise UsageError(
            f"pairs are attributed to the features of a featurizer at {' or '.join(SITES)}, not to {basis}"
        )

    def fn(context: Context, x: Tensor, probabilities: Tensor, values: Tensor) -> Tensor:
        view, heads = View(basis, context.raw, context.layer, x), Place("attn.z", context.layer)
        if context.circuit.write_matrix(view.place) is not None:
            raise UsageError("this model has a norm or a factor behind attn.out; take attn.delta, which heads write")
        columns = []
        for key in range(len(values)):
            output = torch.einsum("qh,hd->qhd", probabilities[:, key], values[key])
            columns.append(view.follow(exact(context.circuit.write(heads, output, context.raw))))
        return torch.stack(columns, dim=1)

    sources = (RawSource(basis.kind), RawSource(HEADS), RawSource("attn.v"))
    return Deriver(
        f"pair_attribution:{basis}", sources, ("token", "key", "feature"), fn, {"basis": basis}, basis, anywhere(basis)
    )
