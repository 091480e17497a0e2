"""CausalAbstraction's featurizers: closed forms, properties that its code relies on, and faults of the original."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import featurizers
import pytest
import pyvene
import torch
from featurizers.errors import (
    BasisError,
    ConfigError,
    ConversionError,
    FeatureIndexError,
    ManifestError,
    ShapeError,
    UsageError,
)
from featurizers_causalab import featurizers as ca
from torch import Tensor, nn

from tests.support.intervenables import built, logits
from tests.support.models import WIDTH, prompts, tiny_model
from tests.support.processes import run_python

D, K = 8, 3
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def batch(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def basis(d: int = D, k: int = K, seed: int = 0) -> Tensor:
    return torch.linalg.qr(batch(d, k, seed=seed))[0]


def subspace(**options: Any) -> ca.SubspaceFeaturizer:
    return ca.SubspaceFeaturizer(rotation_subspace=basis(), **options)


BASE, SOURCE = batch(2, 1, D), batch(2, 1, D, seed=1)


class Halves(nn.Module):
    """Map to twice as many features: the positive parts and the negative parts."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.cat([x.relu(), (-x).relu()], dim=-1), None


class Together(nn.Module):
    def forward(self, features: Tensor, error: None) -> Tensor:
        positive, negative = features.chunk(2, dim=-1)
        return positive - negative


class ToySAE(nn.Module):
    """Sparse autoencoder with the attributes that CausalAbstraction uses."""

    def __init__(self, d: int = D, n: int = 20, how: str = "none", **config: Any) -> None:
        super().__init__()
        self.W_enc, self.W_dec = nn.Parameter(batch(d, n)), nn.Parameter(batch(n, d, seed=1) / 4)
        options = {"d_sae": n, "normalize_activations": how, **config}
        self.cfg = SimpleNamespace(to_dict=lambda: options, architecture=lambda: "standard")
        self.how = how

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    def encode(self, x: Tensor) -> Tensor:
        if self.how == "layer_norm":  # as in SAELens, decode needs these attributes
            self.mu, self.std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            x = (x - self.mu) / self.std
        return (x @ self.W_enc).relu()

    def decode(self, features: Tensor) -> Tensor:
        x = features @ self.W_dec
        if self.how == "layer_norm":
            x = x * self.std + self.mu
            del self.mu, self.std
        return x


def in_gpt2(cls: type, units: int = 1) -> Any:
    return built([{"layer": 1, "max_number_of_units": units, "intervention_type": cls}])


INPUTS, OTHERS = prompts(2, 6), prompts(2, 6, seed=1)


def swapped(intervenable: Any, positions: list[int], subspaces: Any = None) -> Tensor:
    """Run `INPUTS` with `OTHERS` as the source."""
    return logits(intervenable, positions, subspaces, INPUTS)


# ---------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_interchange_of_a_subspace_is_its_closed_form(dtype):
    W, base, source = basis(), BASE.to(dtype), SOURCE.to(dtype)
    intervention = subspace().get_interchange_intervention()()
    for rows, columns in ((None, [0, 1, 2]), ([[2, 0]] * 2, [2, 0]), ([None, None], [0, 1, 2])):
        chosen = W[:, columns]
        expected = base.float() + (source.float() - base.float()) @ chosen @ chosen.T
        result = intervention(base, source, rows)
        assert result.dtype == dtype
        torch.testing.assert_close(result, expected.to(dtype))
    mixed = intervention(base, source, [None, [1]])
    torch.testing.assert_close(mixed[0], intervention(base, source, None)[0])
    torch.testing.assert_close(mixed[1], intervention(base, source, [[1]] * 2)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["a logit each", "one logit"])
def test_a_mask_is_soft_in_training_and_hard_in_evaluation(dtype, tied):
    W, base, source = basis(), BASE.to(dtype), SOURCE.to(dtype)
    mask = subspace(id="it", tie_masks=tied).get_mask_intervention()()
    logits = torch.tensor([0.7] if tied else [0.7, -0.2, 0.0])
    mask.mask.data.copy_(logits)
    mask.set_temperature(torch.tensor(0.5, dtype=dtype))
    for training, gate in ((True, torch.sigmoid(logits / 0.5)), (False, (logits > 0).float())):
        mask.train(training)
        expected = base.float() + ((source.float() - base.float()) @ W * gate) @ W.T
        torch.testing.assert_close(mask(base, source), expected.to(dtype))
    assert mask.mask.shape == logits.shape
    torch.testing.assert_close(mask.get_sparsity_loss(), torch.sigmoid(logits / 0.5).sum())
    assert mask.get_temperature().dtype == torch.float32
    assert str(mask) == f"FeatureMaskIntervention(id=it{',tied' if tied else ''})"


def test_the_gradients_of_a_mask_are_those_of_its_closed_form():
    W, T, weights = basis(), 0.5, batch(2, 1, D, seed=5)
    f = subspace()
    mask = f.get_mask_intervention()()
    logits = batch(K, seed=2)
    mask.mask.data.copy_(logits)
    mask.set_temperature(T)
    (mask(BASE, SOURCE) * weights).sum().backward()
    gate = torch.sigmoid(logits / T)
    change = ((SOURCE - BASE) @ W).squeeze(1)
    of_gate = (change * (weights.squeeze(1) @ W)).sum(0)
    torch.testing.assert_close(mask.mask.grad, of_gate * gate * (1 - gate) / T)
    free = W.clone().requires_grad_()
    ((BASE + ((SOURCE - BASE) @ free * gate) @ free.T) * weights).sum().backward()
    along = W.T @ free.grad
    tangent = free.grad - W @ (along + along.T) / 2
    torch.testing.assert_close(f.featurizer.rotate.subspace.basis.grad, tangent)
    mask.zero_grad()
    mask.get_sparsity_loss().backward()
    torch.testing.assert_close(mask.mask.grad, gate * (1 - gate) / T)
    hard = mask.eval()(BASE, SOURCE)
    assert torch.autograd.grad(hard.sum(), mask.mask, allow_unused=True) == (None,)


def test_gradients_of_half_precision_activations_reach_the_mask_in_single():
    mask = ca.Featurizer(n_features=D).get_mask_intervention()()
    mask.set_temperature(1e-2)
    base, source = BASE.half() * 1000, SOURCE.half() * 1000
    mask(base, source).float().sum().backward()
    torch.testing.assert_close(mask.mask.grad, (source.float() - base.float()).sum((0, 1)) * 0.25 / 1e-2)


def test_steering_replacing_and_interpolating_are_their_closed_forms():
    f, W = subspace(), basis()
    vector = batch(K, seed=3)
    per_example = batch(2, K, seed=4)
    features = BASE @ W
    steer, replace = f.get_steering_intervention()(), f.get_replace_intervention()()
    torch.testing.assert_close(steer(BASE, vector), BASE + vector @ W.T)
    torch.testing.assert_close(steer(BASE, per_example), BASE + (per_example @ W.T)[:, None])
    torch.testing.assert_close(replace(BASE, vector), BASE + (vector - features) @ W.T)
    torch.testing.assert_close(replace(BASE, torch.zeros(K)), BASE - features @ W.T)
    torch.testing.assert_close(steer(BASE, vector, [[1]] * 2), BASE + vector[1] * W[:, 1])
    torch.testing.assert_close(steer(BASE, vector, [[1], []])[0], BASE[0] + vector[1] * W[:, 1])
    assert torch.equal(steer(BASE, vector, [[1], []])[1], BASE[1])
    between = f.get_interpolation_intervention()()
    with pytest.raises(UsageError, match="no function to interpolate"):
        between(BASE, SOURCE)
    between.set_interpolation(lambda f_base, f_src, alpha: (1 - alpha) * f_base + alpha * f_src, alpha=0.25)
    torch.testing.assert_close(between(BASE, SOURCE), BASE + 0.25 * (SOURCE - BASE) @ W @ W.T)
    torch.testing.assert_close(between(BASE, SOURCE, [[2]] * 2), BASE + 0.25 * (SOURCE - BASE) @ W[:, 2:] @ W[:, 2:].T)
    between.set_interpolation(lambda f_base, f_src: f_src[..., :1])
    with pytest.raises(ShapeError, match="returned features of shape"):
        between(BASE, SOURCE)
    spans = batch(2, 4, D)
    torch.testing.assert_close(steer(spans, per_example), spans + (per_example @ W.T)[:, None])


def test_noise_goes_on_and_is_the_same_after_a_reset():
    f, W = subspace(), basis()
    noise = f.get_noise_intervention(seed=3)()
    first, second = noise(BASE, torch.tensor(2.0)), noise(BASE, torch.tensor(2.0))
    drawn = torch.randn(2, 1, K, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(first, BASE + 2 * drawn @ W.T)
    assert not torch.allclose(first, second)
    noise.reset_noise_rng()
    assert torch.equal(noise(BASE, torch.tensor(2.0)), first)
    other = f.get_noise_intervention()()
    assert f.get_noise_intervention(seed=3) is type(noise)
    assert not torch.allclose(other(BASE, torch.tensor(2.0)), first)
    scale = torch.tensor([0.0, 1.0, 0.0])
    moved = f.get_noise_intervention(seed=3)()(BASE, scale) - BASE
    torch.testing.assert_close(moved, drawn[..., 1:2] * W[:, 1])


# ---------------------------------------------------------------------- which features


@pytest.mark.parametrize("make", [subspace, lambda: ca.Featurizer(n_features=D)], ids=["subspace", "identity"])
@pytest.mark.parametrize("rows", [[], [[], []]])
def test_an_empty_list_of_features_changes_nothing(make, rows):
    intervention = make().get_interchange_intervention()(embed_dim=D)
    assert torch.equal(intervention(BASE, SOURCE, rows), BASE)
    assert not torch.equal(intervention(BASE, SOURCE, None), BASE)


def test_an_empty_list_changes_nothing_inside_a_model():
    patched = in_gpt2(ca.Featurizer(n_features=WIDTH).get_interchange_intervention())
    clean = tiny_model("gpt2")(INPUTS).logits
    torch.testing.assert_close(swapped(patched, [3], [[[], []]]), clean)
    assert not torch.allclose(swapped(patched, [3]), clean)


def test_the_features_that_are_set_are_those_that_every_intervention_acts_on():
    f, W = subspace(), basis()
    assert f.get_feature_indices() is None
    f.set_feature_indices([1])
    assert f.get_feature_indices() == [1]
    expected = BASE + (SOURCE - BASE) @ W[:, 1:2] @ W[:, 1:2].T
    torch.testing.assert_close(f.get_interchange_intervention()()(BASE, SOURCE), expected)
    mask = f.get_mask_intervention()()
    mask.set_temperature(1.0)
    mask.mask.data.fill_(50.0)
    torch.testing.assert_close(mask(BASE, SOURCE), expected)
    assert f.get_collect_intervention()()(BASE).shape == (2, 1, 1)
    every = f.get_interchange_intervention()()(BASE, SOURCE, [[0, 1, 2]] * 2)
    torch.testing.assert_close(every, BASE + (SOURCE - BASE) @ W @ W.T)
    f.set_feature_indices([])
    assert torch.equal(f.get_interchange_intervention()()(BASE, SOURCE), BASE)
    f.set_feature_indices(None)
    assert f.get_feature_indices() is None
    for wrong in ([3], [-1], [0, 0]):
        with pytest.raises(FeatureIndexError):
            f.set_feature_indices(wrong)


def test_a_mask_keeps_to_the_features_that_are_named():
    mask = ca.Featurizer(n_features=D).get_mask_intervention()()
    mask.set_temperature(1.0)
    mask.mask.data.fill_(50.0)
    result = mask(BASE, SOURCE, [[2], [0, 5]])
    assert (result != BASE).nonzero()[:, [0, 2]].tolist() == [[0, 2], [1, 0], [1, 5]]


def test_more_features_than_dimensions_are_collected_whole():
    f = ca.Featurizer(Halves(), Together(), id="halves")
    patched = in_gpt2(f.get_collect_intervention())
    (_, (collected,)), _ = patched({"input_ids": INPUTS}, [None], {"base": [[[3]] * 2]})
    assert collected.shape == (2, 1, 2 * WIDTH)
    few = f.get_collect_intervention()()(BASE, subspaces=[[9]] * 2)
    torch.testing.assert_close(few, (-BASE[..., 1:2]).relu())


@pytest.mark.parametrize("mode", ["interchange", "mask"])
@pytest.mark.parametrize("kind", ["subspace", "identity"])
def test_spans_of_several_tokens_are_featurized_token_by_token(mode, kind):
    W = basis(WIDTH, 4)
    rotation = ca.SubspaceFeaturizer(rotation_subspace=W)
    f = rotation if kind == "subspace" else ca.Featurizer(n_features=WIDTH)
    patched = in_gpt2(getattr(f, f"get_{mode}_intervention")(), units=2)
    if mode == "mask":
        (mask,) = patched.interventions.values()
        mask.set_temperature(1.0)
        mask.mask.data.fill_(60.0)
    result = swapped(patched, [1, 4])
    core = featurizers.create("identity", d_in=WIDTH) if kind == "identity" else f.as_featurizer()
    swap = featurizers.Interchange(core, source={"input_ids": OTHERS}, positions=[1, 4])
    model = tiny_model("gpt2")
    with featurizers.intervene(model, {"resid.post:1": swap}):
        torch.testing.assert_close(result, model(INPUTS).logits)


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        subspace,
        lambda: ca.Featurizer(n_features=D),
        lambda: ca.SAEFeaturizer(ToySAE()),
        lambda: ca.SAEFeaturizer(ToySAE(how="layer_norm")),
        lambda: ca.Featurizer(Halves(), Together(), n_features=2 * D),
    ],
    ids=["subspace", "identity", "sae", "normalizing sae", "modules"],
)
def test_what_changes_no_feature_gives_the_base_back_bit_for_bit(make, dtype):
    f, base, source = make(), BASE.to(dtype) * 30, SOURCE.to(dtype)
    assert torch.equal(f.get_interchange_intervention()()(base, base.clone()), base)
    mask = f.get_mask_intervention()()
    mask.set_temperature(1.0)
    mask.mask.data.fill_(-1.0)
    assert torch.equal(mask.eval()(base, source), base)


def test_neither_base_nor_source_is_written_into():
    f = ca.Featurizer(n_features=D)
    base, source = BASE.clone(), SOURCE.clone()
    result = f.get_interchange_intervention()(embed_dim=D)(base, source, [[0]] * 2)
    assert torch.equal(base, BASE)
    assert torch.equal(source, SOURCE)
    assert torch.equal(result[..., 0], SOURCE[..., 0])
    features, _ = f.featurize(base)
    features.zero_()
    assert torch.equal(base, BASE)


# ---------------------------------------------------------------------- sparse autoencoders


def test_an_autoencoder_that_normalizes_takes_interventions():
    sae = ToySAE(how="layer_norm")
    f = ca.SAEFeaturizer(sae)
    features, error = f.featurize(BASE)
    torch.testing.assert_close(f.inverse_featurize(features, error), BASE)
    result = f.get_interchange_intervention()()(BASE, SOURCE)
    expected = BASE + (sae.encode(SOURCE) - sae.encode(BASE)) @ sae.W_dec * BASE.std(-1, keepdim=True)
    torch.testing.assert_close(result, expected)
    with pytest.raises(UsageError, match="normalizes each x"):
        f.inverse_featurize(features, None)


def test_the_callers_autoencoder_keeps_its_flags_and_shares_its_memory():
    sae = ToySAE()
    f = ca.SAEFeaturizer(sae, id="mine")
    assert all(p.requires_grad for p in sae.parameters())
    assert not any(p.requires_grad for p in f.parameters())
    assert all(p.requires_grad for p in ca.SAEFeaturizer(sae, trainable=True).parameters())
    sae.W_dec.data.zero_()
    assert f.featurizer.sae.W_dec.eq(0).all()
    assert (f.n_features, f.id) == (20, "mine")
    intervention = f.get_interchange_intervention()()
    assert sum(name.endswith("W_enc") for name in intervention.state_dict()) == 1
    moved = copy.deepcopy(intervention).double()
    assert moved(BASE.double(), SOURCE.double()).dtype == torch.float64
    assert moved.featurizer._inverse[0].sae is moved.featurizer.forward_module.sae


def test_what_is_no_autoencoder_of_one_site_is_refused():
    with pytest.raises(UsageError, match="a transcoder"):
        ca.SAEFeaturizer(ToySAE(d_out=D))
    with pytest.raises(UsageError, match="not a Linear"):
        ca.SAEFeaturizer(nn.Linear(2, 2))


def test_saving_an_autoencoder_says_that_nothing_is_written(tmp_path):
    f = ca.SAEFeaturizer(ToySAE())
    with pytest.warns(UserWarning, match="no file is written: .* the autoencoder 'sae'; save it .*save_pretrained"):
        assert f.save_modules(tmp_path / "unit") == (None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["none", "layer_norm", "constant_norm_rescale"])
def test_an_autoencoder_of_saelens_is_saved_as_an_artefact(how, tmp_path):
    pytest.importorskip("sae_lens")
    from tests.plugins.sae_lens.test_sae_lens import make as make_sae

    f = ca.SAEFeaturizer(make_sae("standard", normalize_activations=how))
    f.set_feature_indices([3, 1])
    x, source = batch(2, 1, 16), batch(2, 1, 16, seed=1)
    again = featurizers.load(f.as_featurizer().save_pretrained(tmp_path / "it"))
    torch.testing.assert_close(again.encode(x), f.featurize(x)[0])
    torch.testing.assert_close(
        again.interchange(x, source, again.feature_sets["selected"]),
        f.get_interchange_intervention()()(x, source),
        atol=1e-4,
        rtol=1e-4,
    )


# ---------------------------------------------------------------------- construction


def test_featurizers_do_not_share_their_default_modules():
    one, other = ca.Featurizer(), ca.Featurizer()
    calls: list[int] = []
    one.featurizer.register_forward_hook(lambda *_: calls.append(1))
    other.featurize(BASE)
    assert not calls
    assert bool(one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_orthonormal_rotation_is_kept(dtype):
    W = basis(64, 5)
    f = ca.SubspaceFeaturizer(rotation_subspace=W.to(dtype))
    assert f.featurizer.rotate.weight.dtype == torch.float32
    if dtype == torch.float32:
        assert torch.equal(f.featurizer.rotate.weight, W)
    else:
        torch.testing.assert_close(f.featurizer.rotate.weight, W, atol=2 * torch.finfo(dtype).eps, rtol=0)
    result = f.featurizer.rotate.weight
    torch.testing.assert_close(result.T @ result, torch.eye(5))


def test_other_rotations_are_refused_and_not_replaced():
    with pytest.raises(BasisError, match="not orthonormal"):
        ca.SubspaceFeaturizer(rotation_subspace=batch(D, K))
    with pytest.raises(BasisError, match="must be transposed"):
        ca.SubspaceFeaturizer(rotation_subspace=basis().T)
    with pytest.raises(ConfigError, match="9 orthonormal directions do not fit into 8"):
        ca.SubspaceFeaturizer(shape=(8, 9))
    with pytest.raises(UsageError, match="`shape` or `rotation_subspace`, and not both"):
        ca.SubspaceFeaturizer(shape=(D, K), rotation_subspace=basis())
    with pytest.raises(UsageError, match="Provide either"):
        ca.SubspaceFeaturizer()
    with pytest.raises(UsageError, match="given together"):
        ca.Featurizer(Halves())


def test_a_new_rotation_follows_torchs_generator():
    rotations = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        rotations.append(ca.SubspaceFeaturizer(shape=(D, K)).featurizer.rotate.weight.detach())
    assert torch.equal(rotations[0], rotations[1])
    assert not torch.allclose(rotations[0], rotations[2])


def test_the_number_of_features_is_checked():
    f = subspace()
    with pytest.raises(ShapeError, match="given n_features=1, but has 3 features"):
        ca.Featurizer(f.featurizer, f.inverse_featurizer, n_features=1).get_mask_intervention()
    wrong = ca.Featurizer(Halves(), Together(), n_features=1).get_mask_intervention()()
    wrong.set_temperature(1.0)
    with pytest.raises(ShapeError, match="given n_features=1, but its module returns 16"):
        wrong(BASE, SOURCE)
    with pytest.raises(ValueError, match="`n_features` must be given"):
        ca.Featurizer().get_mask_intervention()
    mask = subspace().get_mask_intervention()()
    for call in (mask.get_temperature, mask.get_sparsity_loss, lambda: mask(BASE, SOURCE)):
        with pytest.raises(ValueError, match="temperature of the mask is not set"):
            call()


def test_modules_of_another_rotation_layer_work_too(tmp_path):
    layer = pyvene.models.layers.LowRankRotateLayer(D, K, init_orth=False)
    layer.weight.data.copy_(basis())
    layer = nn.utils.parametrizations.orthogonal(layer)
    f = ca.Featurizer(ca.SubspaceFeaturizerModule(layer), ca.SubspaceInverseFeaturizerModule(layer), n_features=K)
    same = subspace()
    torch.testing.assert_close(
        f.get_interchange_intervention()()(BASE, SOURCE), same.get_interchange_intervention()()(BASE, SOURCE)
    )
    f.get_interchange_intervention()()(BASE, SOURCE).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None
    f.save_modules(tmp_path / "unit")
    again = ca.Featurizer.load_modules(tmp_path / "unit")
    torch.testing.assert_close(again.featurizer.rotate.weight, layer.weight)


def test_the_builders_take_modules():
    f = subspace()
    pair = (f.featurizer, f.inverse_featurizer)
    expected = f.get_interchange_intervention()()(BASE, SOURCE)
    torch.testing.assert_close(ca.build_feature_interchange_intervention(*pair, "x")()(BASE, SOURCE), expected)
    torch.testing.assert_close(ca.build_feature_collect_intervention(pair[0], "x")()(BASE), BASE @ basis())
    collect = ca.build_feature_collect_intervention(Halves(), "halves")()
    assert str(collect) == "FeatureCollectIntervention(id=halves)"
    assert collect(BASE).shape == (2, 1, 2 * D)
    mask = ca.build_feature_mask_intervention(*pair, K, "x", tie_masks=True)()
    assert mask.mask.shape == (1,)
    vector = batch(K)
    for build, method in (
        (ca.build_feature_steering_intervention, f.get_steering_intervention),
        (ca.build_feature_replace_intervention, f.get_replace_intervention),
        (ca.build_feature_noise_intervention, f.get_noise_intervention),
    ):
        torch.testing.assert_close(build(*pair, "x")()(BASE, vector), method()()(BASE, vector))
    between = ca.build_feature_interpolation_intervention(*pair, "x")()
    between.set_interpolation(lambda f_base, f_src: f_src)
    torch.testing.assert_close(between(BASE, SOURCE), expected)


def test_the_star_brings_the_names_of_the_original():
    names: dict[str, Any] = {}
    exec("from featurizers_causalab.featurizers import *", names)
    modules = [f"{kind}{side}FeaturizerModule" for kind in ("Identity", "Subspace", "SAE") for side in ("", "Inverse")]
    builders = [f"build_feature_{what}_intervention" for what in ("interchange", "collect", "mask")]
    assert names.keys() >= {"Featurizer", "SubspaceFeaturizer", "SAEFeaturizer", *modules, *builders}


def test_any_featurizer_can_be_one_of_causalabstractions(tmp_path):
    core = featurizers.create("standardize", d_in=D) >> featurizers.create("subspace", d_in=D, n_features=K, seed=4)
    core.id = "mine"
    f = ca.Featurizer.of(core)
    assert (f.n_features, f.id, f.as_featurizer()) == (K, "mine", core)
    torch.testing.assert_close(f.get_interchange_intervention()()(BASE, SOURCE), core.interchange(BASE, SOURCE))
    features, error = f.featurize(BASE)
    torch.testing.assert_close(f.inverse_featurize(features, error), BASE)
    with pytest.raises(ConversionError, match="not the kind 'composition'"):
        f.save_modules(tmp_path / "unit")
    same = featurizers.create("subspace", d_in=D, n_features=K)
    assert ca.Featurizer.of(same).as_featurizer() is same
    chosen = featurizers.create("identity", d_in=D)
    chosen.feature_sets = {"selected": torch.tensor([2])}
    assert ca.Featurizer.of(chosen).get_feature_indices() == [2]


# ---------------------------------------------------------------------- a module like any other


def test_a_featurizer_is_a_module_with_parameters_that_move():
    f = subspace()
    assert [p.shape for p in f.parameters()] == [(D, K)]
    assert list(f.state_dict()) == ["featurizer.rotate.subspace.basis", "inverse_featurizer.rotate.subspace.basis"]
    assert f.to(torch.float64).featurizer.rotate.weight.dtype == torch.float64
    assert f(BASE.double())[0].dtype == torch.float64
    assert not any(p.requires_grad for p in subspace(trainable=False).parameters())
    (parameter,) = f.get_interchange_intervention()().parameters()
    assert parameter is f.featurizer.rotate.subspace.basis


def test_a_rotation_in_half_precision_works():
    f = subspace()
    f.to(torch.bfloat16)
    x = BASE.bfloat16()
    features, error = f.featurize(x)
    torch.testing.assert_close(f.inverse_featurize(features, error), x, atol=0.05, rtol=0)
    torch.testing.assert_close(f.inverse_featurize(features, None), features @ f.featurizer.rotate.weight.T)


def test_an_optimizer_with_its_default_weight_decay_leaves_a_rotation():
    f = subspace()
    optimizer = torch.optim.AdamW(f.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        f.featurize(BASE)[0].square().sum().neg().backward()
        optimizer.step()
    W = f.featurizer.rotate.weight
    torch.testing.assert_close(W.T @ W, torch.eye(K))
    assert not torch.allclose(W, basis(), atol=1e-2)
    assert f.featurizer.rotate.weight is W  # computed once for each step


def test_an_intervention_follows_its_featurizer_through_swaps_and_copies():
    f = subspace()
    cls = f.get_interchange_intervention()
    assert f.get_interchange_intervention() is cls
    other = ca.SubspaceFeaturizer(rotation_subspace=basis(seed=7))
    expected = other.get_interchange_intervention()()(BASE, SOURCE)
    f.featurizer, f.inverse_featurizer = other.featurizer, other.inverse_featurizer
    torch.testing.assert_close(f.get_interchange_intervention()()(BASE, SOURCE), expected)
    copied = copy.deepcopy(f)
    copied.featurizer.rotate.subspace.basis.data.copy_(basis(seed=8))
    torch.testing.assert_close(f.get_interchange_intervention()()(BASE, SOURCE), expected)
    W = basis(seed=8)
    torch.testing.assert_close(copied.get_interchange_intervention()()(BASE, SOURCE), BASE + (SOURCE - BASE) @ W @ W.T)
    plain = ca.Featurizer()
    plain.n_features = D
    assert plain.get_mask_intervention()().mask.shape == (D,)


def test_classes_and_instances_are_pickled_by_name():
    f = subspace()
    for name in ("interchange", "collect", "mask", "steering", "replace", "interpolation", "noise"):
        cls = getattr(f, f"get_{name}_intervention")()
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert "featurizers_causalab.interventions" in str(cls)


@pytest.mark.parametrize("mode", ["interchange", "mask"])
def test_pyvene_saves_an_intervention_and_loads_it_in_another_process(mode, tmp_path):
    f = ca.SubspaceFeaturizer(rotation_subspace=basis(WIDTH, 4), id="kept")
    patched = in_gpt2(getattr(f, f"get_{mode}_intervention")())
    if mode == "mask":
        (mask,) = patched.interventions.values()
        mask.mask.data.copy_(torch.linspace(-1, 1, 4))
    patched.save(str(tmp_path / "it"))
    run_python(f"""
        import torch, pyvene, torch.nn.modules.module
        from tests.support.models import tiny_model
        load = torch.load
        torch.load = lambda *a, **k: load(*a, **{{**k, "map_location": "cpu"}})
        loaded = pyvene.IntervenableModel.load({str(tmp_path / "it")!r}, tiny_model("gpt2"))
        (result,) = loaded.interventions.values()
        torch.save({{"str": str(result), **dict(result.named_parameters())}}, {str(tmp_path / "found")!r})
    """)
    result = torch.load(tmp_path / "found")
    assert torch.equal(result["featurizer.basis"], basis(WIDTH, 4))
    assert "id=kept" in result["str"]
    if mode == "mask":
        assert torch.equal(result["gate.logits"], torch.linspace(-1, 1, 4))


# ---------------------------------------------------------------------- files


def test_the_modules_of_a_featurizer_are_saved_and_loaded_with_their_class_and_name(tmp_path):
    f = subspace(id="DAS", tie_masks=True)
    path = tmp_path / "new" / "unit"
    assert f.save_modules(str(path)) == (f"{path}_featurizer", f"{path}_inverse_featurizer")
    assert sorted(p.name for p in path.parent.iterdir()) == ["unit_featurizer", "unit_inverse_featurizer"]
    for cls in (ca.Featurizer, ca.SubspaceFeaturizer):
        again = cls.load_modules(str(path))
        assert type(again) is ca.SubspaceFeaturizer
        assert (again.id, again.n_features, again.tie_masks) == ("DAS", K, True)
        assert torch.equal(again.featurizer.rotate.weight, f.featurizer.rotate.weight)
    ca.Featurizer(n_features=D).save_modules(path)  # replaces the files of the other
    again = ca.Featurizer.load_modules(path)
    assert (type(again), again.n_features, again.id, again.is_trivial()) == (ca.Featurizer, D, "null", True)
    with pytest.raises(UsageError, match="what was saved is a Featurizer, not a SubspaceFeaturizer"):
        ca.SubspaceFeaturizer.load_modules(path)
    with pytest.raises(ManifestError, match="is missing"):
        ca.Featurizer.load_modules(tmp_path / "none")


@pytest.mark.parametrize("trainable", [True, False])
def test_what_learns_is_known_without_gradients_too(trainable, tmp_path):
    with torch.no_grad():
        subspace(trainable=trainable).save_modules(tmp_path / "unit")
    (parameter,) = ca.Featurizer.load_modules(tmp_path / "unit").parameters()
    assert parameter.requires_grad is trainable


def test_modules_of_ones_own_are_refused_when_they_are_saved_and_not_when_they_are_loaded(tmp_path):
    f = ca.Featurizer(Halves(), Together(), n_features=2 * D, id="halves")
    for save in (lambda: f.save_modules(tmp_path / "unit"), f.to_dict, f.as_featurizer):
        with pytest.raises(ConversionError, match=r"halves: its map is that of a Halves.*docs/plugins.md"):
            save()
    assert list(tmp_path.iterdir()) == []


def test_a_saving_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    subspace(id="old").save_modules(tmp_path / "unit")
    save, saved = torch.save, []

    def fail(what: Any, where: Any) -> None:
        saved.append(where)
        if len(saved) > 1:
            raise OSError("disk full")
        save(what, where)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(featurizers.errors.ArtefactError, match="disk full"):
        ca.Featurizer(n_features=D).save_modules(tmp_path / "unit")
    monkeypatch.undo()
    assert ca.Featurizer.load_modules(tmp_path / "unit").id == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_dicts_keep_the_class_the_name_and_the_ties():
    f = subspace(id="DAS", tie_masks=True)
    data = f.to_dict()
    assert data["model_info"]["featurizer_class"] == "SubspaceFeaturizerModule"
    again = ca.Featurizer.from_dict(data)
    assert torch.equal(again.featurizer.rotate.weight, f.featurizer.rotate.weight)
    assert (again.id, again.tie_masks) == ("DAS", True)
    assert ca.Featurizer(n_features=D).to_dict() is None
    named = ca.Featurizer.from_dict(ca.Featurizer(n_features=D, id="mask", tie_masks=True).to_dict())
    assert (named.id, named.tie_masks, named.n_features) == ("mask", True, D)
    assert subspace(id="null").to_dict() is not None  # a rotation is never trivial
    with pytest.raises(ManifestError, match="from_dict: model_info holds"):
        ca.Featurizer.from_dict({"model_info": {}})


def test_a_trained_mask_is_kept_with_its_featurizer(tmp_path):
    f = subspace(id="DBM")
    mask = f.get_mask_intervention()()
    mask.mask.data.copy_(torch.tensor([1.0, -1.0, 0.0]))
    assert mask.keep() == f.get_feature_indices() == [0]
    again = featurizers.load(f.as_featurizer().save_pretrained(tmp_path / "it"))
    assert torch.equal(again.feature_sets["gate_logits"], mask.mask.data)
    assert again.feature_sets["selected"].tolist() == [0]
    assert sum(path.stat().st_size for path in (tmp_path / "it").iterdir()) < 4000


def test_an_artefact_is_a_fraction_of_the_two_files(tmp_path):
    f = ca.SubspaceFeaturizer(shape=(256, 4))
    f.save_modules(tmp_path / "unit")
    f.as_featurizer().save_pretrained(tmp_path / "artefact")
    two = sum(path.stat().st_size for path in tmp_path.glob("unit_*"))
    assert two > 50 * (tmp_path / "artefact" / "model.safetensors").stat().st_size


# ---------------------------------------------------------------------- as CausalAbstraction trains


@pytest.mark.parametrize("mode", ["interchange", "mask"])
def test_training_through_pyvene_learns_in_the_objects_that_the_unit_holds(mode):
    torch.manual_seed(0)
    f = ca.SubspaceFeaturizer(shape=(WIDTH, 4), id="DAS")
    before = f.featurizer.rotate.weight.detach().clone()
    patched = in_gpt2(getattr(f, f"get_{mode}_intervention")())
    patched.set_device("cpu")
    patched.disable_model_gradients()
    patched.eval()
    (intervention,) = patched.interventions.values()
    optimizer = torch.optim.AdamW(intervention.parameters(), lr=0.02, weight_decay=0)
    temperatures = torch.linspace(1.0, 0.1, 13).half()
    losses = []
    for step in range(12):
        if mode == "mask":
            intervention.set_temperature(temperatures[step])
        logits = swapped(patched, [3])
        loss = nn.functional.cross_entropy(logits[:, -1], torch.tensor([1, 2]))
        if mode == "mask":
            loss = loss + 1e-3 * intervention.get_sparsity_loss()
        loss.backward()
        optimizer.step()
        patched.set_zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not torch.allclose(f.featurizer.rotate.weight, before)
    assert f.as_featurizer().basis is next(iter(f.parameters()))
    if mode == "mask":
        assert intervention.training  # pyvene's eval() does not change this, so the gate stays soft
        assert intervention.mask.abs().max() > 0
