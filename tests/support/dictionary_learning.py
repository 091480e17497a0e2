"""Golden tensors of dictionary_learning, and folders in its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import featurizers_dictionary_learning as dl
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "fixtures/dictionary-learning/golden.safetensors"
SEED = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpAutoEncoder")
NAMES = (*SEED, "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
D, F, K = 16, 64, 5


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state dict of a class, and the tensors that dictionary_learning computed with it."""
    tensors = {n.removeprefix(f"{name}/"): t for n, t in load_file(GOLDEN).items() if n.startswith(f"{name}/")}
    state = {n.removeprefix("state/"): t for n, t in tensors.items() if n.startswith("state/")}
    return state, {n: t for n, t in tensors.items() if not n.startswith("state/")}


def model(name: str) -> Any:
    """Return the autoencoder of the golden tensors, with a copy of them."""
    state = {n: t.clone() for n, t in golden(name)[0].items()}
    return getattr(dl, name).from_state(state, "golden")


def saved(folder: Path, name: str, state: Any = None, buffer: Any = None, **trainer: Any) -> Path:
    """Write a folder of dictionary_learning with the golden weights of a class, or with ``state``, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(golden(name)[0] if state is None else state, folder / "ae.pt")
    common = {"dict_class": name, "activation_dim": D, "dict_size": F, "layer": 12, "lm_name": "google/gemma-2-2b"}
    config = {"trainer": {**common, "submodule_name": "resid_post_layer_12", **trainer}}
    (folder / "config.json").write_text(json.dumps({**config, "buffer": buffer or {"ctx_len": 128, "io": "out"}}))
    return folder


def close(result: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Assert that two tensors are equal to rounding, and not all zero."""
    __tracebackhide__ = True
    size = float(expected.detach().abs().max())
    assert size > 0
    torch.testing.assert_close(result.detach(), expected.detach(), rtol=tolerance, atol=tolerance * size)
