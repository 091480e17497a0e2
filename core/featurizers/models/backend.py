"""Native backend: `intervene` and `collect` by plain torch hooks.

How it works, in order:

1. `Anatomy` finds the module, the side and the columns of each site. A site is always a module's input or output, so
   that a plain hook reaches it whatever attention kernel the model uses.
2. Sources in the form of model inputs are read, one forward pass for each distinct inputs and positions. Meanwhile the
   operations of this context and of any context around it pause (`_paused`): a source is read from the unedited model.
3. `_PassWatch` hooks the decoder. Before each forward pass it notes how many tokens are cached, and the mask and the
   token ids. It also replaces ``model.generate`` on the instance, because without a cache each pass of ``generate``
   starts at the first token and would look like a new prompt; the wrapper says how long the prompt is.
4. One hook for each site gathers the columns of the positions, applies the site's operations in the order given, and
   puts the edited columns back. Positions and sources belong to the prompt: passes that compute later tokens are
   edited only by operations with ``positions=None`` and no source.
5. `collect` stops the forward pass as soon as the last site has run.

When the context ends, also by an error, all hooks are removed and ``generate`` is restored.
"""

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

    Every forward pass of the model inside the context is edited, also those of ``generate``. Operations with positions
    act on the prompt. Operations with ``positions=None`` act on every token of every pass, unless they have a source:
    then they act on the prompt only, where the source has tokens. Several operations at one site act in their order.
    Sources are read when the context is entered, from the model without the operations of any context around it. When
    the context ends, also by an error, its hooks are removed; no other hook is touched.

    Args:
        model: a decoder of `transformers`, or any module that `Anatomy` understands.
        operations: an operation, or several, for each site; a site is a `Site` or its string.

    Yields:
        Results of the `Collect` operations by site, once the model has run: ``(batch, n_positions, k)``. A new prompt
        replaces them; tokens generated after it are appended if ``positions`` is None. A site with several `Collect`
        operations keeps the last result.

    Raises:
        SiteError: the model does not have a site.
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
    sources = _read_sources(anatomy, plan)
    collected: dict[SiteT, Tensor] = {}
    with ExitStack() as hooks:
        watch = _PassWatch(anatomy)
        hooks.callback(watch.stop)
        for key, place, at_site in plan:
            edit = functools.partial(_carry_out_all, key, at_site, watch, sources, collected)
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
        return _collect(Anatomy(model), inputs, featurizers, positions)


def _collect(
    anatomy: Anatomy, inputs: Inputs, featurizers: Mapping[SiteT, Featurizer[Any] | None], positions: Positions
) -> dict[SiteT, Tensor]:
    places = {key: anatomy.place(key) for key in featurizers}
    activations: dict[SiteT, Tensor] = {}

    def keep(key: SiteT, watch: _PassWatch, stop: Callable[[], NoReturn], hidden: Tensor) -> Tensor:
        chosen = gather(hidden, columns(positions, hidden, watch.current))
        featurizer = featurizers[key]
        # cloned: a later layer may write into its input
        activations[key] = chosen.clone() if featurizer is None else featurizer.collect(chosen)
        if len(activations) == len(places):
            stop()
        return hidden

    with stoppable() as stop, ExitStack() as hooks:
        watch = _PassWatch(anatomy)
        hooks.callback(watch.stop)
        for key, place in places.items():
            hooks.callback(hook(place, functools.partial(keep, key, watch, stop)).remove)
        anatomy.model(**{**without_cache(anatomy.model), **inputs})
    if missing := [str(key) for key in places if key not in activations]:
        raise UsageError(f"the model ran without passing through {', '.join(missing)}")
    return activations


_paused: ContextVar[bool] = ContextVar("featurizers_paused", default=False)
"""True while a source is read: the operations of all contexts then leave the model unedited."""


class _PassWatch:
    """Records a `Pass` before each forward pass of the decoder, as ``current``, until `stop` is called.

    Without a cache every pass of ``generate`` begins at the first token, as a new prompt does. Therefore ``generate``
    is wrapped too, by an attribute of the instance that `stop` removes.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        model, decoder = anatomy.model, anatomy.decoder
        self._made_while_paused = _paused.get()  # this watch belongs to the pass that reads a source
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
        """Remove the hook and restore ``generate``."""
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
        if _paused.get() and not self._made_while_paused:
            return
        arguments = self._signature.bind_partial(decoder, *args, **kwargs).arguments
        arguments = {**arguments, **arguments.get("kwargs", {})}
        mask: Any = arguments.get("attention_mask")
        cache: Any = arguments.get("past_key_values")
        cache = arguments.get("cache") if cache is None else cache  # the name since transformers 5.24
        start = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        self._seen_prompt |= start == 0
        flat = isinstance(mask, Tensor) and mask.dim() == 2
        self.current = Pass(
            start,
            self._seen_prompt,
            mask if flat else None,
            opaque_mask=mask is not None and not flat,
            prompt_columns=self._prompt_columns,
            tokens=arguments.get("input_ids"),
        )


def _restore(model: nn.Module, name: str, value: object) -> None:
    if value is None:
        del vars(model)[name]
    else:
        vars(model)[name] = value


def _as_operations(key: object, value: object) -> tuple[Operation, ...]:
    operations = tuple(value) if isinstance(value, Sequence) else (value,)
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
    """Return activations for each operation with a source; those with the same inputs and positions share a pass."""
    sources: dict[tuple[SiteT, Operation], Tensor] = {}
    runs: dict[tuple[int, str], tuple[Inputs, Positions, list[tuple[SiteT, Operation]]]] = {}
    for key, _, operations in plan:
        for operation in operations:
            if not isinstance(operation, SourcedOperation):
                continue
            if isinstance(operation.source, Tensor):
                sources[key, operation] = operation.source
            else:
                positions = operation.positions if operation.source_positions is None else operation.source_positions
                name = repr(positions.tolist() if isinstance(positions, Tensor) else positions)
                run = runs.setdefault((id(operation.source), name), (operation.source, positions, []))
                run[2].append((key, operation))
    token = _paused.set(True)
    try:
        for inputs, positions, readers in runs.values():
            activations = _collect(anatomy, inputs, dict.fromkeys(key for key, _ in readers), positions)
            sources.update({(key, operation): activations[key] for key, operation in readers})
    finally:
        _paused.reset(token)
    return sources


def _carry_out_all(
    key: SiteT,
    operations: Sequence[Operation],
    watch: _PassWatch,
    sources: Mapping[tuple[SiteT, Operation], Tensor],
    collected: dict[SiteT, Tensor],
    hidden: Tensor,
) -> Tensor:
    """Return ``hidden`` after all operations of a site in one forward pass."""
    if _paused.get():
        return hidden
    for operation in operations:
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
    """Return ``hidden`` after one operation in one forward pass."""
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
        features = operation.apply(base, None)
        appends = current.start and key in collected
        collected[key] = torch.cat([collected[key], features], dim=1) if appends else features
        return hidden
    edited = operation.apply(base, None if source is None else _fit(source, base, key))
    if special := operation.featurizer.special_tokens:
        edited = torch.where(are_tokens(special, hidden, chosen, current), base, edited)
    if chosen is None:
        return edited
    return scatter(hidden, chosen, edited)


def scatter(hidden: Tensor, chosen: Tensor, edited: Tensor) -> Tensor:
    """Replace columns of activations: the inverse of `gather`.

    Args:
        hidden: activations, ``(batch, sequence, d)``.
        chosen: columns, ``(batch, n)``.
        edited: what to put there, ``(batch, n, d)``.
    """
    rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(-1)
    return hidden.index_put((rows, chosen), edited)


def gather(hidden: Tensor, chosen: Tensor | None) -> Tensor:
    """Return columns of activations, ``(batch, n, d)``.

    Args:
        hidden: activations, ``(batch, sequence, d)``.
        chosen: columns, ``(batch, n)``; None for all of ``hidden``.
    """
    if chosen is None:
        return hidden
    return hidden.gather(1, chosen.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


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


def hook(place: Place, edit: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Register a hook that passes the activations of a place through ``edit``.

    The rest of the module's input or output is unchanged. Other backends are built on this function.

    Args:
        place: of the activations.
        edit: returns the activations to go on with; its own argument, to change nothing.

    Returns:
        The handle; the caller removes the hook with it.
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
