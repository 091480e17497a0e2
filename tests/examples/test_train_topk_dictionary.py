"""Example that trains a dictionary, on data whose features are known and on a tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import featurizers
import pytest
import torch
from torch.nn import functional

PATH = Path(__file__).parents[2] / "examples/train_topk_dictionary.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_topk_dictionary", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path):
    """Save a tiny decoder whose tokens are bytes, and return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=len(alphabet), n_positions=128)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_learns_what_there_is_to_learn(example):
    g = torch.Generator().manual_seed(0)
    truth = functional.normalize(torch.randn(48, 16, generator=g), dim=-1)
    active = (torch.rand(6000, 48, generator=g) < 0.06) * (1 + torch.rand(6000, 48, generator=g))
    x = active @ truth + 3.0
    f, losses = example.train(x[600:], n_features=64, k=4, steps=400, batch=256, seed=0)
    assert losses[-1] < 0.4 * losses[0]
    measures = example.measure(f, x[:600], x[600:], k=4)
    assert measures["variance_explained"] > measures["variance_explained_by_pca_of_rank_k"] + 0.2
    close = (f.W_dec @ truth.T).amax(0)
    assert (close > 0.9).float().mean() > 0.5, "few of the true directions are found"
    again, losses_again = example.train(x[600:], n_features=64, k=4, steps=20, batch=256, seed=0)
    assert losses_again[0] == losses[0]
    torch.testing.assert_close(again.W_dec.norm(dim=-1), torch.ones(64))


def test_what_is_measured_is_what_it_says(example):
    g = torch.Generator().manual_seed(1)
    x, held_out = (torch.randn(n, 6, generator=g) * torch.tensor([5, 3, 1, 1, 1, 1.0]) + 2 for n in (900, 300))
    f, _ = example.train(x, n_features=8, k=3, steps=30, batch=64, seed=0)
    measures = example.measure(f, held_out, x, k=2)
    total = (held_out - held_out.mean(0)).square().sum()
    left = (held_out - f.decode(f.encode(held_out))).square().sum()
    assert measures["variance_explained"] == pytest.approx(1 - float(left / total), abs=1e-5)
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2]
    rest = (held_out - x.mean(0)) - (held_out - x.mean(0)) @ axes.T @ axes
    assert measures["variance_explained_by_pca_of_rank_k"] == pytest.approx(
        1 - float(rest.square().sum() / total), abs=1e-4
    )
    fires = f.encode(held_out) > 0
    assert measures["l0"] == pytest.approx(float(fires.sum(-1).float().mean()))
    assert measures["never_fired"] == pytest.approx(float((~fires.any(0)).float().mean()))


def test_the_whole_of_it(example, model, tmp_path, capsys):
    out = tmp_path / "dictionary"
    example.main(str(model), out, layer=1, features=64, k=4, tokens=3000, steps=60, batch=128)
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    f = featurizers.load(out)
    assert (f.config.rule, f.n_features, str(f.site), f.site.model) == ("topk", 64, "resid.post:1", None)
    assert f.metadata["variance_explained"] > 0.5
    assert 2500 < f.metadata["tokens"] <= 3000
    decoder = example_model(model)
    ids = torch.randint(0, 200, (2, 9))
    x = featurizers.collect(decoder, {"input_ids": ids}, [f.site])[f.site]
    assert int((f.encode(x) != 0).sum(-1).amax()) <= 4
    assert f.encode_sparse(x).values.shape == (2, 9, 4)
    with featurizers.intervene(decoder, {f.site: featurizers.Ablate(f, indices=[])}):
        torch.testing.assert_close(decoder(ids).logits, example_model(model)(ids).logits, rtol=0, atol=0)


def example_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_massive_activations_are_left_out(example, model):
    decoder = example_model(model)
    ids = torch.arange(60).reshape(3, 20)
    whole = featurizers.collect(decoder, {"input_ids": ids}, ["resid.post:0"])["resid.post:0"]
    assert torch.equal(example.activations(decoder, ids, "resid.post:0"), whole[:, 1:].flatten(0, 1))
    with torch.no_grad():
        decoder.transformer.wte.weight[27] *= 1e4
    assert len(example.activations(decoder, ids, "resid.post:0")) == 3 * 19 - 1


def test_the_text_is_there(example):
    assert len(example.python_documentation()) > 1_000_000
