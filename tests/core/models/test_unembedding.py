"""`Unembedding`: logits from the output of the final norm, compared with the model's own."""

import pytest
import torch
import transformers
from featurizers.errors import SiteError
from featurizers.models import Anatomy, Unembedding, projection
from torch import Tensor, nn

from tests.support.decoders import DECODERS, decoder, shared_decoder
from tests.support.models import (
    ARCHITECTURES,
    VOCABULARY,
    WIDTH,
    fresh_model,
    hooks_of,
    module_of,
    prompts,
    read,
    tiny_model,
)


def close(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> None:
    assert first.shape == second.shape
    assert float((first - second).detach().norm()) <= tolerance * float(second.detach().norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_model(architecture):
    model = tiny_model(architecture)
    ids = prompts(2, 6)
    normed = read(model, *module_of(model, architecture, "norm.out"), input_ids=ids)
    logits = model(input_ids=ids).logits
    unembedding = Unembedding.of(model)
    close(unembedding(normed), logits)
    assert unembedding.scale == 1.0
    assert (unembedding.softcap is not None) == (architecture == "gemma2")
    assert unembedding.weight.shape == (WIDTH, VOCABULARY)
    if architecture != "gemma2":
        close(normed @ unembedding.weight + (0 if unembedding.bias is None else unembedding.bias), logits)


@pytest.mark.parametrize("name", DECODERS)
def test_the_factor_is_that_of_the_config(name):
    model = shared_decoder(name)
    unembedding = Unembedding.of(model)
    assert unembedding.scale == {"granite": 1 / 2.5, "cohere": 0.0625}.get(name, 1.0)
    assert unembedding.softcap == (30.0 if name == "gemma2" else None)
    normed = read(model, Anatomy(model).place("norm.out").module, "output", input_ids=prompts(1, 6) % 48)
    close(unembedding(normed), model(input_ids=prompts(1, 6) % 48).logits, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "gptj"])
def test_low_precision_finds_the_same_numbers(name, dtype):
    low, high = Unembedding.of(decoder(name, dtype)), Unembedding.of(shared_decoder(name))
    assert (low.scale, low.softcap) == (high.scale, high.softcap)
    assert low.weight.dtype == torch.float32


def test_a_factor_that_the_config_does_not_name_is_measured():
    model = fresh_model("llama")

    class Times(nn.Module):
        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) * 1.7

    head = model.lm_head
    model.lm_head = Times(head)
    model.get_output_embeddings = lambda: head
    unembedding = Unembedding.of(model)
    assert unembedding.scale == pytest.approx(1.7, rel=1e-5)
    close(unembedding.weight, 1.7 * projection(head)[0])


def test_a_bias_is_multiplied_too():
    head = nn.Linear(3, 5)
    unembedding = Unembedding(head, 2.0, 4.0)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    close(unembedding(x), 4 * torch.tanh((x @ unembedding.weight + unembedding.bias) / 4))
    close(unembedding.bias, 2 * head.bias)
    assert Unembedding(nn.Linear(3, 5, bias=False)).bias is None


def test_a_model_without_a_head_is_refused():
    with pytest.raises(SiteError, match="LlamaModel: it has no language-model head; load it as AutoModelForCausalLM"):
        Unembedding.of(fresh_model("llama").model)


def test_a_head_that_does_not_run_is_refused():
    model = fresh_model("llama")
    model.get_output_embeddings = lambda: nn.Linear(WIDTH, VOCABULARY)
    with pytest.raises(SiteError, match="its head does not read what the final norm gives"):
        Unembedding.of(model)


def test_a_head_that_does_not_read_the_final_norm_is_refused():
    model = fresh_model("llama")
    model.lm_head = nn.Sequential(nn.Tanh(), model.lm_head)
    model.get_output_embeddings = lambda: model.lm_head[1]
    with pytest.raises(SiteError, match="its head does not read what the final norm gives"):
        Unembedding.of(model)


def test_logits_that_are_made_otherwise_are_refused():
    model = fresh_model("llama")
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    model.get_output_embeddings = lambda: model.lm_head[0]
    with pytest.raises(SiteError, match="not what the head gives, times a number, under a softcap"):
        Unembedding.of(model)


def test_a_model_that_cannot_run_the_prompt_is_refused():
    model = fresh_model("llama")
    model.model.layers[1].mlp.down_proj = nn.Linear(3, WIDTH)
    with pytest.raises(SiteError, match="it cannot run a prompt of 5 tokens: RuntimeError"):
        Unembedding.of(model)


def test_the_head_and_the_norm_may_be_named():
    model = shared_decoder("llama")
    named = Unembedding.of(model, head=model.lm_head, final_norm=model.model.norm)
    assert named.head is model.lm_head
    with pytest.raises(SiteError, match="does not read"):
        Unembedding.of(model, final_norm=model.model.layers[0])


def test_the_model_stays_as_it_was():
    model = fresh_model("gemma2").train()
    hooks = hooks_of(model)
    Unembedding.of(model)
    assert model.training
    assert hooks_of(model) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_final_norm_the_head_reads_the_last_block():
    model = fresh_model("llama")
    del model.model.norm
    vars(model.model)["norm"] = lambda hidden: hidden
    assert Unembedding.of(model).scale == 1.0


def test_transformers_gpt2_ties_its_head():
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, tie_word_embeddings=True)
    model = transformers.GPT2LMHeadModel(config).eval()
    assert Unembedding.of(model).weight.data_ptr() == model.transformer.wte.weight.data_ptr()
