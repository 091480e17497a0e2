"""Compares interventions through maps with those of circuit-tracer, on one HookedTransformer with random weights.

    pip install -e . -e plugins/transcoder -e plugins/circuit-tracer
    pip install --no-deps circuit-tracer==0.5.0  # it asks for huggingface_hub before version 1
    python benchmarks/feature_interventions.py

Both run the same model and the transcoders of the folders in ``tests/fixtures/circuit-tracer``. circuit-tracer's
``feature_intervention`` has two modes. Without constraints, later features are computed anew and decoded changes are
added at every write: ``writes="additive"``. With ``constrained_layers`` for all layers, changes come from the features
of the base alone and every MLP output is kept but for them: ``writes="pinned-everywhere", later="frozen"``; it freezes
attention patterns and the scales of norms too, which is done here with its own hooks. Printed is the largest difference
of the logits, and the largest effect of the intervention.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import featurizers
import torch
from huggingface_hub import constants

FIXTURES = Path(__file__).parents[1] / "tests/fixtures/circuit-tracer"
LAYERS, D, VOCABULARY, CPU = 3, 6, 50, torch.device("cpu")
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
MODES = {"additive": "recomputed", "pinned-everywhere": "frozen"}
TOKENS = (4, 8)
"""Tokens of the edits, of 9."""
EDITS = {0: [1, 7], 1: [3], 2: [0, 19]}
"""Features to set, by layer."""
VALUE = 2.5


def model_with(name: str) -> Any:
    """Return a random model of Llama's form with the transcoders of a folder."""
    constants.HF_HUB_ENABLE_HF_TRANSFER = False  # circuit-tracer imports it, and huggingface_hub 1 has dropped it
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
    from transformer_lens import HookedTransformerConfig

    folder = FIXTURES / name
    if name.startswith("clt"):
        transcoders = load_clt(str(folder), device=CPU, dtype=torch.float32, lazy_decoder=False, **HOOKS)
    else:
        paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(LAYERS)}
        transcoders = load_transcoder_set(paths, scan=name, device=CPU, lazy_encoder=False, lazy_decoder=False, **HOOKS)
    config = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=D,
        n_ctx=32,
        d_head=4,
        n_heads=2,
        d_mlp=12,
        d_vocab=VOCABULARY,
        act_fn="silu",
        normalization_type="RMS",
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=4,
        final_rms=True,
        device="cpu",
        seed=0,
    )
    model = TransformerLensReplacementModel.from_config(config, transcoders)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not any(parameter is own for own in transcoders.parameters()):
            parameter.data.normal_(std=0.5)
    return model


def main() -> None:
    ids, every = torch.arange(3, 12), range(LAYERS)
    for name in ("set-relu", "set-jumprelu-skip", "clt-relu", "clt-jump_relu"):
        model = model_with(name)
        f = featurizers.load(FIXTURES / name)
        f.reads = {f"in-{i}": f"module:blocks.{i}.mlp.hook_in:output" for i in every}
        f.writes = {f"out-{i}": f"module:blocks.{i}.mlp.hook_out:output" for i in every}
        indices = {f"layer-{layer}": features for layer, features in EDITS.items()}
        for (mode, later), token in itertools.product(MODES.items(), TOKENS):
            theirs = [(layer, token, feature, VALUE) for layer, features in EDITS.items() for feature in features]
            constraints = {"freeze_attention": False} if mode == "additive" else {"constrained_layers": every}
            edit = featurizers.Ablate(f, indices=indices, value=VALUE, positions=[token], writes=mode, later=later)
            with torch.no_grad():
                base = model(ids[None])
                expected, _ = model.feature_intervention(ids, theirs, **constraints)
                _, hooks = model.setup_intervention_with_freeze(ids, constrained_layers=every)
                frozen = [(hook, own) for hook, own in hooks if hook.endswith(("hook_pattern", "hook_scale"))]
                with model.hooks(frozen if later == "frozen" else []), featurizers.intervene(model, edit):
                    logits = model(ids[None])
            difference, effect = (logits - expected).abs().max().item(), (expected - base).abs().max().item()
            print(f"{name:18} {mode:18} token {token} difference {difference:.1e}  effect {effect:.2f}")


if __name__ == "__main__":
    main()
