"""Demo: it finds the planted variable in the embedded task, and runs on a language model from a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import featurizers
import pytest
import torch
from featurizers.errors import ArtefactError, FeaturizerError, SiteError, UsageError
from featurizers_training.demo import english
from featurizers_training.demo import toy as toy_task
from featurizers_training.demo.main import run

from tests.support.command import run as run_command


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return run(None, out, quiet=True), out


def test_the_planted_direction_is_found_at_its_site(toy):
    result, _ = toy
    assert result["best"] in ("resid.post:1", "resid.post:2")
    assert result["accuracy"]["resid.post:1"]["subspace"] > 0.95
    assert result["cosine_with_planted"] > 0.7


def test_the_baselines_do_not_find_it(toy):
    accuracy = toy[0]["accuracy"]["resid.post:1"]
    assert accuracy["random"] < 0.1
    assert accuracy["full vector"] < 0.3  # it swaps the letter as well
    assert toy[0]["accuracy"]["embed"]["subspace"] < 0.1  # no attention has moved the numbers there yet


def test_the_artefact_gives_the_same_accuracy_and_says_where_it_belongs(toy):
    result, out = toy
    assert result["loaded_accuracy"] == result["accuracy"][result["best"]]["subspace"]
    loaded = featurizers.load(out / "artefact", verify=True)
    assert str(loaded.site) == result["best"]
    assert loaded.metadata["accuracy"] == result["accuracy"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_task, "make_task", None)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for out in (tmp_path, tmp_path / "new"):
        with pytest.raises(ArtefactError, match="it cannot be written: this user may not write to"):
            run(None, out, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_the_picture_is_a_picture(toy):
    from matplotlib import image

    pixels = image.imread(toy[1] / "accuracy.png")
    assert pixels.shape[0] > 100
    assert pixels.std() > 0.05


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Save a word-level language model that was trained on the continents, and return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    prompts = {
        english.TEMPLATE.format(country): continent
        for continent, countries in english.COUNTRIES.items()
        for country in countries.split()
    }
    words = sorted({word for text, answer in prompts.items() for word in f"{text} {answer}".split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = torch.tensor([wrapped(text).input_ids for text in prompts])
    answers = torch.tensor([wrapped(answer).input_ids[0] for answer in prompts.values()])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(60):
            loss = torch.nn.functional.cross_entropy(model(ids).logits[:, -1], answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def test_the_command_prints_json_and_nothing_else_about_a_language_model_from_a_folder(language_model, tmp_path):
    options = ["--model", language_model, "--layers", "0,1", "--features", "2", "--out", tmp_path, "--json"]
    command = [sys.executable, "-m", "featurizers", "demo", *options]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["artefact"] == str(tmp_path / "artefact")
    assert list(result["accuracy"]) == ["resid.post:0", "resid.post:1"]
    last = result["accuracy"]["resid.post:1"]
    assert last["full vector"] == 1.0  # the answer depends on nothing but the last residual stream
    assert last["subspace"] > 0.5 > last["random"]
    assert featurizers.load(tmp_path / "artefact").site.model == language_model.name


def test_a_model_that_does_not_know_is_refused(language_model, tmp_path, monkeypatch):
    monkeypatch.setattr(english, "COUNTRIES", {"Africa": "Kenya Mali", "Europe": "France"})
    with pytest.raises(FeaturizerError, match="3 countries only"):
        run(str(language_model), tmp_path, quiet=True)


def test_wrong_arguments_cost_one_clear_error(language_model, tmp_path):
    with pytest.raises(UsageError, match="no_such_folder"):
        run("./no_such_folder", tmp_path, quiet=True)
    with pytest.raises(UsageError, match="4,8,12"):
        run(str(language_model), tmp_path, layers="first", quiet=True)
    with pytest.raises(SiteError, match="2 layers"):
        run(str(language_model), tmp_path, layers="7", quiet=True)


def test_layers_without_a_model_are_refused(tmp_path, monkeypatch):
    def train(*_):
        raise AssertionError("the tiny transformer is trained")

    monkeypatch.setattr(toy_task, "make_task", train)
    for layers in ("x", "1"):
        code, _, err = run_command("demo", "--layers", layers, "--out", tmp_path)
        assert (code, len(err.splitlines())) == (1, 1)
        assert "layers" in err


def test_the_examples_show_the_answer_follow_the_source(toy):
    lines = toy[0]["examples"]
    assert len(lines) == 3
    for line in lines:
        base, before, after, source = line.split("'")[1::2]
        below = [int(a) < int(b) for a, b, _ in (prompt.split() for prompt in (base, source))]
        letter = base.split()[2]
        answers = {True: f"{letter} if below", False: f"{letter} if not"}
        assert [before, after] == [answers[value] for value in below]
