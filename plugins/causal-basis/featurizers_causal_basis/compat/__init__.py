"""Names, signatures and field order of tuned-lens 0.2.0, computed by this package.

``from featurizers_causal_basis import compat as causal`` replaces ``from tuned_lens import causal``. Differences fix
faults: any floating-point dtype and tuned lenses work, blocks may return tensors, ``resample`` uses one derangement
for a whole layer, and the parameters of a lens are left as they are. As in tuned-lens, the randomness of ablation is
torch's global generator, and no token is left out. New programs call `featurizers_causal_basis.extract_causal_bases`.

`white_box` has the names of the first publication. This room imports `ablation`, `inputs`, `lens` and `solve`.
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

from featurizers_causal_basis import ablation, inputs
from featurizers_causal_basis.lens import ExternalLens, Readout
from featurizers_causal_basis.record import Mode
from featurizers_causal_basis.solve import iterate_causal_bases


class CausalBasis(NamedTuple):
    """Orthonormal basis in the field order of tuned-lens; the first publication's is in `white_box`.

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
    """Yield the causal basis of each layer's input but the last, by the schedule of tuned-lens 0.2.0.

    Args:
        lens: tuned-lens' own, any callable ``lens(h, layer)``, or a `Readout`.
        hiddens: of each layer, such as transformers' ``hidden_states``; the last entry is ignored.
        k: vectors per layer; all if less than 1.
        labels: not supported; energies are divergences.
        max_iter: iterations of L-BFGS per vector.
        mode: of ablation.

    Raises:
        UsageError: labels are given, or an option is out of range.
        ShapeError: the hidden states do not fit together, or not the lens.
    """
    if labels is not None:
        raise UsageError("energies by cross-entropy with labels are not computed here; leave labels out")
    readout = lens if isinstance(lens, Readout) else ExternalLens(lens)
    layers, k = without_last(hiddens, k)
    for basis in iterate_causal_bases(readout, layers, k, max_iter=max_iter, mode=mode, preset="reference"):
        yield CausalBasis(basis.energies, basis.vectors)


def without_last(hiddens: Sequence[Tensor], k: int) -> tuple[list[Tensor], int]:
    """Return all hidden states but the last, and k, which is their width if less than 1."""
    layers = list(hiddens)[:-1]
    if not layers:
        raise UsageError("the last hidden states get no basis: give those of two layers or more")
    return layers, layers[0].shape[-1] if k < 1 else k


def remove_subspace(
    u: Float[Tensor, "*tokens d"], A: Float[Tensor, "d *k"], mode: Mode = "zero", orthonormal: bool = False
) -> Float[Tensor, "*tokens d"]:
    """Call `featurizers_causal_basis.remove_subspace` on every token, with torch's global generator."""
    return ablation.remove_subspace(u, A, mode, orthonormal, generator=torch.default_generator)


def ablate_subspace(
    model: nn.Module, A: Float[Tensor, "d *k"], layer_index: int, mode: Mode = "zero", orthonormal: bool = False
) -> AbstractContextManager[nn.Module]:
    """Return a context in which a subspace of the output of block ``layer_index`` is ablated.

    As in tuned-lens it is the block's output, although hidden states with the same index are its input.
    """
    return ablation.ablate_subspace(
        model, A, Site("resid.post", layer_index), mode, orthonormal, generator=torch.default_generator
    )


def derange(batch: Float[Tensor, "n *shape"], generator: torch.Generator | None = None) -> Float[Tensor, "n *shape"]:
    """Return the rows of a tensor in a random order that leaves none in its place."""
    return inputs.derange(batch, torch.default_generator if generator is None else generator)


def sample_derangement(
    n: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Int[Tensor, " n"]:
    """Return a permutation of n things that leaves none in its place, uniformly at random."""
    return inputs.derangement(n, torch.default_generator if generator is None else generator).to(device)
