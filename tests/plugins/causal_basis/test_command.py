"""``featurizers fit causal-basis``: its output, its files and its errors."""

import json
import subprocess
import sys

import featurizers
import pytest
import torch
from featurizers_causal_basis import LogitLens, extract_causal_bases
from safetensors.torch import save_file

from tests.support.command import as_json, run
from tests.support.models import LAYERS, VOCABULARY, WIDTH, fresh_model, prompts, save_language_model

LENGTH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a language model and texts for it."""
    folder = tmp_path_factory.mktemp("causal-basis")
    save_language_model(fresh_model("llama"), folder / "lm")
    lines = [" ".join(f"w{i}" for i in row) for row in prompts(12, LENGTH).tolist()]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"words": line}) + "\n" for line in lines))
    return folder


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")


FIT = ("fit", "causal-basis", "--model", "./lm", "--data", "texts.txt", "-k", "2", "--preset", "fast")


def test_it_saves_the_bases_that_the_library_finds(tmp_path):
    result = as_json(*FIT, "--out", tmp_path / "out", "--layers", "0,2", "--tokens", "40", "--seed", "3")
    ids = prompts(12, LENGTH)[:8]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    expected = extract_causal_bases(
        LogitLens(fresh_model("llama")), ids, 2, layers=[0, 2], side="output", mask=mask, seed=3, preset="fast"
    )
    assert list(featurizers.list_artefacts(tmp_path / "out")) == ["resid.post-0", "resid.post-2"]
    for row, basis in zip(result["layers"], expected, strict=True):
        loaded = featurizers.load(tmp_path / "out", subfolder=row["subfolder"], verify=True)
        assert str(loaded.site) == row["site"] == str(basis.site)
        torch.testing.assert_close(loaded.energies, basis.energies, rtol=1e-5, atol=0)
        torch.testing.assert_close(loaded.energies, torch.tensor(row["energies"]))
        torch.testing.assert_close((loaded.vectors * basis.vectors).sum(0).abs(), torch.ones(2), rtol=1e-4, atol=0)
        record = loaded.record
        assert (record.mode, record.side, record.readout, record.seed) == ("mean", "output", "logit-lens", 3)
        assert (record.n_tokens, record.mask) == (40, "every token but the first of each prompt")
        assert (record.model, record.preset) == ("lm", "fast")
        assert loaded.metadata["data"] == {"file": "texts.txt", "prompts": 8}
        assert row["evaluations"] > 2
        assert row["joint_energy"] == pytest.approx(record.joint_energy)
    assert (tmp_path / "out" / "energies.png").read_bytes()[:4] == b"\x89PNG"
    assert (result["n_tokens"], result["units"]) == (40, "nats/token")


def test_one_layer_is_one_artefact_and_options_are_passed_on(tmp_path):
    result = as_json(
        *("fit", "causal-basis", "--model", "./lm", "--data", "texts.jsonl", "--key", "words", "-k", "3"),
        *("--out", tmp_path / "out", "--layers", "1", "--side", "input", "--mode", "zero", "--mask-first", "2"),
        *("--length", "4", "--preset", "reference", "--max-iter", "5", "--batch-size", "5"),
    )
    f = featurizers.load(tmp_path / "out")
    assert (str(f.site), f.record.mode, f.record.side) == ("resid.pre:1", "zero", "input")
    assert (f.record.n_tokens, f.record.mask) == (24, "every token but the first 2 of each prompt")
    assert f.record.solver["max_iter"] == 5
    assert result["layers"][0]["site"] == "resid.pre:1"
    between = (f.energies[1] + f.energies[2]).item() / 2
    part = as_json(
        *("fit", "causal-basis", "--model", "./lm", "--data", "texts.jsonl", "--key", "words", "-k", "3"),
        *("--out", tmp_path / "part", "--layers", "1", "--side", "input", "--mode", "zero", "--mask-first", "2"),
        *("--length", "4", "--preset", "reference", "--max-iter", "5", "--min-energy", between),
    )
    assert len(part["layers"][0]["energies"]) == 2


def test_the_whole_model_and_a_tuned_lens_as_readouts(tmp_path):
    tiny = (*FIT, "--layers", "1", "--tokens", "20")
    whole = as_json(*tiny, "--out", tmp_path / "model", "--readout", "model")
    assert featurizers.load(tmp_path / "model").record.readout == "model"
    lens = tmp_path / "lens"
    lens.mkdir()
    (lens / "config.json").write_text(
        json.dumps({"d_model": WIDTH, "num_hidden_layers": LAYERS, "bias": True, "lens_type": "linear_tuned_lens"})
    )
    zero = {"weight": torch.zeros(WIDTH, WIDTH), "bias": torch.zeros(WIDTH)}
    torch.save({f"{i}.{name}": tensor for i in range(LAYERS) for name, tensor in zero.items()}, lens / "params.pt")
    tuned = as_json(*tiny, "--out", tmp_path / "tuned", "--readout", f"tuned-lens:{lens}")
    logit = as_json(*tiny, "--out", tmp_path / "logit")
    assert featurizers.load(tmp_path / "tuned").record.readout == "tuned-lens"
    energies = [result["layers"][0]["energies"] for result in (tuned, logit, whole)]
    assert energies[0] == pytest.approx(energies[1], rel=1e-4)  # translators of zero change nothing
    assert energies[2] != pytest.approx(energies[1], rel=0.01)


def test_it_resumes_an_interrupted_run(tmp_path):
    arguments = (*FIT, "--layers", "0,1", "--tokens", "20", "--checkpoints", tmp_path / "state")
    first = as_json(*arguments, "--out", tmp_path / "first")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "state").iterdir()}
    (tmp_path / "state" / "layer-001.safetensors").unlink()
    again = as_json(*arguments, "--out", tmp_path / "again")
    assert again["layers"] == first["layers"]
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "state").iterdir()}
    assert after.keys() == kept.keys()
    assert after["layer-000.safetensors"] == kept["layer-000.safetensors"]
    code, _, error = run(*arguments[:-4], "--tokens", "21", *arguments[-2:], "--out", tmp_path / "other")
    assert (code, error.count("\n")) == (1, 1)
    assert "another extraction" in error


def test_it_prints_a_table_and_the_paths(tmp_path):
    code, out, err = run(*FIT, "--layers", "0-1", "--tokens", "20", "--out", tmp_path / "out")
    assert code == 0
    told = [line.partition(":")[2].partition(":")[0] for line in err.splitlines() if line.startswith("progress: ")]
    assert told[:2] == [" layer 0, vector 1", " layer 0, vector 2"]
    assert {line.partition(",")[0] for line in told} == {" layer 0", " layer 1"}
    assert "resid.post:0" in out
    assert "all at once" in out
    assert "20 tokens: every token but the first of each prompt" in out
    assert "energies.png" in out


def test_each_wrong_input_is_one_clear_line(tmp_path):
    out = ("--out", tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "file").touch()
    save_file({"x": torch.ones(1)}, tmp_path / "one.safetensors")
    for arguments, words in [
        ((*out, "--layers", "x"), "layers are numbers"),
        ((*out, "--layers", "3"), "from 0 to 2"),
        ((*out, "--mode", "median"), "--mode is one of mean, resample, zero"),
        ((*out, "--side", "left"), "--side is one of input, output"),
        ((*out, "--preset", "slow"), "no preset 'slow'"),
        ((*out, "--dtype", "int8"), "a dtype is one of auto, float32, bfloat16, float16, not 'int8'"),
        ((*out, "--readout", "lens"), "--readout is logit-lens, model or tuned-lens:FOLDER"),
        ((*out, "--readout", "tuned-lens:"), "--readout is"),
        ((*out, "--readout", f"tuned-lens:{tmp_path}/none"), "config.json"),
        ((*out, "--data", "none.txt"), "cannot read texts"),
        ((*out, "--data", "texts.jsonl"), "under 'text'"),
        ((*out, "--model", "./none"), "cannot load the language model"),
        ((*out, "--min-energy", "1e9", "--layers", "0"), "give a smaller --min-energy"),
        ((*out, "-k", WIDTH + 1, "--layers", "0"), f"at most {WIDTH}"),
        ((*out, "--mask-first", "128"), "leave none"),
        ((*out, "--device", "nowhere"), "device"),
        ((*out, "--checkpoints", tmp_path / "state"), "no extraction"),
        (("--out", full), "there already"),
    ]:
        code, _, error = run(*FIT, "--tokens", "20", *arguments)
        assert (code, error.count("\n")) == (1, 1), (arguments, error)
        assert words in error, (arguments, error)
        assert not (tmp_path / "out").exists()
    for arguments in ((*out, "-k", "0"), (*out, "--tokens", "1"), (*out, "--seed", "-1"), ()):
        assert run(*FIT, *arguments)[0] == 2, arguments
    assert VOCABULARY > 40


def test_it_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "featurizers", "fit", "causal-basis", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "100", "PATH": "", "NO_COLOR": "1"},
    )
    for option in ("--readout", "--mask-first", "--checkpoints", "--min-energy"):
        assert option in done.stdout
