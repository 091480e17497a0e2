"""Low-rank sparse attention compared with llamascopium's own, alone and in a model with padding, caches and edits."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ConfigError, ManifestError, PositionError, ShapeError, UsageError, WeightsError
from featurizers.testing import SiteMapContract
from featurizers_llamascopium import LorsaConfig, LorsaMap
from featurizers_transcoder import ReadConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.decoders import decoder
from tests.support.sae_lens import same

FIXTURES = Path(__file__).parents[2] / "fixtures/llamascopium"
NAMES = ("lorsa-jumprelu", "lorsa-topk-adjacent-normed", "lorsa-relu-scaled", "lorsa-relu-none")
D, N = 6, 18


def golden(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the stream, the features and the outputs."""
    tensors = load_file(FIXTURES / "golden.safetensors")
    own = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
    return own["x.blocks.1.ln1.hook_normalized"], own["features"], own["y.blocks.1.hook_attn_out"]


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_llamascopiums(name, tmp_path):
    f, (x, z, y) = featurizers.load(FIXTURES / name), golden(name)
    assert isinstance(f, LorsaMap)
    features = f.encode("features", {"in": x})
    same(features, z, 1e-5)
    same(f.decode("out", {"features": features}, {}), y, 1e-5)
    columns = torch.tensor([17, 3, 4])
    same(f.encode("features", {"in": x}, columns), z[..., columns], 1e-5)
    assert f.sites_text == "resid.pre:1 -> attn.out:1"
    assert {site.model for site in f.sites.values()} == {"meta-llama/Llama-3.2-1B"}
    again = featurizers.load(f.save_pretrained(tmp_path / "artefact"))
    assert torch.equal(again.encode("features", {"in": x}), features)
    assert torch.equal(pickle.loads(pickle.dumps(f)).encode("features", {"in": x}), features)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_token(name):
    """Padding takes no position: the rotation has tables for 12, and the sequence has 15 columns."""
    f, (x, z, _) = featurizers.load(FIXTURES / name), golden(name)
    padded = torch.cat([torch.randn(2, 6, D) * 50, x, torch.randn(2, 2, D) * 50], dim=1)
    is_token = torch.tensor([[0] * 6 + [1] * 7 + [0] * 2] * 2).bool()
    found = f.encode_sequences("features", {"in": padded}, is_token)
    assert found.isfinite().all()
    same(found[:, 6:13], z, 1e-5)


def llama() -> Any:
    """Return a random Llama of this width with the epsilon of Llama 3."""
    return decoder("llama", hidden_size=D, num_attention_heads=3, num_key_value_heads=3, rms_norm_eps=1e-5)


IDS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(1))


def test_edits_in_a_model_add_the_decoded_change():
    """The norm in the encoder is the model's without its gain, and an edit equals a hook that adds the change."""
    f, model = featurizers.load(FIXTURES / "lorsa-jumprelu"), llama()
    block, seen = model.model.layers[1], {}

    def read(module: Any, _args: Any, out: Tensor) -> None:
        seen["z"] = f.encode("features", {"in": out / module.weight})  # normalised already: once more changes nothing

    def write(_module: Any, _args: Any, out: Any) -> Any:
        change = torch.zeros_like(out[0])
        change[:, -1] = (3.0 - seen["z"][:, -1, 9:10]) * f.W_O[9]
        return (out[0] + change, *out[1:])

    with torch.no_grad():
        base = model(IDS).logits
        hooks = [block.input_layernorm.register_forward_hook(read), block.self_attn.register_forward_hook(write)]
        expected = model(IDS).logits
        [hook.remove() for hook in hooks]
        collect = featurizers.Collect(f)
        with featurizers.intervene(model, [collect]) as results:
            model(IDS)
        same(results[collect], seen["z"], 1e-4)
        with featurizers.intervene(model, featurizers.Ablate(f, positions=[-1], indices=[9], value=3.0)):
            same(model(IDS).logits, expected, 1e-4)
    assert not torch.allclose(base, expected, atol=1e-2)


def test_a_cache_changes_nothing():
    """Each new token is encoded with all earlier ones, padded or not, whether they are in the model's cache or not."""
    f, model = featurizers.load(FIXTURES / "lorsa-jumprelu"), llama()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    options |= {"output_scores": True, "return_dict_in_generate": True}

    def scores(cached: bool) -> Tensor:
        with featurizers.intervene(model, featurizers.Ablate(f, value=0.5)):
            return torch.stack(model.generate(IDS, use_cache=cached, **options).scores)

    same(scores(True), scores(False), 1e-4)
    assert not torch.allclose(scores(True), torch.stack(model.generate(IDS, **options).scores), atol=1e-2)
    cache = model(IDS, use_cache=True).past_key_values
    with (
        pytest.raises(PositionError, match="run the whole prompt inside it"),
        featurizers.intervene(model, featurizers.Ablate(f)),
    ):
        model(IDS[:, :1], past_key_values=cache)


class TestLorsa(SiteMapContract):
    @pytest.fixture
    def site_map(self):
        config = LorsaConfig(
            read=ReadConfig(width=8, normalize="rms"), d_out=8, n_features=16, n_patterns=2, d_head=4, scale=2.0
        )
        f, generator = LorsaMap(config), torch.Generator().manual_seed(0)
        for parameter in f.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        return f.eval()


def edited(name: str, folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    shutil.copytree(FIXTURES / name, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    changed = {**load_file(folder / "sae_weights.safetensors"), **(tensors or {})}
    save_file(changed, folder / "sae_weights.safetensors")
    return folder


def test_fewer_patterns_in_the_file_are_shared(tmp_path):
    """llamascopium repeats the patterns of a file until there are ``n_qk_heads``."""
    name = "lorsa-jumprelu"
    few = {key: t[:1] for key, t in load_file(FIXTURES / name / "sae_weights.safetensors").items() if key[2:] in "QK"}
    many = {key: t.repeat_interleave(3, dim=0) for key, t in few.items()}
    assert sorted(few) == ["W_K", "W_Q", "b_K", "b_Q"]
    a, b = (featurizers.load(edited(name, tmp_path / str(len(t["b_Q"])), t)) for t in (few, many))
    (x, _, _) = golden(name)
    assert (a.config.n_patterns, b.config.n_patterns) == (1, 3)
    same(a.encode("features", {"in": x}), b.encode("features", {"in": x}))


REFUSED = {
    "a repeated rotation": ({"rotary_scale": 2}, "rotary_scale is 2"),
    "another norm": ({"use_post_qk_ln": True, "normalization_type": "LN"}, "only 'RMS' is known"),
    "unequal shares": ({"n_qk_heads": 4}, "do not share 4 attention patterns equally"),
    "too wide a rotation": ({"rotary_dim": 6}, "rotary_dim is 6"),
    "an odd rotation": ({"rotary_dim": 3}, "rotary_dim is 3"),
    "missing norms": ({"use_post_qk_ln": True, "normalization_type": "RMS"}, r"'ln_k\.w'"),
    "another number of patterns": ({"n_qk_heads": 2}, "W_Q has 3 patterns, and n_qk_heads is 2"),
    "another number of positions": ({"n_ctx": 13}, r"rotary_cos is float32 of shape \(12, 4\)"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_exactly_is_refused(change, message, tmp_path):
    with pytest.raises((ManifestError, WeightsError), match=message):
        featurizers.load(edited("lorsa-jumprelu", tmp_path / "it", **change))


def test_what_a_sparse_attention_cannot_be(tmp_path):
    with pytest.raises(UsageError, match="is loaded whole"):
        featurizers.load(FIXTURES / "lorsa-jumprelu", indices=[1])
    f = featurizers.load(FIXTURES / "lorsa-jumprelu")
    with pytest.raises(ShapeError, match="encodes whole sequences"):
        f.encode("features", {"in": torch.zeros(7, D)})
    with pytest.raises(ShapeError, match="knows 12 positions, and the sequence has 13"):
        f.encode("features", {"in": torch.zeros(1, 13, D)})
    read: dict[str, Any] = {"read": ReadConfig(width=8), "d_out": 8, "scale": 1.0, "d_head": 4}
    for options, words in (
        ({"n_features": 5, "n_patterns": 2}, "do not share 2 patterns"),
        ({"n_features": 4, "n_patterns": 2, "rotary": "halves"}, "every rotation has both"),
        ({"n_features": 4, "n_patterns": 2, "rotary_dim": 2}, "belong to a rotation"),
        ({"n_features": 4, "n_patterns": 2, "rotary": "halves", "rotary_dim": 6, "n_positions": 9}, "at most d_head"),
    ):
        with pytest.raises(ConfigError, match=words):
            LorsaMap(LorsaConfig(**read, **options))
