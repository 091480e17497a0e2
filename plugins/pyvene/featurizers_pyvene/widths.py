"""Check that featurizers are as wide as the places of a model, as far as that is known before the model runs."""

from __future__ import annotations

import re
from typing import Any, Final

from featurizers.errors import PluginError, ShapeError, SiteError
from featurizers.features import Featurizer
from featurizers.models import Anatomy
from torch import nn

from featurizers_pyvene.record import IntervenableRecord

RESIDUAL: Final = {"block_input", "block_output", "attention_input", "attention_output", "mlp_input", "mlp_output"}
"""Components of pyvene that are as wide as the residual stream."""
LAYER: Final = re.compile(r"[0-9]{1,6}")


def check_widths(record: IntervenableRecord, featurizers: list[Featurizer[Any]], model: nn.Module, where: str) -> None:
    """Raise `ShapeError` if a featurizer is not as wide as its place in the model.

    A place is skipped if its width or that of the featurizer is not known; the featurizer then checks its input.

    Args:
        record: the places and their featurizers.
        featurizers: the featurizers of the record.
        model: the model that they will act in.
        where: names the source of the record in an error.
    """
    anatomy = Anatomy(model)
    for row in record.representations:
        own = featurizers[record.interventions[row.intervention].featurizer].d_in
        width = residual_width(anatomy, row.component)
        if None not in (own, width) and own != width:
            raise ShapeError(
                f"{where}: the featurizer for {row.component} of layer {row.layer} takes activations of width {own}, "
                f"but those of this {type(model).__name__} have {width}"
            )


def residual_width(anatomy: Anatomy, component: str) -> int | None:
    """Return the width of the residual stream if a component is known to be as wide, else None.

    Args:
        anatomy: the sites of the model.
        component: pyvene's name of a place, or a module path such as ``transformer.h[1].output``.
    """
    if component not in RESIDUAL and not _is_block_or_part(anatomy, component):
        return None
    config: Any = getattr(anatomy.model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text_config, "hidden_size", None)
    return width if isinstance(width, int) else None


def _is_block_or_part(anatomy: Anatomy, component: str) -> bool:
    """Return True for the path of a block, or of its attention or MLP module; blocks may differ in their parts."""
    path = re.sub(r"\[(\d+)\]", r".\1", component.rpartition(".")[0])
    try:
        layers = f"{anatomy.blocks.layers}."
        number, dot, part = path.removeprefix(layers).partition(".")
        if not path.startswith(layers) or not LAYER.fullmatch(number) or int(number) >= anatomy.n_layers:
            return False
        parts = anatomy.parts(int(number))
    except (SiteError, PluginError):
        return False
    return not dot or part in (parts.attention, parts.mlp)
