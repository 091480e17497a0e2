"""Text from outside on a terminal: shown as it is, and never obeyed."""

from types import SimpleNamespace

from featurizers.cli.output import commit_link, in_short, print_fields, print_rows


def test_escape_sequences_in_the_address_of_a_commit_are_shown_escaped():
    commit = SimpleNamespace(pr_url=None, commit_url="https://hub/\x1b]0;title\x07\u202eabc")
    assert commit_link(commit) == r"https://hub/\x1b]0;title\x07\u202eabc"


def test_emoji_codes_and_markup_are_shown_as_they_are(capsys):
    print_rows([{"id": ":skull: [red]x[/red]"}], ["id"], as_json=False)
    print_fields({"id": ":skull:"})
    out = capsys.readouterr().out
    assert out.count(":skull:") == 2
    assert "[red]x[/red]" in out


def test_text_of_artefacts_and_plugins_in_a_table_is_escaped(capsys):
    print_rows([{"id": "\x1b[2J\u202ea\nb\x9b"}], ["id"], as_json=False)
    print_fields({"\x07": "\x1b]0;title"})
    out = capsys.readouterr().out
    assert all(character.isprintable() for character in out.replace("\n", ""))
    assert [text for text in (r"\x1b[2J\u202ea", r"b\x9b", r"\x07", r"\x1b]0;title") if text not in out] == []


def test_many_names_are_counted():
    assert [in_short(list("abcde")[:n]) for n in (0, 1, 3, 5)] == ["", "a", "a, b, c", "a, b, c and 2 more"]
