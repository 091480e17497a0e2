"""Public names: each can be imported, and plugins and examples import no others."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "featurizers"
PROGRAMS = sorted(
    path for folder in ("plugins", "examples", "tests/examples") for path in (ROOT / folder).rglob("*.py")
)


def listed(stub: Path) -> list[tuple[str, str]]:
    """Return the module and the name of each line of a stub."""
    lines = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    return [(node.module or "", alias.asname or "") for node in lines for alias in node.names]


def defined(path: Path) -> set[str]:
    """Return the public classes and functions that a module defines."""
    body = ast.parse(path.read_text()).body
    names = {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return {name for name in names if not name.startswith("_")}


STUBS = {"featurizers": CORE / "__init__.pyi"} | {
    f"featurizers.{stub.parent.name}": stub for stub in sorted(CORE.glob("*/__init__.pyi"))
}
PUBLIC = {face: {name for _, name in listed(stub)} for face, stub in STUBS.items()}
PUBLIC["featurizers"] |= {face.partition(".")[2] for face in STUBS}
PUBLIC["featurizers.errors"] = defined(CORE / "errors.py")
ANY_NAME = {"featurizers.pyvene"}
"""Modules that forward every name to a plugin."""


def private_imports(code: str) -> list[str]:
    """Return the imports in a program that are not of public names of the core."""
    modules = [*PUBLIC, *ANY_NAME]
    wrong = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            wrong += [alias.name for alias in node.names if _is_core(alias.name) and alias.name not in modules]
        elif isinstance(node, ast.ImportFrom) and not node.level and _is_core(module := node.module or ""):
            public = PUBLIC.get(module, set())
            names = [alias.name for alias in node.names if module not in ANY_NAME]
            wrong += [f"{module}.{name}" for name in names if name not in public]
    return wrong


def _is_core(module: str) -> bool:
    return module.partition(".")[0] == "featurizers"


@pytest.mark.parametrize(("face", "stub"), STUBS.items(), ids=STUBS)
def test_no_name_is_that_of_a_module_beside_it(face, stub):
    """Python sets a module as an attribute of its package, where it would hide a function of the same name."""
    modules = {path.stem for path in stub.parent.iterdir()}
    forwarded = {name for module, name in listed(stub) if not module}
    assert not (PUBLIC[face] - forwarded - {each.partition(".")[2] for each in STUBS}) & modules


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_plugin_or_an_example_imports_public_names_alone(path):
    assert private_imports(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "from featurizers.models.anatomy import Anatomy",
        "import featurizers.models.anatomy",
        "import featurizers.hub.sources as sources",
        "from featurizers.models import _hidden",
        "from featurizers.models import anatomy",
        "from featurizers.models import *",
        "from featurizers.names import KIND",
        "from featurizers import names",
        "from featurizers import _hidden",
        "from featurizers.errors import MOST, _hidden",
        "def f():\n    from featurizers.store.artefact import save",
        "if TYPE_CHECKING:\n    from featurizers.features.featurizer import Featurizer",
        "try:\n    import torch, featurizers.store.artefact\nexcept ImportError:\n    pass",
    ],
)
def test_a_private_import_is_found(line):
    assert private_imports(line)


@pytest.mark.parametrize(
    "line",
    [
        "import featurizers",
        "import featurizers.models",
        "from featurizers import Featurizer, errors, store",
        "from featurizers.errors import UsageError, shown",
        "from featurizers.models import hook",
        "from featurizers.pyvene import FeatureIntervention",
        "from featurizers_training.search import anything",
        "from .models.anatomy import anything",
    ],
)
def test_a_public_import_is_allowed(line):
    assert private_imports(line) == []


@pytest.mark.parametrize("face", STUBS)
def test_every_name_of_a_stub_can_be_imported(face):
    module = importlib.import_module(face)
    assert sorted(module.__all__) == sorted(name for _, name in listed(STUBS[face]))
    assert [name for name in module.__all__ if name.startswith("_") and name != "__version__"] == []
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("face", STUBS)
def test_a_stub_is_sorted(face):
    """By module, and in a module constants before classes before functions, as the linter sorts imports."""
    names = listed(STUBS[face])
    assert len(set(names)) == len(names)
    assert names == sorted(names, key=lambda name: (name[0], not name[1].isupper(), not name[1][0].isupper(), name[1]))


def test_a_type_checker_follows_a_name_that_a_plugin_defines_into_that_plugin():
    """An editor shows its signature too; without the plugin the name has any type."""
    forwarding = [path for path in CORE.glob("*.py") if "attributes_of(" in path.read_text(encoding="utf-8")]
    for path in forwarding:
        typed = {name for module, name in listed(path.with_suffix(".pyi")) if module.startswith("featurizers_")}
        assert typed >= {name for module, name in listed(STUBS["featurizers"]) if module == path.stem}
    stub = ROOT / "plugins" / "pyvene" / "featurizers_pyvene" / "__init__.pyi"
    assert {name for _, name in listed(stub)} <= {name for _, name in listed(CORE / "pyvene.pyi")}
    assert len(forwarding) == 5


def test_the_page_lists_what_a_plugin_may_import():
    page = (ROOT / "docs" / "plugins-reference.md").read_text(encoding="utf-8")
    section = page.partition("## What a plugin may import\n")[2].partition("\n## ")[0]
    rows = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted([*PUBLIC, *ANY_NAME])
