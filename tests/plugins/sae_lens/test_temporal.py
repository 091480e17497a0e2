"""Temporal autoencoders compared with SAELens, alone and in a model with padding, caches and edits."""

from __future__ import annotations

import json
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ConfigError, ManifestError, ShapeError, UsageError, WeightsError
from featurizers.testing import SiteMapContract
from featurizers_sae_lens import TemporalConfig, TemporalMap, wrap
from torch import Tensor

from tests.support.sae_lens import D, F, batch, make, same
from tests.support.site_maps import model

SHAPE = {"n_heads": 2, "bottleneck_factor": 8}
CASES: dict[str, dict[str, Any]] = {
    "topk": {"kval_topk": 5},
    "all": {"sae_diff_type": "relu"},
    "untied": {"tied_weights": False, "kval_topk": 5},
    "untied, without pre-bias": {"tied_weights": False, "apply_b_dec_to_input": False, "sae_diff_type": "relu"},
    "without a bias": {"apply_b_dec_to_input": False, "sae_diff_type": "relu"},
    "two layers": {"n_attn_layers": 2, "kval_topk": 7},
    "scaled": {
        "kval_topk": 5,
        "normalize_activations": "constant_scalar_rescale",
        "activation_normalization_factor": 0.029,
    },
}


def autoencoder(**options: Any) -> Any:
    """Return a random temporal autoencoder of SAELens with a hook in the model of the tests."""
    sae = make("temporal", **{**SHAPE, **options})
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = "blocks.1.hook_resid_post", "gpt2"
    return sae


def codes(f: TemporalMap, x: Tensor) -> dict[str, Tensor]:
    return {group: f.encode(group, {"in": x}) for group in f.groups}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_codes_and_output_are_those_of_saelens(sae_lens, options, tmp_path):
    sae, x = autoencoder(**options), batch(3, 6)
    novel, predicted = sae.encode_with_predictions(x)
    sae.save_model(tmp_path)
    for f in (wrap(sae), featurizers.load(tmp_path)):
        assert isinstance(f, TemporalMap)
        features = codes(f, x)
        same(features["novel"], novel, 1e-5)
        same(features["predicted"], predicted, 1e-5)
        same(f.decode("out", features, {"in": x}), sae(x), 1e-5)
        assert f.sites_text == "resid.post:1 -> resid.post:1"
    again = featurizers.load(f.save_pretrained(tmp_path / "artefact"))
    assert torch.equal(again.encode("novel", {"in": x}), f.encode("novel", {"in": x}))


@pytest.mark.parametrize("options", [CASES["topk"], CASES["two layers"], CASES["scaled"]])
def test_padding_changes_no_token(sae_lens, options):
    f = wrap(autoencoder(**options))
    x = batch(2, 5)
    padded = torch.cat([torch.randn(2, 3, D) * 50, x, torch.randn(2, 2, D) * 50], dim=1)
    is_token = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 0, 0]] * 2).bool()
    for group, expected in codes(f, x).items():
        found = f.encode_sequences(group, {"in": padded}, is_token)
        assert found.isfinite().all()
        same(found[:, 3:8], expected, 1e-5)


def test_edits_in_a_model_add_the_decoded_change(sae_lens):
    """An edit at the last token equals a hook that adds the change."""
    sae = autoencoder(kval_topk=5)
    f, lm = wrap(sae), model("gpt2")
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def edit(_module: Any, _args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        novel = sae.encode(hidden)
        seen.append(novel)
        change = torch.zeros_like(hidden)
        change[:, -1] = (3.0 - novel[:, -1, 9:10]) * sae.W_dec[9]
        return (hidden + change, *out[1:]) if isinstance(out, tuple) else hidden + change

    with torch.no_grad():
        base = lm(ids).logits
        handle = lm.transformer.h[1].register_forward_hook(edit)
        expected = lm(ids).logits
        handle.remove()
        ablate = featurizers.Ablate(f, positions=[-1], indices={"novel": [9]}, value=3.0)
        collect = featurizers.Collect(f, indices={"novel": None})
        with featurizers.intervene(lm, [collect]) as results:
            lm(ids)
        same(results[collect]["novel"], seen[0], 1e-5)
        with featurizers.intervene(lm, ablate):
            same(lm(ids).logits, expected, 1e-5)
        assert not torch.allclose(base, expected, atol=1e-3)


def test_a_cache_changes_nothing(sae_lens):
    """Each new token is encoded with all earlier ones, padded or not, whether they are in the model's cache or not."""
    f, lm = wrap(autoencoder(kval_topk=5)), model("gpt2")
    ids = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    options |= {"output_scores": True, "return_dict_in_generate": True}

    def scores(cached: bool) -> Tensor:
        with featurizers.intervene(lm, featurizers.Ablate(f, indices={"novel": None}, value=0.2)):
            return torch.stack(lm.generate(ids, use_cache=cached, **options).scores)

    same(scores(True), scores(False), 1e-4)
    assert not torch.allclose(scores(True), torch.stack(lm.generate(ids, **options).scores), atol=1e-2)


class TestTemporal(SiteMapContract):
    @pytest.fixture
    def site_map(self):
        f = TemporalMap(TemporalConfig(d_in=8, n_features=16, n_heads=2, bottleneck_factor=4, k=4, input_scale=0.5))
        generator = torch.Generator().manual_seed(0)
        for parameter in f.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        return f.eval()


def test_what_a_temporal_autoencoder_cannot_be(sae_lens, tmp_path):
    autoencoder(kval_topk=5).save_model(tmp_path)
    for indices in ([1], {"novel": [1]}):
        with pytest.raises(UsageError, match="depends on all others; load it whole"):
            featurizers.load(tmp_path, indices=indices)
    before = json.loads((tmp_path / "cfg.json").read_text())
    for change, words in (
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"sae_diff_type": "hydra"}, "sae_diff_type is 'hydra'"),
        ({"kval_topk": F + 1}, "k must be at most the 64 features"),
        ({"bottleneck_factor": 7}, "must be a multiple"),
        ({"n_attn_layers": 2}, "lacks or has more"),
        ({"d_in": D + 1}, "it must be"),
        ({"heads": 3}, r"unknown keys \['heads'\]"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps({**before, **change}))
        with pytest.raises((ManifestError, WeightsError), match=words):
            featurizers.load(tmp_path)
    with pytest.raises(ConfigError, match="multiple of bottleneck_factor"):
        TemporalMap(TemporalConfig(d_in=8, n_features=15))
    f = wrap(autoencoder(kval_topk=5))
    with pytest.raises(ShapeError, match="encodes whole sequences"):
        f.encode("novel", {"in": batch(4)})
    with pytest.raises(featurizers.errors.ConversionError, match="no architecture for the kind"):
        featurizers.convert(f, tmp_path / "x", to="sae-lens")


def test_a_change_of_features_is_decoded_in_the_dtype_of_the_weights(sae_lens):
    f = wrap(autoencoder(kval_topk=5))
    change = torch.randn(2, 3, F, generator=torch.Generator().manual_seed(0))
    expected = change @ f.W_dec
    for dtype in (torch.float64, torch.float32):
        same(f.decode_change("out", "novel", change.to(dtype)), expected, 1e-5)
    same(
        f.decode_change("out", "novel", change[..., [3, 1]].double(), torch.tensor([3, 1])),
        change[..., [3, 1]] @ f.W_dec[[3, 1]],
        1e-5,
    )
