"""Text from outside on a terminal: shown as it is, and never obeyed."""

from types import SimpleNamespace

from featurizers.cli.output import commit_link, print_fields, print_rows


def test_escape_sequences_in_the_address_of_a_commit_are_shown_escaped():
    commit = SimpleNamespace(pr_url=None, commit_url="https://hub/\x1b]0;title\x07\u202eabc")
    assert commit_link(commit) == r"https://hub/\x1b]0;title\x07\u202eabc"


def test_emoji_codes_and_markup_are_shown_as_they_are(capsys):
    print_rows([{"id": ":skull: [red]x[/red]"}], ["id"], as_json=False)
    print_fields({"id": ":skull:"})
    out = capsys.readouterr().out
    assert out.count(":skull:") == 2
    assert "[red]x[/red]" in out
