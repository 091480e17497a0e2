"""What must be so that edits are right: the version of vLLM, and how the engine is configured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from featurizers.errors import shown
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from featurizers_vllm.architectures import ARCHITECTURES
from featurizers_vllm.errors import ServerError
from featurizers_vllm.settings import Settings

VERSIONS: Final = ">=0.32,<0.33"
"""Versions of vLLM that this package was tested with."""


def check_version(version: str) -> None:
    """Raise a ServerError if this is no version of vLLM that the package was tested with."""
    try:
        fits = SpecifierSet(VERSIONS).contains(Version(version), prereleases=True)
    except InvalidVersion:
        fits = False
    if not fits:
        raise ServerError(
            f"vLLM {shown(version)} is installed, and featurizers-vllm works with {VERSIONS}; install that version, or "
            "a release of featurizers-vllm for yours"
        )


def check_engine(vllm_config: Any, settings: Settings) -> None:
    """Raise a ServerError if edits would not be right in an engine of this configuration; name every reason."""
    if reasons := list(_reasons(vllm_config, settings)):
        raise ServerError("edits of features cannot be served: " + "; ".join(reasons))


def _reasons(config: Any, settings: Settings) -> Iterator[str]:
    yield from _of_model(config.model_config, settings)
    yield from _of_engine(config)
    cpu = torch.device(config.device_config.device).type == "cpu"
    if not cpu and config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        yield "full CUDA graphs are not supported; start with --enforce-eager, or with cudagraph_mode PIECEWISE"
    if not settings.untested and (not cpu or config.use_v2_model_runner):
        yield (
            "this package was tested on CPUs with the V1 model runner alone; to try it here all the same, set "
            '"untested": true in its settings'
        )


def _of_model(model: Any, settings: Settings) -> Iterator[str]:
    if model.architecture not in ARCHITECTURES:
        yield f"the model is a {shown(model.architecture)}; supported are {', '.join(sorted(ARCHITECTURES))}"
    layers = model.hf_text_config.num_hidden_layers
    for site in settings.armed:
        if site.layer is not None and site.layer >= layers:
            yield f"site {site} is armed, but the model has {layers} layers"
    if model.dtype not in (torch.float32, torch.bfloat16):
        yield f"activations in {model.dtype} can overflow; start with --dtype bfloat16 or float32"
    if model.runner_type != "generate":
        yield f"the runner is {shown(model.runner_type)}; only generation is served"
    if model.enable_prompt_embeds:
        yield "a prompt of embeddings has no tokens; start without --enable-prompt-embeds"
    if model.enable_sleep_mode:
        yield "a sleeping server forgets its edits; start without --enable-sleep-mode"


def _of_engine(config: Any) -> Iterator[str]:
    parallel = config.parallel_config
    if parallel.world_size > 1 or parallel.data_parallel_size > 1:
        yield "tensor, pipeline, context and data parallelism are not supported; start one process for one device"
    if parallel.use_ubatching:
        yield "a batch that is cut in two is not supported; start without --enable-dbo"
    if config.speculative_config is not None:
        yield "a model that drafts tokens is not edited; start without speculative decoding"
    if config.kv_transfer_config is not None:
        yield "keys and values of edited prompts must not leave the server; start without a KV connector"
    if config.cache_config.kv_sharing_fast_prefill:
        yield "layers that skip the prompt are not edited there; start without --kv-sharing-fast-prefill"
    if not isinstance(config.additional_config, dict):
        yield "additional_config must be a dict, where the armed sites are noted for the cache of compiled code"
