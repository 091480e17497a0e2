"""Featurizers on disk and settings of a server that allows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import featurizers
import torch
from featurizers_vllm import Settings

WIDTH, COUNT = 16, 40
SITE = "resid.post:1"


def made(generator: torch.Generator, width: int = WIDTH, count: int = COUNT) -> dict[str, featurizers.Featurizer[Any]]:
    """Return featurizers of each form of gate, and one without."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    write = torch.nn.functional.normalize(random(count, width), dim=-1)
    bias, shared = random(count) * 0.2, {"b_dec": random(width) * 0.1}

    def dictionary(rule: str, **options: Any) -> featurizers.DictionaryFeaturizer:
        given = {"W_enc": write * 0.7, "W_dec": write, **shared, "rule": rule, **options}
        return featurizers.DictionaryFeaturizer.from_tensors(**given)

    return {
        "relu": dictionary("relu", b_enc=bias),
        "jumprelu": dictionary("jumprelu", b_enc=bias, threshold=random(count).abs(), pre_bias=True),
        "gated": dictionary("gated", b_gate=bias, r_mag=bias.roll(1), b_mag=bias.roll(2)),
        "topk": dictionary("topk", b_enc=bias, rule_options={"k": 8}),
        "subspace": featurizers.create("subspace", d_in=width, n_features=4, seed=1),
    }


def saved(folder: Path, width: int = WIDTH) -> list[dict[str, str]]:
    """Save them, and return how settings allow them, each at the revision ``r1``."""
    for name, f in made(torch.Generator().manual_seed(0), width).items():
        f.save_pretrained(folder / name)
    return [{"id": f"owner/{name}", "revision": "r1", "path": name} for name in made(torch.Generator())]


def settings(folder: Path, **changes: Any) -> Settings:
    """Return settings of a server with these featurizers and two armed sites."""
    given = {"version": 1, "sites": [SITE, "mlp.out:0"], "featurizers": saved(folder), "features": 6, **changes}
    return Settings.parse(json.dumps(given).encode(), "settings.json", folder)


def request(*edits: dict[str, Any]) -> str:
    """Return the JSON of a request, whose edits are at the first armed site unless they say otherwise."""
    return json.dumps({"version": 1, "edits": [{"site": SITE, **edit} for edit in edits]})
