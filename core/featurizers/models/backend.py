"""Native backend: `intervene` and `collect` by plain torch hooks.

How it works, in order:

1. `Anatomy` finds the module, the side and the columns of each site. A site is always a module's input or output, so
   that a plain hook reaches it whatever attention kernel the model uses.
2. `Sources` reads the sources in the form of model inputs from the unedited model, one forward pass for each distinct
   inputs and positions.
3. `watching` notes before each forward pass how many tokens are cached, the mask and the token ids, and calls of
   ``model.generate``.
4. One hook for each site gathers the columns of the positions, applies the site's operations in the order given, and
   puts the edited columns back. Positions and sources belong to the prompt: passes that compute later tokens are
   edited only by operations with ``positions=None`` and no source. A hook acts for its own context only: see `Context`.
5. `collect` stops the forward pass as soon as the last site has run.

When the context ends, also by an error, its hooks are removed; with the last context, ``generate`` is restored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from featurizers.errors import UsageError
from featurizers.features.active import SparseFeatures
from featurizers.features.featurizer import Featurizer
from featurizers.format.sites import Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.calling import with_position_ids
from featurizers.models.operations import Operation
from featurizers.models.positions import Inputs, Positions
from featurizers.models.prepared import Prepared
from featurizers.models.reading import read, read_sparse

SiteT = TypeVar("SiteT", bound=Site | str | None)


@overload
def intervene(
    model: object, operations: Mapping[SiteT, Operation | Sequence[Operation]]
) -> AbstractContextManager[dict[SiteT, Tensor]]: ...
@overload
def intervene(
    model: object, operations: Operation | Sequence[Operation]
) -> AbstractContextManager[dict[Operation, Any]]: ...
def intervene(
    model: object, operations: Mapping[SiteT, Operation | Sequence[Operation]] | Operation | Sequence[Operation]
) -> AbstractContextManager[dict[Any, Any]]:
    """Carry out operations at sites of a model while the context lasts.

    Every forward pass of the model inside the context is edited, also those of ``generate``. Operations with positions
    act on the prompt. Operations with ``positions=None`` act on every token of every pass, unless they have a source:
    then they act on the prompt only, where the source has tokens. Several operations at one site act in their order.
    Sources are read when the context is entered, from the model without the operations of any context around it. When
    the context ends, also by an error, its hooks are removed; no other hook is touched.

    Args:
        model: a decoder of `transformers`, any module that `Anatomy` understands, or an object of another library that
            holds a model, if the library's plugin is installed.
        operations: an operation, or several, for each site; a site is a `Site` or its string. A featurizer's ``site``
            may be None to a type checker, so that None is accepted as a key and refused when it is one. Or one
            operation or a sequence of operations whose featurizers know their sites, which is how maps between sites
            are given; operations through one map are composed in feature space in their order.

    Yields:
        Results of the `Collect` operations, once the model has run, ``(batch, n_positions, k)``: by site, or by
        operation if no sites are given; of a map with several groups a mapping by group. A new prompt replaces them;
        tokens generated after it are appended if ``positions`` is None. A site with several `Collect` operations keeps
        the last result.

    Raises:
        SiteError: the model does not have a site, or a site is None.
        PositionError: a prompt does not have a position.
        ShapeError: a source does not fit the batch, or a featurizer does not fit the site.

    Examples:
        >>> import torch, featurizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).eval()
        >>> base, source = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
        >>> f = featurizers.create("identity", d_in=8)
        >>> swap = featurizers.Interchange(f, source={"input_ids": source}, positions=[-1])
        >>> with featurizers.intervene(model, {"resid.post:1": swap}):
        ...     patched = model(base).logits[:, -1]
        >>> torch.equal(patched, model(source).logits[:, -1])
        True
    """
    return _intervening(model, operations)


@contextmanager
def _intervening(model: object, operations: Any) -> Iterator[dict[Any, Any]]:
    with Prepared(model, operations).intervening() as collected:
        yield collected


def prepare(
    model: object, operations: Mapping[SiteT, Operation | Sequence[Operation]] | Operation | Sequence[Operation]
) -> Prepared:
    """Look up the sites, check the operations and read the sources of `intervene` once, to enter it many times.

    Args:
        model: as in `intervene`.
        operations: as in `intervene`.

    Raises:
        SiteError, PositionError, ShapeError: as in `intervene`.

    Examples:
        >>> import torch, featurizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).eval()
        >>> swap = featurizers.Interchange(featurizers.create("identity", d_in=8), source=torch.zeros(1, 8))
        >>> edit = featurizers.prepare(model, {"resid.post:1": swap})
        >>> for base in torch.tensor([[[1, 2]], [[3, 4]]]):
        ...     edit.sources(torch.ones(1, 8))
        ...     with edit:
        ...         logits = model(base).logits
    """
    return Prepared(model, operations)


@overload
def collect(
    model: object,
    inputs: Inputs,
    sites: Iterable[SiteT] | Mapping[SiteT, Featurizer[Any]],
    *,
    positions: Positions = None,
    grad: bool = False,
    sparse: Literal[False] = False,
) -> dict[SiteT, Tensor]: ...
@overload
def collect(
    model: object,
    inputs: Inputs,
    sites: Mapping[SiteT, Featurizer[Any]],
    *,
    positions: Positions = None,
    grad: bool = False,
    sparse: Literal[True],
) -> dict[SiteT, SparseFeatures]: ...
def collect(
    model: object,
    inputs: Inputs,
    sites: Iterable[SiteT] | Mapping[SiteT, Featurizer[Any]],
    *,
    positions: Positions = None,
    grad: bool = False,
    sparse: bool = False,
) -> dict[SiteT, Tensor] | dict[SiteT, SparseFeatures]:
    """Return activations of a model at sites, or their features. The forward pass stops after the last site.

    Args:
        model: as in `intervene`.
        inputs: keyword arguments of the model, by their names in `transformers`.
        sites: sites whose activations to return, or a mapping from sites to featurizers whose features to return.
        positions: tokens of each prompt; None for all columns, padding included.
        grad: whether to keep the graph.
        sparse: True returns the features that are not 0, see `Featurizer.encode_sparse`, so that no tensor has a place
            for each feature of each token.

    Returns:
        ``(batch, n_positions, d)`` for each site, under the key that was given; if sparse, values and indices
        ``(batch, n_positions, k)``.

    Raises:
        SiteError, PositionError, ShapeError: as in `intervene`.
        UsageError: sparse features are asked for, and a site has no featurizer.

    Examples:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20))
        >>> collect(model, {"input_ids": torch.tensor([[1, 2, 3]])}, ["resid.post:0"])["resid.post:0"].shape
        torch.Size([1, 3, 8])
    """
    if isinstance(sites, str | Site):
        raise UsageError(f"sites is a list of sites: [{str(sites)!r}]")
    if not isinstance(inputs, Mapping):
        raise UsageError(
            f"inputs are the keyword arguments of the model, such as {{'input_ids': …}}, not {type(inputs).__name__}"
        )
    featurizers = dict(sites) if isinstance(sites, Mapping) else dict.fromkeys(sites)
    if sparse and None in featurizers.values():
        raise UsageError("sparse=True is for features: give a mapping from sites to featurizers, {site: featurizer}")
    anatomy = Anatomy(model)
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        if sparse:
            own = {site: f for site, f in featurizers.items() if f is not None}
            return read_sparse(anatomy, with_position_ids(anatomy.model, inputs), own, positions)
        return read(anatomy, with_position_ids(anatomy.model, inputs), featurizers, positions)
