"""Rows add up on many architectures, at several sites of reading and writing; and edges are what ablations change."""

from __future__ import annotations

from typing import Any

import featurizers
import pytest
import torch
import transformers
from featurizers.errors import SiteError

from tests.support.attribution_graphs import MODELS, PROMPT, random_cross_layer, random_transcoders, shaken

LAYERS, D, FEATURES = 3, 32, 48
AFTER = "module:model.layers.{}.post_feedforward_layernorm:output"
OTHER = {
    "gemma2": ("resid.mid", AFTER),
    "gemma3": ("resid.mid", AFTER),
    # blocks without a stream between attention and MLP, or with one that is a multiple of their sum
    **dict.fromkeys(("neox-parallel", "gptj-parallel", "cohere-parallel", "granite"), ("resid.pre", "mlp.out")),
}
"""Where maps read and write beside mlp.in and mlp.out."""


@pytest.mark.parametrize("name", MODELS)
def test_rows_add_up(name: str) -> None:
    torch.manual_seed(0)
    model = shaken(MODELS[name]())
    for first, (reads, writes) in enumerate((("mlp.in", "mlp.out"), OTHER.get(name, ("resid.mid", "mlp.out")))):
        maps = random_cross_layer(LAYERS, D, FEATURES, 1, reads, writes, skip=True)
        graph = featurizers.graph(model, PROMPT, maps, first=first)
        assert graph.check_complete() < 1e-4
        assert graph.expanded.sum() > 20


def test_a_parallel_block_has_no_stream_before_its_mlp() -> None:
    maps = random_transcoders(LAYERS, D, FEATURES, reads="resid.mid")
    with pytest.raises(SiteError, match="side by side"):
        featurizers.graph(shaken(MODELS["neox-parallel"]()), PROMPT, maps)


@pytest.mark.parametrize("name", ["llama", "gemma2", "neox-parallel"])
def test_edges_are_what_a_plain_model_with_everything_held_computes(name: str) -> None:
    """The local replacement model by hooks: patterns, scales and features held, one source's write taken away."""
    torch.manual_seed(0)
    model = shaken(MODELS[name]())
    maps = random_transcoders(LAYERS, D, FEATURES)
    graph = featurizers.graph(model, PROMPT, maps, keep=1.0, targets=[5, 7])
    blocks = model.gpt_neox.layers if name == "neox-parallel" else model.model.layers
    held = Held(model, blocks)
    for node in graph.top(6):
        assert node.layer is not None
        assert node.feature is not None
        assert node.value is not None
        written = torch.zeros(len(PROMPT), D)
        written[node.position] = node.value * maps[node.layer].W_dec["features"]["out"][node.feature]
        change = held.change_of_logits(node.layer, written)
        for target, token in enumerate((5, 7)):
            (edge,) = graph.edges(into=graph.first_target + target, out_of=node) or [None]
            weight = 0.0 if edge is None else edge.weight
            expected = change[token] - change.mean()
            assert abs(weight - float(expected)) < 2e-4 * max(1.0, float(change.abs().max()))


class Held:
    """A model whose norms divide by what they divided by in a clean run, whose attention has the clean patterns, and
    whose MLPs give what they gave. It is run on the derivative of the stream, by torch's forward mode."""

    def __init__(self, model: Any, blocks: Any) -> None:
        self.model, self.blocks = model, blocks
        self.ids = torch.tensor([PROMPT])

    def change_of_logits(self, layer: int, written: torch.Tensor) -> torch.Tensor:
        """Return the change of the last token's logits for a change of what the MLP of a layer gives."""
        norms = [m for m in self.model.modules() if "Norm" in type(m).__name__]
        handles = [norm.register_forward_hook(_held_norm) for norm in norms]
        handles += [b.mlp.register_forward_hook(lambda m, a, out: out.detach()) for b in self.blocks]
        handles.append(self.blocks[layer].mlp.register_forward_hook(lambda m, a, out: out.detach() + self.delta))
        previous = self.model.config._attn_implementation
        transformers.AttentionInterface.register("held", _held_attention)
        self.model.set_attn_implementation("held")
        try:

            def logits(delta: torch.Tensor) -> torch.Tensor:
                self.delta = delta
                return self.model(self.ids).logits[0, -1]

            softcap = getattr(self.model.config, "final_logit_softcapping", None)
            if softcap is not None:
                self.model.config.final_logit_softcapping = None
            zero = torch.zeros(1, len(PROMPT), D)
            _, change = torch.func.jvp(logits, (zero,), (written[None],))
            if softcap is not None:
                self.model.config.final_logit_softcapping = softcap
            return change
        finally:
            self.model.set_attn_implementation(previous)
            for handle in handles:
                handle.remove()


def _held_norm(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
    """Return a norm's output, whose derivative holds its scale: that of the output for a scale of the same size."""
    x = args[0]
    centred = x - x.mean(-1, keepdim=True) if isinstance(module, torch.nn.LayerNorm) else x
    weight = module.weight + 1 if type(module).__name__.startswith("Gemma") else module.weight
    eps = next(value for key, value in vars(module).items() if "eps" in key)
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt().detach()
    held = centred / scale * weight
    return held - held.detach() + out.detach()


def _held_attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any, softcap: Any = None, **_: Any) -> Any:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q.detach() @ k.detach().mT * scaling
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    causal = torch.ones(q.shape[2], k.shape[2]).tril().bool()
    scores = scores.masked_fill(~causal, float("-inf")) if mask is None else scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None
