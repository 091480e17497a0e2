"""Attribution graphs beside circuit-tracer, on the same model with the same transcoders: time, memory, FLOPs.

    pip install --no-deps circuit-tracer==0.5.0  # it asks for huggingface_hub before version 1; and transformer-lens<4

Memory is measured in a process for each side: ``python benchmarks/graphs.py ours|theirs CASE``.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import featurizers
import torch
from featurizers_transcoder import Transcoder
from timing import Benchmark, Case, Settings, Sizes, Skipped, Unequal
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, D, HEADS, KV_HEADS, FEATURES, VOCABULARY = 8, 256, 8, 4, 2048, 1000
KEEP = 0.99


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how many features are active on it.

    Attributes:
        tokens: of the prompt.
        bias: of all encoders; the lower, the fewer features are active.
        batch: rows that circuit-tracer makes together: of 8 and 64 the faster.
    """

    tokens: int
    bias: float
    batch: int


CASES = {"128": Prompt(128, -7.5, 8), "64": Prompt(64, -6.05, 8), "quick": Prompt(16, -8.0, 64)}


@functools.lru_cache(maxsize=1)
def model_and_maps() -> tuple[LlamaForCausalLM, list[Transcoder]]:
    """Return a random Llama and a transcoder for each layer, whose biases are zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=D,
        intermediate_size=2 * D,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        noise = 0.2 * torch.randn_like(parameter)
        parameter.data.copy_(parameter * 4 if parameter.dim() > 1 else parameter + noise)
    maps = []
    for layer in range(LAYERS):
        f = Transcoder.from_weights(*(torch.randn(FEATURES, D) / 6 for _ in range(2)), torch.zeros(FEATURES))
        f.reads, f.writes = {"in": f"mlp.in:{layer}"}, {"out": f"mlp.out:{layer}"}
        maps.append(f)
    return model, maps


def ids(prompt: Prompt) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.cat([torch.tensor([1]), torch.randint(3, VOCABULARY - 1, (prompt.tokens - 1,), generator=generator)])


def ours(prompt: Prompt) -> Callable[[], Any]:
    model, maps = model_and_maps()
    for f in maps:
        f.get_parameter("b_enc.features").fill_(prompt.bias)
    tokens = ids(prompt)

    def call() -> Any:
        graph = featurizers.graph(model, tokens, maps, nodes=10**9, keep=KEEP)
        return graph, graph.prune()

    return call


def theirs(prompt: Prompt) -> Callable[[], Any]:
    """Return a call of circuit-tracer's ``attribute`` and ``prune_graph``.

    Raises:
        Skipped: it is not installed.
    """
    from huggingface_hub import constants

    constants.HF_HUB_ENABLE_HF_TRANSFER = False  # type: ignore[attr-defined]  # circuit-tracer 0.5.0 imports it
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        tracer = importlib.import_module("circuit_tracer")
        graphs = importlib.import_module("circuit_tracer.graph")
        replacement = importlib.import_module("circuit_tracer.replacement_model.replacement_model_transformerlens")
        single = importlib.import_module("circuit_tracer.transcoder.single_layer_transcoder")
        lens = importlib.import_module("transformer_lens")
        conversions = importlib.import_module("transformer_lens.pretrained.weight_conversions")
    except ImportError as error:
        raise Skipped(f"the peer, circuit_tracer, cannot be imported: {error}") from error
    model, maps = model_and_maps()
    layers = {}
    for layer, f in enumerate(maps):
        cpu: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
        one = single.SingleLayerTranscoder(D, FEATURES, torch.relu, layer, **cpu)
        one.W_enc.data, one.W_dec.data = f.get_parameter("W_enc.features.in"), f.get_parameter("W_dec.features.out")
        one.b_enc.data, one.b_dec.data = torch.full((FEATURES,), prompt.bias), f.get_parameter("b_dec.out")
        layers[layer] = one
    config = lens.HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=D,
        n_heads=HEADS,
        n_key_value_heads=KV_HEADS,
        d_head=D // HEADS,
        d_mlp=2 * D,
        d_vocab=VOCABULARY,
        n_ctx=4096,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        eps=1e-6,
        positional_embedding_type="rotary",
        rotary_dim=D // HEADS,
        rotary_adjacent_pairs=False,
        final_rms=True,
        device="cpu",
        dtype=torch.float32,
        original_architecture="LlamaForCausalLM",
    )
    whole = replacement.TransformerLensReplacementModel(config)
    plain = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
    plain |= {"fold_value_biases": False, "refactor_factored_attn_matrices": False}
    whole.load_and_process_state_dict(conversions.convert_llama_weights(model, config), **plain)
    whole._configure_replacement_model(single.TranscoderSet(layers, "mlp.hook_in", "hook_mlp_out"))
    whole.tokenizer = _Tokenizer()
    tokens = ids(prompt)

    def call() -> Any:
        graph = tracer.attribute(tokens, whole, batch_size=prompt.batch)
        return graph, graphs.prune_graph(graph)

    return call


class _Tokenizer:
    all_special_ids = (1,)
    bos_token_id, eos_token_id, pad_token_id, padding_side, vocab_size = 1, 2, 0, "right", VOCABULARY

    def decode(self, tokens: object) -> str:
        return str(tokens)


def compared(here: Any, there: Any) -> str:
    """Return how close two graphs are.

    Raises:
        Unequal: features, edges or pruned nodes differ.
    """
    (graph, pruned), (other, other_pruned) = here, there
    adjacency = other.adjacency_matrix
    if not torch.equal(graph.features, other.active_features):
        raise Unequal("other features are active")
    found = adjacency[graph.edge_targets, graph.sources.long()]
    off = float((found - graph.weights).abs().max() / adjacency.abs().max())
    differ = int((pruned.kept != other_pruned.node_mask).sum())
    if off > 1e-5 or differ > 0.01 * len(pruned):
        raise Unequal(f"edges differ by {off:.1e} of the largest, and {differ} pruned nodes")
    sizes = f"{graph.n_features:,} features; {len(pruned):,} nodes stay, {differ} of them other ones"
    return f"{sizes}; edges within {off:.0e} of the largest"


def case(name: str) -> Callable[[Settings], Case]:
    def build(settings: Settings) -> Case:
        prompt = CASES[name] if not settings.quick else CASES["quick"]
        results: dict[str, Any] = {}
        calls = {"ours": ours(prompt), "theirs": theirs(prompt)}

        def kept(side: str) -> Callable[[], object]:
            def call() -> object:
                results[side] = calls[side]()
                return results[side]

            return call

        return Case(
            f"attribute and prune, {prompt.tokens} tokens, {LAYERS} layers of width {D} and {FEATURES:,} features",
            "circuit-tracer attribute and prune_graph",
            kept("ours"),
            kept("theirs"),
            lambda: "",
            after=lambda: compared(results["ours"], results["theirs"]),
        )

    return build


def memory(settings: Settings) -> Sizes:
    """Compare the memory that both take above that of model and maps."""
    name = "quick" if settings.quick else "128"
    theirs(CASES[name])  # raises Skipped
    used = {}
    for side in ("ours", "theirs"):
        done = subprocess.run([sys.executable, __file__, side, name], capture_output=True, text=True, check=True)
        used[side] = json.loads(done.stdout.splitlines()[-1])
    what = f"memory to attribute and prune, {CASES[name].tokens} tokens"
    return Sizes(what, "circuit-tracer", used["ours"], used["theirs"], "peak above model and maps, in a process each")


def floor(settings: Settings) -> Sizes:
    """Compare the FLOPs that were done with those that each expanded node needs."""
    prompt = CASES["quick" if settings.quick else "128"]
    call = ours(prompt)
    with FlopCounterMode(display=False) as counter:
        graph, _ = call()
    return Sizes(
        f"FLOPs of a graph, {prompt.tokens} tokens",
        "the causal floor of each row",
        float(counter.get_total_flops()),
        float(needed(graph)),
        "counted by torch",
        unit="FLOP",
    )


def needed(graph: Any) -> int:
    """Return the FLOPs that rows need: at tokens up to a reader's, attention and the products with all sources."""
    tokens = len(graph.tokens)
    each = torch.zeros(LAYERS, tokens, dtype=torch.long)
    for layer, position, _ in graph.features.tolist():
        each[layer, position] += 1
    written = each.cumsum(1) + torch.arange(1, tokens + 1)  # features and errors of a layer up to a token
    head = D // HEADS
    total = 0
    readers = [(layer, position) for layer, position, _ in graph.features[graph.expanded].tolist()]
    readers += [(LAYERS, tokens - 1)] * len(graph.targets)
    for layer, position in readers:
        t = position + 1
        attention = 2 * t * D * head * (HEADS + KV_HEADS) + HEADS * head * t * (t + 1)
        total += attention * min(layer + 1, LAYERS) + 2 * D * (int(written[:layer, position].sum()) + t)
    return total


BENCHMARKS = (
    Benchmark("graphs-128", case("128"), required=2.5),
    Benchmark("graphs-64", case("64"), required=4.0),
    Benchmark("graphs-memory", memory, required=5.0),
    Benchmark("graphs-flops", floor, sense="at most", required=1.3),
)


def main() -> None:
    """Print the bytes that one side takes above what model and maps take."""
    side, name = sys.argv[1:]
    torch.set_num_threads(1)
    prompt = CASES[name]
    call = ours(prompt) if side == "ours" else theirs(prompt)
    (ours if side == "ours" else theirs)(CASES["quick"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    print(max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 4) * 1024)


if __name__ == "__main__":
    main()
