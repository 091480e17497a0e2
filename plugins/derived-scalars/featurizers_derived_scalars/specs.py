"""`ScalarSpec`: a named quantity with its options, and the registry that any plugin adds to.

Hook: ``featurizers_scalars(register)`` calls ``register(ScalarSpec(...))``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from featurizers_derived_scalars.derivers import Deriver


@dataclass(frozen=True)
class ScalarSpec:
    """A named quantity.

    Attributes:
        name: lower-case words joined by ``_`` or, of another plugin, with its name and a dot before.
        make: from the options to the deriver.
        config: pydantic model of the options; what a field means is its description.
        group: which scalars have comparable units and are ranked together.
        text: what it is, one line.
        presets: values of options that are fixed (an alias of another spec has some).
        aliases: other names.
    """

    name: str
    make: Callable[[Any], Deriver]
    config: type[BaseModel]
    group: str
    text: str
    presets: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


def specs() -> Mapping[str, ScalarSpec]:
    """Every registered spec by name and by alias."""
    raise NotImplementedError


def deriver(name: str, /, **options: Any) -> Deriver:
    """The deriver of a registered name: ``deriver("write_to", kind="mlp.neurons")``."""
    raise NotImplementedError
