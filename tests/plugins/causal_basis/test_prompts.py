"""Prompts of files: their tokens, their masks, and errors about unfit files."""

import json

import pytest
import tokenizers
import torch
import transformers
from featurizers.errors import UsageError
from featurizers_causal_basis.command.prompts import read_prompts
from featurizers_derived_scalars.command.options import prompt_ids

from tests.support.models import fresh_model, save_language_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_language_model(fresh_model("llama"), tmp_path_factory.mktemp("lm")))


def words(*ids):
    return " ".join(f"w{i}" for i in ids)


LINES = [words(1, 2, 3, 4, 5), words(6), words(7, 8, 9)]


@pytest.fixture(params=["txt", "jsonl"])
def file(request, tmp_path):
    path = tmp_path / f"texts.{request.param}"
    lines = LINES if request.param == "txt" else [json.dumps({"text": line, "id": 3}) for line in LINES]
    path.write_text("\n".join([lines[0], "", *lines[1:], "", ""]))
    return path


def read(path, tokenizer, **options):
    return read_prompts(path, tokenizer, **{"tokens": 100, "length": 50, "skipped": 1, "key": "text", **options})


def test_each_line_is_a_text(file, tokenizer):
    prompts = read(file, tokenizer)
    assert prompts.ids.tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 9, 0, 0],
    ]  # the mask leaves nothing of the prompt of one word
    assert prompts.attention.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert prompts.mask.tolist() == [[False] + [True] * 4, [False, True, True, False, False]]
    assert prompts.rule == "every token but the first of each prompt"
    whole = read(file, tokenizer, skipped=0)
    assert whole.ids.tolist()[1] == [6, 0, 0, 0, 0]
    assert torch.equal(whole.mask, whole.attention)
    assert whole.rule == "every token"
    assert read(file, tokenizer, skipped=2).rule == "every token but the first 2 of each prompt"


def test_the_numbers_of_tokens_and_of_tokens_per_prompt_are_limits(file, tokenizer):
    for tokens in (2, 3, 4, 5, 6):
        assert int(read(file, tokenizer, tokens=tokens).mask.sum()) == tokens
    assert read(file, tokenizer, tokens=3).ids.tolist() == [[1, 2, 3, 4]]
    assert read(file, tokenizer, length=3).ids.tolist() == [[1, 2, 3], [7, 8, 9]]


def test_unfit_files_are_refused(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    for content, message in {
        "{": "a.jsonl:1: the line is not valid JSON",
        '{"text": "w1 w2 w3"}\n[1]': r"a.jsonl:2: expected an object with a text under 'text', not \[1\]",
        '{"words": "w1"}': "under 'text'",
        '{"text": "w1 w2 w3", "text": "w4"}': "a.jsonl:1: the line is not valid JSON: .*text",
        '{"text": "w1 \\ud800 w3"}': "a.jsonl:1: the text has half of a surrogate pair",
        '{"text": 3}': "under 'text'",
        '{"text": "w1 w2"}': "has 1 tokens to use",
        "": "has 0 tokens",
    }.items():
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            read(path, tokenizer)
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(UsageError, match="cannot read texts"):
        read(path, tokenizer)
    for there in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UsageError, match="cannot read texts"):
            read(there, tokenizer)
    with pytest.raises(UsageError, match="leave none"):
        read(path, tokenizer, length=4, skipped=4)


@pytest.mark.parametrize(("kind", "before"), [("$A </s>", []), ("<s> $A </s>", [1])])
def test_an_appended_end_of_sequence_is_no_token_of_a_prompt(kind, before, tmp_path):
    vocabulary = {"</s>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, 30)}}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w2"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = tokenizers.processors.TemplateProcessing(
        single=kind, special_tokens=[("<s>", 1), ("</s>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
    (tmp_path / "texts.txt").write_text("w5 w6 w7\nw8 w9 </s>")
    prompts = read(tmp_path / "texts.txt", tokenizer, skipped=0)
    rows = [row[kept].tolist() for row, kept in zip(prompts.ids, prompts.attention, strict=True)]
    assert rows == [[*before, 5, 6, 7], [*before, 8, 9, 0]]  # the second text spells it out
    assert int(read(tmp_path / "texts.txt", tokenizer, skipped=0, length=2).mask.sum()) == 4
    assert prompt_ids(tokenizer, "w5 w6", fresh_model("llama")) == [*before, 5, 6]  # of `featurizers scalars`
