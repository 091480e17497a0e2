"""The native backend: operations on a model's sites by plain torch hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featurizers.errors import PositionError, ShapeError, UsageError
from featurizers.features.featurizer import Featurizer
from featurizers.format.sites import Site
from featurizers.models.anatomy import Anatomy, Place, first_tensor
from featurizers.models.calling import signature, without_cache
from featurizers.models.operations import Collect, Operation, SourcedOperation
from featurizers.models.positions import Inputs, Pass, Positions, are_tokens, columns
from featurizers.models.stopping import stoppable

SiteT = TypeVar("SiteT", Site, str)


@contextmanager
def intervene(
    model: nn.Module, operations: Mapping[SiteT, Operation | Sequence[Operation]]
) -> Iterator[dict[SiteT, Tensor]]:
    """Carry out operations at sites of a model while the context lasts.

    Every forward pass of the model inside the context is edited, one of ``generate`` included: operations with
    positions act on the prompt, those with ``positions=None`` on every token of every pass, except that an
    operation with a source acts on the prompt only, where its source has tokens. Several operations at one site
    act in their order. The source of an operation is read when the context is entered, from the model without the
    operations of any context around it. The hooks are removed when the context ends, however it ends; no other hook
    is touched.

    Args:
        model: a decoder of `transformers`, or any module that `Anatomy` understands.
        operations: what to do at each site, a `Site` or its string.

    Yields:
        What the `Collect` operations kept, by site, once the model has run: ``(batch, n_positions, k)``. A new
        prompt replaces it; tokens generated after it are appended if ``positions`` is None. A site with several
        `Collect` operations keeps the last.

    Raises:
        SiteError: the model does not have a site.
        PositionError: a prompt does not have a position.
        ShapeError: a source does not fit the batch, or a featurizer the site.

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
    plan = [(key, anatomy.place(key), _as_operations(key, todo)) for key, todo in operations.items()]
    sources = _read_sources(anatomy, plan)
    collected: dict[SiteT, Tensor] = {}
    with ExitStack() as hooks:
        watch = _PassWatch(anatomy)
        hooks.callback(watch.stop)
        for key, place, todo in plan:
            edit = functools.partial(_carry_out_all, key, todo, watch, sources, collected)
            hooks.callback(hook(place, edit).remove)
        yield collected


def collect(
    model: nn.Module,
    inputs: Inputs,
    sites: Iterable[SiteT] | Mapping[SiteT, Featurizer[Any]],
    *,
    positions: Positions = None,
    grad: bool = False,
) -> dict[SiteT, Tensor]:
    """Activations of a model at sites, or their features; the forward pass stops after the last site.

    Args:
        model: as in `intervene`.
        inputs: what the model is called with.
        sites: where; a mapping gives a featurizer to each site, whose features are returned.
        positions: which tokens of each prompt, None for all columns, padding included.
        grad: whether to keep the graph.

    Returns:
        For each site, as it was given: ``(batch, n_positions, d)``.

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
    featurizers = dict(sites) if isinstance(sites, Mapping) else dict.fromkeys(sites)
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        return _collect(Anatomy(model), inputs, featurizers, positions)


def _collect(
    anatomy: Anatomy, inputs: Inputs, featurizers: Mapping[SiteT, Featurizer[Any] | None], positions: Positions
) -> dict[SiteT, Tensor]:
    places = {key: anatomy.place(key) for key in featurizers}
    found: dict[SiteT, Tensor] = {}

    def keep(key: SiteT, watch: _PassWatch, stop: Callable[[], NoReturn], hidden: Tensor) -> Tensor:
        chosen = gather(hidden, columns(positions, hidden, watch.current))
        featurizer = featurizers[key]
        # a later layer of the model may write into the tensor that it was given
        found[key] = chosen.clone() if featurizer is None else featurizer.collect(chosen)
        if len(found) == len(places):
            stop()
        return hidden

    with stoppable() as stop, ExitStack() as hooks:
        watch = _PassWatch(anatomy)
        hooks.callback(watch.stop)
        for key, place in places.items():
            hooks.callback(hook(place, functools.partial(keep, key, watch, stop)).remove)
        anatomy.model(**{**without_cache(anatomy.model), **inputs})
    if missing := [str(key) for key in places if key not in found]:
        raise UsageError(f"the model ran without passing through {', '.join(missing)}")
    return found


_paused: ContextVar[bool] = ContextVar("featurizers_paused", default=False)
"""Whether the operations of `intervene` rest, because the source of another is being read."""


class _PassWatch:
    """Notes, before each forward pass of the decoder, where in the sequence it is and what is padding.

    Without a cache every pass of ``generate`` begins at the first token, as a new prompt does; so ``generate`` itself
    is watched too, by an attribute of the instance that is taken away again.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        model, decoder = anatomy.model, anatomy.decoder
        self._paused = _paused.get()  # the watch of a source's own pass is not
        self.current = Pass(0, True, None)
        self._seen_prompt = False
        self._prompt_columns: int | None = None
        self._signature = signature(type(decoder).forward)
        self._exit = ExitStack()
        self._exit.callback(decoder.register_forward_pre_hook(self._note, with_kwargs=True).remove)
        if callable(generate := getattr(model, "generate", None)):
            self._exit.callback(_restore, model, "generate", vars(model).get("generate"))
            vars(model)["generate"] = functools.partial(self._generate, generate)

    def stop(self) -> None:
        """Leave the model as it was."""
        self._exit.close()

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        names = ("inputs", "input_ids", "inputs_embeds")
        prompt = args[0] if args else next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
        before, self._prompt_columns = self._prompt_columns, prompt.shape[1] if isinstance(prompt, Tensor) else None
        try:
            return generate(*args, **kwargs)
        finally:
            self._prompt_columns = before

    def _note(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _paused.get() and not self._paused:
            return
        given = self._signature.bind_partial(decoder, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        mask: Any = given.get("attention_mask")
        cache: Any = given.get("past_key_values")
        cache = given.get("cache") if cache is None else cache  # the name since transformers 5.24
        start = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        self._seen_prompt |= start == 0
        flat = isinstance(mask, Tensor) and mask.dim() == 2
        self.current = Pass(
            start,
            self._seen_prompt,
            mask if flat else None,
            opaque_mask=mask is not None and not flat,
            prompt_columns=self._prompt_columns,
            tokens=given.get("input_ids"),
        )


def _restore(model: nn.Module, name: str, value: object) -> None:
    if value is None:
        del vars(model)[name]
    else:
        vars(model)[name] = value


def _as_operations(key: object, todo: object) -> tuple[Operation, ...]:
    operations = tuple(todo) if isinstance(todo, Sequence) else (todo,)
    for operation in operations:
        if not isinstance(operation, Operation):
            raise UsageError(
                f"{key}: expected an operation such as Interchange(...), or a list of them, got {operation!r}"
            )
    return operations


@torch.no_grad()
def _read_sources(
    anatomy: Anatomy, plan: Sequence[tuple[SiteT, Place, tuple[Operation, ...]]]
) -> dict[tuple[SiteT, Operation], Tensor]:
    """Activations for each operation with a source; each distinct inputs and positions cost one forward pass."""
    sources: dict[tuple[SiteT, Operation], Tensor] = {}
    runs: dict[tuple[int, str], tuple[Inputs, Positions, list[tuple[SiteT, Operation]]]] = {}
    for key, _, todo in plan:
        for operation in todo:
            if not isinstance(operation, SourcedOperation):
                continue
            if isinstance(operation.source, Tensor):
                sources[key, operation] = operation.source
            else:
                where = _source_positions(operation)
                name = repr(where.tolist() if isinstance(where, Tensor) else where)
                run = runs.setdefault((id(operation.source), name), (operation.source, where, []))
                run[2].append((key, operation))
    token = _paused.set(True)
    try:
        for inputs, where, wanted in runs.values():
            found = _collect(anatomy, inputs, dict.fromkeys(key for key, _ in wanted), where)
            sources.update({(key, operation): found[key] for key, operation in wanted})
    finally:
        _paused.reset(token)
    return sources


def _source_positions(operation: SourcedOperation) -> Positions:
    return operation.positions if operation.source_positions is None else operation.source_positions


def _carry_out_all(
    key: SiteT,
    todo: Sequence[Operation],
    watch: _PassWatch,
    sources: Mapping[tuple[SiteT, Operation], Tensor],
    collected: dict[SiteT, Tensor],
    hidden: Tensor,
) -> Tensor:
    """``hidden`` after all operations of a site in one forward pass."""
    if _paused.get():
        return hidden
    for operation in todo:
        hidden = _carry_out(operation, hidden, watch.current, sources.get((key, operation)), collected, key)
    return hidden


def _carry_out(
    operation: Operation,
    hidden: Tensor,
    current: Pass,
    source: Tensor | None,
    collected: dict[SiteT, Tensor],
    key: SiteT,
) -> Tensor:
    """``hidden`` after one operation in one forward pass."""
    if current.start and (operation.positions is not None or source is not None):
        if not current.seen_prompt:
            raise PositionError(
                f"{key}: the first tokens of the prompt are in a cache already, so its positions cannot be edited; "
                "run the whole prompt inside the context"
            )
        return hidden
    chosen = columns(operation.positions, hidden, current, prompt_only=source is not None)
    base = gather(hidden, chosen)
    if isinstance(operation, Collect):
        kept = operation.apply(base, None)
        collected[key] = torch.cat([collected[key], kept], dim=1) if current.start and key in collected else kept
        return hidden
    edited = operation.apply(base, None if source is None else _fit(source, base, key))
    if special := operation.featurizer.special_tokens:
        edited = torch.where(are_tokens(special, hidden, chosen, current), base, edited)
    if chosen is None:
        return edited
    return scatter(hidden, chosen, edited)


def scatter(hidden: Tensor, chosen: Tensor, edited: Tensor) -> Tensor:
    """Activations ``(batch, sequence, d)`` with other ones in the columns ``(batch, n)``: undoes `gather`."""
    rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(-1)
    return hidden.index_put((rows, chosen), edited)


def gather(hidden: Tensor, chosen: Tensor | None) -> Tensor:
    """The columns ``(batch, n)`` of activations ``(batch, sequence, d)``, or all of them."""
    if chosen is None:
        return hidden
    return hidden.gather(1, chosen.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def _fit(source: Tensor, base: Tensor, key: object) -> Tensor:
    """The source in the shape of base: one position or one example may stand for all."""
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


def hook(place: Place, edit: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Pass the activations of a place through ``edit``, the rest of what its module takes or returns as it was.

    What a backend of another kind is built on; the caller removes the hook.
    """

    def part(hidden: Tensor) -> Tensor:
        if place.columns is None:
            return edit(hidden)
        chosen = hidden[..., place.columns]
        edited = edit(chosen)
        if edited is chosen:
            return hidden
        return torch.cat([hidden[..., : place.columns.start], edited, hidden[..., place.columns.stop :]], dim=-1)

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        hidden = first_tensor(output)
        edited = part(hidden)
        if edited is hidden:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (part(first_tensor(args)), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "hidden_states")
        return args, {**kwargs, name: part(first_tensor(kwargs.get(name)))}

    if place.side == "output":
        return place.module.register_forward_hook(on_output)
    return place.module.register_forward_pre_hook(on_input, with_kwargs=True)
