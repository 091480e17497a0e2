"""Counterfactual pairs: the forms that a record may have, and the errors for all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from featurizers.errors import UsageError
from featurizers_training import CleanRuns, PairError, Pairs
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support.models import tiny_model


class Letters:
    """A tokenizer of letters; "ab" at the end of a text is one token, so that a label's tokens depend on its base."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        start = [1] if add_special_tokens else []
        if text.endswith("ab") and len(text) > 2:
            return {"input_ids": [*start, *map(ord, text[:-2]), 500]}
        return {"input_ids": [*start, *map(ord, text)]}


def one(tokenizer: Any = None, **record: Any) -> Any:
    return Pairs.of([{"base": [5, 6, 7], "source": [8, 9, 10, 11], "label": 3, **record}], tokenizer)[0]


def test_token_ids_are_taken_as_they_are() -> None:
    pair = one()
    assert (pair.base, pair.sources, pair.label, pair.base_label) == ((5, 6, 7), ((8, 9, 10, 11),), (3,), None)
    assert (pair.base_positions, pair.source_positions) == (((2,),), ((3,),))


def test_the_model_runs_on_the_label_without_its_last_token() -> None:
    assert one(label=[3, 4, 2]).run == (5, 6, 7, 3, 4)


def test_texts_are_tokenized_and_a_label_is_tokenized_after_its_base() -> None:
    pair = one(Letters(), base="xy", source="z", label="ab", base_label="q")
    assert (pair.base, pair.sources, pair.label, pair.base_label) == ((1, 120, 121), ((1, 122),), (500,), (113,))


def test_an_empty_text_is_not_a_label() -> None:
    with pytest.raises(PairError, match="'label' is a text or a list of token ids"):
        one(Letters(), label="")


def test_a_label_that_changes_the_tokens_of_its_base_is_tokenized_alone() -> None:
    assert one(Letters(), base="xa", source="z", label="b").label == (ord("b"),)


@pytest.mark.parametrize(
    ("position", "found"),
    [
        (1, ((1,),)),
        (-1, ((2,),)),
        ([0, -1], ((0, 2),)),
        ([[0], [-1]], ((0,), (2,))),
        ([[0, 1], [-1, 0]], ((0, 1), (2, 0))),
    ],
)
def test_positions_count_from_either_end_and_may_be_given_for_each_site(position: Any, found: Any) -> None:
    pair = one(base_position=position, source=[8, 9, 10], source_position=position)
    assert pair.base_positions == pair.source_positions == found


def test_the_positions_of_the_source_are_those_of_the_base_unless_given() -> None:
    assert one(base_position=[0, -1]).source_positions == ((0, 3),)
    assert one(base_position=1, source_position=2).source_positions == ((2,),)


def test_several_sources_are_for_several_sites() -> None:
    pair = one(source=[[8, 9], [10]], base_position=[[0], [1]], source_position=-1)
    assert pair.sources == ((8, 9), (10,))
    assert pair.source_positions == ((1,), (0,))


def test_named_positions_are_chosen_later() -> None:
    names = {"base_position": {"subject": 1, "last": -1}, "source_position": {"subject": [2], "last": -1}}
    record = {"base": [5, 6, 7], "source": [8, 9, 10, 11], "label": 3, **names}
    with pytest.raises(PairError, match="'subject', 'last'; choose one"):
        Pairs.of([record])
    pairs = Pairs.of([{**record, **names}], position="subject")
    assert (pairs[0].base_positions, pairs[0].source_positions) == (((1,),), ((2,),))
    both = pairs.at("subject", "last")
    assert (both[0].base_positions, both[0].source_positions) == (((1,), (2,)), ((2,), (3,)))
    assert pairs.at(0)[0].base_positions == ((0,),)
    with pytest.raises(PairError, match="no position named 'verb'"):
        pairs.at("verb")


def test_splits_have_no_pair_in_common_and_are_the_same_each_time() -> None:
    pairs = Pairs.of([{"base": [i], "source": [i], "label": i} for i in range(10)])
    train, test = pairs.split(0.3, seed=4)
    assert sorted(p.base for p in [*train, *test]) == [(i,) for i in range(10)]
    assert len(test) == 3
    assert pairs.split(0.3, seed=4)[1] == test != pairs.split(0.3, seed=5)[1]
    with pytest.raises(UsageError, match="leaves one part empty"):
        pairs.split(1.0)


def test_shuffled_labels_are_the_same_labels_at_other_pairs() -> None:
    pairs = Pairs.of([{"base": [i], "source": [i], "label": [i, i + 1]} for i in range(20)])
    control = pairs.with_shuffled_labels(seed=1)
    assert [p.base for p in control] == [p.base for p in pairs]
    assert sorted(p.label for p in control) == sorted(p.label for p in pairs)
    assert sum(a.label == b.label for a, b in zip(control, pairs, strict=True)) < 5
    assert [p.label for p in control.at(0)] == [p.label for p in control]


def test_a_file_of_json_lines_is_read(tmp_path: Path) -> None:
    record = {"base": [5, 6], "source": [7], "label": 3}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(record)}\n\n{json.dumps(record)}\n")
    assert len(Pairs.read(tmp_path / "pairs.jsonl")) == 2
    assert Pairs.read(tmp_path / "pairs.jsonl")[0] == Pairs.of([record])[0]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_texts_with_separators_of_unicode_are_one_line(tmp_path: Path, end: str) -> None:
    texts = ["a\u2028b", "c\u0085d"]
    lines = [json.dumps({"base": t, "source": "s", "label": "l"}, ensure_ascii=False) for t in texts]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes((end.join(lines) + end).encode())
    assert ["".join(map(chr, pair.base[1:])) for pair in Pairs.read(path, Letters())] == texts


def test_a_token_that_the_model_lacks_is_refused_before_the_run() -> None:
    for record in ({"base": [10**6]}, {"source": [10**6]}, {"label": 10**6}, {"base_label": 10**6}):
        pairs = Pairs.of([{"base": [1], "source": [2], "label": 3, **record}])
        with pytest.raises(UsageError, match="pair 0 has the token 1000000, and the model's vocabulary has"):
            CleanRuns(tiny_model("llama"), pairs, ["resid.post:0"])


def appending(kind: str) -> Any:
    """Return a tokenizer of `tokenizers` that adds special tokens as a template says."""
    words = Tokenizer(models.WordLevel({"</s>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, 30)}}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single=kind, special_tokens=[("<s>", 1), ("</s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("kind", "start"), [("$A </s>", ()), ("<s> $A </s>", (1,)), ("<s> $A </s> </s>", (1,))])
def test_an_appended_end_of_sequence_is_no_token_of_the_prompt(kind: str, start: tuple[int, ...]) -> None:
    tokenizer = appending(kind)
    pair = one(tokenizer, base="w5 w6", source="w7 w8 w9", label=" w4 w3", base_position=-1)
    assert pair.base == (*start, *tokenizer("w5 w6", add_special_tokens=False)["input_ids"])
    assert pair.sources == ((*start, 7, 8, 9),)
    assert pair.label == (4, 3)
    assert (pair.base[pair.base_positions[0][0]], pair.sources[0][pair.source_positions[0][0]]) == (6, 9)
    assert one(tokenizer, base="w5 </s>", source="w7", label="w4").base == (*start, 5, 0)  # it is written in the text


def test_a_dataset_is_read() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"base": [5, 6], "source": [7], "label": 3, "base_label": 9}, {"base": [5], "source": [7], "label": 4}]
    assert list(Pairs.of(datasets.Dataset.from_list(rows))) == list(Pairs.of(rows))


def test_positions_that_are_the_same_from_one_end_are_recorded() -> None:
    def common(*records: dict[str, Any]) -> Any:
        return Pairs.of([{"source": [1] * 6, "label": 3, **record} for record in records]).common_position(0)

    assert common({"base": [1, 2]}, {"base": [1, 2, 3]}) == (-1,)
    assert common({"base": [1, 2], "base_position": 1}, {"base": [1, 2, 3], "base_position": 1}) == (1,)
    assert common({"base": [1, 2, 3], "base_position": [-2, -1]}, {"base": [1, 2], "base_position": [-2, -1]}) == (
        -2,
        -1,
    )
    assert common({"base": [1, 2], "base_position": 0}, {"base": [1, 2, 3], "base_position": 1}) == (-2,)
    assert common({"base": [1, 2], "base_position": 0}, {"base": [1, 2, 3], "base_position": 2}) is None


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"base": "text"}, "give the tokenizer of the model"),
        ({"base": []}, "'base' is a text or a list of token ids"),
        ({"base": [1, -2]}, "'base' is a text or a list of token ids"),
        ({"base": [1, True]}, "'base' is a text or a list of token ids"),
        ({"base": [1, 10**30]}, "'base' is a text or a list of token ids"),
        ({"base": "\ud800 x"}, "'base' has half of a surrogate pair"),
        ({"source": None}, "'source' is missing"),
        ({"source": [[1, 2], []]}, "'source' is a text or a list of token ids"),
        ({"source": [[1], [2]], "base_position": [[0], [1], [2]]}, "for 3 sites"),
        ({"label": "x"}, "give the tokenizer of the model"),
        ({"label": 1.5}, "'label' is a text or a list of token ids"),
        ({"lable": 3}, "the key 'lable' is not one of"),
        ({"base_position": 3}, "token 3 is not in the prompt, which has 3 tokens"),
        ({"base_position": -4}, "token -4 is not in the prompt"),
        ({"base_position": 1.0}, "is a number, or a list of numbers"),
        ({"base_position": [0, "x"]}, "is a number, or a list of numbers|not the number of a token"),
        ({"base_position": []}, "is a number, or a list of numbers"),
        ({"base_position": [True]}, "not the number of a token"),
        ({"base_position": [0, 1], "source_position": 0}, "2 tokens of the base for 1 of the source"),
    ],
)
def test_a_record_that_is_not_a_pair_is_refused_with_its_number(record: dict[str, Any], problem: str) -> None:
    good = {"base": [5, 6, 7], "source": [8, 9, 10, 11], "label": 3}
    with pytest.raises(PairError, match=problem) as error:
        Pairs.of([good, {**good, **record}])
    assert error.value.where == "pair 1"


def test_a_file_without_pairs_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(UsageError, match="cannot read pairs"):
        Pairs.read(path)
    path.write_text("\n")
    with pytest.raises(UsageError, match="there are no counterfactual pairs"):
        Pairs.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read pairs"):
        Pairs.read(path)
    path.write_text('{"base": [1], "source": [1], "label": 1}\n{"base": \n')
    with pytest.raises(PairError, match=r"pairs.jsonl:2: the line is not valid JSON"):
        Pairs.read(path)
    path.write_text('{"base": [1], "source": [1], "label": 1, "label": 2}\n')
    with pytest.raises(PairError, match=r"pairs.jsonl:1: the line is not valid JSON: .*label"):
        Pairs.read(path)
    path.write_text("[1]\n")
    with pytest.raises(PairError, match=r"pairs.jsonl:1: a pair is an object"):
        Pairs.read(path)
    path.write_text(
        '{"base": [1], "source": [1], "label": 1}\n\n{"base": [1], "source": [1], "label": 1, "base_position": 4}\n'
    )
    with pytest.raises(PairError, match=r"pairs.jsonl:3: .*token 4"):
        Pairs.read(path)
    with pytest.raises(UsageError, match="no counterfactual pairs"):
        Pairs.of([])
