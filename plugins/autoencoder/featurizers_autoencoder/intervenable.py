"""A pyvene model with an autoencoder in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from featurizers import DictionaryFeaturizer
from torch import nn

from featurizers_autoencoder.intervention import AutoencoderIntervention, JumpReLUAutoencoderIntervention
from featurizers_autoencoder.layers import AutoencoderLayerBase, JumpReLUAutoencoderLayer, layer_of


def get_intervenable_with_autoencoder(
    model: nn.Module,
    autoencoder: AutoencoderLayerBase | DictionaryFeaturizer,
    interchange_dimensions: int | Sequence[int] | None,
    layer: int,
    *,
    component: str = "block_output",
    max_number_of_units: int = 1,
    device: torch.device | str | None = None,
) -> Any:
    """A pyvene model that interchanges latents of an autoencoder, trained anywhere, at the output of a block.

    Args:
        model: a model that pyvene knows.
        autoencoder: whose weights are copied; a dictionary of the rule relu or jumprelu becomes one.
        interchange_dimensions: which latents; see `AutoencoderIntervention.set_interchange_dim`.
        layer: of the model, from 0.
        component: pyvene's name of the place.
        max_number_of_units: positions of each prompt.
        device: where to put it all; where the model is if None.

    Raises:
        UsageError: a dictionary is none that an autoencoder layer computes.
        FeatureIndexError: the dimensions are no latents.
    """
    import pyvene as pv

    own = layer_of(autoencoder) if isinstance(autoencoder, DictionaryFeaturizer) else copy.deepcopy(autoencoder)
    cls = JumpReLUAutoencoderIntervention if type(own) is JumpReLUAutoencoderLayer else AutoencoderIntervention
    intervention = cls(autoencoder=own)
    intervention.set_interchange_dim(interchange_dimensions)
    config = pv.IntervenableConfig(
        [
            {
                "layer": layer,
                "component": component,
                "unit": "pos",
                "max_number_of_units": max_number_of_units,
                "intervention": intervention,
            }
        ]
    )
    intervenable = pv.IntervenableModel(config, model)
    intervenable.set_device(device or next(model.parameters()).device)
    intervenable.disable_model_gradients()
    return intervenable
