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

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from featurizers.errors import PositionError, ShapeError, UsageError
from featurizers.features.featurizer import Featurizer
from featurizers.format.sites import Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.calling import with_position_ids
from featurizers.models.checkpointing import uncheckpointed
from featurizers.models.compilation import eager
from featurizers.models.contexts import Context
from featurizers.models.hooks import gather, hook, scatter
from featurizers.models.operations import Collect, Operation, SourcedOperation
from featurizers.models.positions import Inputs, Positions, are_tokens, columns
from featurizers.models.reading import Sources, read
from featurizers.models.watching import GenerateOptions, Watch, watching

SiteT = TypeVar("SiteT", bound=Site | str | None)


@contextmanager
def intervene(
    model: nn.Module, operations: Mapping[SiteT, Operation | Sequence[Operation]]
) -> Iterator[dict[SiteT, Tensor]]:
    """Carry out operations at sites of a model while the context lasts.

    Every forward pass of the model inside the context is edited, also those of ``generate``. Operations with positions
    act on the prompt. Operations with ``positions=None`` act on every token of every pass, unless they have a source:
    then they act on the prompt only, where the source has tokens. Several operations at one site act in their order.
    Sources are read when the context is entered, from the model without the operations of any context around it. When
    the context ends, also by an error, its hooks are removed; no other hook is touched.

    Args:
        model: a decoder of `transformers`, or any module that `Anatomy` understands.
        operations: an operation, or several, for each site; a site is a `Site` or its string. A featurizer's ``site``
            may be None to a type checker, so that None is accepted as a key and refused when it is one.

    Yields:
        Results of the `Collect` operations by site, once the model has run: ``(batch, n_positions, k)``. A new prompt
        replaces them; tokens generated after it are appended if ``positions`` is None. A site with several `Collect`
        operations keeps the last result.

    Raises:
        SiteError: the model does not have a site, or a site is None.
        PositionError: a prompt does not have a position.
        ShapeError: a source does not fit the batch, or a featurizer does not fit the site.

    Example:
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
    anatomy = Anatomy(model)
    plan = [(key, anatomy.place(key), _as_operations(key, value)) for key, value in operations.items()]
    sources = Sources(anatomy, plan)
    collected: dict[SiteT, Tensor] = {}
    with eager(), ExitStack() as hooks:
        hooks.enter_context(uncheckpointed(model, (place.path for _, place, _ in plan)))
        context = Context()
        watch = hooks.enter_context(watching(anatomy))
        edits = _Edits({key: at_site for key, _, at_site in plan}, context, watch, sources, collected)
        hooks.enter_context(watch.telling(context.acts, edits))
        for key, place, _ in plan:
            hooks.callback(hook(place, functools.partial(edits.carry_out, key)).remove)
        hooks.enter_context(context.entered())
        yield collected


def collect(
    model: nn.Module,
    inputs: Inputs,
    sites: Iterable[SiteT] | Mapping[SiteT, Featurizer[Any]],
    *,
    positions: Positions = None,
    grad: bool = False,
) -> dict[SiteT, Tensor]:
    """Return activations of a model at sites, or their features. The forward pass stops after the last site.

    Args:
        model: as in `intervene`.
        inputs: keyword arguments of the model.
        sites: sites whose activations to return, or a mapping from sites to featurizers whose features to return.
        positions: tokens of each prompt; None for all columns, padding included.
        grad: whether to keep the graph.

    Returns:
        ``(batch, n_positions, d)`` for each site, under the key that was given.

    Raises:
        SiteError, PositionError, ShapeError: as in `intervene`.

    Example:
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
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        return read(Anatomy(model), with_position_ids(model, inputs), featurizers, positions)


def _as_operations(key: object, value: object) -> tuple[Operation, ...]:
    operations = tuple(value) if isinstance(value, Sequence) else (value,)
    for operation in operations:
        if not isinstance(operation, Operation):
            raise UsageError(
                f"{key}: expected an operation such as Interchange(...), or a list of them, got {operation!r}"
            )
    return operations


class _Edits:
    """Operations of one context, as its hooks carry them out.

    Args:
        operations: by site.
        context: in which they act.
        watch: of the model.
        sources: of the operations.
        collected: where results of `Collect` go, by site.
    """

    def __init__(
        self,
        operations: Mapping[Any, Sequence[Operation]],
        context: Context,
        watch: Watch,
        sources: Sources,
        collected: dict[Any, Tensor],
    ) -> None:
        self._operations, self._context, self._watch, self._sources = operations, context, watch, sources
        self._collected = collected
        self._kept: dict[tuple[Any, Operation], tuple[int, Tensor]] = {}  # cached tokens before the first, features

    def carry_out(self, key: Any, hidden: Tensor) -> Tensor:
        """Return ``hidden`` after all operations of a site in one forward pass."""
        if not self._context.acts():
            return hidden
        for operation in self._operations[key]:
            hidden = self._carry_out(key, operation, hidden)
        return hidden

    def _carry_out(self, key: Any, operation: Operation, hidden: Tensor) -> Tensor:
        current = self._watch.current
        source = self._sources.of(key, operation, current)
        if current.start and (operation.positions is not None or source is not None):
            if current.began < self._context.opened:
                raise PositionError(
                    f"{key}: the first tokens of the prompt are in a cache already, so its positions cannot be edited; "
                    "run the whole prompt inside the context"
                )
            return hidden
        chosen = columns(operation.positions, hidden, current, prompt_only=source is not None)
        base = gather(hidden, chosen)
        if isinstance(operation, Collect):
            self._keep(key, operation, operation.apply(base, None), current.start)
            return hidden
        edited = operation.apply(base, None if source is None else _fit(source, base, key))
        if special := operation.featurizer.special_tokens:
            edited = torch.where(are_tokens(special, hidden, chosen, current), base, edited)
        return edited if chosen is None else scatter(hidden, chosen, edited)

    def _keep(self, key: Any, operation: Collect, features: Tensor, start: int) -> None:
        """Put features after those of the tokens that are cached, in place of any candidates that were rejected."""
        first, before = self._kept.get((key, operation), (start, features[:, :0]))
        if start > first:
            self._collected[key] = torch.cat([before[:, : start - first], features], dim=1)
        else:
            first, self._collected[key] = start, features
        self._kept[key, operation] = (first, self._collected[key])

    def begin_generate(self, options: GenerateOptions) -> None:
        """Raise if the operations cannot be carried out with these options of ``generate``."""
        for key, operations in self._operations.items():
            for operation in operations:
                if isinstance(operation, Collect) and operation.positions is None:
                    _check_collect(key, options)
                of_prompt = operation.positions is not None or isinstance(operation, Collect | SourcedOperation)
                if of_prompt and options.texts:
                    raise PositionError(
                        f"{key}: `generate` was given texts, so that the columns of the prompt are not known; turn "
                        "them into token ids first, or use operations with positions=None and no source"
                    )
                if of_prompt and (options.get("guidance_scale") or 1) != 1:
                    raise PositionError(
                        f"{key}: with guidance_scale a second, unconditional prompt passes through the model; generate "
                        "without it, or use operations with positions=None and no source"
                    )

    def end_generate(self, tokens: int) -> None:
        """Drop what was collected for candidates that assisted decoding rejected last."""
        for (key, operation), (first, features) in self._kept.items():
            if operation.positions is None and features.shape[1] > tokens - first:
                trimmed = features[:, : tokens - first]
                if self._collected.get(key) is features:
                    self._collected[key] = trimmed
                self._kept[key, operation] = (first, trimmed)


def _check_collect(key: Any, options: GenerateOptions) -> None:
    """Raise UsageError if the tokens of returned sequences cannot be collected as they are generated."""
    if (options.get("num_beams") or 1) > 1:
        raise UsageError(
            f"{key}: beam search computes beams that it does not return; collect from the returned sequences with "
            "`featurizers.collect`, or give Collect positions of the prompt"
        )
    assisted = options.get("assistant_model") is not None or options.get("prompt_lookup_num_tokens") is not None
    if assisted and not options.trims:
        raise UsageError(f"{key}: intervene on the model whose `generate` is called, to collect in assisted decoding")


def _fit(source: Tensor, base: Tensor, key: object) -> Tensor:
    """Expand a source to the shape of base: a single position or example is repeated."""
    if source.dim() == 2 and base.shape[1] == 1:
        source = source.unsqueeze(1)
    try:
        if source.dim() == 2 and source.shape[0] != 1:
            raise RuntimeError("its rows may be examples or positions")
        return source.to(base.device).expand_as(base)
    except RuntimeError as error:
        raise ShapeError(
            f"{key}: the source has shape {tuple(source.shape)}, but the activations to edit have shape "
            f"{tuple(base.shape)} (batch, positions, width); give source_positions, or repeat the source where "
            "generate repeats the prompts"
        ) from error
