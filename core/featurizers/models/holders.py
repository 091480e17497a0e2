"""Other libraries' holders of a model: which ones are models themselves, and whose activations are the model's own."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from featurizers.errors import SiteError, UsageError

HELD_AS: Final = ("_module", "hf_model", "original_model", "model", "module")
"""Attributes under which other libraries keep the model that they hold."""
_LENS: Final = "transformer_lens"


def check_module(model: Any) -> None:
    """Raise UsageError unless a model is a torch module, which takes hooks; name the module that it holds."""
    if isinstance(model, nn.Module):
        return
    name = type(model).__name__
    for attribute in HELD_AS:
        held = getattr(model, attribute, None)
        if isinstance(held, nn.Module):
            raise UsageError(
                f"the model is a torch module, not {name}, which holds one: pass that {type(held).__name__}, "
                f"model.{attribute}, with its weights loaded"
            )
    raise UsageError(f"the model is a torch module, such as a model of transformers, not {name}")


def inside_bridge(model: nn.Module) -> nn.Module | None:
    """Return the model of transformers that a TransformerBridge of TransformerLens calls; None for other models.

    It is not among the bridge's modules; its own were replaced by those of the bridge.
    """
    held = getattr(model, "original_model", None) if _is_of_lens(model) else None
    return held if isinstance(held, nn.Module) else None


def check_coordinates(model: nn.Module, block: nn.Module | None = None) -> None:
    """Raise SiteError if TransformerLens may have changed what the activations of a model mean.

    It folds the weights of norms into the next layer and centres what is written to the residual stream: logits stay
    the same, activations do not. A bridge says whether it did so; the model inside it does not.

    Args:
        model: to be edited.
        block: one of its blocks, if they were found.
    """
    if inside_bridge(model) is not None:
        if getattr(model, "_weights_processed", None) is False:
            return
        raise SiteError(
            f"the weights of this {type(model).__name__} were processed by its compatibility mode, which folds norms "
            "and centres weights, so that its activations are in other coordinates than those of the original model; "
            f"load the bridge again and leave that mode out, or enable it with no_processing=True. {_OWN}"
        )
    if _is_of_lens(model):
        raise SiteError(
            f"{type(model).__name__} of TransformerLens folds norms and centres weights when it is loaded, so that its "
            "activations may be in other coordinates than those of the original model; use the model of transformers, "
            f"or a TransformerBridge without compatibility mode. {_OWN}"
        )
    if block is not None and _is_of_lens(block):
        raise SiteError(
            f"the blocks of this {type(model).__name__} belong to a bridge of TransformerLens, which may have "
            "processed its weights; pass the bridge itself, or load the model again with transformers"
        )


_OWN: Final = "For a featurizer that was found in this very model, name the module: 'module:blocks.1:output'"


def _is_of_lens(module: nn.Module) -> bool:
    return any(base.__module__.partition(".")[0] == _LENS for base in type(module).__mro__)
