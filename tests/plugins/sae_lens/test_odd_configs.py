"""Configurations of SAELens with values of any type: they are read as they are meant, or refused in one line."""

from __future__ import annotations

import json

import featurizers
import pytest
import torch
from featurizers.errors import FeaturizerError
from safetensors.torch import save_file

ODD = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "negative": -1,
    "zero": 0,
    "enormous": 10**30,
    "fraction": 1.5,
    "digits": "3",
    "escape": "a/\x1b[31m",
    "long": "x" * 100_000,
    "surrogate": "\ud800",
    "list": [3],
    "empty list": [],
    "object": {"a": {"b": [1]}},
    "null": None,
    "true": True,
}
FIELDS = (
    *("architecture", "d_in", "d_sae", "dtype", "apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
    *("metadata", "hook_name", "model_name", "hook_head_index", "scaling_factor", "finetuning_scaling_factor", "k"),
    *("activation_fn_str", "activation_fn_kwargs", "rescale_acts_by_decoder_norm", "residual_threshold"),
    "max_iterations",
)


def load(folder, architecture, changes):
    cfg = {
        "architecture": architecture,
        "d_in": 4,
        "d_sae": 6,
        "dtype": "float32",
        "k": 2,
        "apply_b_dec_to_input": True,
    }
    metadata = {"sae_lens_version": "6.0.0", "hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2"}
    own = {name: value for name, value in changes.items() if name in metadata}
    (folder / "cfg.json").write_text(json.dumps({**cfg, "metadata": {**metadata, **own}, **changes}))
    tensors = {"W_enc": torch.ones(4, 6), "W_dec": torch.ones(6, 4), "b_enc": torch.zeros(6), "b_dec": torch.zeros(4)}
    if architecture == "matching_pursuit":
        tensors = {name: tensors[name] for name in ("W_dec", "b_dec")}
    save_file(tensors, folder / "sae_weights.safetensors")
    return featurizers.load(folder)


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("architecture", ["standard", "topk", "matching_pursuit"])
def test_an_odd_value_is_read_or_refused_in_one_line(tmp_path, architecture, value):
    for field in FIELDS:
        read, message = None, ""
        try:
            read = load(tmp_path, architecture, {field: value})
        except FeaturizerError as error:
            message = str(error)
        assert message.isprintable(), field
        assert len(message) < 700, field
        if read is not None:
            assert read.featurize(torch.randn(3, 4))[0].isfinite().all(), field
            assert read.id.isprintable()
            assert read.site is None or read.site.model is None or read.site.model.isprintable()
