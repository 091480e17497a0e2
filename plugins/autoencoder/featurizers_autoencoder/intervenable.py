"""`get_intervenable_with_autoencoder`: a pyvene model that interchanges latents of an autoencoder."""

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
    """Build a pyvene model that interchanges latents of an autoencoder, by default at the output of a block.

    Args:
        model: a model that pyvene knows.
        autoencoder: an autoencoder, trained anywhere; its weights are copied. A dictionary of the rule relu or jumprelu
            is converted to one.
        interchange_dimensions: latents to interchange; see `AutoencoderIntervention.set_interchange_dim`.
        layer: layer of the model, from 0.
        component: pyvene's name of the place.
        max_number_of_units: number of positions of each prompt.
        device: device of the result; that of the model if None.

    Raises:
        UsageError: no autoencoder layer computes the same map as the dictionary.
        FeatureIndexError: the autoencoder lacks one of the latents.
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
