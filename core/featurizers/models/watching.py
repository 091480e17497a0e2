"""`Watch`: what a model is computing, noted before each forward pass for the hooks of all contexts.

There is one watch for each model. It lasts as long as any context on the model. It hooks the modules from the model
that the user calls down to the decoder, because a class that also sees gives its decoder embeddings and masks by block:
ids and padding are known at the outermost call, tokens and cache at the decoder. It also replaces ``generate`` on the
instance: without a cache each pass of ``generate`` starts at the first token and would look like a new prompt, and a
static cache hides the padding. What it notes is kept for each thread, since models run in several.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featurizers.models.anatomy import Anatomy
from featurizers.models.caches import CacheLog, cache_of
from featurizers.models.calling import bound, signature
from featurizers.models.contexts import counter
from featurizers.models.positions import Pass


class Member(Protocol):
    """A context that a watch tells of calls of ``generate``."""

    def begin_generate(self, options: GenerateOptions) -> None:
        """Raise if the operations of the context cannot be carried out with these options."""

    def end_generate(self, tokens: int) -> None:
        """Take note that the sequences were computed up to some number of tokens."""


@dataclass(frozen=True)
class GenerateOptions:
    """Options of a call of ``generate`` that decide where its passes are.

    Attributes:
        columns: number of columns of the prompt; None if it is not known.
        mask: attention mask that was given, ``(batch, columns)``.
        arguments: keyword arguments of the call.
        defaults: generation configs to look into for an option that is not among them.
        trims: whether `Member.end_generate` will be called.
        texts: whether the prompt was given as texts.
    """

    columns: int | None
    mask: Tensor | None
    arguments: dict[str, Any]
    defaults: tuple[Any, ...]
    trims: bool = True
    texts: bool = False

    def get(self, name: str) -> Any:
        """Return an option; None if it is not set."""
        candidates = (self.arguments.get(name), *(getattr(config, name, None) for config in self.defaults))
        return next((value for value in candidates if value is not None), None)


@dataclass(frozen=True)
class _Outer:
    """Call of the outermost module of a pass that takes a mask."""

    depth: int
    mask: Any
    ids: Any
    has_position_ids: bool


class _State(threading.local):
    current: Pass | None = None
    outer: _Outer | None = None
    call: tuple[int, nn.Module, dict[str, Any]] | None = None  # depth of the outermost module called, it, its arguments
    generating: GenerateOptions | None = None
    filling: tuple[Any, int, int] = (None, 0, 0)  # cache, its tokens after the pass, event at which they began


class Watch:
    """Records a `Pass` before each forward pass of a model's decoder, as ``current``."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._backend, self._model, self._path = anatomy.backend, anatomy.model, anatomy.watched
        self._ids_name = self._backend.argument_names.get("input_ids", "input_ids")
        self._members: list[tuple[Callable[[], bool], Member]] = []
        self._users = 0
        self._when_opened: list[Callable[[], None]] = []
        self._state = _State()
        self._latest = Pass(0, 0, None)
        self._log = CacheLog()
        self._exit = ExitStack()
        self._handles: list[RemovableHandle] = []
        self._wrapper: Callable[..., Any] | None = None
        self._generate_before: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """Return the watch itself, which serves a copy of the model as well."""
        return self

    @property
    def current(self) -> Pass:
        """Latest pass of this thread; of any thread if this one has run none, as a worker of ``backward``."""
        return self._state.current or self._latest

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let passes within the ``with`` block leave what is known of the current pass as it is."""
        state = self._state
        before = dict(vars(state))
        try:
            yield
        finally:
            vars(state).clear()
            vars(state).update(before)

    def tell(self, acts: Callable[[], bool], member: Member) -> Callable[[], None]:
        """Tell a context of calls of ``generate`` in threads and tasks in which it acts, until the result is called."""
        entry = (acts, member)
        self._members.append(entry)
        return functools.partial(self._members.remove, entry)

    @contextmanager
    def calling_when_opened(self, function: Callable[[], None]) -> Iterator[None]:
        """Call a function whenever another context has put its hooks on the model."""
        self._when_opened.append(function)
        try:
            yield
        finally:
            self._when_opened.remove(function)

    def note_opened(self) -> None:
        """Take note that a context has put its hooks on the model."""
        for function in self._when_opened:
            function()

    def start(self) -> None:
        """Register the hooks and wrap ``generate``."""
        self._exit.enter_context(self._backend.prepared())
        *outer, decoder = self._path
        for depth, module in enumerate(outer):
            before = functools.partial(self._note_outer, depth)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if outer:
            self._handles.append(self._model.register_forward_hook(self._forget_outer, always_call=True))
        self._handles.append(decoder.register_forward_pre_hook(self._note, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._note_cache))
        if callable(generate := getattr(self._model, "generate", None)):
            own = vars(self._model)
            self._generate_before = own.get("generate")
            self._wrapper = own["generate"] = functools.partial(self._generate, generate)

    def stop(self) -> None:
        """Remove the hooks and restore ``generate``."""
        if self._wrapper is not None:
            _restore(self._model, self._wrapper, self._generate_before)
        for handle in reversed(self._handles):
            handle.remove()
        self._exit.close()

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        names = ("inputs", "input_ids", "inputs_embeds", self._ids_name)
        prompt = args[0] if args else next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
        columns = prompt.shape[1] if isinstance(prompt, Tensor) and prompt.dim() > 1 else None
        options = replace(self._options(columns, kwargs), texts=are_texts(prompt))
        before, self._state.generating = self._state.generating, options
        members = [member for acts, member in self._members if acts()]
        try:
            for member in members:
                member.begin_generate(options)
            output = generate(*args, **kwargs)
        finally:
            self._state.generating = before
        tokens = getattr(output, "sequences", output)
        if isinstance(tokens, Tensor) and tokens.dim() == 2 and columns is not None:
            with_prompt = isinstance(prompt, Tensor) and prompt.dim() == 2
            for member in members:
                member.end_generate(tokens.shape[1] + (0 if with_prompt else columns) - 1)
        return output

    def _options(self, columns: int | None, arguments: dict[str, Any], *, trims: bool = True) -> GenerateOptions:
        mask = arguments.get("attention_mask")
        configs = (arguments.get("generation_config"), getattr(self._model, "generation_config", None))
        known = tuple(config for config in configs if config is not None)
        return GenerateOptions(columns, mask if isinstance(mask, Tensor) else None, arguments, known, trims)

    def _found_generate(self) -> GenerateOptions | None:
        """Return the options of a ``generate`` of transformers that runs a model around this one; None without it."""
        if (frame := _generate_frame()) is None:
            return None
        prompt, arguments, outer = (frame.get(name) for name in ("inputs_tensor", "kwargs", "self"))
        if (
            not isinstance(prompt, Tensor)
            or not isinstance(outer, nn.Module)
            or set(outer.modules()).isdisjoint(self._path)
        ):
            return None
        arguments = {**frame, **(arguments or {})}
        options = self._options(prompt.shape[1], arguments, trims=False)
        for acts, member in self._members:
            if acts():
                member.begin_generate(options)
        return options

    def _note_outer(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self._state
        arguments = bound(module, args, kwargs)
        if state.call is None or state.call[0] >= depth:
            state.call = (depth, module, arguments)
        if state.outer is not None and state.outer.depth < depth:
            return
        if "attention_mask" in arguments or "attention_mask" in signature(type(module).forward).parameters:
            ids = arguments.get("input_ids", arguments.get(self._ids_name))
            has_ids = arguments.get("position_ids") is not None
            state.outer = _Outer(depth, arguments.get("attention_mask"), ids, has_ids)

    def _forget_outer(self, *_: Any) -> None:
        self._state.outer = self._state.call = None

    def _note(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self._state
        outer, state.outer = state.outer, None
        arguments = bound(decoder, args, kwargs)
        call, state.call = state.call, None
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        columns = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() > 1 else None
        cache = cache_of(arguments)
        start = self._log.start(cache)
        began = self._log.began(cache) if start else next(counter)
        generating = state.generating
        if generating is None and not start:
            generating = self._found_generate()
        own_mask = arguments.get("attention_mask")
        mask = next((m for m in (own_mask, outer and outer.mask) if isinstance(m, Tensor) and m.dim() == 2), None)
        if mask is None and generating is not None and not start:  # `generate` may give the model a mask of pairs
            of_prompts = generating.mask if own_mask is None else _mask_of_generate(generating)
            mask = None if of_prompts is None else _repeated(of_prompts, tokens)
        texts = outer is not None and are_texts(outer.ids)
        outer_ids = outer.ids if outer is not None and isinstance(outer.ids, Tensor) else None
        given = outer_ids.shape[1] if outer_ids is not None and outer_ids.dim() == 2 else columns
        state.current = self._latest = Pass(
            start,
            began,
            mask,
            opaque_mask=texts or (mask is None and own_mask is not None and (outer is None or outer.mask is not None)),
            prompt_columns=None if generating is None else generating.columns,
            tokens=ids if ids is not None else outer_ids,
            has_position_ids=(outer.has_position_ids if outer else False) or arguments.get("position_ids") is not None,
            added_columns=0 if columns is None or given is None else columns - given,
            in_chunks=generating is not None and generating.get("prefill_chunk_size") is not None,
            call=(decoder, arguments) if call is None else call[1:],
        )
        state.filling = (cache, start + (columns or 0), began)

    def _note_cache(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        state = self._state
        cache, tokens, began = state.filling
        state.filling = (None, 0, 0)
        made = cache_of(output)
        self._log.add(cache if made is None else made, tokens, began)


_watches: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def watching(anatomy: Anatomy) -> Iterator[Watch]:
    """Watch a model while the context lasts; contexts on one model share a watch and may end in any order."""
    model = anatomy.model
    with _lock:
        watch = _watches.get(model)
        if watch is None:
            watch = Watch(anatomy)
            watch.start()
            _watches[model] = watch
        watch._users += 1
    try:
        yield watch
    finally:
        with _lock:
            watch._users -= 1
            if not watch._users:
                del _watches[model]
                watch.stop()


def _restore(model: nn.Module, wrapper: object, before: object) -> None:
    """Take a wrapper of ``generate`` off a model, unless something else has replaced it."""
    if vars(model).get("generate") is not wrapper:
        return
    if before is None:
        del vars(model)["generate"]
    else:
        vars(model)["generate"] = before


def are_texts(inputs: Any) -> bool:
    """Return whether a model was given texts, which it turns into tokens itself."""
    return isinstance(inputs, str) or (isinstance(inputs, list | tuple) and isinstance(next(iter(inputs), None), str))


def _repeated(mask: Tensor, tokens: Any) -> Tensor | None:
    """Return a mask with its rows repeated as ``generate`` repeats the prompts; None if it does not fit."""
    batch = tokens.shape[0] if isinstance(tokens, Tensor) else mask.shape[0]
    return mask.repeat_interleave(batch // mask.shape[0], dim=0) if batch % mask.shape[0] == 0 else None


def _mask_of_generate(generating: GenerateOptions) -> Tensor | None:
    """Return the mask of prompts that ``generate`` was given, or that it made by the padding token."""
    if generating.mask is not None:
        return generating.mask
    made = ((_generate_frame() or {}).get("model_kwargs") or {}).get("attention_mask")
    return made if isinstance(made, Tensor) and made.dim() == 2 else None


def _generate_frame() -> dict[str, Any] | None:
    """Return the local variables of the innermost ``generate`` of transformers that is running in this thread."""
    utils = sys.modules.get("transformers.generation.utils")
    if utils is None:
        return None
    code = _code_of(utils.GenerationMixin)
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return None


@functools.cache
def _code_of(mixin: Any) -> Any:
    return inspect.unwrap(mixin.generate).__code__
