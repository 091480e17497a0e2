"""tuned-lens' causal bases under its own names, signatures and field order, computed here.

``from featurizers_causal_basis import compat as causal`` stands in for ``from tuned_lens import causal``. What differs
is what was wrong there: any floating-point dtype, blocks that return tensors, and a lens' own parameters are left as they
were. As there, randomness is torch's global generator, and no token is left out of a mean; a program that is new calls
`featurizers_causal_basis.extract_causal_bases`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from featurizers import Site
from jaxtyping import Float, Int
from torch import Tensor, nn

from featurizers_causal_basis import ablation, derangement
from featurizers_causal_basis.record import Mode


class CausalBasis(NamedTuple):
    """An orthonormal basis in the field order of tuned-lens; that of its first publication is in `white_box`.

    Attributes:
        energies: of ablating each vector alone, descending, nats per token.
        vectors: as columns.
    """

    energies: Float[Tensor, " k"]
    vectors: Float[Tensor, "d k"]


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
