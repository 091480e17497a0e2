"""Kind `causal-basis`: its laws, prefixes, artefact, and the energy of a vector computed in several ways."""

import json

import featurizers
import pytest
import pyvene
import torch
from featurizers import Ablate, Interchange, Site
from featurizers.errors import BasisError, ConfigError, FeatureIndexError, SiteError, UsageError, WeightsError
from featurizers.testing import FeaturizerContract
from featurizers_causal_basis import BasisRecord, CausalBasisFeaturizer, LogitLens, extract_causal_bases
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from tests.support.models import LAYERS, WIDTH, hooked, module_of, prompts, read, tiny_model


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def record(**changes):
    return BasisRecord(**{"mode": "mean", "side": "output", "readout": "logit-lens", "n_tokens": 18, **changes})


def basis(d_in=8, n_features=3, site="resid.post:1", **changes):
    vectors = torch.linalg.qr(normal(d_in, n_features, dtype=torch.float64)).Q.float()
    energies = torch.linspace(0.5, 0.1, n_features)
    return CausalBasisFeaturizer.of(vectors, energies, normal(d_in, seed=3), record(**changes), site=site)


class TestCausalBasis(FeaturizerContract):
    @pytest.fixture
    def featurizer(self):
        return basis(steps=[0, 2, 1], inversions=1, joint_energy=0.7, solver={"restarts": 3, "tolerance": 1e-3})

    @pytest.fixture
    def activations(self):
        return 3 * normal(12, 8, seed=1) + 1


class TestCompleteBasis(TestCausalBasis):
    @pytest.fixture
    def featurizer(self):
        return basis(n_features=8)


def test_coordinates_are_those_of_the_vectors():
    f, x = basis(), normal(5, 4, 8, seed=1)
    features, error = f.featurize(x)
    torch.testing.assert_close(features, torch.einsum("...d,dk->...k", x, f.vectors))
    torch.testing.assert_close(error @ f.vectors, torch.zeros(5, 4, 3), rtol=0, atol=1e-6)
    assert not list(f.parameters())


def test_a_prefix_keeps_everything_that_is_true_of_it():
    f = basis(steps=[0, 2, 1], inversions=1, joint_energy=0.7, model="owner/name")
    f.id, f.metadata, f.special_tokens = "layer 1", {"data": "text"}, (0,)
    f.feature_sets = {"selected": torch.tensor([2, 0]), "gate": torch.tensor([0.1, 0.2, 0.3])}
    part = f.truncate(2)
    assert torch.equal(part.vectors, f.vectors[:, :2])
    assert torch.equal(part.energies, f.energies[:2])
    assert torch.equal(part.mean, f.mean)
    assert part.record == f.record.model_copy(update={"steps": (0, 2), "joint_energy": None})
    assert (part.id, part.metadata, part.site, part.special_tokens) == (f.id, f.metadata, f.site, (0,))
    assert part.feature_sets["selected"].tolist() == [0]
    assert torch.equal(part.feature_sets["gate"], torch.tensor([0.1, 0.2]))
    assert f.truncate(3).record == f.record
    for k in (0, 4, -1, True, 2.0):
        with pytest.raises(UsageError, match="keep 1 to 3"):
            f.truncate(k)
    part.directions[0] = 0  # a copy
    assert f.directions[0].norm() > 0.9


def test_directions_below_an_energy_are_dropped():
    f = basis()  # 0.5, 0.3, 0.1
    assert f.min_energy(0.31).n_features == 1
    assert f.min_energy(float(f.energies[1])).n_features == 2
    assert f.min_energy(0.0).n_features == 3
    with pytest.raises(UsageError, match=r"the greatest is 0\.5"):
        f.min_energy(0.6)


def test_ablation_values_are_the_values_of_ablated_features():
    f, x = basis(), normal(6, 8, seed=1)
    by_hand = x + (f.mean - x) @ f.vectors[:, 1:2] @ f.vectors[:, 1:2].mT
    torch.testing.assert_close(f.ablate(x, [1], f.ablation_values()[[1]]), by_hand)
    assert torch.equal(basis(mode="zero").ablation_values(), torch.zeros(3))
    assert torch.equal(f.ablation_values("zero"), torch.zeros(3))
    with pytest.raises(UsageError, match="interchange"):
        f.ablation_values("resample")
    with pytest.raises(UsageError, match="'median'"):
        f.ablation_values("median")


def test_an_invalid_basis_is_refused():
    good, energies, mean = basis().vectors, torch.tensor([0.5, 0.3, 0.1]), torch.zeros(8)
    skewed = good.clone()
    skewed[:, 1] += 1e-3 * skewed[:, 0]
    cases = [
        (skewed, energies, mean, "not orthonormal: VᵀV differs from I by 0.001"),
        (2 * good, energies, mean, "not orthonormal"),
        (good.mT, energies, mean, "columns of a real matrix"),
        (good[:, 0], energies, mean, "columns of a real matrix"),
        (good.long(), energies, mean, "columns of a real matrix"),
        (good * float("nan"), energies, mean, "directions hold NaN"),
        (good, energies[:2], mean, r"energies must be real of shape \(3,\)"),
        (good, energies.flip(0), mean, "descending"),
        (good, energies / 0, mean, "energies hold NaN or infinity"),
        (good, energies, mean[:7], r"mean must be real of shape \(8,\)"),
    ]
    for vectors, sizes, centre, words in cases:
        with pytest.raises(BasisError, match=words):
            CausalBasisFeaturizer.of(vectors, sizes, centre, record())
    with pytest.raises(BasisError, match="2 steps for 3 vectors"):
        CausalBasisFeaturizer.of(good, energies, mean, record(steps=[1, 0]))
    with pytest.raises(SiteError, match="the output of the block"):
        CausalBasisFeaturizer.of(good, energies, mean, record(), site="resid.pre:1")
    assert CausalBasisFeaturizer.of(good, energies, mean, record(side="input"), site="resid.pre:1").site.layer == 1
    with pytest.raises(ConfigError, match="record"):
        featurizers.create("causal-basis", d_in=8, n_features=3)
    with pytest.raises(ConfigError, match="do not fit"):
        featurizers.create("causal-basis", d_in=2, n_features=3, record=record())


def test_a_record_is_immutable_and_refuses_unknown_fields():
    with pytest.raises(ValidationError, match="frozen"):
        record().mode = "zero"
    for changes in ({"mode": "median"}, {"side": "left"}, {"units": "bits"}, {"n_tokens": 0}, {"colour": "red"}):
        with pytest.raises(ValidationError):
            record(**changes)


# ---------------------------------------------------------------------- artefact


def test_an_artefact_keeps_everything(tmp_path):
    f = basis(steps=[0, 2, 1], inversions=1, joint_energy=0.7, solver={"restarts": 3}, readout_sha256="0" * 64)
    f.site = Site("resid.post", 1).at(model="owner/name")
    folder = f.save_pretrained(tmp_path / "basis")
    again = featurizers.load(folder, verify=True)
    assert again.record == f.record
    assert (again.site, again.site.model) == (f.site, "owner/name")
    for name, tensor in f.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert json.loads((folder / "config.json").read_text())["config"]["record"]["units"] == "nats/token"


@pytest.mark.parametrize("d_in", [7, 64, 96])
@pytest.mark.parametrize("own_file", [True, False])
def test_a_complete_basis_gives_the_same_bits_after_loading(d_in, own_file, tmp_path):
    """Whichever way the file lays the tensors out: matrix products round by the address that they begin at."""
    f = basis(d_in=d_in, n_features=d_in)
    folder = f.save_pretrained(tmp_path / "basis")
    if not own_file:
        save_file({name: tensor.clone() for name, tensor in f.state_dict().items()}, folder / "model.safetensors")
    again = featurizers.load(folder)
    for rows in (1, 3, 64):
        x = normal(rows, d_in, seed=rows)
        features, error = f.featurize(x)
        assert all(torch.equal(*pair) for pair in zip(again.featurize(x), (features, error), strict=True))
        assert torch.equal(again.inverse_featurize(features, error), f.inverse_featurize(features, error))
        assert torch.equal(again.encode(x), f.encode(x))
        assert torch.equal(again.interchange(x, x.flip(0), [0, d_in - 1]), f.interchange(x, x.flip(0), [0, d_in - 1]))
    assert torch.equal(again.ablation_values(), f.ablation_values())


def test_the_first_vectors_are_loaded_alone(tmp_path):
    f = basis(steps=[0, 2, 1], joint_energy=0.7)
    folder = f.save_pretrained(tmp_path / "basis")
    for indices in (range(2), slice(2), [0, 1]):
        part = featurizers.load(folder, indices=indices)
        assert torch.equal(part.vectors, f.vectors[:, :2])
        assert part.record == f.truncate(2).record
    for indices in ([1], [1, 0], [0, 2]):
        with pytest.raises(UsageError, match="only the first directions of a causal basis can be loaded alone"):
            featurizers.load(folder, indices=indices)
    with pytest.raises(FeatureIndexError):
        featurizers.load(folder, indices=range(4))


def test_invalid_weights_are_not_loaded(tmp_path):
    folder = basis().save_pretrained(tmp_path / "basis")
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not mapped: the file is overwritten
    wrong = {
        "not orthonormal": {"directions": tensors["directions"] * 1.01},
        "descending": {"energies": tensors["energies"].flip(0)},
        "NaN or infinity": {"energies": tensors["energies"] / 0},
        "shape": {"energies": tensors["energies"][:2]},
        "lacks": {"mean": None},
    }
    for words, changes in wrong.items():
        save_file({n: t for n, t in {**tensors, **changes}.items() if t is not None}, path)
        with pytest.raises(WeightsError, match=words):
            featurizers.load(folder)
    save_file(tensors, path)
    featurizers.load(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_basis_can_be_loaded_in_another_dtype(dtype, tmp_path):
    folder = basis(d_in=64, n_features=20).save_pretrained(tmp_path / "basis")
    f = featurizers.load(folder, dtype=dtype)
    assert f.directions.dtype == dtype
    x = normal(3, 64, dtype=dtype)
    assert torch.equal(f.interchange(x, x), x)


# ---------------------------------------------------------------------- the energy of a vector in a model


def divergence(clean, edited):
    """Return the mean over tokens of KL(clean ‖ edited), in nats."""
    p, q = clean.double().log_softmax(-1), edited.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(("side", "kind", "component"), [
    ("input", "resid.pre", "block_input"),
    ("output", "resid.post", "block_output"),
])  # fmt: skip
def test_energies_are_the_same_natively_in_pyvene_and_by_a_plain_hook(architecture, side, kind, component):
    model, ids = tiny_model(architecture), prompts(3, 6)
    module, at = module_of(model, architecture, kind, 1)
    hidden = read(model, module, at, input_ids=ids)
    mean = hidden.flatten(0, 1).mean(dim=0)
    vectors = torch.linalg.qr(normal(WIDTH, 3, dtype=torch.float64)).Q.float()
    clean = model(ids).logits.detach()

    def by_hand(v):
        with torch.no_grad(), hooked(module, at, lambda h: h + ((mean - h) @ v).unsqueeze(-1) * v):
            return divergence(clean, model(ids).logits)

    energies = torch.tensor([by_hand(v) for v in vectors.mT])
    order = energies.argsort(descending=True)
    f = CausalBasisFeaturizer.of(vectors[:, order], energies[order], mean, record(side=side), site=f"{kind}:1")

    built = pyvene.IntervenableModel(
        pyvene.IntervenableConfig(
            [{"layer": 1, "component": component, "unit": "pos", "max_number_of_units": 6}],
            intervention_types=f.get_interchange_intervention(),
        ),
        model,
    )
    (key,) = built.interventions
    where = [[list(range(6))] * 3]
    for j in range(3):
        value = f.ablation_values()[[j]]
        with torch.no_grad(), featurizers.intervene(model, {f.site: Ablate(f, indices=[j], value=value)}):
            native = divergence(clean, model(ids).logits)
        _, output = built(
            {"input_ids": ids},
            unit_locations={"sources->base": (where, where)},
            source_representations={key: mean.expand(3, 6, WIDTH)},
            subspaces=[[[j]] * 3],
        )
        expected = pytest.approx(float(f.energies[j]), rel=1e-4)
        assert native == expected
        assert divergence(clean, output.logits.detach()) == expected
    assert f.energies[0] > 1.05 * f.energies[2] > 1e-3


@pytest.mark.parametrize(("side", "kind"), [("input", "resid.pre"), ("output", "resid.post")])
def test_extracted_energies_are_those_of_features_set_to_their_mean(side, kind):
    model, ids = tiny_model("llama"), prompts(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 0] = False
    (f,) = extract_causal_bases(LogitLens(model), ids, 3, side=side, layers=[1], mask=mask, max_iter=10)
    module, at = module_of(model, "llama", kind, 1)
    x = read(model, module, at, input_ids=ids)[mask]
    torch.testing.assert_close(f.mean, x.mean(dim=0))
    features, error = f.featurize(x)

    def logits(h):
        return model.lm_head(model.model.norm(h)).detach()

    for j in range(3):
        edited = features.clone()
        edited[:, j] = x.mean(dim=0) @ f.vectors[:, j]
        again = divergence(logits(x), logits(f.inverse_featurize(edited, error)))
        assert float(f.energies[j]) == pytest.approx(again, rel=1e-4)
    assert f.record.n_tokens == len(x) == 20


def test_the_two_sides_of_a_block_give_different_energies():
    model, ids = tiny_model("gpt2"), prompts(3, 6)
    clean, divergences = model(ids).logits.detach(), {}
    for kind in ("resid.pre", "resid.post"):
        f = basis(d_in=WIDTH, site=f"{kind}:1", side={"resid.pre": "input", "resid.post": "output"}[kind])
        with torch.no_grad(), featurizers.intervene(model, {f.site: Ablate(f, indices=[0])}):
            divergences[kind] = divergence(clean, model(ids).logits)
    assert abs(divergences["resid.pre"] - divergences["resid.post"]) > 0.01 * divergences["resid.post"]


def test_it_interchanges_at_its_site_like_any_other_featurizer():
    model, base, source = tiny_model("llama"), prompts(2, 5), prompts(2, 5, seed=1)
    f = basis(d_in=WIDTH, n_features=WIDTH, site=f"resid.post:{LAYERS - 1}")
    f.energies = torch.linspace(1, 0, WIDTH)
    with torch.no_grad(), featurizers.intervene(model, {f.site: Interchange(f, source={"input_ids": source})}):
        swapped = model(base).logits
    torch.testing.assert_close(swapped, model(source).logits, rtol=1e-4, atol=1e-4)
