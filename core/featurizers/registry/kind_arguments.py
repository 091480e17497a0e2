"""Arguments of a kind, read from its `Config`: for ``featurizers kinds KIND`` and for errors of `create`."""

from __future__ import annotations

import inspect
import re
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True)
class Argument:
    """An argument that `featurizers.create` takes for a kind.

    Attributes:
        name: of the argument.
        type: as it is written in Python.
        default: its `repr`; None if the argument must be given.
        meaning: from the field's description, or from the section ``Attributes`` of the docstring.
    """

    name: str
    type: str
    default: str | None
    meaning: str

    def __str__(self) -> str:
        """Return the argument as it stands in a signature."""
        return f"{self.name}: {self.type}" + ("" if self.default is None else f" = {self.default}")


def arguments(config: type[BaseModel]) -> list[Argument]:
    """Return the arguments of a kind, given its ``Config``."""
    meanings: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        meanings.update(_attributes(inspect.cleandoc(cls.__doc__ or "")))
    return [
        Argument(
            name,
            _written(field.annotation),
            None if field.is_required() else repr(field.get_default(call_default_factory=True)),
            field.description or meanings.get(name, ""),
        )
        for name, field in config.model_fields.items()
    ]


def _attributes(docstring: str) -> dict[str, str]:
    """Return the texts in the section ``Attributes`` of a docstring in Google's style, by name."""
    section = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for line in section[1].splitlines() if section else []:
        if match := re.match(r" {4}(\w+): (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found


def _written(annotation: Any) -> str:
    """Return a type as it is written in Python, without limits on its values."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _written(parts[0])
    if origin in (Union, types.UnionType):
        return " | ".join(map(_written, parts))
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin is not None:
        inner = ", ".join("..." if part is Ellipsis else _written(part) for part in parts)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    if annotation in (None, type(None)):
        return "None"
    return getattr(annotation, "__name__", str(annotation))
