"""pyvene models with CausalAbstraction's interventions: saved and loaded to the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ConfigError, ConversionError, ManifestError, UsageError
from featurizers_causalab.featurizers import Featurizer, SubspaceFeaturizer
from torch import Tensor

from tests.support.intervenables import built
from tests.support.models import WIDTH, prompts, tiny_model

BASE, SOURCE = ({"input_ids": prompts(2, 5, seed=seed)} for seed in (1, 2))
LOCATIONS = {"sources->base": 3}
KINDS = ["interchange", "mask", "tied-mask", "steering", "replace", "noise"]


def subspace(tied: bool = False) -> SubspaceFeaturizer:
    torch.manual_seed(0)
    made = SubspaceFeaturizer(shape=(WIDTH, 4), id="DAS", tie_masks=tied)
    made.set_feature_indices([0, 2])
    return made


def intervenable(kind: str, featurizer: Featurizer) -> Any:
    name = {"tied-mask": "mask"}.get(kind, kind)
    options = {"seed": 7} if kind == "noise" else {}
    cls = getattr(featurizer, f"get_{name}_intervention")(**options)
    made = built([{"layer": 1, "intervention_type": cls}])
    [intervention] = made.interventions.values()
    if "mask" in kind:
        intervention.mask.data = torch.tensor([1.5, -1.0, 0.3, 0.2])[: len(intervention.mask)]
        intervention.set_temperature(torch.tensor(0.37))
    return made


@torch.no_grad()
def run(made: Any, kind: str) -> Tensor:
    [intervention] = made.interventions.values()
    if kind == "noise":
        intervention.reset_noise_rng()
    source = torch.linspace(-1, 1, 4) if kind in ("steering", "replace", "noise") else None
    if source is None:
        return made(BASE, [SOURCE], LOCATIONS)[1].logits
    sources = {next(iter(made.interventions)): source}
    locations = {"sources->base": (None, [[[3]] * 2])}
    try:
        return made(BASE, source_representations=sources, unit_locations=locations)[1].logits
    finally:
        made._cleanup_states()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_same_after_loading(kind: str, tmp_path: Path) -> None:
    made = intervenable(kind, subspace(tied=kind == "tied-mask"))
    before = run(made, kind)
    featurizers.save_intervenable(made, tmp_path / "it")
    assert json.loads((tmp_path / "it/intervenable.json").read_text())["interventions"][0]["kind"] == f"causalab.{kind}"
    loaded = featurizers.load_intervenable(tmp_path / "it", tiny_model("gpt2"))
    assert torch.equal(run(loaded, kind), before)
    assert not torch.allclose(before, tiny_model("gpt2")(**BASE).logits, atol=1e-3)


def test_a_hard_mask_stays_hard_and_its_temperature_stays(tmp_path: Path) -> None:
    made = intervenable("mask", subspace())
    [intervention] = made.interventions.values()
    soft = run(made, "mask")
    intervention.eval()
    hard = run(made, "mask")
    assert not torch.equal(soft, hard)
    featurizers.save_intervenable(made, tmp_path / "it")
    loaded = featurizers.load_intervenable(tmp_path / "it", tiny_model("gpt2"))
    [again] = loaded.interventions.values()
    assert torch.equal(run(loaded, "mask"), hard)
    assert torch.equal(again.get_temperature(), intervention.get_temperature())
    again.train()
    assert torch.equal(run(loaded, "mask"), soft)


def test_a_mask_without_a_temperature_comes_back_without_one(tmp_path: Path) -> None:
    made = intervenable("mask", subspace())
    [intervention] = made.interventions.values()
    intervention.temperature = None
    featurizers.save_intervenable(made, tmp_path / "it")
    [again] = featurizers.load_intervenable(tmp_path / "it", tiny_model("gpt2")).interventions.values()
    with pytest.raises(UsageError, match="temperature of the mask is not set"):
        again.get_temperature()


def test_features_are_collected_after_loading(tmp_path: Path) -> None:
    cls = subspace().get_collect_intervention()
    made = built([{"layer": 1, "intervention_type": cls}])
    featurizers.save_intervenable(made, tmp_path / "it")
    loaded = featurizers.load_intervenable(tmp_path / "it", tiny_model("gpt2"))
    (_, before), _ = made(BASE, unit_locations={"base": 3})
    (_, after), _ = loaded(BASE, unit_locations={"base": 3})
    assert torch.equal(before[0], after[0])
    assert before[0].shape == (2, 1, 2)


def test_a_function_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="FeatureInterpolateIntervention, which no file may name"):
        featurizers.save_intervenable(intervenable("interpolation", subspace()), tmp_path / "it")
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize("temperature", [0.0, -1.0, "warm", []])
def test_an_invalid_temperature_is_refused(temperature: Any, tmp_path: Path) -> None:
    featurizers.save_intervenable(intervenable("mask", subspace()), tmp_path / "it")
    path = tmp_path / "it/intervenable.json"
    record = json.loads(path.read_text())
    record["interventions"][0]["config"]["temperature"] = temperature
    path.write_text(json.dumps(record))
    with pytest.raises((ManifestError, ConfigError), match="temperature"):
        featurizers.load_intervenable(tmp_path / "it", tiny_model("gpt2"))


def test_modules_of_ones_own_are_refused_when_saving(tmp_path: Path) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return 2 * x, None

    class Halved(torch.nn.Module):
        def forward(self, x: Tensor, error: None) -> Tensor:
            return x / 2

    with pytest.raises(ConversionError, match="its map is that of modules"):
        featurizers.save_intervenable(
            intervenable("interchange", Featurizer(Doubled(), Halved(), n_features=WIDTH)), tmp_path / "it"
        )
    assert not (tmp_path / "it").exists()
