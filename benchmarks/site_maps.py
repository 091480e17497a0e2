"""Speed and memory of maps between sites beside SAELens and circuit-tracer, with the same weights and activations."""

from __future__ import annotations

import functools
import importlib
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from dictionaries import ACTIVE, TOKENS, WIDTH, sae_lens
from featurizers.features import Edit
from featurizers_transcoder import CrossLayerTranscoder, LinearMapConfig, Transcoder
from resident import touched
from timing import Benchmark, Case, Settings, Sizes, Skipped, same
from torch import Tensor

LAYERS, FEATURES = 12, 4096


def circuit_tracer() -> Any:
    """Import circuit-tracer's cross-layer transcoder.

    Raises:
        Skipped: it is not installed.
    """
    from huggingface_hub import constants

    constants.HF_HUB_ENABLE_HF_TRANSFER = False  # type: ignore[attr-defined]  # circuit-tracer 0.5.0 imports it
    try:
        return importlib.import_module("circuit_tracer.transcoder.cross_layer_transcoder")
    except ImportError as error:
        raise Skipped(f"the peer, circuit_tracer, cannot be imported: {error}") from error


@functools.lru_cache(maxsize=1)
def _weights(settings: Settings, n: int) -> dict[str, Tensor]:
    """Return random weights of a transcoder with thresholds at which about 64 features of a token are active."""
    g = torch.Generator().manual_seed(0)
    d = settings.size(WIDTH, 64)
    w_enc = torch.randn(n, d, generator=g) / math.sqrt(d)
    level = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - settings.size(ACTIVE, 8) / n)))
    tensors = {
        "W_enc": w_enc,
        "W_dec": torch.randn(n, d, generator=g) / math.sqrt(d),
        "b_enc": torch.zeros(n),
        "b_dec": torch.randn(d, generator=g) / math.sqrt(d),
        "threshold": torch.full((n,), level),
    }
    return {name: tensor.to(settings.device, settings.dtype) for name, tensor in tensors.items()}


def _theirs(settings: Settings, weights: dict[str, Tensor]) -> Any:
    """Return the same transcoder in SAELens."""
    sae_lens()
    cls, config = importlib.import_module("sae_lens.registry").get_sae_class("jumprelu_transcoder")
    n, d = weights["W_enc"].shape
    with torch.device("meta"):
        theirs = cls(
            config(
                d_in=d,
                d_out=d,
                d_sae=n,
                dtype=str(settings.dtype).removeprefix("torch."),
                device=str(settings.device),
                apply_b_dec_to_input=False,
                normalize_activations="none",
            )
        )
    theirs.load_state_dict({k: v.T.contiguous() if k == "W_enc" else v for k, v in weights.items()}, assign=True)
    return theirs.requires_grad_(False)


def _tokens(settings: Settings, seed: int) -> Tensor:
    return settings.randn(settings.size(TOKENS, 16), settings.size(WIDTH, 64), seed=seed)


def edit_of_transcoder(settings: Settings, k: int) -> Case:
    """Compare an edit of k features that keeps the error: ours adds rows, SAELens decodes twice."""
    n = settings.size(16384, 1024)
    weights = _weights(settings, n)
    ours = Transcoder.from_weights(**weights, rule="jumprelu")
    theirs = _theirs(settings, weights)
    x, y = _tokens(settings, 1), _tokens(settings, 2)
    columns = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k].to(settings.device)

    @torch.no_grad()
    def here() -> Tensor:
        z = ours.encode("features", {"in": x}, columns)
        return ours.apply_edit("out", y, {"features": Edit(z, z + 1.0, columns)})

    @torch.no_grad()
    def there() -> Tensor:
        z = theirs.encode(x)
        error = y - theirs.decode(z)
        edited = z.clone()
        edited[..., columns] += 1.0
        return theirs.decode(edited) + error

    return Case(
        f"edit of {k} of {n} features of a JumpReLU transcoder, the error kept",
        "a featurizer over sae_lens",
        here,
        there,
        lambda: same(here(), there(), 1e-4 if settings.dtype == torch.float32 else 0.1, "activations"),
    )


def _cross_layer(settings: Settings, layers: int, n: int, d: int) -> tuple[LinearMapConfig, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    groups = {
        f"layer-{i}": {"reads": [f"in-{i}"], "writes": [f"out-{j}" for j in range(i, layers)], "n_features": n}
        for i in range(layers)
    }
    reads = {f"in-{i}": {"width": d} for i in range(layers)}
    writes = {f"out-{i}": d for i in range(layers)}
    config = LinearMapConfig.model_validate({"reads": reads, "writes": writes, "groups": groups})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CrossLayerTranscoder(config).state_dict().items()}
    scale = math.sqrt(d)
    tensors = {name: torch.randn(shape, generator=g) / scale for name, shape in shapes.items()}
    level = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - settings.size(ACTIVE, 8) / n)))
    tensors |= {name: torch.full_like(bias, -level) for name, bias in tensors.items() if name.startswith("b_enc.")}
    return config, {name: tensor.to(settings.device, settings.dtype) for name, tensor in tensors.items()}


def edit_of_cross_layer_transcoder(settings: Settings) -> Case:
    """Compare an edit of 8 features of one layer at all later writes."""
    module = circuit_tracer()
    layers, n, d = settings.size(LAYERS, 3), settings.size(FEATURES, 128), settings.size(WIDTH, 64)
    config, tensors = _cross_layer(settings, layers, n, d)
    ours = CrossLayerTranscoder.from_tensors(config, tensors)
    theirs = module.CrossLayerTranscoder(layers, n, d, lazy_decoder=False, device=settings.device)
    state = {
        "W_enc": torch.stack([tensors[f"W_enc.layer-{i}.in-{i}"] for i in range(layers)]),
        "b_enc": torch.stack([tensors[f"b_enc.layer-{i}"] for i in range(layers)]),
        "b_dec": torch.stack([tensors[f"b_dec.out-{i}"] for i in range(layers)]),
    }
    for i in range(layers):
        decoders = [tensors[f"W_dec.layer-{i}.out-{j}"] for j in range(i, layers)]
        state[f"W_dec.{i}"] = torch.stack(decoders, dim=1)
    theirs.load_state_dict(state, strict=False, assign=True)
    tokens = settings.size(16, 8)
    x = settings.randn(layers, tokens, d, seed=1)
    y = settings.randn(layers, tokens, d, seed=2)
    columns = torch.arange(8, device=settings.device)

    @torch.no_grad()
    def here() -> Tensor:
        z = ours.encode("layer-0", {"in-0": x[0]}, columns)
        edit = {"layer-0": Edit(z, z + 1.0, columns)}
        return torch.stack([ours.apply_edit(f"out-{j}", y[j], edit) for j in range(layers)])

    @torch.no_grad()
    def there() -> Tensor:
        z = theirs.encode(x)
        edited = z.clone()
        edited[0][:, columns] += 1.0
        return y + theirs.decode(edited) - theirs.decode(z)

    return Case(
        f"edit of 8 features of a cross-layer transcoder of {layers} layers of {n} features",
        "circuit_tracer encode, and decode twice",
        here,
        there,
        lambda: same(here(), there(), 1e-4 if settings.dtype == torch.float32 else 0.1, "activations"),
    )


_SLICE = "f = featurizers.load(folder, indices={'layer-0': range(0, 64, 8)}); return f, _used(f)"
_WHOLE = "f = featurizers.load(folder); return f, _used(f)"
_IMPORTS = """
import featurizers
def _used(f):
    return [tensor.sum() for tensor in f.state_dict().values()]
"""


def load_slice(settings: Settings) -> Sizes:
    """Compare the memory that becomes resident while 8 features and all of a cross-layer transcoder are loaded."""
    layers, n, d = settings.size(LAYERS, 3), settings.size(1024, 128), settings.size(WIDTH, 64)
    with tempfile.TemporaryDirectory() as name:
        folders = {}
        for size, count in (("small", 96), ("large", n)):
            f = CrossLayerTranscoder.from_tensors(*_cross_layer(settings, layers, count, d))
            folders[size] = str(f.save_pretrained(Path(name, size)))
            del f
        (part, fast), (whole, slow) = (touched(_IMPORTS, body, **folders) for body in (_SLICE, _WHOLE))
    return Sizes(
        f"memory touched: load 8 features of a cross-layer transcoder of {layers} × {n} features, and use them",
        "the whole, loaded here",
        part,
        whole,
        f"in {fast * 1e3:.0f} ms and in {slow * 1e3:.0f} ms",
    )


BENCHMARKS = (
    Benchmark("transcoder-32-of-16384", functools.partial(edit_of_transcoder, k=32), required=100),
    Benchmark("cross-layer-8-of-12x4096", edit_of_cross_layer_transcoder, required=50),
    Benchmark("cross-layer-load-slice", load_slice, required=50),
)
