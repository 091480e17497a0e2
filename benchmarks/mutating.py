"""Mutants of a Python file: one small change each, found in the syntax tree and made in the text.

The rest of the file stays as it is, byte for byte, so that lines keep their numbers. Annotations, decorators,
docstrings, the text of errors and what only type checkers read are left alone: no test of behaviour sees them.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
DROPPED = ("clone", "detach", "copy", "contiguous", "to", "abs", "float", "double", "eval", "requires_grad_")
"""Methods whose call is replaced by the object itself."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: path within the repository.
        function: qualified name of the function or class, ``<module>`` outside them.
        kind: what is changed.
        change: old and new text; the second such change in a function ends in ``#2``, and so on.
        lines: first and last line of the code that must run for the change to matter.
        at_import: the code runs when the file is imported: it is in no function.
        start: first byte that is replaced.
        end: byte after the last one.
        new: text in their place.
    """

    file: str
    function: str
    kind: str
    change: str
    lines: tuple[int, int]
    at_import: bool
    start: int
    end: int
    new: str

    @property
    def name(self) -> str:
        """Return file, function and change: what stays the same if lines are added above."""
        return f"{self.file}::{self.function}: {self.change}"

    def applied(self, source: bytes) -> bytes:
        """Return the text of the file with the change."""
        return source[: self.start] + self.new.encode() + source[self.end :]


def mutants(file: str, source: bytes) -> list[Mutant]:
    """Return all mutants of a file; a few, as those of patterns, may be no Python (see :func:`is_python`)."""
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    seen: dict[tuple[str, str], int] = {}
    found = []
    for mutant in finder.found:
        number = seen[mutant.function, mutant.change] = seen.get((mutant.function, mutant.change), 0) + 1
        change = mutant.change if number == 1 else f"{mutant.change} #{number}"
        found.append(Mutant(**{**vars(mutant), "change": change}))
    return found


class _Finder(ast.NodeVisitor):
    """Walks a file and collects its mutants."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.names: list[str] = []
        self.lines = (1, 1)
        self.functions = 0
        self.found: list[Mutant] = []

    def visit(self, node: ast.AST) -> None:
        """Visit a node; note the lines of the statement, or of the head of a compound one."""
        if isinstance(node, ast.stmt):
            kept, self.lines = self.lines, _lines(node)
            super().visit(node)
            self.lines = kept
        else:
            super().visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        """Visit what is below a node, except annotations, decorators, docstrings and errors that are raised."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params", "format_spec"):
                continue
            is_run_later = name == "body" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            self.functions += is_run_later
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, (ast.Raise, ast.JoinedStr)):
                    self.visit(child)
            self.functions -= is_run_later

    def _scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.names.append(node.name)
        self.generic_visit(node)
        self.names.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _scope

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if all(isinstance(child, ast.Raise) for child in node.body) and not node.orelse:
            self._replace(node, ast.Pass(), "dropped check", f"if {ast.unparse(node.test)}: raise", "pass")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._replace(node, ast.Pass(), "dropped call")
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self._replace(node, ast.Return(ast.Constant(None)), "returned None")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in ARITHMETIC:
            self._changed(node, "arithmetic", op=ARITHMETIC[type(node.op)]())
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for index, op in enumerate(node.ops):
            for other in COMPARISONS[type(op)]:
                self._changed(node, "comparison", ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._changed(node, "boolean", op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._replace(node, node.operand, "dropped not")
        elif isinstance(node.op, ast.USub):
            self._replace(node, node.operand, "sign")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in ARITHMETIC and not (_is_text(node.left) or _is_text(node.right)):
            self._changed(node, "arithmetic", op=ARITHMETIC[type(node.op)]())
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._changed(node, "constant", value=not node.value)
        elif isinstance(node.value, (int, float)):
            for value in sorted({node.value + 1, node.value - 1, -node.value} - {node.value}):
                self._changed(node, "constant", value=value)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED:
            self._replace(node, node.func.value, "dropped method")
        if len(node.args) > 1 and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
            self._changed(node, "swapped arguments", args=[node.args[1], node.args[0], *node.args[2:]])
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                kept = node.keywords[:index] + node.keywords[index + 1 :]
                self._changed(node, "removed keyword", keywords=kept)
        self.generic_visit(node)

    def _changed(self, node: ast.AST, kind: str, **fields: object) -> None:
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        self._replace(node, other, kind)

    def _replace(self, node: ast.AST, other: ast.AST, kind: str, old: str = "", new: str = "") -> None:
        if not isinstance(node, (ast.expr, ast.stmt)):
            return
        text = ast.unparse(other)
        if isinstance(node, ast.expr):
            text = f"({text})"
        change = f"{old or ast.unparse(node)} → {new or ast.unparse(other)}"
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        function = ".".join(self.names) or "<module>"
        at_import = self.functions == 0
        self.found.append(Mutant(self.file, function, kind, change, self.lines, at_import, start, end, text))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)))


def _lines(node: ast.stmt) -> tuple[int, int]:
    """Return the lines of a statement; of a compound one those before its body."""
    body: list[ast.stmt] = getattr(node, "body", [])
    last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
    return node.lineno, max(node.lineno, last)


def is_python(source: bytes) -> bool:
    """Return whether a file can be parsed."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True
