"""pyvene models with interventions of this project, for tests and for the processes that they start."""

from __future__ import annotations

from typing import Any

import featurizers
import pyvene as pv
import torch
from torch import Tensor

from tests.support.models import WIDTH, prompts, tiny_model

BASE, SOURCE = prompts(3, 6), prompts(3, 6, seed=1)


def subspace(n_features: int = 6, seed: int = 2, d_in: int = WIDTH) -> Any:
    return featurizers.create("subspace", d_in=d_in, n_features=n_features, seed=seed)


def built(places: list[dict[str, Any]], architecture: str = "gpt2", mode: str = "parallel", **options: Any) -> Any:
    """Build a pyvene model. A place is a representation; by default it is one position at the output of a block."""
    places = [{"component": "block_output", "unit": "pos", "max_number_of_units": 1, **place} for place in places]
    return pv.IntervenableModel(pv.IntervenableConfig(places, mode=mode), tiny_model(architecture), **options)


def several() -> Any:
    """Build four places: two share a featurizer, the third has an equal one of its own, the fourth has a mask."""
    shared, equal, other = subspace(), subspace(), subspace(5, 3)
    mask = other.get_mask_intervention()()
    mask.mask.data = torch.linspace(-2, 2, 5)
    mask.set_temperature(0.3)
    return built(
        [
            {"layer": 0, "intervention": shared.get_interchange_intervention()(subspace_partition=[[0, 2], [2, 6]])},
            {"layer": 1, "component": "mlp_output", "intervention": shared.get_interchange_intervention()()},
            {"layer": 1, "intervention": equal.get_interchange_intervention()()},
            {"layer": 2, "component": "attention_output", "intervention": mask},
        ]
    )


def logits(intervenable: Any, positions: list[int] | None = None, subspaces: Any = None, base: Tensor = BASE) -> Tensor:
    """Run a pyvene model with another source for each place (`SOURCE` for the first) and return the logits."""
    count = len(intervenable.representations)
    sources = [{"input_ids": prompts(*base.shape, seed=1 + i)} for i in range(len(intervenable._intervention_group))]
    where = [[positions or [3]] * len(base)] * count
    _, output = intervenable({"input_ids": base}, sources, {"sources->base": (where, where)}, subspaces=subspaces)
    return output.logits  # type: ignore[no-any-return]


def logits_of_several(intervenable: Any) -> Tensor:
    """Run the model of `several` so that each argument of its interventions matters; return the logits."""
    return logits(intervenable, [3], [[[1]] * 3, [[0, 3]] * 3, [[2], [3], [4]], None])
