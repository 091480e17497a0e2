"""The documentation: its examples run, its tables are the code's, its links lead somewhere."""

from __future__ import annotations

import inspect
import json
import linecache
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import featurizers
import pytest
import torch
import yaml
from featurizers import errors
from featurizers.format.sites import BLOCK_KINDS, MODEL_KINDS
from featurizers.registry import hookspecs
from featurizers.testing import FeaturizerContract

from tests.support.command import run

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "core" / "README.md", *DOCS, *sorted((ROOT / "plugins").glob("*/README.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(
    r"^(<!-- not run: .+? -->\n)?(?:<!-- (?:given|not typed): .+? -->\n)?```python\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
CONSOLE = re.compile(r"^```console\n\$ featurizers (.+?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

by_name = {"ids": lambda path: str(path.relative_to(ROOT))}


def blocks(path: Path) -> list[str]:
    """The Python blocks of a page that are to be run, with blank lines before them, so that errors name its lines."""
    text = path.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, m.start(2)) + m[2] for m in BLOCK.finditer(text) if not m[1]]


def section(page: str, title: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/{page} has no section {title!r}"
    return found[1]


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


# ---------------------------------------------------------------------- examples


@pytest.fixture
def small_model(tmp_path, monkeypatch):
    """A function that makes `load_model` give a small model for any name, with a tokenizer of the words of a text."""

    def make(text: str) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

        known = sorted({"[PAD]", *re.findall(r"\w+", text)})
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[PAD]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        sizes = {"n_layer": 30, "n_embd": 64, "n_head": 2, "vocab_size": len(known)}
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).save_pretrained(tmp_path / "small")
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path / "small")
        load = featurizers.load_model
        monkeypatch.setattr(featurizers, "load_model", lambda _: load(str(tmp_path / "small")))

    return make


@pytest.fixture
def small_dictionary(tmp_path, monkeypatch):
    """A dictionary in sparsify's format, which stands for the one of the README."""
    from safetensors.torch import save_file

    folder = tmp_path / "layers.15.mlp"
    folder.mkdir()
    (folder / "cfg.json").write_text('{"d_in": 64, "num_latents": 256, "k": 4, "expansion_factor": 4}')
    save_file(
        {
            "encoder.weight": torch.randn(256, 64),
            "encoder.bias": torch.randn(256),
            "W_dec": torch.randn(256, 64),
            "b_dec": torch.randn(64),
        },
        folder / "sae.safetensors",
    )
    load = featurizers.load
    known = {"sparsify:EleutherAI/sae-SmolLM2-135M-64x/layers.15.mlp": folder}
    monkeypatch.setattr(featurizers, "load", lambda source, **options: load(known.get(source, source), **options))


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "demo.md" and blocks(path)], **by_name)
def test_examples_run(path, tmp_path, monkeypatch, request):
    workplace = tmp_path / "cwd"
    workplace.mkdir()
    monkeypatch.chdir(workplace)
    if "pyvene" in path.name:
        pytest.importorskip("pyvene")
    if path.name in ("nnsight.md", "interp-engine.md"):
        pytest.importorskip(path.stem.replace("-", "_"))
    if path.parent.name == "control-vectors":
        pytest.importorskip("gguf")
    namespace = {"__name__": "an_example"}
    if path == ROOT / "README.md":
        request.getfixturevalue("small_dictionary")
    if path.name == "quickstart.md" or path == ROOT / "README.md":
        request.getfixturevalue("small_model")(path.read_text(encoding="utf-8"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks(path):
            linecache.cache[str(path)] = (len(block), None, block.splitlines(True), str(path))  # nnsight reads it
            exec(compile(block, str(path), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("path", TUTORIALS, **by_name)
def test_tutorials_run(path, tmp_path, monkeypatch, small_model):
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    install, *code = ("".join(cell["source"]) for cell in cells)
    assert install.startswith("%pip install -q featurizers ")
    small_model("\n".join(code))
    namespace = {"__name__": "a_tutorial"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for number, text in enumerate(code):
            exec(compile(text, f"{path.name}, cell {number}", "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("path", TUTORIALS, **by_name)
def test_tutorials_are_kept_with_what_they_print(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert len(outputs) >= 3
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    counts = [cell["execution_count"] for cell in cells if cell["execution_count"]]
    assert counts in (list(range(1, len(cells) + 1)), list(range(1, len(cells))))  # the first may only install
    assert all("/" not in "".join(output.get("text", [])) for output in outputs)  # no path of a machine


def test_the_pages_have_the_examples_that_are_run():
    assert len(blocks(ROOT / "README.md")) == 2
    for page, least in {
        "interventions.md": 7,
        "pyvene.md": 6,
        "dictionaries.md": 11,
        "featurizers.md": 3,
        "plugins.md": 7,
        "cli.md": 1,
    }.items():
        assert len(blocks(ROOT / "docs" / page)) >= least
    every = [block for path in PAGES for block in re.findall("^```python$", path.read_text(), re.MULTILINE)]
    matched = [m for path in PAGES for m in BLOCK.finditer(path.read_text())]
    assert len(every) == len(matched), "a Python block is not closed"


def test_console_examples_print_what_they_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    page = ROOT / "docs" / "cli.md"
    exec("\n".join(blocks(page)), {})
    examples = CONSOLE.findall(page.read_text(encoding="utf-8"))
    assert len(examples) >= 9
    for command, shown in examples:
        _, out, errors = (_in_new_process if command == "plugins" else run)(*shlex.split(command))
        bars = ("progress: ", "Loading weights")
        errors = "".join(line for line in errors.splitlines(True) if line.strip() and not line.startswith(bars))
        assert _comparable(out + errors) == _comparable(shown), command


def _in_new_process(*arguments: str) -> tuple[int, str, str]:
    """Run a command that says which plugins this process has imported; see `run`."""
    command = [sys.executable, "-m", "featurizers", *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return done.returncode, done.stdout, done.stderr


def _comparable(output: str) -> str:
    """Without the digits of a checksum, which depend on the machine, nor spaces at the ends of lines."""
    output = re.sub(r"\b[0-9a-f]{5,}\b", lambda m: "#" * len(m[0]), output)
    return "\n".join(line.rstrip() for line in output.rstrip().splitlines())


def test_types_are_checked_of_every_example_that_is_not_left_out():
    """The modules that ``.ci/type_examples.py`` gives to mypy have each line of the examples, and on its own line."""
    script = runpy.run_path(str(ROOT / ".ci" / "type_examples.py"))
    assert ".venv/bin/python .ci/type_examples.py" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert set(script["PAGES"]) == {*PAGES, *TUTORIALS}
    left_out = 0
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        typed = script["module"](text).splitlines()
        left_out += text.count("<!-- not typed: ")
        if "<!-- not typed: " not in text:
            for block in blocks(path):
                assert all(typed[number] == line for number, line in enumerate(block.splitlines()) if line), path.name
    assert left_out == 1


def test_an_error_that_pyright_finds_names_the_line_of_the_page():
    script = runpy.run_path(str(ROOT / ".ci" / "type_examples.py"))

    def found(message: str, severity: str = "error") -> dict[str, object]:
        place = {"file": "/tmp/documented/page_1.py", "range": {"start": {"line": 22, "character": 0}}}
        return {**place, "severity": severity, "message": message, "rule": "reportGeneralTypeIssues"}

    given = [found('"None" is not iterable\n  "__iter__" is missing'), found("unused", "warning")]
    given.append(found('Cannot access attribute "generate" for class "GPT2LMHeadModel"'))
    told = script["of_pyright"](
        json.dumps({"generalDiagnostics": given}), [ROOT / "README.md", ROOT / "docs" / "cli.md"]
    )
    assert told == ['docs/cli.md:23: error: "None" is not iterable "__iter__" is missing [reportGeneralTypeIssues]']


# ---------------------------------------------------------------------- the README's commands


def test_ci_runs_the_readmes_own_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -m1 -E '(.+)' README\.md", script)
    assert pattern
    assert 'bash -euo pipefail -c "$command"' in script
    readme = (ROOT / "README.md").read_text().splitlines()
    lines = [line for line in readme if re.search(pattern[1], line)]
    assert len(lines) == 1
    assert lines[0].endswith("&& .venv/bin/pytest -n 2")
    demo = [line for line in readme if line.startswith("python3 -m venv") and line.endswith("featurizers demo")]
    assert len(demo) == 1
    set_up = lines[0].removesuffix(" && .venv/bin/pytest -n 2")
    assert demo[0] == f"{set_up} && .venv/bin/featurizers demo"
    assert set_up in (ROOT / "CONTRIBUTING.md").read_text().splitlines()


def test_a_checkout_is_set_up_with_every_distribution():
    listed = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    editable = [line.removeprefix("-e ") for line in listed if line.startswith("-e ")]
    assert editable == [".", *sorted(str(project.parent.relative_to(ROOT)) for project in PROJECTS[1:])]


# ---------------------------------------------------------------------- tables against code


def test_the_table_of_hooks_is_that_of_the_code():
    hooks = {
        f"{name}({', '.join(inspect.signature(hook).parameters)})"
        for name, hook in vars(hookspecs).items()
        if inspect.isfunction(hook) and hook.__module__ == hookspecs.__name__
    }
    assert hooks
    assert set(first_column(section("plugins-reference.md", "Hooks"))) == hooks


def test_the_table_of_errors_is_that_of_the_code():
    classes = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.FeaturizerError) and value is not errors.FeaturizerError
    }
    assert set(first_column(section("design.md", "Errors"))) == classes


def test_the_table_of_sites_is_that_of_the_code():
    assert set(first_column(section("interventions.md", "Sites"))) == {*BLOCK_KINDS, *MODEL_KINDS, "module"}


def test_every_architecture_of_the_tests_is_named():
    from tests.support.models import ARCHITECTURES

    said = re.sub(r"[^a-z0-9]", "", section("interventions.md", "Architectures").lower().replace("2 and 3", "2 3"))
    short = {"gpt_neox_sequential": "sequential", "qwen3": "qwen23", "gemma3": "gemma23"}
    missing = [name for name in ARCHITECTURES if short.get(name, name).replace("_", "") not in said]
    assert not missing


def test_every_file_of_the_core_is_listed_once():
    core = ROOT / "core" / "featurizers"
    listed = first_column(section("design.md", "The files, in reading order"))
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(path.relative_to(core)) for path in core.rglob("*.py")}


def test_every_key_of_the_format_is_described():
    from featurizers.format.manifest import Entry, Index, Manifest, SiteRecord
    from featurizers_pyvene import record as own

    text = (ROOT / "docs" / "format.md").read_text()
    ours = (own.IntervenableRecord, own.ModelRecord, own.RepresentationRecord, own.InterventionRecord)
    for record in (Manifest, SiteRecord, Index, Entry, *ours, own.FeaturizerRecord):
        for key in record.model_fields:
            assert f"`{key}`" in text, key


def test_the_shortest_plugin_is_shown_as_it_is():
    text = (ROOT / "docs" / "plugins.md").read_text()
    folder = ROOT / "tests" / "examples" / "featurizers-scale"
    for name, language in (("pyproject.toml", "toml"), ("featurizers_scale.py", "python")):
        assert f"```{language}\n{(folder / name).read_text().rstrip()}\n```" in text


def test_the_conformance_suite_is_described_with_its_fixtures():
    text = section("plugins.md", "The conformance suite")
    assert all(f"def {name}(self) -> " in text for name in ("featurizer", "activations"))
    assert str(FeaturizerContract.tolerance).replace("1e-05", "1e-5") in text


def test_every_public_name_is_in_the_documentation():
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCS)
    assert [name for name in featurizers.__all__ if not re.search(rf"\b{name}\b", text)] == []


# ---------------------------------------------------------------------- distributions

PROJECTS = [ROOT / "pyproject.toml", *sorted((ROOT / "plugins").glob("*/pyproject.toml"))]


@pytest.mark.parametrize("project", PROJECTS, **by_name)
def test_the_page_of_a_distribution_on_an_index_links_to_no_file(project):
    page = project.parent / tomllib.loads(project.read_text())["project"]["readme"]
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("https://")] == []
    site = tomllib.loads(project.read_text())["project"]["urls"]["Documentation"]
    pages = [link.removeprefix(site).strip("/") for link in links if link.startswith(site)]
    assert pages
    assert [name for name in pages if name and not (ROOT / "docs" / f"{name}.md").exists()] == []


def test_the_page_of_the_core_names_every_distribution():
    named = set(re.findall(r"`pip install (featurizers[a-z-]*)`", (ROOT / "core" / "README.md").read_text()))
    assert named == {tomllib.loads(project.read_text())["project"]["name"] for project in PROJECTS}
    assert named == set(re.findall(r"`pip install (featurizers[a-z-]*)`", (ROOT / "README.md").read_text()))


def test_the_lowest_versions_are_the_lower_bounds():
    script = [sys.executable, str(ROOT / ".ci" / "lowest_versions.py")]
    lines = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    lowest = dict(line.split("==") for line in lines)
    required = {
        requirement.partition(";")[0].strip()
        for project in PROJECTS
        for requirement in tomllib.loads(project.read_text())["project"]["dependencies"]
        if not requirement.startswith("featurizers")
    }
    assert {requirement.partition(">=")[0] for requirement in required} <= set(lowest)
    for requirement in required:
        name, _, bound = requirement.partition(">=")
        assert tuple(map(int, lowest[name].split("."))) >= tuple(map(int, bound.split("."))), requirement


# ---------------------------------------------------------------------- links


@pytest.mark.parametrize("path", TEXTS, **by_name)
def test_relative_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("path", TEXTS, **by_name)
def test_no_page_holds_an_unresolved_merge(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.match(r"<{7} |={7}$|>{7} ", line)] == []


def test_the_site_has_every_page_in_its_navigation():
    sections = yaml.safe_load((ROOT / "docs" / "site" / "mkdocs.yml").read_text())["nav"]
    listed = [
        page for part in sections for pages in ([[part]] if isinstance(part, str) else part.values()) for page in pages
    ]
    of_repository = runpy.run_path(str(ROOT / "docs" / "site" / "build.py"))["PAGES"]
    tutorials = [f"tutorials/{path.stem}.md" for path in TUTORIALS]
    assert sorted(listed) == sorted([*(path.name for path in DOCS), *of_repository, "api/index.md", *tutorials])
    assert ".venv/bin/python docs/site/build.py" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize(
    ("page", "asks"),
    [
        ('<img alt="x" src="../x.png"><script src="assets/x.js"></script>', False),
        ('<a href="https://github.com/x" class="md-source"></a><link rel="canonical" href="https://x.org/">', False),
        ('<a href="https://github.com/x" class="md-source" data-md-component="source"></a>', True),
        ('<img alt="x" src="https://x.org/x.png" />', True),
        ('<script src="//x.org/x.js"></script>', True),
        ('<link rel="stylesheet" href="https://x.org/x.css">', True),
        ('<link href="https://x.org/" rel="preconnect">', True),
    ],
)
def test_a_page_of_the_site_that_asks_another_host_is_found(tmp_path, page, asks):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text(f"<html><body>{page}</body></html>")
    asking = runpy.run_path(str(ROOT / "docs" / "site" / "build.py"))["asking"]
    assert asking(tmp_path) == (["a/index.html"] if asks else [])


def test_the_link_to_the_repository_asks_nothing():
    config = yaml.safe_load((ROOT / "docs" / "site" / "mkdocs.yml").read_text())
    part = (ROOT / "docs" / "site" / config["theme"]["custom_dir"] / "partials" / "source.html").read_text()
    element = part.partition("-#}")[2]
    assert '<a href="{{ config.repo_url }}"' in element
    assert "data-md-component" not in element


@pytest.mark.parametrize(
    ("link", "on_the_site"),
    [
        ("benchmarks-growth.png", "benchmarks-growth.png"),
        ("benchmarks.md#gpu", "benchmarks.md#gpu"),
        ("../benchmarks/run.py", "{}/blob/main/benchmarks/run.py"),
        ("../examples/plugin-flow", "{}/blob/main/examples/plugin-flow"),
        ("../LICENSE", "{}/blob/main/LICENSE"),
        ("../tests", "{}/blob/main/tests"),
        ("../SECURITY.md#what-is-promised", "SECURITY.md#what-is-promised"),
    ],
)
def test_a_link_leads_to_the_same_file_on_the_site(link, on_the_site):
    script = runpy.run_path(str(ROOT / "docs" / "site" / "build.py"))
    assert script["outward"](f"[x]({link})") == f"[x]({on_the_site.format(script['repository']())})"


def test_the_api_pages_have_every_public_name():
    pages = runpy.run_path(str(ROOT / "docs" / "site" / "build.py"))["api_pages"]()
    core = pages["api/featurizers.md"]
    for name in featurizers.__all__:
        if name not in ("errors", "pyvene", "__version__"):
            assert f"::: featurizers.{name}\n" in core or f"`{name}`" in core, name
    assert "::: featurizers_training.DAS\n" in pages["api/featurizers-training.md"]
    assert "::: featurizers_patching.patch\n" in pages["api/featurizers-patching.md"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == featurizers.__version__


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    assert set(re.findall(r"\]\((.+?)\)", index)) >= {path.name for path in DOCS} - {"index.md"}
