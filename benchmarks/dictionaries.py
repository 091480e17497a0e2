"""Speed and memory of dictionaries beside SAELens, with the same weights and activations."""

from __future__ import annotations

import functools
import importlib
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from featurizers import DictionaryFeaturizer
from resident import touched
from timing import Benchmark, Case, Settings, Sizes, Skipped, same
from torch import Tensor

WIDTH, TOKENS, ACTIVE = 2304, 256, 64


def sae_lens() -> Any:
    """Import `sae_lens`.

    Raises:
        Skipped: it is not installed.
    """
    try:
        return importlib.import_module("sae_lens")
    except ImportError as error:
        raise Skipped(f"the peer, sae_lens, cannot be imported: {error}") from error


@functools.lru_cache(maxsize=1)
def _weights(settings: Settings, n_features: int, d: int) -> dict[str, Tensor]:
    """Return random weights, with thresholds at which about 64 features of a token are active."""
    g = torch.Generator().manual_seed(0)
    w_enc = torch.randn(n_features, d, generator=g) / math.sqrt(d)
    share = settings.size(ACTIVE, 8) / n_features
    level = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - share)))
    tensors = {
        "W_enc": w_enc,
        "b_enc": torch.zeros(n_features),
        "W_dec": torch.nn.functional.normalize(w_enc, dim=-1),
        "b_dec": torch.zeros(d),
        "threshold": torch.full((n_features,), level),
    }
    return {name: tensor.to(settings.device, settings.dtype) for name, tensor in tensors.items()}


def pair(
    settings: Settings, n_features: int, architecture: str, d: int | None = None
) -> tuple[DictionaryFeaturizer, Any]:
    """Build the same dictionary in this library and in SAELens."""
    sae_lens()
    weights = _weights(settings, n_features, d or settings.size(WIDTH, 64))
    t = dict(weights)
    f, d = t["W_enc"].shape
    options: dict[str, Any] = {}
    if architecture != "jumprelu":
        t.pop("threshold")
    if architecture == "gated":
        level = weights["threshold"]
        t |= {"b_gate": -level, "r_mag": torch.zeros_like(level), "b_mag": -level}
        t.pop("b_enc")
    if architecture == "topk":
        options["rule_options"] = {"k": settings.size(ACTIVE, 8)}
    ours = DictionaryFeaturizer.from_tensors(**t, rule=architecture, **options)
    saes = importlib.import_module("sae_lens.registry")
    cls, config = saes.get_sae_class(architecture)
    with torch.device("meta"):
        theirs = cls(
            config(
                d_in=d,
                d_sae=f,
                dtype=str(settings.dtype).removeprefix("torch."),
                device=str(settings.device),
                apply_b_dec_to_input=False,
                normalize_activations="none",
                **({"k": settings.size(ACTIVE, 8)} if architecture == "topk" else {}),
            )
        )
    theirs.load_state_dict({n: v.T.contiguous() if n == "W_enc" else v for n, v in t.items()}, assign=True)
    return ours, theirs.requires_grad_(False)


class SaeLensFeaturizer:
    """Featurizer over SAELens as users write it by hand, with an error term; an interchange decodes three times."""

    def __init__(self, sae: Any) -> None:
        self.sae = sae

    def featurize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.sae.encode(x)
        return features, x - self.sae.decode(features)

    def inverse_featurize(self, features: Tensor, error: Tensor) -> Tensor:
        return self.sae.decode(features) + error

    def interchange(self, base: Tensor, source: Tensor, indices: Tensor | None) -> Tensor:
        features, error = self.featurize(base)
        source_features, _ = self.featurize(source)
        if indices is None:
            features = source_features
        else:
            features[..., indices] = source_features[..., indices]
        return self.inverse_featurize(features, error)

    def mask(self, base: Tensor, source: Tensor, gate: Tensor) -> Tensor:
        features, error = self.featurize(base)
        source_features, _ = self.featurize(source)
        return self.inverse_featurize((1 - gate) * features + gate * source_features, error)


def _tokens(settings: Settings, seed: int) -> Tensor:
    return settings.randn(settings.size(TOKENS, 16), settings.size(WIDTH, 64), seed=seed)


def _interchange(settings: Settings, n_features: int, k: int | None) -> Case:
    n_features = settings.size(n_features, 1024)
    ours, sae = pair(settings, n_features, "jumprelu")
    theirs = SaeLensFeaturizer(sae)
    base, source = _tokens(settings, 1), _tokens(settings, 2)
    indices = None
    if k is not None:
        indices = torch.randperm(n_features, generator=torch.Generator().manual_seed(0))[:k].to(settings.device)
    what = "all features" if k is None else f"{k} features"

    @torch.no_grad()
    def here() -> Tensor:
        return ours.interchange(base, source, indices)

    @torch.no_grad()
    def there() -> Tensor:
        return theirs.interchange(base, source, indices)

    return Case(
        f"interchange of {what} of a JumpReLU dictionary, {ACTIVE} of {n_features} active",
        "a featurizer over sae_lens",
        here,
        there,
        lambda: same(here(), there(), _tolerance(settings), "activations"),
    )


def _tolerance(settings: Settings) -> float:
    return 1e-4 if settings.dtype == torch.float32 else 0.1


def mask_step(settings: Settings) -> Case:
    """Compare a training step of a mask: forward, and backward to its logits."""
    n_features = settings.size(65536, 1024)
    ours, sae = pair(settings, n_features, "topk")
    theirs = SaeLensFeaturizer(sae)
    base, source, cotangent = (_tokens(settings, seed) for seed in (1, 2, 3))
    logits = settings.randn(n_features, seed=4).requires_grad_()

    def step(mask: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        loss = (mask(base, source, torch.sigmoid(logits)) * cotangent).sum()
        return torch.autograd.grad(loss, logits)[0]

    def here() -> Tensor:
        return step(ours.mask)

    def there() -> Tensor:
        return step(theirs.mask)

    return Case(
        f"a training step of a mask, top {ACTIVE} of {n_features}, forward and backward",
        "a featurizer over sae_lens",
        here,
        there,
        lambda: same(here(), there(), _tolerance(settings), "gradients"),
    )


def decode(settings: Settings) -> Case:
    """Compare decoding of the active features, given as sparse features."""
    n_features = settings.size(65536, 1024)
    ours, sae = pair(settings, n_features, "topk")
    with torch.no_grad():
        features = ours.encode_sparse(_tokens(settings, 1))
        dense = sae.encode(_tokens(settings, 1))

    @torch.no_grad()
    def here() -> Tensor:
        return ours.decode_sparse(features)

    @torch.no_grad()
    def there() -> Tensor:
        return sae.decode(dense)

    return Case(
        f"decode {ACTIVE} of {n_features} features",
        "sae_lens decode",
        here,
        there,
        lambda: same(here(), there(), _tolerance(settings), "activations"),
    )


def decode_dense(settings: Settings) -> Case:
    """Compare decoding of a dense tensor, in which the active features must be found first."""
    case = decode(settings)
    ours, sae = pair(settings, settings.size(65536, 1024), "topk")
    with torch.no_grad():
        dense = sae.encode(_tokens(settings, 1))

    @torch.no_grad()
    def here() -> Tensor:
        return ours.decode(dense)

    return Case(f"{case.what}, given as a dense tensor", case.peer, here, case.theirs, case.check)


def gated(settings: Settings) -> Case:
    """Compare a gated encoder: a matrix product instead of two and a scaled copy of the weights."""
    n_features = settings.size(16384, 1024)
    ours, sae = pair(settings, n_features, "gated")
    x = _tokens(settings, 1)

    @torch.no_grad()
    def here() -> Tensor:
        return ours.encode(x)

    @torch.no_grad()
    def there() -> Tensor:
        return sae.encode(x)

    return Case(
        f"encode with {n_features} gated features",
        "sae_lens encode",
        here,
        there,
        lambda: same(here(), there(), _tolerance(settings), "features"),
    )


_OURS = (
    "import featurizers",
    "f = featurizers.load(folder, indices=range(0, 1024, 32)); return f, f.encode(torch.randn(1, f.d_in))",
)
_THEIRS = (
    "import warnings; warnings.simplefilter('ignore'); from sae_lens import SAE",
    "sae = SAE.load_from_disk(folder); return sae, sae.encode(torch.randn(1, sae.cfg.d_in))[..., :1024:32]",
)


def load_rows(settings: Settings) -> Sizes:
    """Compare the memory that becomes resident while 32 features are loaded and encoded, in separate processes."""
    sae_lens()
    n_features = settings.size(65536, 2048)
    medians = []
    with tempfile.TemporaryDirectory() as name:
        for size, folder in ((1024, "small"), (n_features, "large")):
            ours, sae = pair(settings, size, "jumprelu")
            ours.save_pretrained(Path(name, f"ours-{folder}"))
            sae.save_model(str(Path(name, f"theirs-{folder}")))
        for side, (imports, body) in {"ours": _OURS, "theirs": _THEIRS}.items():
            paths = {folder: str(Path(name, f"{side}-{folder}")) for folder in ("small", "large")}
            medians.append(touched(imports, body, small=paths["small"], large=paths["large"]))
        size = sum(path.stat().st_size for path in Path(name, "ours-large").iterdir())
    return Sizes(
        f"memory touched: load 32 of {n_features} features of a {size / 1e9:.2f} GB dictionary, encode a token",
        "sae_lens load_from_disk, and all features encoded",
        medians[0][0],
        medians[1][0],
        f"in {medians[0][1] * 1e3:.0f} ms here, in {medians[1][1] * 1e3:.0f} ms there",
    )


BENCHMARKS = (
    Benchmark("dictionary-load-rows", load_rows, required=100),
    Benchmark("dictionary-32-of-65536", functools.partial(_interchange, n_features=65536, k=32), required=500),
    Benchmark("dictionary-full", functools.partial(_interchange, n_features=65536, k=None), required=2.2),
    Benchmark("dictionary-mask-step", mask_step, required=2.3),
    Benchmark("dictionary-decode", decode, required=60),
    Benchmark("dictionary-decode-dense", decode_dense),
    Benchmark("dictionary-32-of-16384", functools.partial(_interchange, n_features=16384, k=32), required=100),
    Benchmark("dictionary-gated", gated, required=2),
)
