"""Names from outside of a million characters, made for each pattern so that it repeats: each is looked at once.

A pattern that starts over at each place would take an hour; the alarm ends such a run after five minutes.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from featurizers.errors import ManifestError
from featurizers_sae_lens import formats, multi_layer, scopes, torch_files, transcoders
from featurizers_sae_lens.table import catalogue
from featurizers_transcoder import hooks

MOST = 10**6


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """End a test that does not end."""

    def ring(*_: Any) -> None:
        raise TimeoutError("five minutes for a million characters")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def long(*words: str) -> str:
    """Return the words, and the last one again and again, a million characters long."""
    return "".join(words) + words[-1] * (MOST // len(words[-1]))


PATHS = [
    long("gemma-scope"),
    long("gemma-scope-", "transcoder"),
    long("gemma-scope-2b-pt-", "transcoder-"),
    long("gemma-scope-2-", "a"),
    long("/gemma-scope-2-", "4b-p/gemma-scope-2-"),
    long("gemma-scope-", "2"),
    long("gemma-scope-2b-pt-res/embedding/width_", "a"),
    long("embedding/width_a/"),
    long("embedding/width_a/embedding/width_", "/a"),
    long("layer_", "1"),
    long("layer_"),
    long("layers.", "1"),
    long("layers.1."),
    long("layers.1\n"),
    long("-res"),
    long("resid_post_all"),
    long("Llama-3.1-8B-Instruct-SAE-l"),
    long("Llama-3.1-", "8"),
    long("SAE-Res-"),
    long("SAE-Res-", "a-W8K-L0_"),
    long("SAE-Res-a-W", "8"),
    long("SAE-Res-a-W8K-L0_", "8"),
    long("DeepSeek-R1-Distill-"),
    long("DeepSeek-R1-Distill-", "a-SAE-l"),
    long("DeepSeek-R1-Distill-a-SAE-l", "9"),
    long("mlp_post_act"),
    long("resid_post_mlp", "/autoencoders/"),
    long("resid_post_mlp/autoencoders/", "1"),
    long("layer", "1"),
    long("blocks.", "1"),
    long("blocks.1.", "hook_resid_pre"),
    long("google/gemma-2-"),
    long("google/gemma-3-270m", "\n"),
    long("model.layers.1.", "post_attention_layernorm"),
]


def _single_file(*names: str) -> Callable[[str], Any]:
    state = {name: torch.ones((1, 1) if "eight" in name or "W_" in name else 1) for name in names}

    def read(path: str) -> Any:
        source = SimpleNamespace(where="it", torch=lambda _: dict(state), indices=None)
        return torch_files.single_file(source, path, {}, path)  # type: ignore[arg-type]

    return read


LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
READERS: dict[str, Callable[[str], Any]] = {
    "other folders": scopes.is_transcoder,
    "Gemma Scope": lambda path: (scopes._gemma_hook(path), scopes._gemma_model(path)),
    "Gemma Scope 2": lambda path: (scopes._gemma_2_hook(path, {}), scopes.gemma_2_model(path, None)),
    "Gemma Scope 2's config.json": lambda path: (
        scopes._gemma_2_hook("", {"hf_hook_point_in": path}),
        scopes.gemma_2_model("", path),
    ),
    "folders of Gemma Scope 2's crosscoders": lambda path: multi_layer._layers(path, "crosscoder", (None, None), 3),
    "layers in Gemma Scope 2's config.json": lambda path: multi_layer._layers("", "clt", (f"{{{path}}}",) * 2, 3),
    "Goodfire": _single_file(*(name.replace(".", "_linear.") for name in LINEAR)),
    "Qwen Scope": _single_file("W_enc", "W_dec", "b_enc", "b_dec"),
    "DeepSeek": _single_file(*LINEAR),
    "OpenAI": _single_file("encoder.weight", "decoder.weight", "latent_bias", "pre_bias"),
    "hooks and models": lambda name: (hooks.site_of(name, "gemma-2-2b"), hooks.site_of("hook_embed", name)),
    "hooks of transcoders": lambda name: (
        hooks.read_of(name, name),
        hooks.read_of("blocks.1.ln2.hook_normalized", name),
        hooks.site_of_point(name, name),
        transcoders._qwen(name),
    ),
    "names of files": lambda name: formats.read(SimpleNamespace(names=(f"{name}.pt", "b.pt"), where="")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("reader", READERS)
def test_a_million_characters(reader):
    for path in PATHS:
        with contextlib.suppress(ManifestError):  # a transcoder, or Qwen Scope without k
            READERS[reader](path)


@pytest.mark.parametrize(
    ("path", "architecture"),
    [
        ("google/gemma-scope-2b-pt-transcoders/layer_0", "transcoder"),
        ("google/gemma-scope-2b-pt-transcoders@main/layer_0/width_16k", "transcoder"),
        ("google/gemma-scope-2-4b-pt/transcoder_all/layer_0", "transcoder"),
        ("google/gemma-scope-2-4b-pt@1/clt", "clt"),
        ("crosscoder", "crosscoder"),
        ("gemma-scope-2-1b-pt-crosscoders_old", "crosscoder"),
        ("google/gemma-scope-2b-pt-res/layer_0", None),
        ("me/my-transcoder/gemma-scope-2b-pt-res", None),
        ("gemma-scope-transcoder-free/layer_0", None),
        ("gemma-scope-2b-pt-res/my-transcoder", None),
        ("transcoders of mine", None),
    ],
)
def test_folders_of_other_architectures(path, architecture):
    if architecture in (None, "transcoder"):
        assert scopes.is_transcoder(path) == (architecture is not None)
        return
    with pytest.raises(ManifestError, match=f"the architecture '{architecture}' is not"):
        scopes.is_transcoder(path)


def test_folders_of_the_catalogue():
    for release in catalogue().releases.values():
        if release.loader in ("gemma_2", "gemma_3", "gemma_2_transcoder"):
            for entry in release.entries.values():
                assert scopes.is_transcoder(f"{release.repo_id}/{entry.path}") == ("transcoder" in release.name)
