"""Commands ``train``, ``evaluate`` and ``sweep``: their output, their files and their errors."""

import csv
import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import featurizers
import featurizers_training as training
import pytest
import torch
from featurizers import models
from featurizers.errors import ArtefactError
from featurizers.format import weights
from featurizers_training.command import options

from tests.support.command import as_json, run
from tests.support.models import LAYERS, WIDTH, fresh_model, prompts, save_language_model

LAST = f"resid.post:{LAYERS - 1}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a language model and pairs of texts, to search with and to test on; a label is its answer to the source."""
    folder = tmp_path_factory.mktemp("training")
    model = save_language_model(fresh_model("llama"), folder / "lm") and fresh_model("llama")
    for name, count, seed in (("pairs", 40, 0), ("test", 17, 5)):
        base, source = prompts(count, 5, seed=seed), prompts(count, 5, seed=seed + 1)
        answers = model(source).logits[:, -1].argmax(-1).tolist()
        plain = [
            {"base": _text(b), "source": _text(s), "label": f" w{a}"}
            for b, s, a in zip(base.tolist(), source.tolist(), answers, strict=True)
        ]
        named = [{**record, "base_position": {"subject": 1, "end": -1}} for record in plain]
        for kind, records in (("", plain), ("-named", named)):
            (folder / f"{name}{kind}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _text(ids):
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")


def in_a_process(*arguments):
    done = subprocess.run([sys.executable, "-m", "featurizers", *map(str, arguments)], capture_output=True, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


MODEL = ("--model", "./lm")
COMMON = (*MODEL, "--pairs", "pairs.jsonl")
DAS = ("train", "das", *COMMON, "--features", "4", "--epochs", "1")


# ---------------------------------------------------------------------- sweep


@pytest.fixture(scope="module")
def swept(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ("--features", "4", "--epochs", "1", "--test", "test-named.jsonl", "--controls", "shuffled-labels")
        where = ("--positions", "end,subject", "--layers", "1-2", "--pairs", "pairs-named.jsonl")
        return as_json("sweep", *MODEL, *where, *arguments, "--out", "swept"), folder / "swept"


def test_a_new_process_measures_what_the_sweep_printed(swept):
    result, folder = swept
    best = result["best"]
    code, out, err = in_a_process(
        "evaluate",
        folder / "best",
        *MODEL,
        "--pairs",
        "test-named.jsonl",
        "--json",
        "--site",
        f"{best['site']}@{best['position']}",
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["accuracy"] == best["accuracy"]
    assert found["interval_95"] == [best["low_95"], best["high_95"]]
    assert found["pairs"] == 17


def test_a_sweep_writes_a_table_a_picture_and_the_best(swept):
    result, folder = swept
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["accuracy"] for row in rows] == [str(cell["accuracy"]) for cell in result["cells"]]
    assert json.loads((folder / "table.json").read_text())["cells"] == result["cells"]
    assert {row["site"] for row in rows} == {"resid.post:1", LAST}
    assert {row["position"] for row in rows} == {"subject", "end"}
    assert {row["method"] for row in rows} == {"das", "full-vector", "pca", "random"}
    assert {row["control"] for row in rows} == {"", "shuffled-labels"}
    assert len(rows) == 2 * 2 * 4 * 2
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    best = featurizers.load(folder / "best")
    assert best.metadata["training"]["accuracy"]["test"]["accuracy"] == result["best"]["accuracy"]
    assert str(best.site) == result["best"]["site"]


def test_the_full_vector_at_the_end_of_the_model_answers_as_the_source(swept):
    for cell in swept[0]["cells"]:
        if (cell["site"], cell["method"], cell["position"]) == (LAST, "full-vector", "end"):
            assert (cell["accuracy"] == 1.0) == (cell["control"] is None)
            assert (cell["train_accuracy"] == 1.0) == (cell["control"] is None)


def test_a_sweep_prints_its_tables(tmp_path):
    code, out, _ = run(
        "sweep",
        *COMMON,
        "--layers",
        "2",
        "--methods",
        "full-vector,random",
        "--features",
        "2",
        "--controls",
        "random-model,shuffled-labels",
        "--out",
        tmp_path / "out",
    )
    assert code == 0
    assert "100% / 100%" in out
    assert all(word in out for word in (LAST, "full-vector", "control: random-model", "control: shuffled-labels"))
    assert "Best: full-vector at resid.post:2, position -1: 100.0%" in out.replace("\n", " ")


# ---------------------------------------------------------------------- train and evaluate


def test_train_says_what_it_found_and_how_to_load_it(tmp_path):
    out = tmp_path / "found"
    code, printed, _ = run(
        *DAS,
        "--site",
        f"{LAST}@-1",
        "--out",
        out,
        "--test",
        "test.jsonl",
        "--validation",
        "0.2",
        "--seed",
        "3",
        "--control",
        "shuffled-labels",
        "--control",
        "random-model",
    )
    assert code == 0
    assert all(word in printed for word in ("train", "validation", "test", "shuffled-labels", "random-model"))
    assert f"featurizers.load({str(out)!r}).attach(model)" in printed
    loaded = featurizers.load(out)
    record = loaded.metadata["training"]
    for shown in ((out / "README.md").read_text(), run("info", out)[1]):
        rows = {cells[0]: cells[1] for line in shown.splitlines() if len(cells := re.findall(r"[^|│]+", line)) == 2}
        rows = {name.strip(): text.strip() for name, text in rows.items()}
        test = training.Accuracy(round(record["accuracy"]["test"]["accuracy"] * 17), 17)
        assert rows["accuracy (test)"].startswith(f"{test}, 17 pairs")
        assert (rows["method"], rows["selected features"], rows["pairs of the search"]) == ("das", "4", "32")
        assert (rows["site"].strip("`"), rows["tokens"], rows["model"].strip("`")) == (LAST, "-1", "lm")
    assert "history" not in run("info", out)[1]
    assert record["method"]["n_features"] == 4
    assert (record["pairs"]["count"], record["accuracy"]["validation"]["pairs"]) == (32, 8)
    assert (str(loaded.site), loaded.site.position, loaded.site.model) == (LAST, (-1,), "lm")
    measured = as_json("evaluate", out, *MODEL, "--pairs", "test.jsonl")
    assert measured["accuracy"] == record["accuracy"]["test"]["accuracy"]
    assert str(training.Accuracy(round(measured["accuracy"] * 17), 17)) in printed
    assert measured["featurizers"] == [{"id": f"das at {LAST}", "site": LAST, "position": [-1]}]
    by_base = as_json("evaluate", out, *MODEL, "--pairs", "test.jsonl", "--cluster", "base")
    bases = {json.loads(line)["base"] for line in Path("test.jsonl").read_text().splitlines()}
    assert (by_base["accuracy"], by_base["clusters"]) == (measured["accuracy"], len(bases))
    code, _, err = run("evaluate", out, *MODEL, "--pairs", "test.jsonl", "--cluster", "word")
    assert code == 1
    assert "label, base, source, not by 'word'" in err


def test_off_a_terminal_there_is_a_line_for_each_epoch_and_cell(tmp_path):
    epochs = ("--site", LAST, "--out", tmp_path / "a", "--epochs", "3")
    code, _, err = run("train", "das", *COMMON, "--features", "4", *epochs)
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("progress: ")]
    assert [line.partition(": loss")[0] for line in lines] == [f"progress: das, epoch {i} of 3" for i in (1, 2, 3)]
    cells = ("--methods", "full-vector", "--layers", "0-2", "--out", tmp_path / "b")
    code, _, err = run("sweep", *COMMON, *cells)
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("progress: ")]
    assert [line.rpartition(": accuracy")[0] for line in lines] == [
        f"progress: cell {i + 1} of 3: resid.post:{i}, position -1, full-vector" for i in range(3)
    ]
    quiet = run("train", "das", *COMMON, "--features", "4", "--site", LAST, "--out", tmp_path / "c", "--json")
    assert "progress" not in quiet[2]


def test_train_says_what_the_model_does_by_itself_and_what_whole_activations_do(folder, tmp_path):
    model = fresh_model("llama")
    records = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    ids = {key: [[int(word[1:]) for word in r[key].split()] for r in records] for key in ("base", "source", "label")}
    labels = [label for (label,) in ids["label"]]
    answers = [int(model(torch.tensor([row])).logits[0, -1].argmax()) for row in ids["base"]]
    edited = []
    for base, source in zip(ids["base"], ids["source"], strict=True):  # by plain hooks
        block, kept = model.model.layers[0], []
        first = block.register_forward_hook(
            lambda _, __, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        model(torch.tensor([source]))
        first.remove()

        def put(_, __, out, whole=kept[0]):
            hidden = out[0] if isinstance(out, tuple) else out
            hidden[:, 1] = whole[:, 1]

        second = block.register_forward_hook(put)
        with torch.no_grad():
            edited.append(int(model(torch.tensor([base])).logits[0, -1].argmax()))
        second.remove()
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text(
        "".join(
            json.dumps({**r, "base_label": f" w{answer if i % 3 else 1 - min(answer, 1)}"}) + "\n"
            for i, (r, answer) in enumerate(zip(records, answers, strict=True))
        )
    )
    site = ("--site", "resid.post:0@1")
    train = ("train", "das", *MODEL, "--pairs", "pairs.jsonl", "--features", "4", "--epochs", "1", "--test", labelled)
    checks = as_json(*train, *site, "--out", tmp_path / "a")["checks"]
    hits = {name: round(measured["accuracy"] * 17) for name, measured in checks.items() if name != "part"}
    assert hits == {
        "base": 17 - len(range(0, 17, 3)),
        "source": 17,
        "unchanged": sum(a == b for a, b in zip(answers, labels, strict=True)),
        "ceiling": sum(a == b for a, b in zip(edited, labels, strict=True)),
    }
    assert hits["ceiling"] < 9
    code, out, err = run(*train, *site, "--out", tmp_path / "b")
    assert code == 0
    assert "The model alone answers source prompts with the label: 100.0%" in out
    assert "warning: whole activations of resid.post:0 give the label for only" in err
    assert "itself answers only" not in err


def test_train_warns_of_pairs_that_the_model_does_not_answer(folder, tmp_path):
    records = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    wrong = tmp_path / "wrong.jsonl"
    labels = [record["label"] for record in records]
    wrong.write_text(
        "".join(
            json.dumps({**record, "label": label, "base_label": label}) + "\n"
            for record, label in zip(records, labels[1:] + labels[:1], strict=True)
        )
    )
    code, _, err = run(
        "train", "das", *MODEL, "--pairs", wrong, "--features", "4", "--epochs", "1", "--site", LAST,
        "--out", tmp_path / "a", "--test", "0", "--json",
    )  # fmt: skip
    assert code == 0
    assert [line.split(" only ")[0] for line in err.splitlines() if line.startswith("warning: ")] == [
        "warning: the model itself answers",
        "warning: the model itself answers",
        f"warning: whole activations of {LAST} give the label for",
    ]


def test_controls_stand_beside_the_search(tmp_path):
    found = as_json("train", "dbm", *COMMON, "--site", LAST, "--out", tmp_path / "a", "--epochs", "1", "--control",
                    "shuffled-labels", "--control", "random-model")  # fmt: skip
    assert [row["control"] for row in found["rows"]] == [None, "shuffled-labels", "random-model"]
    true, shuffled, random = (row["accuracy"]["train"]["accuracy"] for row in found["rows"])
    assert true > 0.6
    assert max(shuffled, random) < 0.2


def test_several_sites_are_a_collection_that_is_evaluated_at_once(tmp_path):
    out = tmp_path / "several"
    sites = ("--site", "resid.post:2@end", "--site", "resid.post:0@subject")
    found = as_json("train", "das", *MODEL, "--pairs", "pairs-named.jsonl", "--features", "4", "--epochs", "1", *sites,
                    "--out", out, "--test", "test-named.jsonl")  # fmt: skip
    assert set(featurizers.list_artefacts(out)) == {"resid.post-0", "resid.post-2"}
    accuracy = found["rows"][0]["accuracy"]["test"]
    by_name = as_json("evaluate", out, *MODEL, "--pairs", "test-named.jsonl", *sites)
    assert {key: by_name[key] for key in accuracy} == accuracy
    own = as_json("evaluate", out, *MODEL, "--pairs", "test.jsonl")
    assert own == by_name  # at the artefacts' own positions, because the records have none
    assert [row["position"] for row in own["featurizers"]] == [[-1], [1]]
    assert as_json("evaluate", out, *MODEL, "--pairs", "test-named.jsonl") == by_name  # names are not positions either
    alone = as_json("evaluate", out, *MODEL, "--pairs", "test.jsonl", "--subfolder", "resid.post-2")
    assert [row["site"] for row in alone["featurizers"]] == ["resid.post:2"]


def test_a_search_goes_through_an_artefact(tmp_path):
    through = featurizers.create("subspace", d_in=WIDTH, n_features=6, seed=1)
    through.save_pretrained(tmp_path / "through")
    as_json("train", "dbm", *COMMON, "--site", LAST, "--through", f"local:{tmp_path}/through", "--epochs", "1",
            "--sparsity", "0.1", "--temperature", "2,0.5", "--gate-lr", "0.1", "--out", tmp_path / "a")  # fmt: skip
    loaded = featurizers.load(tmp_path / "a")
    assert loaded.n_features == 6
    method = loaded.metadata["training"]["method"]
    assert (method["sparsity"], method["temperature"], method["gate_lr"]) == (0.1, [2.0, 0.5], 0.1)


def test_a_search_resumes_from_its_checkpoint(tmp_path):
    options = ("--site", LAST, "--checkpoints", tmp_path / "state", "--control", "shuffled-labels")
    first = as_json(*DAS, *options, "--out", tmp_path / "a")
    again = as_json(*DAS, *options, "--out", tmp_path / "b")
    assert (tmp_path / "state-shuffled-labels").is_dir()
    for one, other in zip(first["rows"], again["rows"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    bases = [featurizers.load(tmp_path / name).basis for name in "ab"]
    assert torch.equal(*bases)


def test_what_was_found_is_pushed(tmp_path, monkeypatch):
    pushed = []

    class Commit:
        pr_url, commit_url = None, "https://huggingface.co/owner/name/commit/0"

    def push(*arguments):
        pushed.append(arguments)
        return Commit

    monkeypatch.setattr(featurizers, "push", push)
    found = as_json(*DAS, "--site", LAST, "--out", tmp_path / "a", "--push", "owner/name")
    assert found["url"] == Commit.commit_url
    assert pushed == [(tmp_path / "a", "owner/name")]


# ---------------------------------------------------------------------- errors

TRAIN = ("train", "das", *MODEL, "--out", "new")
SWEEP = ("sweep", *MODEL, "--out", "new", "--features", "2")
PAIRS = ("--pairs", "pairs.jsonl")
NAMED = ("--pairs", "pairs-named.jsonl")
SITE = ("--site", LAST, "--features", "2")
ERRORS = {
    "no method": (("train", "dsa", *MODEL, *PAIRS, *SITE, "--out", "new"), "das, dbm, das+dbm, boundless, not 'dsa'"),
    "a baseline": (("train", "pca", *MODEL, *PAIRS, *SITE, "--out", "new"), "boundless, not 'pca'"),
    "no features": ((*TRAIN, *PAIRS, "--site", LAST), "the method 'das' needs --features"),
    "an option of another method": ((*TRAIN, *PAIRS, *SITE, "--sparsity", "1"), "--sparsity is no option of das"),
    "an option of no method": ((*SWEEP, *PAIRS, "--gate-lr", "1"), "--gate-lr is no option of das or full-vector"),
    "a temperature": ((*TRAIN, *PAIRS, *SITE, "--temperature", "1"), "such as 1,0.01, not '1'"),
    "no such site": ((*TRAIN, *PAIRS, "--site", "resid.post:9", "--features", "2"), "3 layers"),
    "a misspelt site": ((*TRAIN, *PAIRS, "--site", "resid:9", "--features", "2"), "resid"),
    "some positions": ((*TRAIN, *PAIRS, *SITE, "--site", "embed@0"), "the position of each site or of none"),
    "too many features": ((*TRAIN, *PAIRS, "--site", LAST, "--features", "99"), "do not fit into 32 dimensions"),
    "names to choose from": ((*TRAIN, *NAMED, *SITE), "'base_position' has the names 'subject', 'end'"),
    "no such name": ((*TRAIN, *NAMED, "--site", f"{LAST}@verb", "--features", "2"), "no position named 'verb'"),
    "no such token": ((*SWEEP, *PAIRS, "--positions", "-1,7"), "token 7 is not in the prompt, which has 5 tokens"),
    "no such file": ((*TRAIN, "--pairs", "none.jsonl", *SITE), "cannot read pairs from 'none.jsonl'"),
    "no such test": ((*TRAIN, *PAIRS, *SITE, "--test", "none.jsonl"), "cannot read pairs from 'none.jsonl'"),
    "a whole share": (
        (*TRAIN, *PAIRS, *SITE, "--test", "1"),
        "--test is a file, or a share of the pairs between 0 and",
    ),
    "no share": ((*SWEEP, *PAIRS, "--test", "0"), "give --test a file or a share"),
    "no model": (("train", "das", "--model", "./none", *PAIRS, *SITE, "--out", "new"), "model './none'"),
    "no device": ((*TRAIN, *PAIRS, *SITE, "--device", "abacus"), "not 'abacus'"),
    "no dtype": ((*TRAIN, *PAIRS, *SITE, "--dtype", "int3"), "a dtype is one of auto, float32, bfloat16, float16"),
    "no precision": ((*TRAIN, *PAIRS, *SITE, "--precision", "int3"), "precision is one of fp32, bf16, fp16"),
    "no objective": ((*TRAIN, *PAIRS, *SITE, "--objective", "x"), "cross-entropy, logit-difference"),
    "no base label": ((*TRAIN, *PAIRS, *SITE, "--objective", "logit-difference"), "a base_label a pair"),
    "no control": ((*TRAIN, *PAIRS, *SITE, "--control", "x"), "shuffled-labels, random-model, not 'x'"),
    "nothing to wait for": ((*TRAIN, *PAIRS, *SITE, "--patience", "1"), "patience needs validation pairs"),
    "no layers": ((*SWEEP, *PAIRS, "--layers", "x"), "such as 4,8,12 or 0-11, not 'x'"),
    "layers beyond": ((*SWEEP, *PAIRS, "--layers", "1-3"), "the layers '1-3' are not in the model"),
    "no kind of site": ((*SWEEP, *PAIRS, "--site-kind", "x"), "x"),
    "no methods": ((*SWEEP, *PAIRS, "--methods", "das,x"), "a method is one of das, dbm"),
    "a misspelt method": ((*SWEEP, *PAIRS, "--methods", "bdm"), "Did you mean 'dbm'?"),
    "a misspelt control": ((*SWEEP, *PAIRS, "--controls", "shuffled-label"), "Did you mean 'shuffled-labels'?"),
    "an artefact that is not there": (("evaluate", "./none", *MODEL, *PAIRS), "there is no config.json"),
    "sites of others": (
        ("evaluate", "./plain", *MODEL, *PAIRS, "--site", LAST, "--site", LAST),
        "there are 1 featuriz",
    ),
    "names and no position": (("evaluate", "./sited", *MODEL, *NAMED), "has the names 'subject', 'end'; choose one"),
    "no site": (("evaluate", "./plain", *MODEL, *PAIRS), "does not say where it belongs"),
    "another model": (("evaluate", "./another", *MODEL, *PAIRS), "was found in the model 'owner/x'"),
}


@pytest.mark.parametrize(("arguments", "words"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_one_line_and_exit_code_1(arguments, words, monkeypatch):
    f = featurizers.create("identity", d_in=WIDTH)
    f.save_pretrained("plain")
    f.site = featurizers.Site.parse(LAST)
    f.save_pretrained("sited")
    f.site = featurizers.Site("resid.post", 0).at(model="owner/x")
    f.save_pretrained("another")
    if words.endswith("'owner/x'"):
        real = models.load_model

        def load(*arguments, **options):
            loaded = real(*arguments, **options)
            loaded.model.config._name_or_path = "owner/y"
            return loaded

        monkeypatch.setattr(models, "load_model", load)
    code, out, err = run(*arguments)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert words in err
    assert not Path("new").exists()


def test_a_folder_that_is_not_empty_is_refused_before_the_search(monkeypatch, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    monkeypatch.setattr(models, "load_model", None)
    for arguments in ((*DAS, "--site", LAST), ("sweep", *COMMON, "--features", "2")):
        code, out, err = run(*arguments, "--out", tmp_path)
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert "choose a new or an empty folder" in err


@pytest.mark.parametrize("arguments", [("train",), ("train", "das"), ("evaluate",), ("sweep", "--frob")], ids=" ".join)
def test_a_command_called_wrongly_ends_with_2(arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err


def test_positions_are_parsed():
    assert [options.position(text) for text in ("-1", "3", "0+1", "-2+-1", "subject", "1st")] == [
        -1, 3, [0, 1], [-2, -1], "subject", "1st",
    ]  # fmt: skip
    sites, positions = options.sites_and_positions(["resid.post:8@subject", "mlp.out:1@-1"])
    assert (list(map(str, sites)), positions) == (["resid.post:8", "mlp.out:1"], ["subject", -1])


# ---------------------------------------------------------------------- Ctrl-C


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("train", (*DAS[1:], "--site", LAST)),
        ("sweep", (*COMMON, "--methods", "das,random", "--epochs", "1", "--features", "2", "--layers", "1")),
    ],
)
def test_two_searches_with_one_folder_are_both_saved(module, arguments, tmp_path, monkeypatch):
    out = tmp_path / "best"  # a sweep has a folder of this name among its results
    command = (module, *arguments)
    importlib.import_module("featurizers_training.command.checks")  # it takes the function as it is now
    where = {"train": "search.training", "sweep": "sweeps.sweeping"}[module]
    searching = importlib.import_module(f"featurizers_training.{where}")
    original, others = getattr(searching, module), []

    def search(*given, **options):
        monkeypatch.undo()
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.chdir(here)
        others.append(run(*command, "--seed", "1", "--out", out))  # it ends while the first one searches
        others.append(files(out))
        return original(*given, **options)

    here = Path.cwd()
    monkeypatch.setattr(searching, module, search)
    code, printed, error = run(*command, "--out", out)
    (other_code, _, other_error), other_files = others
    assert (code, other_code) == (0, 0), (error, other_error)
    assert files(out) == other_files
    folder = tmp_path / "best-2"
    assert f"another program has written to {out} meanwhile; the results are in {folder}\n" in error
    assert re.sub(r"\s", "", str(folder)) in re.sub(r"\s", "", printed)
    assert files(folder).keys() == other_files.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best-2"]
    artefact = folder if module == "train" else folder / "best"
    assert featurizers.load(artefact).metadata["training"]["settings"]["seed"] == 0


def test_a_table_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    pairs = training.Pairs.of([{"base": [1], "source": [2], "label": 3}])
    result = training.sweep(fresh_model("llama"), pairs, pairs, [LAST], [-1], [training.FullVector()])
    (tmp_path / "notes.txt").write_text("mine")
    result.write(tmp_path)
    before = files(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(ArtefactError, match="it cannot be written: No space left on device"):
        result.write(tmp_path)
    assert files(tmp_path) == before
    assert before.keys() == {"notes.txt", "table.csv", "table.json", "heatmap.png"}


def interrupt(*_, **__):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_a_search_saves_leaves_the_earlier_artefact(tmp_path, monkeypatch):
    out = tmp_path / "found"
    code, _, error = run(*DAS, "--site", LAST, "--out", out)
    assert code == 0, error
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write = weights.save_tensors

    def interrupted(tensors, path, *rest, **options):
        write(tensors, path, *rest, **options)
        interrupt()

    monkeypatch.setattr(weights, "save_tensors", interrupted)
    f = featurizers.load(out)
    with pytest.raises(KeyboardInterrupt):
        f.save_pretrained(out)
    code, _, error = run(*DAS, "--site", LAST, "--out", tmp_path / "other")
    assert (code, error.splitlines()[-1]) == (130, "error: interrupted; what was complete before is unchanged")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["found"]


def test_an_interrupt_of_the_demo_and_of_a_push_is_one_line(tmp_path, monkeypatch):
    featurizers.create("identity").save_pretrained(tmp_path / "a")
    monkeypatch.setattr("featurizers_training.demo.main.run", interrupt)
    monkeypatch.setattr("featurizers.store.push", interrupt)
    for arguments in (("demo",), ("push", f"./{tmp_path.name}/a", "owner/name")):
        monkeypatch.chdir(tmp_path.parent)
        assert run(*arguments) == (130, "", "error: interrupted; what was complete before is unchanged\n")
