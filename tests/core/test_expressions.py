"""Each regular expression of the core and the plugins takes time in proportion to a text, whatever the text is."""

from __future__ import annotations

import ast
import importlib
import re
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

parser: Any = importlib.import_module("re._parser")

ROOT = Path(__file__).parents[2]
SIZE = 2**20
FUNCTIONS = {"compile", "search", "match", "fullmatch", "split", "findall", "finditer", "sub", "subn"}
LETTERS = "a0-./\n _:,[?@'\"<\\\0é"
CATEGORIES = {"CATEGORY_DIGIT": r"\d", "CATEGORY_SPACE": r"\s", "CATEGORY_WORD": r"\w"}
MOST_CPU_SECONDS = 60
"""A hundred times what the slowest one takes; one of quadratic time takes an hour."""


class Use(NamedTuple):
    """A method of a regular expression that the code calls."""

    where: str
    pattern: str
    flags: int
    method: str


# ---------------------------------------------------------------------- what the code uses


def modules() -> Iterator[tuple[Path, ModuleType]]:
    for path in sorted([*ROOT.glob("core/featurizers/**/*.py"), *ROOT.glob("plugins/*/featurizers_*/**/*.py")]):
        if "re" in imported(ast.parse(path.read_text())) or path.name == "names.py":
            start = 1 if path.is_relative_to(ROOT / "core") else 2
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts[start:]).removesuffix(".__init__")
            yield path, importlib.import_module(name)


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(name.name == "re" and name.asname for name in node.names)
            names.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
            assert node.module != "re", "import re, so that this test finds what is used"
    return names


def uses() -> list[Use]:
    """Return each use of `re` and of a compiled expression, with every pattern that local names can make of it."""
    found: dict[Use, None] = {}
    for path, module in modules():
        tree, names = ast.parse(path.read_text()), vars(module)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        outer = {id(node): function for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if (
                not isinstance(node, ast.Attribute)
                or node.attr not in FUNCTIONS
                or not isinstance(node.value, ast.Name)
            ):
                continue
            compiled: list[Any] = []
            if node.value.id != "re":
                compiled = [names.get(node.value.id)]
            elif node.attr != "compile":
                call = next(call for call in ast.walk(tree) if isinstance(call, ast.Call) and call.func is node)
                patterns = values(call.args[0], outer.get(id(node), tree), names)
                compiled = [re.compile(pattern, flags_of(call, names)) for pattern in patterns]
            elif id(node) in outer:
                raise AssertionError(f"{where} compiles in a function; make it a constant of the module")
            found |= {
                Use(where, each.pattern, each.flags, node.attr): None
                for each in compiled
                if isinstance(each, re.Pattern)
            }
    return list(found)


def flags_of(node: ast.Call, names: Mapping[str, Any]) -> int:
    position = {"sub": 4, "subn": 4, "split": 3}.get(node.func.attr, 2)  # type: ignore[attr-defined]
    given = [*node.args[position:], *(keyword.value for keyword in node.keywords if keyword.arg == "flags")]
    return int(evaluate(given[0], names)) if given else 0


def evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    return eval(compile(ast.Expression(node), "<pattern>", "eval"), dict(names))


def values(node: ast.expr, function: ast.AST, names: Mapping[str, Any]) -> list[Any]:
    """Return the values of an expression, whose local names are constants or run over constants.

    Raises:
        AssertionError: it depends on an argument; then a string operation is safer than an expression made of it.
    """
    local = dict(names)
    for statement in ast.walk(function):
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            with suppress(Exception):
                local[statement.targets[0].id] = evaluate(statement.value, local)
    wanted = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    choices: list[list[dict[str, Any]]] = []
    for loop in ast.walk(function):
        if isinstance(loop, ast.comprehension | ast.For):
            targets = [name.id for name in ast.walk(loop.target) if isinstance(name, ast.Name)]
            with suppress(Exception):
                if wanted.intersection(targets):
                    rows = list(evaluate(loop.iter, local))
                    choices.append(
                        [dict(zip(targets, row if len(targets) > 1 else [row], strict=True)) for row in rows]
                    )
    found = []
    for rows in product(*choices):
        with suppress(NameError):
            found.append(evaluate(node, {**local, **{key: value for row in rows for key, value in row.items()}}))
    assert found, f"{ast.unparse(node)} is no constant: use string operations, or a constant of the module"
    return found


# ---------------------------------------------------------------------- hostile texts


def letters_of(op: str, av: Any) -> str:
    """Return characters that a part of one character matches."""
    if op == "LITERAL":
        return chr(av)
    if op == "NOT_LITERAL":
        return "".join(letter for letter in LETTERS if letter != chr(av))[:3]
    if op == "ANY":
        return "a-/"
    rows = [(str(kind), value) for kind, value in av]
    negated = rows[0][0] == "NEGATE"

    def has(letter: str) -> bool:
        for kind, value in rows[negated:]:
            if kind == "LITERAL" and letter == chr(value):
                return True
            if kind == "RANGE" and value[0] <= ord(letter) <= value[1]:
                return True
            if kind == "CATEGORY":
                name = str(value)
                opposite = name.replace("_NOT_", "_")
                if (re.match(CATEGORIES[opposite], letter) is not None) == (name == opposite):
                    return True
        return False

    own = "".join(chr(value if kind == "LITERAL" else value[0]) for kind, value in rows if kind in ("LITERAL", "RANGE"))
    return "".join(letter for letter in LETTERS + own if has(letter) != negated)[:3]


def shortest(tree: Iterable[Any]) -> str:
    """Return a short text that a parsed expression matches, but for what it looks ahead to."""
    text = ""
    for op, av in tree:
        name = str(op)
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            text += letters_of(name, av)[0]
        elif name == "BRANCH":
            text += shortest(av[1][0])
        elif name in ("SUBPATTERN", "ATOMIC_GROUP"):
            text += shortest(av[-1] if name == "SUBPATTERN" else av)
        elif name.endswith("REPEAT"):
            text += shortest(av[2]) * av[0]
    return text


def repeated(tree: Iterable[Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield what stands before each repeated part of a parsed expression, and what that part repeats."""
    for op, av in tree:
        name = str(op)
        if name == "BRANCH":
            for branch in av[1]:
                yield from repeated(branch, before)
        elif name in ("SUBPATTERN", "ATOMIC_GROUP"):
            yield from repeated(av[-1] if name == "SUBPATTERN" else av, before)
        elif name.endswith("REPEAT"):
            inner = list(av[2])
            if len(inner) == 1 and str(inner[0][0]) in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
                for letter in letters_of(str(inner[0][0]), inner[0][1]):
                    yield before, letter
            else:
                yield before, shortest(inner)
                yield from repeated(inner, before)
        before += shortest([(op, av)])


def texts(pattern: str, flags: int) -> Iterator[str]:
    """Yield texts of a megabyte that an expression nearly matches, at one place or at each."""
    tree = parser.parse(pattern, flags)
    units = {shortest(tree): None}
    for before, unit in repeated(tree):
        units |= dict.fromkeys((before, before + unit))
        yield before + unit * (SIZE // len(unit)) + "\0"
    for unit in filter(None, units):
        yield unit * (SIZE // len(unit)) + "\0"


@contextmanager
def ended(use: Use) -> Iterator[None]:
    """End a match that runs on and on; what is counted is this program's own time, so that others may be busy."""

    def late(*_: object) -> None:
        raise AssertionError(f"{use.where}: {use.method} of {use.pattern!r} does not take linear time")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def attack(use: Use) -> None:
    compiled = re.compile(use.pattern, use.flags)
    method = use.method if use.method in ("search", "match", "fullmatch") else "finditer"
    for text in texts(use.pattern, use.flags):
        with ended(use):
            result: Any = getattr(compiled, method)(text)
            if method == "finditer":
                for _ in result:
                    pass


# ---------------------------------------------------------------------- tests


def test_each_expression_takes_time_in_proportion_to_the_text():
    found = uses()
    assert {Path(use.where.partition(":")[0]).name for use in found} >= {"transport.py", "record.py", "units.py"}
    for use in {use[1:]: use for use in found}.values():
        attack(use)


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("search", r"(https?://[^\s?']+)\?[^\s']*"),
        ("search", r"SAE-Res-(.+)-W\d+K-L0_(\d+)"),
        ("search", r"\s*\n\s*x"),
        ("search", r"\d+x"),
        ("sub", r"\s+$"),
        ("fullmatch", r"(a+)+b"),
        ("fullmatch", r".*,.*;"),
        ("match", r"\s*---[\r\n]+[\S\s]*?[\r\n]+---"),
    ],
)
def test_an_expression_of_more_than_linear_time_is_found(monkeypatch, method, pattern):
    monkeypatch.setattr(f"{__name__}.MOST_CPU_SECONDS", 0.5)
    monkeypatch.setattr(f"{__name__}.SIZE", 100_000)  # between two looks at signals, `re` may read the text 4096 times
    with pytest.raises(AssertionError, match="does not take linear time"):
        attack(Use("here", pattern, 0, method))


def test_patterns_of_schemas_are_matched_by_an_engine_without_backtracking():
    for path in ROOT.glob("*/**/featurizers*/**/*.py"):
        assert "regex_engine" not in path.read_text(), path
