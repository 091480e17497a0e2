"""The example that finds a variable: its pairs, its filter, and a whole run with a tiny model and a local Hub."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import featurizers
import pytest
import torch
from featurizers_training import PairError, Pairs
from torch import nn

from tests.support.hub import LoopbackHub, connect

PATH = Path(__file__).parents[2] / "examples/find_a_variable.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("find_a_variable", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look the module up here
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a tiny decoder whose tokens are bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=len(alphabet), n_positions=128)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("task", ["continent", "kind"])
def test_what_is_held_out_is_in_no_prompt_of_the_search(example, task):
    seen, unseen = (
        {word for prompt in islice(example.TASKS[task](random.Random(0), held_out), 400) for word in prompt.words}
        for held_out in (False, True)
    )
    assert len(seen) > 40
    assert len(unseen) > 20
    assert not seen & unseen


@pytest.mark.parametrize("task", ["continent", "kind"])
def test_a_counterfactual_is_the_base_with_the_variable_of_the_source(example, tokenizer, task):
    prompts = list(islice(example.TASKS[task](random.Random(1), False), 60))
    by_text = {prompt.text: prompt for prompt in prompts}
    records = example.records(tokenizer, prompts, 50, random.Random(2))
    assert len(records) == 50
    assert len({(record["base"], record["source"]) for record in records}) == 50
    for record in records:
        base, source = by_text[record["base"]], by_text[record["source"]]
        assert base.variable != source.variable
        assert not base.words & source.words
        assert record["base_label"] == f" {base.answer}" != record["label"]
        if task == "continent":
            assert record["label"] == f" {source.answer}"
        else:
            first, second = base.text.splitlines()[1].partition(".")[0].split(", ")
            assert {base.answer, record["label"].strip()} == {first, second}
            assert record["label"].strip() in example.KINDS[source.variable].split()
            assert record["label"] != f" {source.answer}"


@pytest.mark.parametrize("task", ["continent", "kind"])
def test_pairs_of_the_same_value_keep_their_answer(example, tokenizer, task):
    prompts = list(islice(example.TASKS[task](random.Random(1), False), 60))
    by_text = {prompt.text: prompt for prompt in prompts}
    records = example.records(tokenizer, prompts, 20, random.Random(2), differ=False)
    assert len(records) == 20
    for record in records:
        assert by_text[record["base"]].variable == by_text[record["source"]].variable
        assert record["label"] == record["base_label"]


def test_positions_are_those_of_the_tokens_that_they_name(example, tokenizer):
    for task, name in (("continent", "country"), ("kind", "kind")):
        prompts = list(islice(example.TASKS[task](random.Random(3), True), 30))
        for record in example.records(tokenizer, prompts, 10, random.Random(4)):
            for side in ("base", "source"):
                text, places = record[side], record[f"{side}_position"]
                assert places["last"] == len(text) - 1, "a token is a byte"
                prompt = next(prompt for prompt in prompts if prompt.text == text)
                word = prompt.variable if task == "kind" else next(iter(prompt.words))
                assert text[: places[name] + 1].endswith(word)
        assert Pairs.of([record], tokenizer, position=name)[0].base_positions == ((record["base_position"][name],),)
        with pytest.raises(PairError, match=name):
            Pairs.of([record], tokenizer, position="nowhere")


def test_the_prompts_that_are_answered_wrongly_are_left_out(example, tokenizer):
    prompts = list(islice(example.TASKS["kind"](random.Random(5), False), 30))
    wrong = {prompts[i].text for i in (0, 7, 29)}
    silent = {tuple(tokenizer(text).input_ids) for text in wrong}

    class Oracle(nn.Module):
        """Model that answers some prompts wrongly; its logits after the end of a prompt must not be used."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask):
            logits = torch.zeros(*input_ids.shape, 256)
            for row, (ids, length) in enumerate(zip(input_ids, attention_mask.sum(-1), strict=True)):
                said = tokenizer("?" if tuple(ids[:length].tolist()) in silent else " ").input_ids[0]
                logits[row, length - 1, said] = 1.0
                logits[row, length:, tokenizer("!").input_ids[0]] = 2.0
            return SimpleNamespace(logits=logits)

    right = example.answered(Oracle(), tokenizer, prompts, batch=8)
    assert right == [prompt for prompt in prompts if prompt.text not in wrong]


def test_the_whole_of_it(example, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "answered", lambda model, tokenizer, prompts: list(prompts))
    hub = LoopbackHub(tmp_path / "server")
    connect(monkeypatch, hub.url, tmp_path / "home")
    for name, value in (("ENDPOINT", hub.url), ("HOME", str(tmp_path / "home")), ("HUB_DISABLE_XET", "1")):
        monkeypatch.setenv(f"HF_{name}", value)  # for the new process
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    out = tmp_path / "variable"
    try:
        example.main(
            str(folder), "kind", out, every=2, features=4, pairs=12, held_out=6, epochs=1, push="alice/kind", seed=1
        )
        loaded = featurizers.load("alice/kind")
    finally:
        hub.stop()
    printed = " ".join(capsys.readouterr().out.split())
    assert "in a new process" in printed
    assert "keep the answer with a source of the same value" in printed
    table = json.loads((out / "table.json").read_text())
    cells = {(cell["site"], cell["position"], cell["method"], cell["control"]) for cell in table["cells"]}
    assert len(cells) == 2 * 2 * 4 * 2, "layers 0 and 2, two positions, four methods, with shuffled labels and without"
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert (loaded.kind, loaded.n_features) == ("subspace", 4)
    best = featurizers.load(out / "artefact")
    assert torch.equal(loaded.basis, best.basis)
    assert loaded.site == best.site
