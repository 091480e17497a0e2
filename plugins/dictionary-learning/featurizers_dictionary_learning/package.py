"""`alias`: offers the classes under the package's own module names, for code that imports the package."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from featurizers.errors import UsageError

from featurizers_dictionary_learning import reading
from featurizers_dictionary_learning.base import Dictionary

NAME = "dictionary_learning"
MARK = "__featurizers__"
"""Attribute of the modules that `alias` makes."""


def alias() -> None:
    """Make ``import dictionary_learning`` give these classes, in this process and from now on.

    The modules are ``dictionary``, ``utils`` (with `load_dictionary` only) and ``trainers`` (with the autoencoders
    only, and no trainer). An import of any other name is an `ImportError` as usual.

    Raises:
        UsageError: the package itself is already imported.
    """
    present = sys.modules.get(NAME)
    if present is not None:
        if hasattr(present, MARK):
            return
        raise UsageError(
            f"{NAME} is already imported, from {getattr(present, '__file__', None)!r}; call alias() before the import"
        )
    every = {"Dictionary": Dictionary, **reading.CLASSES}
    trainers = {
        "top_k": "AutoEncoderTopK",
        "batch_top_k": "BatchTopKSAE",
        "matryoshka_batch_top_k": "MatryoshkaBatchTopKSAE",
    }
    contents: dict[str, list[str]] = {
        NAME: list(every),
        f"{NAME}.dictionary": [name for name in every if name not in trainers.values()],
        f"{NAME}.utils": [],
        f"{NAME}.trainers": [],
        **{f"{NAME}.trainers.{module}": [name] for module, name in trainers.items()},
    }
    for path, names in contents.items():
        module = ModuleType(path)
        module.__dict__.update({name: every[name] for name in names}, **{MARK: True})
        parent, _, last = path.rpartition(".")
        is_package = path in (NAME, f"{NAME}.trainers")
        module.__spec__ = ModuleSpec(path, None, is_package=is_package)
        if is_package:
            module.__path__ = []  # so that importing a missing submodule is a ModuleNotFoundError
        if parent:
            setattr(sys.modules[parent], last, module)
        sys.modules[path] = module
    sys.modules[f"{NAME}.utils"].__dict__["load_dictionary"] = reading.load_dictionary
