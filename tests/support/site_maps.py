"""Maps between sites with random weights, and models that fit them."""

import torch
from featurizers_transcoder import LinearMapConfig

WIDTH, FEATURES = 16, 12


def linear_map(cls, groups, *, width=WIDTH, n=FEATURES, rule="jumprelu", skips=None, seed=0, **options):
    """Build a map with random weights.

    Args:
        cls: its class.
        groups: by number, the reads and the writes of each.
        width: of every site.
        n: features of each group.
        rule: activation rule.
        skips: reads of each write's skip connections.
        seed: of the weights.
        options: fields of the config.
    """
    generator = torch.Generator().manual_seed(seed)
    reads = dict.fromkeys(read for own, _ in groups.values() for read in own)
    writes = dict.fromkeys(write for _, own in groups.values() for write in own)
    config = LinearMapConfig(
        reads={name: {"width": width} for name in reads},
        writes=dict.fromkeys(writes, width),
        groups={
            f"layer-{i}": {"reads": list(own), "writes": list(to), "n_features": n, "rule": rule}
            for i, (own, to) in groups.items()
        },
        skips=skips or {},
        **options,
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
    tensors = {name: torch.randn(shape, generator=generator) / 3 for name, shape in shapes.items()}
    return cls.from_tensors(config, {name: t.abs() if "threshold" in name else t for name, t in tensors.items()})


def model(name):
    """Build a decoder of three layers and width 16 with random weights; gains and biases are not at their start."""
    import transformers

    torch.manual_seed(0)
    shared = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    llama = {
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        **shared,
    }
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            n_layer=3, n_embd=WIDTH, n_head=2, n_positions=32, activation_function="relu", **shared
        ),
        "llama": lambda: transformers.LlamaConfig(**llama),
        "gemma2": lambda: transformers.Gemma2Config(**llama),
        "gemma3": lambda: transformers.Gemma3TextConfig(**llama),
        "qwen3": lambda: transformers.Qwen3Config(**llama),
    }[name]()
    built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in built.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return built.requires_grad_(False)


def written(name, layer):
    """Return the site at which the MLP's part is added to the stream."""
    if name.startswith("gemma"):
        return f"module:model.layers.{layer}.post_feedforward_layernorm:output"
    return f"mlp.out:{layer}"
