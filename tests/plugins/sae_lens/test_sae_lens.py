"""Plugin sae-lens compared with SAELens itself: architectures, folders both ways, live objects, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ConfigError, ConversionError, FeatureIndexError, ManifestError, UsageError
from featurizers.testing import FeaturizerContract
from featurizers_sae_lens import MatchingPursuitFeaturizer, wrap
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.dictionaries import dictionary
from tests.support.sae_lens import D, F, batch, make, same

ONE_SITE = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")


def by_saelens(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return SAELens' features and reconstruction; decoding consumes statistics that encoding left on the module."""
    features = sae.encode(x)
    return features, sae.decode(features)


def variants() -> list[Any]:
    cases = []
    for architecture in ONE_SITE:
        for normalize in NORMALIZATIONS:
            for pre_bias in (True, False):
                cases.append((architecture, {"normalize_activations": normalize, "apply_b_dec_to_input": pre_bias}))
    cases += [(a, {"rescale_acts_by_decoder_norm": True}) for a in ("topk", "abstopk")]
    cases += [("matching_pursuit", {"max_iterations": 3, "residual_threshold": 0.0})]
    cases += [("matching_pursuit", {"stop_on_duplicate_support": False, "residual_threshold": 1.0})]
    return [pytest.param(a, o, id=f"{a}-{'-'.join(map(str, o.values()))}") for a, o in cases]


@pytest.mark.parametrize(("architecture", "options"), variants())
def test_everything_is_what_saelens_computes(sae_lens, architecture, options):
    sae = make(architecture, **options)
    f = wrap(sae)
    x, source = batch(5, 3), batch(5, 3, seed=2)
    features, error = f.featurize(x)
    expected, x_hat = by_saelens(sae, x)
    same(features, expected)
    residual = error[0] if isinstance(error, tuple) else error
    same(x - residual, x_hat, 2e-6)
    same(f.inverse_featurize(features, error), x, 2e-6)
    reconstruction = f.reconstruct(x)
    same(reconstruction[0], expected)
    same(reconstruction[1], x_hat, 2e-6)
    same(f.inverse_featurize(features, f.without_residual(error)), x_hat, 2e-6)

    others, _ = by_saelens(sae, source)
    mixed = expected.clone()
    mixed[..., [3, 9, 40]] = others[..., [3, 9, 40]]
    sae.encode(x)  # decoding uses the statistics of the last encoding
    swapped = sae.decode(mixed) + (x - x_hat)
    same(f.interchange(x, source, [3, 9, 40]), swapped, 3e-6)
    assert not torch.equal(expected[..., [3, 9, 40]], others[..., [3, 9, 40]])
    sae.encode(x)
    same(f.interchange(x, source), sae.decode(others) + (x - x_hat), 3e-6)
    assert torch.equal(f.interchange(x, x.clone()), x)
    for edited, change in (
        (f.ablate(x, [3, 9, 40]), lambda features: features.index_fill(-1, torch.tensor([3, 9, 40]), 0)),
        (f.steer(x, 1.5, [7]), lambda features: features + 1.5 * torch.eye(F)[7]),
        (f.mask(x, source, torch.linspace(0, 1, F)), lambda features: features.lerp(others, torch.linspace(0, 1, F))),
    ):
        sae.encode(x)
        same(edited, sae.decode(change(expected)) + (x - x_hat), 3e-6)


@pytest.mark.parametrize(("architecture", "options"), variants())
def test_gradients_are_those_of_saelens(sae_lens, architecture, options):
    sae = make(architecture, **options).requires_grad_(False)
    f = wrap(sae)
    cotangent = batch(4, seed=3)
    grads = []
    for run in (lambda x: sae.decode(sae.encode(x)), lambda x: x - _residual(f.featurize(x)[1])):
        x = batch(4).requires_grad_()
        (run(x) * cotangent).sum().backward()
        grads.append(x.grad)
    same(grads[1], grads[0], 2e-6)
    weights = torch.linspace(-1, 1, F)
    grads = []
    for run in (sae.encode, f.encode):
        x = batch(4).requires_grad_()
        (run(x) * weights).sum().backward()
        grads.append(x.grad)
    same(grads[1], grads[0], 2e-6)


def _residual(error: Any) -> Tensor:
    return error[0] if isinstance(error, tuple) else error


@pytest.mark.parametrize(("architecture", "options"), variants())
def test_folders_go_both_ways(sae_lens, architecture, options, tmp_path):
    sae = make(architecture, **options)
    x = batch(6)
    expected, x_hat = by_saelens(sae, x)
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    sae.cfg.metadata.model_name = "gpt2-small"
    sae.save_model(tmp_path / "saelens")
    f = featurizers.load(tmp_path / "saelens")
    same(f.encode(x), expected)
    assert f.site == featurizers.Site("resid.post", 3)
    assert f.site.model == "openai-community/gpt2"

    assert featurizers.convert(f, tmp_path / "back", "sae-lens") == []
    again = sae_lens.SAE.load_from_disk(str(tmp_path / "back"))
    features, decoded = by_saelens(again, x)
    same(features, expected)
    same(decoded, x_hat, 2e-6)
    assert again.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    artefact = featurizers.load(f.save_pretrained(tmp_path / "artefact"))
    assert torch.equal(artefact.encode(x), f.encode(x))


def test_hook_z_takes_heads_apart_and_side_by_side(sae_lens):
    sae = make("standard", reshape_activations="hook_z")
    f = wrap(sae)
    apart = batch(3, 5).unflatten(-1, (4, 4))
    expected, x_hat = by_saelens(sae, apart)
    features, error = f.featurize(apart)
    same(features, expected)
    same(apart - error, x_hat)
    same(f.encode(apart.flatten(-2)), expected)
    assert f.interchange(apart, batch(3, 5, seed=2)).shape == apart.shape


def test_training_classes_are_what_saelens_saves(sae_lens, tmp_path):
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    x = batch(9)
    rescaled = {"topk", "batchtopk", "matryoshka_batchtopk"}
    cases = [(name, False) for name in SAE_TRAINING_CLASS_REGISTRY] + [(name, True) for name in sorted(rescaled)]
    for name, rescale in cases:
        architecture = f"{name}-rescaled" if rescale else name
        cls, config = SAE_TRAINING_CLASS_REGISTRY[name]
        options = {"k": 7} if "topk" in architecture else {}
        options |= {"rescale_acts_by_decoder_norm": rescale} if name in rescaled else {}
        options |= {"matryoshka_widths": [16, F]} if architecture.startswith("matryoshka") else {}
        sae = cls(config(d_in=D, d_sae=F, **options))
        with torch.no_grad():
            for part, parameter in sae.named_parameters():
                if parameter.dim() < 2 and "threshold" not in part:
                    parameter.uniform_(-0.3, 0.3)
                elif part == "W_enc" or (part == "W_dec" and name in rescaled):
                    parameter.mul_(torch.rand(len(parameter), 1) * 10)
            if name == "jumprelu":
                sae.threshold.uniform_(-1, 1)
            if "batchtopk" in architecture:
                sae.topk_threshold.fill_(0.21)
        sae.save_inference_model(tmp_path / architecture)
        saved = sae_lens.SAE.load_from_disk(str(tmp_path / architecture))
        expected, _ = by_saelens(saved, x)
        same(wrap(sae).encode(x), expected)
        assert (expected > 0).any(), architecture
        assert wrap(sae.to(torch.bfloat16)).W_dec.dtype == torch.bfloat16
        same(featurizers.load(tmp_path / architecture).encode(x), expected)


def test_weights_are_shared_and_keep_their_dtype(sae_lens):
    for architecture in ONE_SITE:
        sae = make(architecture).to(torch.bfloat16)
        f = wrap(sae)
        assert {tensor.dtype for tensor in f.state_dict().values()} == {torch.bfloat16}
        for name in {"W_dec", "b_dec", "b_enc", "threshold", "b_gate", "r_mag", "b_mag"} & f.state_dict().keys():
            assert f.get_parameter(name).data_ptr() == sae.get_parameter(name).data_ptr()
        x = batch(4).bfloat16()
        assert f.encode(x).dtype == torch.bfloat16
        assert torch.equal(f.interchange(x, x.clone()), x)


def test_wrapping_leaves_the_sae_as_it_was(sae_lens):
    sae = make("topk", rescale_acts_by_decoder_norm=True, normalize_activations="layer_norm")
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    f = wrap(sae)
    f.featurize(batch(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    assert not hasattr(sae, "ln_mu")
    assert not any(parameter.requires_grad for parameter in f.parameters())


def test_every_architecture_of_the_registry_is_decided(sae_lens):
    from sae_lens.registry import SAE_CLASS_REGISTRY

    assert set(SAE_CLASS_REGISTRY) == {*ONE_SITE, *TRANSCODERS, "temporal"}


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_a_slice_is_those_rows(sae_lens, architecture, tmp_path):
    sae = make(architecture)
    sae.save_model(tmp_path / "it")
    whole, part = featurizers.load(tmp_path / "it"), featurizers.load(tmp_path / "it", indices=[40, 3])
    x, source = batch(4), batch(4, seed=2)
    same(part.collect(x, [3]), whole.collect(x, [3]))
    same(part.interchange(x, source), whole.interchange(x, source, [40, 3]))
    with pytest.raises(FeatureIndexError, match="feature index 64 is out of range: there are 64"):
        featurizers.load(tmp_path / "it", indices=[64])
    with pytest.raises(UsageError, match="holds a featurizer, which has no groups; give the features as a list"):
        featurizers.load(tmp_path / "it", indices={"features": [3]})


@pytest.mark.parametrize(
    ("architecture", "words"),
    [("topk", "compares all features"), ("abstopk", "compares all"), ("matching_pursuit", "those found before")],
)
def test_a_slice_that_would_be_other_features_is_refused(sae_lens, architecture, words, tmp_path):
    make(architecture).save_model(tmp_path / "it")
    with pytest.raises(UsageError, match=f"{words}.*; load it whole"):
        featurizers.load(tmp_path / "it", indices=[1])


class TestMatchingPursuit(FeaturizerContract):
    tolerance = 3e-5

    @pytest.fixture
    def featurizer(self):
        f = featurizers.create("sae-lens.matching-pursuit", d_in=8, n_features=24, max_iterations=5)
        g = torch.Generator().manual_seed(0)
        rows = torch.nn.functional.normalize(torch.randn(24, 8, generator=g), dim=-1)
        rows[0] = torch.nn.functional.normalize(torch.ones(8), dim=-1)
        f.load_state_dict({"W_dec": rows, "b_dec": torch.randn(8, generator=g) * 0.1})
        return f

    @pytest.fixture
    def activations(self):
        return torch.randn(12, 8, generator=torch.Generator().manual_seed(1)) + torch.linspace(1, 3, 12)[:, None]


def test_pursuit_loses_no_bit_of_a_base_of_higher_precision_than_its_weights():
    f = featurizers.create("sae-lens.matching-pursuit", d_in=8, n_features=24)
    f.W_dec.data = torch.nn.functional.normalize(torch.randn(24, 8), dim=-1)
    base = torch.randn(6, 8)
    assert torch.equal(f.half().interchange(base, base.clone()), base)


def test_pursuit_takes_no_row_backwards(sae_lens):
    """A token that has a negative product with every row has no features."""
    sae = make("matching_pursuit", d_sae=2)
    x = batch(40)
    expected, x_hat = by_saelens(sae, x)
    features, error = wrap(sae).featurize(x)
    assert (expected == 0).all(-1).any()
    same(features, expected)
    same(x - error, x_hat)


def test_what_pursuit_refuses():
    kind = "sae-lens.matching-pursuit"
    for wrong in ({"normalize": "scale"}, {"residual_threshold": -1.0}, {"max_iterations": 0}, {"n_heads": 3}):
        with pytest.raises(ConfigError):
            featurizers.create(kind, d_in=4, n_features=3, **wrong)
    with pytest.raises(ConfigError, match="needs d_in of at least 2"):
        featurizers.create(kind, d_in=1, n_features=3, normalize="layer-norm")


def test_pursuit_with_long_rows_would_not_end():
    f = featurizers.create("sae-lens.matching-pursuit", d_in=4, n_features=3)
    assert isinstance(f, MatchingPursuitFeaturizer)
    f.W_dec.data += 1.0
    with pytest.raises(featurizers.errors.ShapeError, match="longer than √2"):
        f.check()


def test_what_saelens_cannot_hold_is_said(sae_lens, tmp_path):
    with pytest.raises(ConversionError, match="no architecture for the rule 'jump'"):
        featurizers.convert(dictionary("jump"), tmp_path / "jump", "sae-lens")
    assert not (tmp_path / "jump").exists()
    with pytest.raises(ConversionError, match="no architecture for the kind 'subspace'"):
        featurizers.convert(featurizers.create("subspace", d_in=8, n_features=2), tmp_path / "x", "sae-lens")
    f = (
        dictionary("jumprelu", normalize="scale", input_scale=3.0, special_tokens=[7])
        .in_units("decoder-norm")
        .take([5, 2])
    )
    f.feature_sets = {"mine": torch.tensor([5])}
    f.site = featurizers.Site("norm.out").at(position=(-1,))
    lost = featurizers.convert(f, tmp_path / "it", "sae-lens")
    for words in ("numbers", "norms of the raw", "factor 3.0", "'mine'", "'norm.out'", "positions"):
        assert sum(words in sentence for sentence in lost) == 1, (words, lost)
    x = torch.randn(3, 8)
    sae = sae_lens.SAE.load_from_disk(str(tmp_path / "it"))
    same(sae.encode(x), f.encode(x), 1e-5)
    same(sae.decode(sae.encode(x)), x - f.featurize(x)[1], 1e-5)
    assert sae.cfg.metadata.exclude_special_tokens == [7]
    raw = load_file(tmp_path / "it/sae_weights.safetensors")
    assert set(raw) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}


def test_wrap_takes_saes_only():
    with pytest.raises(UsageError, match=r"takes a sae_lens\.SAE, not a Linear"):
        wrap(torch.nn.Linear(2, 2))


def test_reading_does_not_import_saelens(sae_lens, tmp_path):
    make("jumprelu").save_model(tmp_path / "it")
    code = (
        "import sys, featurizers\n"
        f"f = featurizers.load({str(tmp_path / 'it')!r})\n"
        f"featurizers.convert(f, {str(tmp_path / 'back')!r}, to='sae-lens')\n"
        "try: featurizers.load('sae-lens:no-such-release/x')\n"
        "except featurizers.errors.SourceError: print('sae_lens' in sys.modules, 'transformer_lens' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=False)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_name_that_is_not_kept_is_said(tmp_path):
    f = dictionary("relu", pre_bias=True)
    assert featurizers.convert(f, tmp_path / "unnamed", "sae-lens") == []
    f.id = "mine"
    assert featurizers.convert(f, tmp_path / "named", "sae-lens") == ["The name 'mine' is not kept."]
    assert featurizers.convert(f, tmp_path / "kept", "dictionary-learning") == []
    assert featurizers.load(tmp_path / "kept").id == "mine"


@pytest.mark.parametrize("architecture", ONE_SITE)
@pytest.mark.parametrize(
    ("said", "stored"),
    [("float32", torch.bfloat16), ("torch.float32", torch.float16), ("bfloat16", torch.float32)],
    ids=str,
)
def test_a_folder_is_computed_in_the_dtype_of_its_configuration(sae_lens, architecture, said, stored, tmp_path):
    make(architecture).save_model(tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": said}))
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file({k: t.to(stored).contiguous() for k, t in tensors.items()}, tmp_path / "sae_weights.safetensors")
    sae, f = sae_lens.SAE.load_from_disk(str(tmp_path)), featurizers.load(tmp_path)
    x = batch(5, 3)
    features, expected = f.encode(x), sae.encode(x)
    assert features.dtype == expected.dtype == sae.dtype
    assert torch.equal(f.W_dec, sae.W_dec)
    if sae.dtype == torch.float32:
        same(features, expected)
        assert torch.equal(features != 0, expected != 0)


def test_a_dtype_that_saelens_does_not_know_is_refused(sae_lens, tmp_path):
    make("standard").save_model(tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float8"}))
    with pytest.raises(ManifestError, match="dtype is 'float8'; known are float32"):
        featurizers.load(tmp_path)
