"""`load_model`: a language model and its tokenizer, by the names that the commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from featurizers.errors import MissingDependencyError, UsageError, one_line
from featurizers.features.placement import check_placement

if TYPE_CHECKING:
    from torch import nn


class LanguageModel(NamedTuple):
    """A language model that was loaded.

    Attributes:
        model: in evaluation mode, its parameters without gradient.
        tokenizer: as transformers gives it.
        revision: the commit of the Hub that it was loaded from; None for a file or a folder.
    """

    model: nn.Module
    tokenizer: Any
    revision: str | None


def load_model(
    name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = torch.float32
) -> LanguageModel:
    """A language model of a Hub id, a folder, or a ``.gguf`` file, ready to intervene in.

    Args:
        name: of the model.
        device: where to put it; where transformers does if None.
        dtype: of its parameters; as stored if None.

    Raises:
        UsageError: it cannot be loaded, or the device or the dtype is none.
        MissingDependencyError: transformers is not installed.
    """
    check_placement(device, dtype)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError("a language model", "transformers", "pip install 'transformers>=5.0'") from error
    path = Path(name).expanduser()
    gguf = path.suffix == ".gguf"
    where, options = (str(path.parent), {"gguf_file": path.name}) if gguf else (name, {})
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype="auto" if dtype is None else dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = model if device is None else model.to(device)
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"cannot load the language model {name!r}: {one_line(reason)}") from error
    if gguf:  # transformers names the folder, which may hold others
        model.config._name_or_path = str(path)
    revision = getattr(model.config, "_commit_hash", None)
    return LanguageModel(model.eval().requires_grad_(False), tokenizer, revision)
