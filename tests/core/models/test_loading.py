"""`load_model`: what it gives is the model of the file, and can be saved."""

from __future__ import annotations

from pathlib import Path

import featurizers
import numpy as np
import pytest
import torch
from featurizers.errors import UsageError
from featurizers.models.loading import model_without_weights
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.tensor([[1, 5, 7, 3]])
ROOT_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=64)).eval()


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Write a model with the library of llama.cpp, which permutes the queries' and keys' rows for its rotary code."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(40)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"▁w{number}" for number in range(37))])
    writer.add_token_scores([0.0] * 40)
    writer.add_token_types([2, 3, 3] + [1] * 37)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {f"{old}.weight": f"{new}.weight" for old, new in ROOT_TENSORS.items()}
    for number in range(2):
        for old, new in BLOCK_TENSORS.items():
            names[f"model.layers.{number}.{old}.weight"] = f"blk.{number}.{new}.weight"
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            rows = tensor.reshape(2, 2, 8, 32).swapaxes(1, 2).reshape(32, 32)
        else:
            rows = tensor
        writer.add_tensor(names[name], rows.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_model_of_a_gguf_file_is_saved_and_loaded_again(tmp_path):
    original = llama()
    write_gguf(original, tmp_path / "tiny.gguf")
    loaded = featurizers.load_model(str(tmp_path / "tiny.gguf"))
    assert loaded.revision is None
    torch.testing.assert_close(loaded.model(IDS).logits, original(IDS).logits)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = featurizers.load_model(str(tmp_path / "saved"))
    assert torch.equal(again.model(IDS).logits, loaded.model(IDS).logits)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "saved").config.to_dict().get("quantization_config") is None


def test_a_model_that_is_not_there_is_one_error(tmp_path):
    places = (
        tmp_path / "nothing",
        str(tmp_path / "nothing"),
        "./nothing",
        "~/nothing-here",
        str(tmp_path / "nothing.gguf"),
    )
    for name in (*places, Path("owner/nothing")):
        with pytest.raises(UsageError, match=r"cannot load the language model '.*nothing.*': there is no such file or"):
            featurizers.load_model(name)


def test_a_folder_in_the_home_is_found(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_without_weights("~/model").config.hidden_size == 32
