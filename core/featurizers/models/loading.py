"""`load_model`: loads a language model and its tokenizer by the names that the commands accept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from featurizers.errors import MissingDependencyError, UsageError, one_line
from featurizers.features.placement import check_placement

if TYPE_CHECKING:
    from torch import nn


class LanguageModel(NamedTuple):
    """A loaded language model.

    Attributes:
        model: in evaluation mode, with parameters that need no gradient.
        tokenizer: of transformers.
        revision: commit on the Hub that the model was loaded from; None for a file or a folder.
    """

    model: nn.Module
    tokenizer: Any
    revision: str | None


def load_model(
    name: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> LanguageModel:
    """Load a language model, ready for interventions.

    Args:
        name: Hub id, folder or ``.gguf`` file, whose weights are dequantized.
        device: of the model; None for the one that transformers chooses.
        dtype: of its parameters; None for the stored one.

    Raises:
        UsageError: the model cannot be loaded, or the device or the dtype does not exist.
        MissingDependencyError: transformers is not installed.

    Examples:
        >>> model, tokenizer, revision = load_model("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    """
    check_placement(device, dtype)
    _check_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name).expanduser()
    gguf = path.suffix == ".gguf"
    source, options = _source(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if dtype is None else dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = model if device is None else model.to(device)
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"cannot load the language model {os.fspath(name)!r}: {one_line(reason)}") from error
    if gguf:
        model.config._name_or_path = str(path)  # transformers records the folder, which may hold other files
        _forget_quantization(model)
    revision = getattr(model.config, "_commit_hash", None)
    return LanguageModel(model.eval().requires_grad_(False), tokenizer, revision)


def model_without_weights(name: str | os.PathLike[str]) -> nn.Module:
    """Build a language model from its config, with parameters on the meta device; read no weights.

    Args:
        name: Hub id, folder, ``config.json`` or ``.gguf`` file.

    Raises:
        UsageError: there is no config, or none of a language model that transformers knows.
        MissingDependencyError: transformers is not installed.
    """
    _check_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM

    source, options = _source(name)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # the classes of configs and models raise many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        problem = f"cannot build the language model {os.fspath(name)!r} from its config: {one_line(reason)}"
        raise UsageError(problem) from error
    return model.eval()


def _check_transformers() -> None:
    """Raise MissingDependencyError if transformers cannot be imported."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("a language model", "transformers", "pip install 'transformers>=5.9'") from error


def _source(name: str | os.PathLike[str]) -> tuple[str, dict[str, str]]:
    """Return what transformers is to read a name from, and with which option.

    Raises:
        UsageError: the name is a path, and nothing is there.
    """
    text, path = os.fspath(name), Path(name).expanduser()
    is_path = not isinstance(name, str) or path.suffix == ".gguf" or text.startswith((".", "~")) or path.is_absolute()
    if is_path and not path.exists():
        raise UsageError(
            f"cannot load the language model {text!r}: there is no such file or folder; give a folder, a .gguf "
            "file or a Hub id such as 'owner/name'"
        )
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return (str(path) if text.startswith("~") else text), {}


def text_ids(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a text with the special tokens that begin a prompt, and without any.

    Special tokens that a tokenizer appends, such as the end of a sequence, are left out, because the model is to go on
    after the text; those that the text itself spells out are kept.

    Args:
        tokenizer: of the model.
        text: not cut to the model's length.
    """
    whole, own = (list(tokenizer(text, add_special_tokens=special)["input_ids"]) for special in (True, False))
    for start in range(len(whole) - len(own), -1, -1):
        if own and whole[start : start + len(own)] == own:
            return whole[: start + len(own)], own
    return whole, own


def _forget_quantization(model: nn.Module) -> None:
    """Remove the marks of quantization from a model whose weights were dequantized, so that it can be saved."""
    if all(parameter.is_floating_point() for parameter in model.parameters()):
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)
        vars(model.config).pop("quantization_config", None)
