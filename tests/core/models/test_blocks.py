"""Decoders whose blocks differ: mixtures of experts and hybrids. Each block is looked at by itself."""

import functools

import featurizers
import pytest
import torch
import transformers
from featurizers import Anatomy, Steer, collect, intervene
from featurizers.errors import SiteError
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.support.models import WIDTH, fresh_model, hooked, prompts, read

SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
LATENT = {
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
SHARED = {"num_experts": 4, "shared_expert_intermediate_size": 16}
MODELS = {
    "Qwen3Next": {**EXPERTS, **LINEAR, **SHARED, "mlp_only_layers": [1]},
    "Bamba": MAMBA,
    "Qwen2Moe": {**EXPERTS, **SHARED, "mlp_only_layers": [0]},
    "DeepseekV3": {**EXPERTS, **LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "Mixtral": {"num_local_experts": 4},
}

PROJECTIONS = [
    ("Qwen3Next", "attn.z:0", "layers.0.linear_attn.out_proj", "attn.out:0"),
    ("Qwen3Next", "attn.z:1", "layers.1.self_attn.o_proj", "attn.out:1"),
    ("Qwen3Next", "mlp.act:1", "layers.1.mlp.down_proj", "mlp.out:1"),
    ("Bamba", "attn.z:0", "layers.0.mamba.out_proj", "attn.out:0"),
    ("Bamba", "attn.z:1", "layers.1.self_attn.o_proj", "attn.out:1"),
    ("Bamba", "mlp.act:0", "layers.0.feed_forward.down_proj", "mlp.out:0"),
    ("Qwen2Moe", "mlp.act:0", "layers.0.mlp.down_proj", "mlp.out:0"),
    ("DeepseekV3", "mlp.act:0", "layers.0.mlp.down_proj", "mlp.out:0"),
    ("Mixtral", "attn.z:1", "layers.1.self_attn.o_proj", "attn.out:1"),
]
"""Site, module named by hand, and the site of what that module computes."""

IDS = {"input_ids": prompts(2, 5)}


@functools.cache
def build(name):
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(("name", "site", "path", "output"), PROJECTIONS)
def test_each_block_has_its_own_projections(name, site, path, output):
    model = build(name)
    projection = model.model.get_submodule(path)
    found = collect(model, IDS, [site, output])
    assert torch.equal(found[site], read(model, projection, "input", **IDS))
    # what the projection makes of the site is the whole output of the part
    with torch.no_grad():
        torch.testing.assert_close(projection(found[site]), found[output])
    f = featurizers.create("identity", d_in=found[site].shape[-1])
    with torch.no_grad(), hooked(projection, "input", lambda hidden: hidden + 1.0):
        wanted = model(**IDS).logits
    with torch.no_grad(), intervene(model, {site: Steer(f, delta=1.0)}):
        torch.testing.assert_close(model(**IDS).logits, wanted)


@pytest.mark.parametrize(
    ("name", "layer"), [("Qwen3Next", 0), ("Qwen2Moe", 1), ("DeepseekV3", 1), ("Mixtral", 0), ("Mixtral", 1)]
)
def test_neurons_of_experts_are_refused_with_the_reason(name, layer):
    with pytest.raises(SiteError, match=rf"mlp\.act:{layer}: .*'experts'.*each token goes through experts"):
        Anatomy(build(name)).place(f"mlp.act:{layer}")
    assert Anatomy(build(name)).place(f"mlp.out:{layer}").path == f"model.layers.{layer}.mlp"


@pytest.mark.parametrize(("name", "part"), [("Qwen3Next", "linear_attn"), ("Bamba", "mamba")])
def test_heads_are_those_of_attention_only(name, part):
    model = build(name)
    heads = collect(model, IDS, [f"attn.z:1:{head}" for head in range(4)])
    known = read(model, model.model.layers[1].self_attn.o_proj, "input", **IDS)
    assert torch.equal(torch.cat(list(heads.values()), dim=-1), known)
    with pytest.raises(SiteError, match=rf"block 0 has '{part}' in the place of attention.* take all of 'attn\.z:0'"):
        Anatomy(model).place("attn.z:0:0")


def test_an_mlp_beside_experts_is_not_the_whole():
    model = fresh_model("llama")
    model.model.layers[1].experts = torch.nn.Linear(WIDTH, WIDTH)
    assert Anatomy(model).place("mlp.act:0").path == "model.layers.0.mlp.down_proj"
    for kind in ("mlp.out", "mlp.act"):
        with pytest.raises(SiteError, match=rf"{kind}:1: .* it has 'mlp' and beside it 'experts'"):
            Anatomy(model).place(f"{kind}:1")


def test_blocks_of_several_classes_and_without_attention_are_blocks():
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=WIDTH, num_hidden_layers=2, vocab_size=64, state_size=4)
    ).eval()
    assert Anatomy(model).place("resid.post:1").module is model.backbone.layers[1]
    with pytest.raises(SiteError, match=r"attn\.out:0: no such part was found in MambaBlock: it has 'norm', 'mixer'"):
        Anatomy(model).place("attn.out:0")
    other = fresh_model("llama")
    other.model.layers[1] = type("Special", (type(other.model.layers[1]),), {})(other.config, 1)
    assert Anatomy(other).place("mlp.act:1").module is other.model.layers[1].mlp.down_proj


@pytest.mark.parametrize("wrap", [functools.partial(torch.compile, backend="eager"), checkpoint_wrapper])
def test_blocks_in_wrappers_of_torch(wrap):
    plain, model = fresh_model("llama"), fresh_model("llama")
    model.model.layers[1] = wrap(model.model.layers[1])
    model.model.layers[2].mlp = wrap(model.model.layers[2].mlp)
    with torch.no_grad():
        model(**IDS)
    f = {"resid.post:1": WIDTH, "mlp.act:1": 48, "mlp.out:1": WIDTH, "mlp.act:2": 48, "mlp.out:2": WIDTH}
    for site, width in f.items():
        kind, layer = site.split(":")
        block = plain.model.layers[int(layer)]
        spot = {"resid.post": (block, "output"), "mlp.out": (block.mlp, "output")}
        with torch.no_grad(), hooked(*spot.get(kind, (block.mlp.down_proj, "input")), lambda hidden: hidden + 1.0):
            wanted = plain(**IDS).logits
        with torch.no_grad(), intervene(model, {site: Steer(featurizers.create("identity", d_in=width), delta=1.0)}):
            torch.testing.assert_close(model(**IDS).logits, wanted)
