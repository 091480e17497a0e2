"""``featurizers scalars``: what it prints and writes, and how it fails."""

import base64
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import featurizers
import pytest
import torch
from featurizers.cli import app as cli
from featurizers_derived_scalars.api import scalars
from featurizers_derived_scalars.capturing import logit_difference
from featurizers_derived_scalars.command import labels
from featurizers_derived_scalars.nodes import Basis
from featurizers_derived_scalars.results import Ranked, Scalar
from typer.testing import CliRunner

from tests.support import command
from tests.support.models import LAYERS, MLP_WIDTH, WIDTH, fresh_model, save_language_model

IDS = [7, 3, 9, 3, 1]
PROMPT = " ".join(f"w{i}" for i in IDS)
METRIC = logit_difference(5, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scalars")
    save_language_model(fresh_model("llama"), folder / "lm")
    generator = torch.Generator().manual_seed(0)
    for name, width, site in (("mlp", WIDTH, featurizers.Site("mlp.out", 1)), ("siteless", MLP_WIDTH, None)):
        weights = torch.randn(2, 12, width, generator=generator)
        sae = featurizers.DictionaryFeaturizer.from_tensors(*weights, rule="relu")
        sae.site = site
        sae.save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "140")


def run(*arguments, model="./lm", prompt=PROMPT):
    return command.run("scalars", "--model", model, "--prompt", prompt, *arguments)


def as_json(*arguments):
    return command.as_json("scalars", "--model", "./lm", "--prompt", PROMPT, *arguments)


TO = ("--target", "w5", "--distractor", "w7")


def test_it_prints_the_largest_nodes_of_each_quantity():
    code, out, err = run(*TO, "--top", 4)
    assert code == 0, err
    value = METRIC.of(fresh_model("llama")(torch.tensor([IDS])).logits[0]).item()
    assert out.startswith(f"5 tokens; logit of 'w5' less 'w7' at token -1: {value:.4g}\n")
    for title in ("act_times_grad: activation times gradient", "write_to: direct effect", "write_norm: length of what"):
        assert title in out
    assert "attends to" in out
    assert len(re.findall(r"^│ +[+-]\d", out, re.MULTILINE)) == 12


@pytest.mark.parametrize("what", ["write_to:attn.probs", "act_times_grad:mlp.neurons"])
def test_it_prints_what_the_library_gives(what):
    found = scalars(fresh_model("llama"), IDS, what, metric=METRIC)
    wanted = found.topk(6, absolute=True)
    rows = as_json("--what", what, *TO, "--top", 6)["scalars"][what]
    assert [(row["layer"], row["index"]) for row in rows] == [(entry.layer, list(entry.at)) for entry in wanted]
    assert [row["value"] for row in rows] == pytest.approx([entry.value for entry in wanted], rel=1e-5)


def test_tokens_and_keys_are_named():
    rows = as_json("--what", "write_to:attn.probs", *TO, "--top", 40)["scalars"]["write_to:attn.probs"]
    for row in rows:
        token, key, head = row["index"]
        assert (row["token"], row["key"]) == (f"{token} 'w{IDS[token]}'", f"{key} 'w{IDS[key]}'")
        assert row["node"] == f"head {head}"
        assert key <= token


def test_signed_gives_both_ends():
    rows = as_json("--what", "write_to:mlp.neurons", *TO, "--top", 3, "--signed")["scalars"]["write_to:mlp.neurons"]
    values = [row["value"] for row in rows]
    assert len(values) == 6
    assert values[:3] == sorted(values[:3], reverse=True)
    assert values[3:] == sorted(values[3:])
    assert values[0] > 0 > values[3]


def test_layers_are_chosen():
    rows = as_json("--what", "write_to:mlp.neurons", *TO, "--layers", "0,2", "--top", 500)["scalars"]
    assert {row["layer"] for row in rows["write_to:mlp.neurons"]} == {0, 2}


@pytest.mark.parametrize("option", ["./mlp", "mlp.delta:1=./mlp"])
def test_a_site_is_seen_through_an_artefact(option):
    found = as_json("--what", "write_to", *TO, "--featurizer", option, "--top", 3000)["scalars"]["write_to"]
    kind = "mlp.out" if option == "./mlp" else "mlp.delta"
    nodes = {row["node"] for row in found if row["layer"] == 1 and "mlp" in row["scalar"]}
    assert f"feature 3 of {kind}" in nodes
    assert any(node.endswith(f"error of {kind}") for node in nodes)
    assert not any(node.startswith("neuron") for node in nodes)
    assert {row["layer"] for row in found if row["node"].startswith("neuron")} == {0, 2}


def test_the_first_tokens_are_left_out():
    found = as_json("--what", "write_to:attn.probs", *TO, "--top", 500)["scalars"]["write_to:attn.probs"]
    rows = as_json("--what", "write_to:attn.probs", *TO, "--top", 500, "--mask-first", 2)["scalars"]
    kept = [row for row in found if min(row["index"][:2]) >= 2]
    assert [row for row in rows["write_to:attn.probs"] if row["value"]] == [row for row in kept if row["value"]]


def test_edges_and_names_of_nodes_take_one():
    found = as_json("--what", "edge_to:mlp.neurons", *TO, "--node", "mlp.neurons:2@4,17", "--top", 500)
    rows = found["scalars"]["edge_to:mlp.neurons"]
    assert {row["layer"] for row in rows} == {0, 1}
    traced = as_json("--what", "write_to:attn.probs", "--node", "mlp.neurons:1@4,17", "--top", 500)
    assert {row["layer"] for row in traced["scalars"]["write_to:attn.probs"]} == {0, 1}
    assert traced["metric"].startswith("mlp.neurons:1[token 4, neuron 17]: ")


def test_the_list_names_every_quantity():
    result = CliRunner().invoke(cli.app, ["scalars", "--list"])
    assert result.exit_code == 0
    for name in ("write_to", "edge_from"):
        assert name in result.stdout


# ---------------------------------------------------------------------- the page


class _Reader(HTMLParser):
    """Pictures, addresses and texts of a page, whose elements must all be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.addresses, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "meta"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "src" and value.startswith("data:image/png;base64,"):
                self.pictures.append(base64.b64decode(value.partition(",")[2]))
            elif name in ("src", "href"):
                self.addresses.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("out", ["page.html", "folder"])
def test_a_page_needs_nothing_else(out, folder):
    code, printed, err = run(*TO, "--top", 5, "--out", out)
    assert code == 0, err
    file = folder / (out if out.endswith(".html") else f"{out}/index.html")
    assert f"Page: {file.relative_to(folder)}" in printed
    text = file.read_text(encoding="utf-8")
    page = _Reader(text)
    assert len(page.pictures) == 9  # by token, by head and the largest, of three quantities
    assert all(picture.startswith(b"\x89PNG") for picture in page.pictures)
    assert page.addresses == []
    assert "://" not in re.sub(r"base64,[^\"]+", "", text)
    command = f"featurizers scalars --model ./lm --prompt {PROMPT!r} --target w5 --distractor w7 --top 5 --out {out}"
    assert command in page.texts
    assert "Tokens read and written" in page.texts
    assert all(f"w{i}" in page.texts for i in IDS)
    code, _, err = run(*TO, "--out", out)
    assert (code, "is there already; name another --out" in err) == (1, True)


@pytest.mark.parametrize("out", ["page.html", "folder"])
def test_a_page_that_cannot_be_written_is_refused_before_the_model_is_loaded(out, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    code, _, error = run("--out", tmp_path / out, model="./no-such-model")
    assert code == 1
    assert "it cannot be written: this user may not write to" in error
    assert list(tmp_path.iterdir()) == []


def test_what_the_prompt_says_is_text_on_the_page(folder):
    model, ids = "./lm", "w1 <script>alert(1)</script> $x$"
    code, _, err = run("--what", "write_norm", "--out", "hostile.html", model=model, prompt=ids)
    assert code == 0, err
    assert "<script" not in (folder / "hostile.html").read_text(encoding="utf-8")


def test_a_page_without_a_metric_has_lengths(folder):
    code, out, err = run("--what", "write_norm,norm", "--out", "lengths.html")
    assert code == 0, err
    assert out.startswith("5 tokens; no metric\n")
    assert len(_Reader((folder / "lengths.html").read_text(encoding="utf-8")).pictures) == 5


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "w5 w7"], r"the target 'w5 w7' is 2 tokens \('w5', 'w7'\); give one token"),
        (["--target", ""], r"the target '' is no token; give one token"),
        (["--target", "w5", "--distractor", "w1 w2 w3"], r"the distractor 'w1 w2 w3' is 3 tokens"),
        (["--distractor", "w5"], r"a distractor's logit is subtracted from the target's: give --target too"),
        ([], r"act_times_grad is of a gradient; say of what: --target ' Paris', or --node"),
        (["--what", "write_too", *TO], r"no scalar 'write_too'; like it: write_to"),
        (["--what", " , "], r"--what names no quantity"),
        (["--what", "write_to:mlp.neuron", *TO], r"no place 'mlp.neuron'"),
        (
            ["--layers", "x", *TO],
            r"layers are numbers with commas between, and ranges, such as 4,8,12 or 0-11, not 'x'",
        ),
        (["--layers", "1-7", *TO], rf"the layers '1-7' are not in the model, which has those from 0 to {LAYERS - 1}"),
        (["--node", "mlp.neurons:1", *TO], r"a node is a place, and an index on each of its axes"),
        (["--node", "mlp.neurons:1@4", *TO], r"a node of mlp.neurons has an index on each of the axes token, neuron"),
        (["--node", "mlp.neurons:1@4,1", *TO], r"none of act_times_grad, write_to, write_norm takes --node"),
        (["--latent", "3", *TO], r"none of act_times_grad, write_to, write_norm takes --latent"),
        (["--what", "edge_to", *TO], r"edge_to cannot be made of these options: node: Field required"),
        (["--featurizer", "mlp.nowhere:1=./mlp", *TO], r"there is no place 'mlp.nowhere'"),
        (["--featurizer", "./siteless", *TO], r"does not say where it belongs; give --featurizer mlp.delta:3=./sitele"),
        (["--featurizer", "mlp.delta:1=./gone", *TO], r"gone: there is no config.json"),
        (["--featurizer", "mlp.delta:9=./mlp", *TO], rf"mlp.delta:9: LlamaForCausalLM has {LAYERS} layers"),
        (["--featurizer", "./mlp", "--featurizer", "./mlp", *TO], r"two featurizers are at mlp.out:1; give one"),
        (
            ["--featurizer", "mlp.delta:1=./siteless", *TO],
            rf"takes activations of width {MLP_WIDTH}, got shape \(5, {WIDTH}\)",
        ),
        (["--position", "9", *TO], r"the metric is at position 9, but the prompt has 5 tokens"),
        (["--mask-first", "5", *TO], r"--mask-first 5 leaves out all 5 tokens of the prompt"),
        (["--dtype", "int8", *TO], r"a dtype is one of auto, float32, bfloat16, float16, not 'int8'"),
    ],
)
def test_a_wrong_input_costs_one_line(arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_a_prompt_must_fit_the_model():
    code, _, err = run(*TO, prompt=" ".join(["w1"] * 65))
    assert (code, err) == (1, "error: the prompt has 65 tokens, and the model takes 64; shorten it\n")
    code, _, err = run(*TO, prompt="")
    assert (code, err) == (1, "error: the prompt has no tokens; give --prompt some text\n")


def test_a_model_that_there_is_not_is_one_line():
    code, _, err = run(*TO, model="./nothing")
    assert (code, err.startswith("error: cannot load the language model './nothing'")) == (1, True)


# ---------------------------------------------------------------------- labels


def _labelled(axes, basis, at, name="s"):
    about = Scalar(axes, basis)
    return labels.node_label(name, about, Ranked(1.0, None, name, 0, at)), labels.positions_of(
        about, Ranked(1.0, None, name, 0, at)
    )


def test_labels_say_what_a_node_is():
    sae = featurizers.create("identity", d_in=WIDTH)
    assert _labelled(("token", "key", "head"), Basis("attn.probs"), (2, 1, 3)) == ("head 3", (2, 1))
    assert _labelled(("pair", "head"), Basis("attn.probs"), (4, 3)) == ("head 3", (2, 1))
    assert _labelled(("token", "neuron"), Basis("mlp.neurons"), (2, 17)) == ("neuron 17", (2, None))
    assert _labelled(("token", "one"), Basis("resid.embed", whole=True), (2, 0)) == ("embedding", (2, None))
    assert _labelled(("token", "one"), Basis("mlp.bias", whole=True), (2, 0)) == ("MLP's bias", (2, None))
    assert _labelled(("token", "feature"), Basis("mlp.delta", sae), (2, 5)) == ("feature 5 of mlp.delta", (2, None))
    assert _labelled(("token", "d_model"), Basis("mlp.delta", sae, "error"), (2, 5)) == (
        "channel 5 of error of mlp.delta",
        (2, None),
    )
    assert _labelled(("vocab",), None, (9,)) == ("token 9", (None, None))
    assert _labelled(("token", "one"), None, (0, 0), name="always_one") == ("always_one", (0, None))
    assert labels.token_label("a\nb", 3) == "3 'a\\\\nb'"
