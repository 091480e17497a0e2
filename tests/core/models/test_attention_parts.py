"""Queries, keys and values: which outputs of a projection they are, seen by what an edit of them changes."""

import functools

import featurizers
import pytest
import torch
import transformers
from featurizers import Anatomy, Site, Steer, collect, intervene
from featurizers.errors import SiteError, UsageError
from featurizers.models.widths import width_of

from tests.support.models import (
    ARCHITECTURES,
    HEADS,
    KV_HEADS,
    VOCABULARY,
    WIDTH,
    fresh_model,
    head_columns,
    hooked,
    prompts,
    tiny_model,
)

torch.set_num_threads(1)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
GROUPED = {"num_key_value_heads": KV_HEADS, "head_dim": 8, "intermediate_size": 40}
GPT = {"n_layer": 2, "n_embd": WIDTH, "n_head": HEADS, "n_positions": 64}
GATED = {
    **GROUPED,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
OTHERS = {
    "GPTBigCode": {**GPT, "multi_query": True},
    "GPTBigCode by head": {**GPT, "multi_query": False},
    "CodeGen": {**GPT, "rotary_dim": 4, "n_head": 8},
    "GPTJ": {**GPT, "rotary_dim": 4},
    "Bloom": {"n_layer": 2, "n_head": HEADS},
    "Falcon": {"multi_query": True, "new_decoder_architecture": False},
    "Falcon by head": {"multi_query": False, "new_decoder_architecture": False},
    "Falcon by group": {"num_kv_heads": KV_HEADS, "new_decoder_architecture": True},
    "Mpt": {"d_model": WIDTH, "n_heads": HEADS, "n_layers": 2, "max_seq_len": 64},
    "Persimmon": {"intermediate_size": 40},
    "Phi": {"intermediate_size": 40, "num_key_value_heads": KV_HEADS},
    "OPT": {"ffn_dim": 40, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64},
    "Qwen3Next": {**GATED, "mlp_only_layers": [0, 1]},
    "Qwen3_5": GATED,
}
"""Models with other layouts. The rest of a name after its first word is for people."""
IDS = {"input_ids": prompts(1, 4)}
TOKEN = 1


@functools.cache
def build(name):
    if name == "olmo2":  # its norms of queries and keys are over all heads, so that an edit of one changes the others
        model = fresh_model(name, attn_implementation="eager")
        for block in model.model.layers:
            block.self_attn.q_norm = block.self_attn.k_norm = torch.nn.Identity()
        return model
    if name == "gpt_neo":  # its scores are not scaled down, so that most probabilities would be 0 or 1
        model = fresh_model(name, attn_implementation="eager")
        for block in model.transformer.h:
            block.attn.attention.q_proj.weight.data *= 0.1
        return model
    if name in ARCHITECTURES:
        return tiny_model(name, attn_implementation="eager")
    kind = name.partition(" ")[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config_name = f"{kind}TextConfig" if kind == "Qwen3_5" else f"{kind}Config"
        config = getattr(transformers, config_name)(**{**SIZES, **OTHERS[name]})
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def observe(model):
    """Return the attention probabilities (head, query, key) and the weighted values (query, head, width) of block 1."""
    with torch.no_grad():
        probabilities = model(**IDS, output_attentions=True, use_cache=False).attentions[:2][-1][0]
        weighted = collect(model, IDS, ["attn.z:1"])["attn.z:1"][0]
    return probabilities, weighted.unflatten(-1, (probabilities.shape[0], -1))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
@pytest.mark.parametrize("kind", ["attn.q", "attn.k", "attn.v"])
def test_an_edit_of_a_head_changes_what_that_head_attends_to_or_carries(name, kind):
    """A query changes its own row of probabilities, a key the rows from its token on, a value no probability."""
    model = build(name)
    probabilities, weighted = observe(model)
    n_heads = probabilities.shape[0]
    whole = collect(model, IDS, [f"{kind}:1"])[f"{kind}:1"]
    width = width_of(Anatomy(model), Site(kind, 1, head=0))
    assert width_of(Anatomy(model), Site(kind, 1)) == whole.shape[-1]
    count = whole.shape[-1] // width
    assert count == n_heads if kind == "attn.q" else n_heads % count == 0
    f, delta = featurizers.create("identity", d_in=width), torch.linspace(-1.0, 2.0, width)
    for head in range(count):
        with intervene(model, {f"{kind}:1:{head}": Steer(f, delta=delta, positions=[TOKEN])}):
            edited_probabilities, edited_weighted = observe(model)
        of_head = torch.arange(n_heads) // (n_heads // count) == head
        rows = torch.arange(4) == TOKEN if kind == "attn.q" else torch.arange(4) >= TOKEN
        changed = (edited_probabilities != probabilities).any(-1)
        if kind == "attn.v":
            assert not changed.any()
        else:
            assert torch.equal(changed, of_head[:, None] & rows[None])
        assert torch.equal((edited_weighted != weighted).any(-1), rows[:, None] & of_head[None])
    with pytest.raises(SiteError, match=rf"{kind}:1:{count}: block 1 has {count} such heads, 0 to {count - 1}"):
        Anatomy(model).place(f"{kind}:1:{count}")


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_probabilities_times_values_are_attn_z(name):
    model = build(name)
    probabilities, weighted = observe(model)
    values = collect(model, IDS, ["attn.v:1"])["attn.v:1"][0].unflatten(-1, (-1, weighted.shape[-1]))
    values = values.repeat_interleave(probabilities.shape[0] // values.shape[-2], dim=-2)
    if name in ("Qwen3Next", "Qwen3_5"):  # values are multiplied by a gate, the other half of what q_proj returns
        queries = collect(model, IDS, [site := "module:model.layers.1.self_attn.q_proj:output"])[site][0]
        gate = queries.unflatten(-1, (HEADS, 2, 8))[:, :, 1].sigmoid()
    else:
        gate = torch.ones(())
    wanted = torch.einsum("hqk,khd->qhd", probabilities.to(values.dtype), values) * gate
    torch.testing.assert_close(weighted, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "llama", "Falcon by group", "CodeGen", "Qwen3Next"])
def test_the_heads_side_by_side_are_the_whole(name):
    model = build(name)
    for kind in ("attn.q", "attn.k", "attn.v"):
        whole = collect(model, IDS, [f"{kind}:1"])[f"{kind}:1"]
        heads = whole.shape[-1] // width_of(Anatomy(model), Site(kind, 1, head=0))
        found = collect(model, IDS, [f"{kind}:1:{head}" for head in range(heads)])
        assert torch.equal(torch.cat(list(found.values()), dim=-1), whole)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "qwen2"])
def test_prompts_of_any_length_and_generated_tokens(name):
    """The left-padded prompt is read as alone, and a plain hook on the prompt's pass generates the same tokens."""
    model, sites = tiny_model(name), ["attn.q:1:1", "attn.k:1", "attn.v:1:0"]
    alone = prompts(1, 4, seed=5)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), alone], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    of_alone = collect(model, {"input_ids": alone}, sites, positions=[0, -1])
    of_padded = collect(model, {"input_ids": padded, "attention_mask": mask}, sites, positions=[0, -1])
    for site in sites:
        torch.testing.assert_close(of_padded[site], of_alone[site], rtol=1e-4, atol=1e-5)
    path, heads = head_columns(name, "attn.v")
    options = {"max_new_tokens": 4, "do_sample": False}
    f = featurizers.create("identity", d_in=len(heads[0]))

    def edit(hidden):
        edited = hidden.clone()
        if hidden.shape[1] > 1:
            edited[:, -1, heads[0]] += 3.0
        return edited

    with torch.no_grad(), hooked(model.get_submodule(path.format(1)), "output", edit):
        wanted = model.generate(alone, **options)
    with torch.no_grad(), intervene(model, {"attn.v:1:0": Steer(f, delta=3.0, positions=[-1])}):
        assert torch.equal(model.generate(alone, **options), wanted)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "qwen3"])
def test_the_gradient_of_an_edit_is_that_of_a_plain_hook(name):
    model = tiny_model(name)
    path, heads = head_columns(name, "attn.k")
    deltas = [torch.zeros(len(heads[1]), requires_grad=True) for _ in range(2)]
    f = featurizers.create("identity", d_in=len(heads[1]))
    with intervene(model, {"attn.k:1:1": Steer(f, delta=deltas[0], positions=[TOKEN])}):
        model(**IDS).logits.square().sum().backward()

    def edit(hidden):
        of_token = torch.arange(4)[None, :, None] == TOKEN
        return hidden.index_add(-1, torch.tensor(heads[1]), deltas[1] * of_token)

    with hooked(model.get_submodule(path.format(1)), "output", edit):
        model(**IDS).logits.square().sum().backward()
    assert deltas[1].grad.abs().max() > 1e-3
    torch.testing.assert_close(deltas[0].grad, deltas[1].grad, rtol=1e-4, atol=1e-5)
    model.zero_grad()


def test_a_map_may_read_a_head_and_write_all_queries_of_the_same_projection():
    """In GPT-NeoX both begin at column 0 and end at column 8, of one head and of every head."""
    from featurizers_transcoder import Transcoder

    model = tiny_model("gpt_neox")
    encoder, decoder = torch.randn(5, 8), torch.randn(5, WIDTH)
    f = Transcoder.from_weights(encoder, decoder)
    f.reads, f.writes = {"in": "attn.q:1:0"}, {"out": "attn.q:1"}
    features = (collect(model, IDS, ["attn.q:1:0"])["attn.q:1:0"] @ encoder.T).relu()
    path, heads = head_columns("gpt_neox", "attn.q")
    columns = [column for head in heads for column in head]

    def edit(hidden):
        return hidden.index_add(-1, torch.tensor(columns), (1.0 - features[..., [3]]) * decoder[3])

    with torch.no_grad(), hooked(model.get_submodule(path.format(1)), "output", edit):
        wanted = model(**IDS).logits
    with torch.no_grad(), intervene(model, featurizers.Ablate(f, value=1.0, indices=[3])):
        torch.testing.assert_close(model(**IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    f.reads, f.writes = {"in": "attn.z:1:0"}, {"out": "attn.q:1"}
    with pytest.raises(UsageError, match=r"written at attn\.q:1 and read up to attn\.z:1:0, which comes later"):
        intervene(model, featurizers.Ablate(f, value=1.0)).__enter__()


class Unknown(torch.nn.Module):
    """Attention of another library, with one projection whose layout is not known."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o_proj = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)


def refused(model, site):
    with pytest.raises(SiteError) as caught:
        Anatomy(model).place(site)
    assert str(caught.value).startswith(f"{site}: ")
    assert "'module:PATH:output'" in str(caught.value)
    return str(caught.value)


def test_layouts_that_are_not_known_are_refused_with_what_the_block_has():
    model = fresh_model("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(WIDTH, 2 * WIDTH)
    assert "'q_proj' of its LlamaAttention returns 64 numbers and not 32" in refused(model, "attn.q:1:0")
    assert "'q_proj' of its LlamaAttention returns 64 numbers and not 32" in refused(model, "attn.q:1")
    assert Anatomy(model).place("attn.k:1").columns is None
    attention.v_proj = None
    for kind in ("attn.k", "attn.v"):
        assert "it has no 'v_proj'; LlamaAttention has 'q_proj', 'k_proj'" in refused(model, f"{kind}:1")
    model.model.layers[1].self_attn = Unknown()
    assert "which outputs of its modules are queries, keys and values; Unknown has 'qkv', 'o_proj'" in refused(
        model, "attn.v:1"
    )
    assert "in 2 of them, 2 heads" in repr(Anatomy(model))
    fused = fresh_model("gpt2")
    fused.transformer.h[1].attn.c_attn = torch.nn.Linear(WIDTH, 2 * WIDTH)
    assert "'c_attn' of its GPT2Attention returns 64 numbers and not 96" in refused(fused, "attn.k:1")
    del fused.transformer.h[1].attn.c_attn
    assert "its GPT2Attention has no 'c_attn'" in refused(fused, "attn.k:1")


def test_attention_of_other_kinds_is_refused_with_the_reason():
    assert "'linear_attn' is no attention with queries, keys and values of its own" in refused(
        build("Qwen3Next"), "attn.k:0"
    )
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(**{**SIZES, **latent}, first_k_dense_replace=2, intermediate_size=40)
    model = transformers.DeepseekV3ForCausalLM(config)
    for kind in ("attn.q", "attn.k", "attn.v"):
        assert "its attention is latent" in refused(model, f"{kind}:1")
    shared = {"num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = transformers.Gemma4TextConfig(
        **{**SIZES, **GROUPED, **shared, "num_hidden_layers": 4, "hidden_size_per_layer_input": 0, "global_head_dim": 8}
    )
    reuses = transformers.Gemma4ForCausalLM(config)
    assert "keys and values of this block are those of an earlier one" in refused(reuses, "attn.k:3")
    assert Anatomy(reuses).place("attn.q:3").columns is None
    mamba = transformers.MambaConfig(hidden_size=WIDTH, num_hidden_layers=1, vocab_size=64, state_size=4)
    assert "no such part was found in MambaBlock" in refused(transformers.MambaForCausalLM(mamba), "attn.q:0")


def test_pyvene_has_no_path_for_a_part_of_an_output():
    anatomy = Anatomy(tiny_model("gpt2"))
    with pytest.raises(SiteError, match=r"attn\.q:1: it is part of a module's output"):
        anatomy.pyvene_component("attn.q:1")
    with pytest.raises(SiteError, match=r"attn\.q:1:0: it is a head"):
        anatomy.pyvene_component("attn.q:1:0")
    assert Anatomy(tiny_model("llama")).pyvene_component("attn.q:1") == "model.layers[1].self_attn.q_proj.output"
