"""The command ``featurizers harvest``, and harvests by several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import featurizers
import featurizers_harvest
import pytest
import torch
from featurizers.errors import ArtefactError, MissingDependencyError, UsageError
from featurizers_harvest import engines

from tests.plugins.harvest.test_harvest import IDS, files, topk
from tests.support.command import as_json, run
from tests.support.fragile import Fragile
from tests.support.models import fresh_model, save_language_model

TEXTS = [" ".join(f"w{i}" for i in ids) for ids in IDS if ids]
ROWS = {"shard_tokens": 100, "batch_size": 4, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Return a folder with a model, an artefact, documents, and a harvest of them in one process."""
    root = Path(tmp_path_factory.mktemp("it"))
    save_language_model(fresh_model("llama"), root / "model")
    topk().save_pretrained(root / "f")
    (root / "texts.jsonl").write_text("".join(json.dumps({"words": text}) + "\n" for text in TEXTS))
    wanted = {"f": featurizers.load(root / "f"), "x": "mlp.out:0"}
    torch.set_num_threads(1)
    featurizers.harvest(str(root / "model"), wanted, TEXTS, root / "whole", **ROWS)
    return root


def options(root: Path, out: str) -> tuple[Any, ...]:
    own = ("--model", root / "model", "--data", root / "texts.jsonl", "--key", "words", "--out", root / out)
    what = ("--featurizer", f"f={root / 'f'}", "--site", "x=mlp.out:0")
    return (*own, *what, "--device", "cpu", "--shard-tokens", 100, "--batch-size", 4)


def test_the_command_writes_what_the_function_writes(folder: Path) -> None:
    code, out, error = run("harvest", *options(folder, "by-command"))
    assert code == 0, error
    assert out.startswith(f"Written: {folder / 'by-command'}: ")
    assert "progress: shard 0, 1 of " in error
    assert "tokens/s" in error
    assert files(folder / "by-command") == files(folder / "whole")
    about = as_json("harvest", *options(folder, "by-command"))
    assert (about["names"], about["tokens"]) == (["f", "x"], sum(map(len, IDS)))


def test_the_command_builds_the_index(folder: Path) -> None:
    code, _, error = run("harvest", *options(folder, "indexed"), "--index")
    assert code == 0, error
    assert [path.name for path in (folder / "indexed" / "by=feature").iterdir()] == ["name=f"]
    assert "--index takes no --shard" in run("harvest", *options(folder, "x"), "--index", "--shard", 0, "--of", 1)[2]


def test_a_harvest_is_indexed_and_its_contexts_are_printed(folder: Path) -> None:
    from transformers import AutoTokenizer

    run("harvest", *options(folder, "read"))
    code, out, error = run("harvested", "index", folder / "read", "f")
    assert (code, out) == (0, f"Written: {folder / 'read' / 'by=feature' / 'name=f'}\n"), error
    found = featurizers_harvest.open(folder / "read")
    feature = int(found.densities("f").argmax())
    expected = featurizers_harvest.top_contexts(found, "f", feature, k=3, width=2)
    own = ("harvested", "contexts", folder / "read", "f", feature, "--k", 3, "--width", 2)
    assert [each["tokens"] for each in as_json(*own)["contexts"]] == [each.tokens for each in expected]
    decode = AutoTokenizer.from_pretrained(folder / "model").decode
    lines = run(*own, "--tokenizer", folder / "model")[1].splitlines()
    for line, each in zip(lines, expected, strict=True):
        assert line.split()[0] == f"{each.value:.4g}"
        assert f"document {each.document}, token {each.position}: " in line
        assert f"[{decode([each.tokens[each.position - each.start]])}]" in line
    never = int((found.densities("f") == 0).nonzero()[0])
    assert run("harvested", "contexts", folder / "read", "f", never)[1] == f"Feature {never} is 0 at every token.\n"
    assert "'x' has activations and no features" in run("harvested", "index", folder / "read", "x")[2]
    assert "there is no harvest here" in run("harvested", "index", folder / "model", "f")[2]
    assert "cannot load the tokenizer" in run(*own, "--tokenizer", folder / "f")[2]


def test_a_harvest_is_exported(folder: Path) -> None:
    run("harvest", *options(folder, "exported"))
    found = featurizers_harvest.open(folder / "exported")
    featurizers_harvest.to_delphi(found, "f", folder / "by-function", module="layers.1", context_size=8, splits=3)
    own = ("harvested", "export", folder / "exported", "f", "--to", "delphi", "--context-size", 8)
    code, out, error = run(*own, "--out", folder / "by-option", "--module", "layers.1", "--splits", 3)
    assert (code, out.endswith(f": {found.n_tokens // 8} contexts of 8 tokens\n")) == (0, True), error
    assert files(folder / "by-option") == files(folder / "by-function")
    activations = (*own[:3], "x", "--to", "sae-lens", "--context-size", 8, "--out", folder / "cached")
    pytest.importorskip("datasets")
    code, _, error = run(*activations, "--hook-name", "blocks.0.hook_mlp_out")
    assert (code, (folder / "cached" / "dataset_info.json").is_file()) == (0, True), error
    for words, message in (
        ((*own, "--out", folder / "y"), "error: --to delphi needs --module"),
        (activations, "error: --to sae-lens needs --hook-name"),
        ((*activations, "--hook-name", "h", "--splits", 2), "error: --splits is not for --to sae-lens"),
        ((*activations[:5], "other", *activations[6:]), "error: --to is sae-lens or delphi, not 'other'"),
    ):
        assert run(*words)[2].startswith(message)


def test_the_command_checks_a_harvest(folder: Path) -> None:
    run("harvest", *options(folder, "checked"))
    assert as_json("harvest", *options(folder, "checked"), "--check", 0.01) == {"problems": []}
    victim = folder / "checked" / "site=f" / "part-000000.parquet"
    victim.write_bytes(bytes(len(victim.read_bytes())))
    code, _, error = run("harvest", *options(folder, "checked"), "--check", 1)
    assert (code, "site=f/part-000000.parquet: the file is lost or has changed" in error) == (1, True)


def test_jobs_of_an_array_write_what_one_writes(folder: Path) -> None:
    for job in range(3):
        code, _, error = run("harvest", *options(folder, "array"), "--shard", job, "--of", 3)
        assert code == 0, error
    assert files(folder / "array") == files(folder / "whole")
    assert run("harvest", *options(folder, "array"), "--shard", 1)[2].startswith(
        "error: give --shard and --of together"
    )


def test_processes_write_what_one_writes(folder: Path) -> None:
    wanted = {"f": featurizers.load(folder / "f"), "x": "mlp.out:0"}
    out = folder / "processes"
    found = featurizers.harvest(str(folder / "model"), wanted, TEXTS, out, workers=2, **ROWS)
    assert found.is_complete
    assert files(out) == files(folder / "whole")
    assert not [path for path in out.iterdir() if path.name.startswith(".work")]


def test_a_worker_that_is_killed_is_started_anew(tmp_path: Path) -> None:
    found = list(engines.Processes(2).run(Fragile(tmp_path, 2, 2), range(6)))
    assert sorted(each.shard for each in found) == list(range(6))
    assert len(list(tmp_path.glob("dead-*"))) == 2
    (tmp_path / "one").mkdir()
    found = list(engines.Processes(1).run(Fragile(tmp_path / "one", 2, 1), range(4)))
    assert [each.shard for each in found] == [0, 1, 2, 3]


def test_a_worker_that_always_dies_ends_the_harvest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "RETRIES", 1)
    with pytest.raises(ArtefactError, match="workers were killed again and again"):
        list(engines.Processes(1).run(Fragile(tmp_path, 0, 99), [0]))
    with pytest.raises(UsageError, match="a document is wrong"):
        list(engines.Processes(1).run(Fragile(tmp_path, 9, 0), [-1]))


def test_engines_that_are_not_there_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="an engine is 'local', 'ray'"):
        engines.engine_of("dask", 1)
    with pytest.raises(UsageError, match="workers is a number of at least 1"):
        engines.engine_of("local", 0)
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match="ray"):
            featurizers_harvest.harvest(
                str(folder / "model"), ["embed"], TEXTS, folder / "ray", engine="ray", progress=False
            )
