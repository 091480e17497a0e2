"""The entry point ``vllm.general_plugins``: a function that vLLM calls in each of its processes."""

from __future__ import annotations

import functools
import hashlib
import hmac
import importlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from featurizers_vllm import server, spec
from featurizers_vllm.architectures import ARCHITECTURES
from featurizers_vllm.checks import check_version
from featurizers_vllm.errors import RequestError
from featurizers_vllm.models import PREFIX
from featurizers_vllm.server import Server
from featurizers_vllm.settings import Settings

_MARK = "_featurizers_vllm"  # of what is wrapped already
_SECRET = secrets.token_bytes(32)


def register() -> None:
    """Read the operator's settings and prepare this process; do nothing if there are none.

    Raises:
        ServerError: the settings are malformed, or vLLM has another version.
    """
    settings = Settings.of_environment()
    if settings is None:
        return
    import vllm
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    check_version(vllm.__version__)
    running = server.start(settings)
    for architecture in ARCHITECTURES:
        vllm.ModelRegistry.register_model(architecture, f"featurizers_vllm.models:{PREFIX}{architecture}")
    watch_requests(InputProcessor, running, VLLMValidationError)


def http_bodies() -> Iterator[type[Any]]:
    """Yield vLLM's classes of HTTP requests that can ask for a beam search."""
    for module, name in (("completion", "CompletionRequest"), ("chat_completion", "ChatCompletionRequest")):
        yield getattr(importlib.import_module(f"vllm.entrypoints.openai.{module}.protocol"), name)


def watch_requests(
    processor: type[Any],
    running: Server,
    refusal: type[Exception],
    bodies: Callable[[], Iterable[type[Any]]] = http_bodies,
) -> None:
    """Wrap vLLM's ``InputProcessor``, which makes each request for the engine, where the prompt's length is known.

    The one change of a private method of vLLM that edits need: its keys and values of an edited prompt must not be
    taken for those of a clean one.

    Args:
        processor: the class.
        running: server of this process.
        refusal: error that vLLM answers with HTTP 400.
        bodies: classes of HTTP requests, looked up in the process that makes a processor.
    """
    if hasattr(processor.process_inputs, _MARK):
        return
    make, original = processor.__init__, processor.process_inputs

    @functools.wraps(make)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        running.admission  # noqa: B018  # the featurizers are read now, as in the engine
        for each in bodies():
            refuse_beams(each, refusal)

    @functools.wraps(original)
    def process_inputs(self: Any, *arguments: Any, **options: Any) -> Any:
        request = original(self, *arguments, **options)
        try:
            return admitted(request, running)
        except RequestError as error:
            raise refusal(str(error)) from error

    setattr(process_inputs, _MARK, True)
    processor.__init__, processor.process_inputs = __init__, process_inputs


def admitted(request: Any, running: Server) -> Any:
    """Return a request for the engine, with a salt of its own for the prefix cache if it has edits.

    Args:
        request: vLLM's ``EngineCoreRequest``.
        running: server of this process.

    Raises:
        RequestError: its edits cannot be served.
    """
    params = request.sampling_params
    raw = spec.given(params.extra_args) if params is not None else None
    if raw is None:
        return request
    edits = running.admission.edits(raw)
    if not edits:
        return request
    if request.prompt_token_ids is None:
        raise RequestError("a prompt of embeddings has no tokens to edit")
    if request.resumable:
        raise RequestError("a prompt that is given in parts has no length, so its activations are not edited")
    length = len(request.prompt_token_ids)
    for edit in edits:
        edit.check_prompt(length)
    # a longer prompt that begins alike, as the next turn of a chat does, is edited at other tokens
    of_length = length if any(edit.depends_on_length for edit in edits) else None
    request.cache_salt = salt(request.cache_salt, raw, of_length)
    return request


def salt(*parts: str | int | None) -> str:
    """Return a salt that nobody can name who does not know this process' secret."""
    return hmac.new(_SECRET, json.dumps(parts).encode(), hashlib.sha256).hexdigest()


def refuse_beams(protocol: type[Any], refusal: type[Exception]) -> None:
    """Wrap a request of the HTTP server, which forgets the extra arguments in a beam search, so that it refuses it.

    Args:
        protocol: class of the request's body.
        refusal: error that vLLM answers with HTTP 400.
    """
    if hasattr(protocol.to_beam_search_params, _MARK):
        return
    original = protocol.to_beam_search_params

    @functools.wraps(original)
    def to_beam_search_params(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.vllm_xargs and spec.ARGUMENT in self.vllm_xargs:
            raise refusal("vLLM does not hand the edits of a request on in a beam search; leave out use_beam_search")
        return original(self, *arguments, **options)

    setattr(to_beam_search_params, _MARK, True)
    protocol.to_beam_search_params = to_beam_search_params
