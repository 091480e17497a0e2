"""tuned-lens' causal bases under its own names, signatures and field order, computed here.

``from featurizers_causal_basis import compat as causal`` stands in for ``from tuned_lens import causal``. What differs
is what was wrong there: any floating-point dtype, tuned lenses, blocks that return tensors, one derangement for a whole
layer, and a lens' parameters are left as they were. As there, the randomness of ablation is torch's global generator,
and no token is left out; a new program calls `featurizers_causal_basis.extract_causal_bases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from featurizers import Site
from featurizers.errors import UsageError
from jaxtyping import Float, Int
from torch import Tensor, nn

from featurizers_causal_basis import ablation, derangement
from featurizers_causal_basis.extraction import iterate_causal_bases
from featurizers_causal_basis.lenses import ForeignLens
from featurizers_causal_basis.readouts import Readout
from featurizers_causal_basis.record import Mode


class CausalBasis(NamedTuple):
    """An orthonormal basis in the field order of tuned-lens; that of its first publication is in `white_box`.

    Attributes:
        energies: of ablating each vector alone, descending, nats per token.
        vectors: as columns.
    """

    energies: Float[Tensor, " k"]
    vectors: Float[Tensor, "d k"]


def extract_causal_bases(
    lens: Readout | Callable[[Tensor, int], Tensor],
    hiddens: Sequence[Float[Tensor, "*tokens d"]],
    k: int,
    *,
    labels: Int[Tensor, "*tokens"] | None = None,
    max_iter: int = 100,
    mode: Mode = "mean",
) -> Iterator[CausalBasis]:
    """The causal basis of each layer's input but the last, by the schedule of tuned-lens 0.2.0.

    Args:
        lens: tuned-lens' own, any callable ``lens(h, layer)``, or a readout of ours.
        hiddens: of each layer, in transformers' ``hidden_states``; the last one is left out.
        k: vectors a layer; all if less than 1.
        labels: not supported: energies are divergences.
        max_iter: iterations of L-BFGS a vector.
        mode: what a direction is ablated to.

    Raises:
        UsageError: there are labels, or an option is none of those allowed.
        ShapeError: the hidden states do not fit together, or not the lens.
    """
    if labels is not None:
        raise UsageError("energies by cross-entropy with labels are not computed here; leave labels out")
    readout = lens if isinstance(lens, Readout) else ForeignLens(lens)
    layers = list(hiddens)[:-1]
    if not layers:
        raise UsageError("the last hidden states get no basis, as in tuned-lens: give those of two layers or more")
    k = layers[0].shape[-1] if k < 1 else k
    for found in iterate_causal_bases(readout, layers, k, max_iter=max_iter, mode=mode, preset="reference"):
        yield CausalBasis(found.energies, found.vectors)


def remove_subspace(
    u: Float[Tensor, "*tokens d"], A: Float[Tensor, "d *k"], mode: Mode = "zero", orthonormal: bool = False
) -> Float[Tensor, "*tokens d"]:
    """`featurizers_causal_basis.remove_subspace` on every token, with torch's global generator."""
    return ablation.remove_subspace(u, A, mode, orthonormal, generator=torch.default_generator)


def ablate_subspace(
    model: nn.Module, A: Float[Tensor, "d *k"], layer_index: int, mode: Mode = "zero", orthonormal: bool = False
) -> AbstractContextManager[nn.Module]:
    """A context in which a subspace of what block ``layer_index`` gives is ablated.

    It is the block's output, as there, and not the hidden states of that index, which are its input.
    """
    return ablation.ablate_subspace(
        model, A, Site("resid.post", layer_index), mode, orthonormal, generator=torch.default_generator
    )


def derange(batch: Float[Tensor, "n *shape"], generator: torch.Generator | None = None) -> Float[Tensor, "n *shape"]:
    """The rows of a tensor in an order in which none stays in its place."""
    return derangement.derange(batch, torch.default_generator if generator is None else generator)


def sample_derangement(
    n: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Int[Tensor, " n"]:
    """A derangement of n things, each as likely as any other."""
    return derangement.derangement(n, torch.default_generator if generator is None else generator).to(device)
