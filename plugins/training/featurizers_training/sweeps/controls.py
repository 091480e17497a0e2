"""Controls: the same search where there is nothing to find, which shows what the method finds in noise."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from featurizers.errors import UsageError, did_you_mean
from torch import nn

from featurizers_training.pairs import Pairs

CONTROLS: Final = ("shuffled-labels", "random-model")
"""Names of the controls: each pair gets the label of another pair; the model gets random parameters."""


def randomly_initialised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a new model of the same class, config, device and dtype, with the parameters that training starts from.

    A search in it finds what the method can do alone: unrestricted maps align any model with any algorithm (Sutter et
    al. 2025, "The Non-Linear Representation Dilemma", arXiv:2507.08802).

    Args:
        model: a decoder of `transformers`.
        seed: of the parameters.

    Raises:
        UsageError: the model has no config to make a new one from.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
        >>> randomly_initialised(model).config.n_embd
        8
    """
    config: Any = copy.deepcopy(getattr(model, "config", None))
    make: Any = type(model)
    first = next(model.parameters())
    with torch.random.fork_rng(devices=[]):  # it is made on the CPU
        torch.default_generator.manual_seed(seed)
        try:
            config._name_or_path, config._commit_hash = f"{config._name_or_path} (random)".strip(), None
            fresh: nn.Module = make(config)
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"a {make.__name__} cannot be made anew from its config ({error}); the control 'random-model' needs a "
                "model of transformers"
            ) from error
    for parameter in fresh.parameters():  # buffers keep the dtype that their model gives them
        parameter.data = parameter.data.to(first.dtype)
    return fresh.to(first.device).eval().requires_grad_(False)


def controlled(
    control: str, model: nn.Module, parts: Mapping[str, Pairs], seed: int = 0
) -> tuple[nn.Module, dict[str, Pairs]]:
    """Return the model and the pairs of a control; held-out pairs are changed as those of the search are.

    Args:
        control: one of `CONTROLS`.
        model: of the search.
        parts: pairs of the search, of the validation and so on, by name.
        seed: of the random labels or parameters.

    Raises:
        UsageError: there is no such control.
    """
    check_controls([control])
    if control == "shuffled-labels":
        return model, {name: pairs.with_shuffled_labels(seed) for name, pairs in parts.items()}
    return randomly_initialised(model, seed), dict(parts)


def check_controls(controls: Iterable[str]) -> None:
    """Raise `UsageError` unless all of these are in `CONTROLS`."""
    for control in controls:
        if control not in CONTROLS:
            near = did_you_mean(control, CONTROLS, " ").strip()
            raise UsageError(f"a control is one of {', '.join(CONTROLS)}, not {control!r}. {near}")
