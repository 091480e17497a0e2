"""Cards: what people wrote is kept, and what the Hub reads is complete."""

from __future__ import annotations

import re
import time
from itertools import pairwise

import featurizers
import pytest
import yaml
from featurizers.errors import ArtefactError
from featurizers.format import card
from huggingface_hub import ModelCard

from tests.support.hub import subspace

TAGS = ["featurizers", "mechanistic-interpretability", "subspace", "site:resid.post:3"]


def found_in(model="owner/model"):
    f = subspace()
    f.site = featurizers.Site("resid.post", 3).at(model=model)
    return f


def saved_over(folder, before: bytes, f=None) -> bytes:
    """Save a featurizer over an artefact with another README, and return the new README."""
    f = f or found_in()
    f.save_pretrained(folder)
    (folder / "README.md").write_bytes(before)
    f.save_pretrained(folder)
    return (folder / "README.md").read_bytes()


def test_the_hub_client_reads_a_new_card(tmp_path):
    f = found_in()
    f.metadata = {"license": "mit"}
    f.save_pretrained(tmp_path / "a")
    data = ModelCard.load(tmp_path / "a" / "README.md").data
    assert data.to_dict() == {
        "library_name": "featurizers",
        "license": "mit",
        "base_model": "owner/model",
        "tags": TAGS,
    }


def test_a_summary_in_the_metadata_is_a_part_of_the_cards_table(tmp_path):
    f = found_in()
    f.site = featurizers.Site("resid.post", 1).at(position=(0, -1))
    f.metadata = {"summary": {"accuracy": "97.0% (92.6% to 100.0%)", "<b>|x": "a\n|b| <i>", "n": 3, "l": ["x"]}}
    f.save_pretrained(tmp_path / "a")
    lines = (tmp_path / "a" / "README.md").read_text().splitlines()
    start = lines.index("|---|---|") + 1
    rows = lines[start : lines.index("", start)]
    assert "| tokens | 0, -1 |" in rows
    assert "| accuracy | 97.0% (92.6% to 100.0%) |" in rows
    assert r"| \<b\>\|x | a \|b\| \<i\> |" in rows
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert not any(row.startswith(("| n |", "| l |")) for row in rows)


@pytest.mark.parametrize(
    ("front_matter", "metadata"),
    [
        ("license: mit", {"license": "mit", "library_name": "featurizers", "base_model": "owner/model", "tags": TAGS}),
        (
            "zebra: {b: 1, a: [2]}\nlibrary_name: mine\ntags: [x, featurizers]\nlicense: other\nlanguage:\n- en",
            {
                "zebra": {"b": 1, "a": [2]},
                "library_name": "mine",
                "tags": ["x", *TAGS],
                "license": "other",
                "language": ["en"],
                "base_model": "owner/model",
            },
        ),
        (
            "base_model: [a/b, c/d]\ntags: one",
            {"base_model": ["a/b", "c/d"], "tags": "one", "library_name": "featurizers", "license": "unknown"},
        ),
    ],
    ids=["of the Hub's own page", "with other keys", "with other values"],
)
def test_front_matter_of_people_is_completed_and_keeps_its_keys_values_and_order(tmp_path, front_matter, metadata):
    text = saved_over(tmp_path / "a", f"---\n{front_matter}\n---\n# Mine\n".encode()).decode()
    found = yaml.safe_load(text.split("---\n")[1])
    assert found == metadata
    assert list(found) == list(metadata)
    assert text.partition("\n---\n")[2].startswith("# Mine\n")


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("front_matter", ["", "---\nlicense: mit\n---\n"], ids=["plain", "with front matter"])
@pytest.mark.parametrize("end", ["", "\n", "  \n\n\n"], ids=["no newline", "newline", "spaces"])
def test_the_prose_of_people_stays_byte_for_byte(tmp_path, newline, front_matter, end):
    prose = f"\n  # Mine \n\ttext\n{end}".replace("\n", newline).encode()
    text = saved_over(tmp_path / "a", front_matter.replace("\n", newline).encode() + prose)
    assert text.count(prose) == 1
    assert b"\n" not in text.replace(b"\r\n", b"") if newline == "\r\n" else b"\r" not in text
    after = newline.encode() + b"After.  " + newline.encode()
    (tmp_path / "a" / "README.md").write_bytes(text + after)
    renamed = found_in()
    renamed.id = "renamed"
    renamed.save_pretrained(tmp_path / "a")
    again = (tmp_path / "a" / "README.md").read_bytes()
    assert again == text.replace(b"# subspace", b"# renamed") + after


def test_a_complete_front_matter_stays_byte_for_byte(tmp_path):
    front_matter = (
        b"---\n# a comment\nversion: 1.10\nlibrary_name: 'featurizers'\nlicense: mit\nbase_model: x\n"
        b"tags: [subspace, featurizers, mechanistic-interpretability, 'site:resid.post:3']\n---\n"
    )
    assert saved_over(tmp_path / "a", front_matter).startswith(front_matter)


BOMB = "a: &a {x: 1}\n"
for old, new in pairwise("abcdefghijk"):
    BOMB += f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n"


@pytest.mark.parametrize(
    "front_matter",
    [
        "license: [",
        "- a\n- b",
        "just words",
        "a: b: c",
        "[" * 5000,
        "license: mit\nsize: 0x" + "f" * 5000,
        "a: &a [x]\nb: *a",
        BOMB,
        "a: |\n" + "  words\n" * 200_000,
    ],
    ids=["no YAML", "a list", "a string", "two colons", "deep", "an enormous number", "an alias", "a bomb", "long"],
)
def test_front_matter_that_is_not_understood_stays_byte_for_byte(tmp_path, front_matter):
    front_matter = f"---\n{front_matter}\n---\n".encode()
    start = time.process_time()
    text = saved_over(tmp_path / "a", front_matter + b"# Mine\n")
    assert time.process_time() - start < 20
    assert text.startswith(front_matter + b"# Mine\n")
    assert text.count(b"featurizers.load(") == 1


def test_marks_in_the_front_matter_are_no_marks(tmp_path):
    f = found_in(f"{card.START}{card.END}")
    text = saved_over(tmp_path / "a", b"# Mine\n", f).decode()
    assert saved_over(tmp_path / "a", text.encode(), f).decode() == text
    assert ModelCard(text).data.base_model == f"{card.START}{card.END}"
    assert re.findall(r"^# .*$", text, re.MULTILINE) == ["# Mine", "# subspace"]


def test_a_card_in_another_encoding_is_an_error(tmp_path):
    with pytest.raises(ArtefactError, match="it is not UTF-8 text"):
        saved_over(tmp_path / "a", "Prosa für alle".encode("latin-1"))


UNPRINTABLE = {
    "DEL": "\x7f",
    "C1": "\x9b",
    "NEL": "\x85",
    "escape": "\x1b]0;title\x07",
    "null": "\0",
    "line separator": "\u2028",
    "bidi": "\u202e",
    "byte-order mark": "\ufeff",
    "non-character": "\ufffe",
    "tag": "\U000e0001",
    "end of the front matter": "\n---\n# x",
}


@pytest.mark.parametrize("characters", UNPRINTABLE.values(), ids=UNPRINTABLE)
@pytest.mark.parametrize("of", [lambda text: text, lambda text: [text], lambda text: {text: [text]}])
def test_a_licence_of_any_characters_leaves_a_card_that_is_read_and_printed(tmp_path, characters, of):
    f = found_in()
    f.metadata = {"license": of(f"mit{characters}!")}
    f.save_pretrained(tmp_path / "a")
    assert featurizers.load(tmp_path / "a").metadata == f.metadata
    text = (tmp_path / "a" / "README.md").read_bytes().decode()
    assert all(line.isprintable() for line in text.split("\n"))
    data = ModelCard(text).data.to_dict()
    assert set(data) == {"library_name", "license", "base_model", "tags"}
    assert "mit" in str(data["license"])


@pytest.mark.parametrize("characters", ["x" * 900_000, ["x" * 1000] * 500], ids=["long", "many"])
def test_a_licence_of_any_length_leaves_a_card_that_can_be_completed(tmp_path, characters):
    f = found_in()
    f.metadata = {"license": characters}
    f.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "README.md").stat().st_size < 10_000


@pytest.mark.parametrize("characters", UNPRINTABLE.values(), ids=UNPRINTABLE)
def test_values_of_people_keep_their_characters(tmp_path, characters):
    text = saved_over(tmp_path / "a", f"---\n{yaml.safe_dump({'author': characters})}---\n".encode())
    data = ModelCard(text.decode()).data.to_dict()
    assert data["author"] == characters
    assert data["library_name"] == "featurizers"


def tags_of(folder):
    return ModelCard.load(folder / "README.md").data.tags


def test_tags_name_the_sites_as_they_are_now_and_an_authors_own_stay(tmp_path):
    f = found_in()
    f.save_pretrained(tmp_path / "a")
    readme = tmp_path / "a" / "README.md"
    readme.write_text(readme.read_text().replace("- subspace\n", "- subspace\n- my-own\n"))
    f.site = featurizers.Site("mlp.out", 5)
    f.save_pretrained(tmp_path / "a")
    assert tags_of(tmp_path / "a") == [*TAGS[:3], "my-own", "site:mlp.out:5"]
    f.site = None
    f.save_pretrained(tmp_path / "a")
    assert tags_of(tmp_path / "a") == [*TAGS[:3], "my-own"]


def test_the_card_of_a_collection_names_its_sites_and_models(tmp_path):
    one, two, three = found_in("b/b"), found_in("a/a"), found_in("a/a")
    two.site = featurizers.Site("attn.z", 1, 2).at(model="a/a")
    folder = featurizers.save_collection({"x": one, "y": two, "z": three}, tmp_path / "a")
    data = ModelCard.load(folder / "README.md").data
    assert data.tags == [*TAGS[:3], "site:resid.post:3", "site:attn.z:1:2"]
    assert data.base_model == ["a/a", "b/b"]
    folder = featurizers.save_collection({"x": two, "z": three}, tmp_path / "b")
    assert ModelCard.load(folder / "README.md").data.base_model == "a/a"
    many = {f"l{i}": subspace() for i in range(100)}
    for i, f in enumerate(many.values()):
        f.site = featurizers.Site("resid.post", i)
    tags = tags_of(featurizers.save_collection(many, tmp_path / "c"))
    assert len(tags) == 3 + card.MAX_SITES


@pytest.mark.parametrize(
    "text", ["---" + "\n" * 10**6, "\n" * 10**6 + "---\n", "---\n" * 250_000, "---\r" * 250_000 + "x"]
)
def test_a_card_of_many_lines_costs_no_more_than_its_length(tmp_path, text):
    assert saved_over(tmp_path / "a", text.encode()).count(b"featurizers.load(") == 1


def test_a_collection_completes_its_card_too(tmp_path):
    folder = featurizers.save_collection({"x": subspace()}, tmp_path / "a")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    featurizers.save_collection({"x": subspace(), "y": featurizers.create("identity")}, folder)
    data = ModelCard.load(folder / "README.md").data.to_dict()
    tags = ["featurizers", "mechanistic-interpretability", "identity", "subspace"]
    assert data == {"license": "mit", "library_name": "featurizers", "tags": tags}
