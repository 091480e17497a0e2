"""Dictionaries: laws for every rule, formulas written out by hand, and sparse forms compared with dense forms."""

from __future__ import annotations

import copy
import multiprocessing
import pickle

import featurizers
import pytest
import torch
from featurizers import DictionaryFeaturizer
from featurizers.builtin import sparse
from featurizers.errors import ConfigError, FeatureIndexError, PositionError, ShapeError, UsageError
from featurizers.features import SparseFeatures
from featurizers.testing import FeaturizerContract

from tests.support.dictionaries import RULES, dictionary, features_by_hand, normalized_by_hand, weights
from tests.support.models import tiny_model

NORMALIZATIONS = ("none", "layer-norm", "constant-norm", "scale")
VARIANTS = [
    *[(rule, {}) for rule in RULES],
    *[
        ("jumprelu", {"normalize": how, "pre_bias": True, **scale})
        for how, scale in zip(NORMALIZATIONS, ({}, {}, {}, {"input_scale": 2.5}), strict=True)
    ],
    ("relu", {"bias": -3.0}),  # few features fire, so that the sparse forms are taken
    ("gated", {"bias": -3.0, "pre_bias": True}),
    ("topk", {"k": 3, "normalize": "layer-norm", "pre_bias": True}),
    ("abstopk", {"k": 3}),
    ("groupmax", {"k": 4}),
]


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    """Let these tiny dictionaries take the code paths of large ones."""
    monkeypatch.setattr("featurizers.builtin.dictionary.SMALL", 0)


def batch(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rule", "options"), VARIANTS, ids=str)
class TestEveryRule(FeaturizerContract):
    tolerance = 3e-5

    @pytest.fixture
    def featurizer(self, rule, options):
        return dictionary(rule, **options)

    @pytest.fixture
    def activations(self):
        return batch(12)


class TestASlice(FeaturizerContract):
    """A slice is a featurizer too; this slice holds the first features, so that their numbers are also columns."""

    tolerance = 3e-5

    @pytest.fixture
    def featurizer(self):
        return dictionary("jumprelu").take(range(20))

    @pytest.fixture
    def activations(self):
        return batch(12)


class TestDecoderNormUnits(FeaturizerContract):
    tolerance = 3e-5

    @pytest.fixture(params=[("relu", -3.0, "decoder-norm"), ("topk", 0.0, "decoder-norm"), ("gated", -1.0, "folded")])
    def featurizer(self, request):
        rule, bias, units = request.param
        return dictionary(rule, k=3, bias=bias).in_units(units)

    @pytest.fixture
    def activations(self):
        return batch(12)


# ---------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("how", NORMALIZATIONS)
@pytest.mark.parametrize("pre_bias", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_features_and_reconstruction_are_the_formulas(rule, pre_bias, how):
    options = {"input_scale": 2.5} if how == "scale" else {}
    f = dictionary(rule, pre_bias=pre_bias, normalize=how, dtype=torch.float64, **options)
    t = {name: tensor.double() for name, tensor in weights(rule).items()}
    x = batch(4, 3).double()
    n, factor, offset = normalized_by_hand(how, x)
    expected = features_by_hand(rule, t, n - t["b_dec"] if pre_bias else n)
    features, error = f.featurize(x)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)
    x_hat = (expected @ t["W_dec"] + t["b_dec"]) * factor + offset
    residual = error[0] if isinstance(error, tuple) else error
    torch.testing.assert_close(x - residual, x_hat, rtol=1e-9, atol=1e-9)
    assert (expected != 0).any(-1).all(), "the case is empty"


@pytest.mark.parametrize("how", NORMALIZATIONS)
def test_a_reconstruction_is_what_the_formulas_decode(how):
    t, x = weights("topk"), batch(2, 5)
    f = dictionary("topk", k=3, normalize=how, input_scale=2.5 if how == "scale" else 1.0)
    normal, factor, offset = normalized_by_hand(how, x)
    expected = features_by_hand("topk", t, normal, k=3) @ t["W_dec"] + t["b_dec"]
    reconstruction = f.reconstruct(x)[1]
    torch.testing.assert_close(reconstruction, expected * factor + offset, rtol=1e-4, atol=1e-5)
    through = featurizers.create("identity", d_in=8) >> f
    torch.testing.assert_close(through.reconstruct(x)[1], reconstruction)
    pca = featurizers.create("subspace", d_in=8, n_features=3, seed=0)
    basis = pca.orthonormal_basis().detach()
    torch.testing.assert_close(pca.reconstruct(x)[1], x @ basis @ basis.T)


def test_jump_is_not_jumprelu():
    x = torch.eye(2)
    eye = torch.eye(2)
    jump = DictionaryFeaturizer.from_tensors(eye, eye, rule="jump", jump=0.5)
    jumprelu = DictionaryFeaturizer.from_tensors(eye, eye, rule="jumprelu", threshold=1.5)
    assert torch.equal(jump.encode(x), torch.eye(2) * 1.5)
    assert torch.equal(jumprelu.encode(x), torch.zeros(2, 2))
    at_threshold = DictionaryFeaturizer.from_tensors(eye, eye, rule="jumprelu", threshold=1.0)
    assert torch.equal(at_threshold.encode(x), torch.zeros(2, 2)), "the threshold itself does not fire"


def test_activations_of_zero_length_are_no_accident():
    f = dictionary("relu", normalize="constant-norm")
    x = torch.zeros(2, 8)
    features, error = f.featurize(x)
    assert features.isfinite().all()
    torch.testing.assert_close(f.inverse_featurize(features, error), x)


# ---------------------------------------------------------------------- sparse forms


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "identity"])
@pytest.mark.parametrize("how", ["none", "layer-norm"])
def test_the_sparse_form_is_the_dense_form(rule, how, monkeypatch):
    f = dictionary(rule, k=4, bias=-6.0, normalize=how, pre_bias=True)
    base, source = batch(5, 2), batch(5, 2, seed=2)
    gates = {
        "everything": None,
        "a mask": torch.arange(64) % 3 == 0,
        "a gate": torch.linspace(0, 1, 64),
        "a gate of each example": torch.rand(5, 1, 64, generator=torch.Generator().manual_seed(3)),
    }
    for name, gate in gates.items():
        assert f._can_skip_zeros()
        sparse_form = f.blend(base, source, gate)
        monkeypatch.setattr(DictionaryFeaturizer, "_can_skip_zeros", lambda self: False)
        dense = f.blend(base, source, gate)
        monkeypatch.undo()
        torch.testing.assert_close(sparse_form, dense, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(sparse_form, base)


def test_the_sparse_form_is_taken_where_few_features_fire(monkeypatch):
    calls = []
    times_rows = sparse.times_rows
    monkeypatch.setattr(sparse, "times_rows", lambda *a: (calls.append(1), times_rows(*a))[1])
    base, source = batch(16), batch(16, seed=2)
    dictionary("relu", bias=-6.0).interchange(base, source)
    assert calls
    calls.clear()
    dictionary("relu", bias=2.0).interchange(base, source)
    assert not calls, "most features fire, and a matrix product is faster"


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "jump", "gated", "topk", "abstopk", "groupmax"])
def test_gradients_of_the_sparse_form_are_those_of_the_formulas(rule):
    t = weights(rule, bias=-6.0)
    f = dictionary(rule, k=4, bias=-6.0, pre_bias=True)
    base, source = (batch(6, seed=seed).requires_grad_() for seed in (1, 2))
    gate = torch.linspace(0.1, 0.9, 64).requires_grad_()
    cotangent = batch(6, seed=3)

    def by_hand() -> torch.Tensor:
        before, after = (features_by_hand(rule, t, x - t["b_dec"], k=4) for x in (base, source))
        return base + (gate * (after - before)) @ t["W_dec"]

    def gradients(result: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((result * cotangent).sum(), [base, source, gate])

    for gradient, expected in zip(gradients(f.mask(base, source, gate)), gradients(by_hand()), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
        assert expected.abs().max() > 0


def test_weights_that_are_trained_get_the_gradient_of_the_dense_form():
    f = dictionary("relu", bias=-6.0).requires_grad_()
    f.interchange(batch(6), batch(6, seed=2)).square().sum().backward()
    assert all(f.get_parameter(name).grad.abs().max() > 0 for name in ("W_enc", "b_enc", "W_dec"))


@pytest.mark.parametrize("rule", ["relu", "topk", "gated", "identity"])
@pytest.mark.parametrize("units", ["raw", "decoder-norm"])
def test_sparse_features_are_the_features(rule, units):
    f = dictionary(rule, k=3, bias=-6.0).in_units(units)
    x = batch(4, 2)
    values, indices = f.encode_sparse(x)
    dense = torch.zeros(4, 2, 64).scatter_add(-1, indices, values)
    torch.testing.assert_close(dense, f.encode(x))
    torch.testing.assert_close(
        f.decode_sparse(SparseFeatures(values, indices)), f.decode(f.encode(x)), rtol=1e-5, atol=1e-5
    )
    assert values.shape[-1] < 64 or rule == "identity"


def test_sparse_features_of_no_token_and_of_none_that_fires():
    f = dictionary("relu", bias=-6.0)
    assert f.encode_sparse(batch(0)).values.shape == (0, 0)
    silent = DictionaryFeaturizer.from_tensors(torch.ones(3, 8), torch.ones(3, 8), torch.full((3,), -1e3))
    values, indices = silent.encode_sparse(batch(2))
    assert values.shape == indices.shape == (2, 0)
    assert torch.equal(silent.decode_sparse(SparseFeatures(values, indices)), torch.zeros(2, 8))
    assert torch.equal(silent.interchange(batch(2), batch(2, seed=2)), batch(2))


def test_encoding_a_few_features_reads_their_rows_alone():
    f = dictionary("jumprelu")
    chosen = torch.tensor([5, 60, 7])
    expected = f.encode(batch(3), chosen)
    state = f.state_dict()
    others = [i for i in range(64) if i not in chosen.tolist()]
    for name in ("W_enc", "b_enc", "threshold"):
        state[name][others] = float("nan")
    assert torch.equal(f.encode(batch(3), chosen), expected)


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "jump", "gated"])
def test_chunks_give_what_the_whole_gives(rule, monkeypatch):
    f = dictionary(rule, pre_bias=True)
    x = batch(7)
    monkeypatch.setattr("featurizers.builtin.encoder.CHUNK", 10)
    active = f._encoder().active(x, share=1.0)
    assert active is not None
    assert (active.rows.diff() >= 0).all(), "they are ordered by token"
    features = torch.zeros(7, 64).index_put((active.rows, active.columns), active.values)
    torch.testing.assert_close(features, f.encode(x), rtol=1e-5, atol=1e-5)
    values, indices = f.encode_sparse(x)
    torch.testing.assert_close(torch.zeros(7, 64).scatter_add(-1, indices, values), f.encode(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(f.interchange(x, x.clone()), x)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_no_bit_of_the_base_is_lost_whatever_the_dtypes(dtype, weights_dtype):
    f = dictionary("relu", bias=-6.0, dtype=weights_dtype)
    base = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(f.interchange(base, base.clone()), base)
    assert torch.equal(f.interchange(base, base.clone(), [0, 3]), base)


# ---------------------------------------------------------------------- slices


def test_a_slice_keeps_the_numbers_of_its_features():
    whole = dictionary("jumprelu", bias=0.0)
    part = whole.take([60, 7, 0])
    base, source = batch(4), batch(4, seed=2)
    assert part.n_features == 3
    assert torch.equal(part.collect(base), whole.collect(base, [60, 7, 0]))
    assert torch.equal(part.collect(base, [0, 60]), whole.collect(base, [0, 60]))
    torch.testing.assert_close(part.interchange(base, source, [7]), whole.interchange(base, source, [7]))
    torch.testing.assert_close(part.interchange(base, source), whole.interchange(base, source, [60, 7, 0]))
    torch.testing.assert_close(part.steer(base, 2.0, [0]), whole.steer(base, 2.0, [0]))
    rows = [[7], [], [0, 60], [60]]
    torch.testing.assert_close(part.interchange(base, source, rows), whole.interchange(base, source, rows))
    chosen = torch.zeros(64, dtype=torch.bool)
    chosen[[7, 9]] = True
    torch.testing.assert_close(part.interchange(base, source, chosen), whole.interchange(base, source, [7]))
    assert torch.equal(part.collect(base, slice(0, 8)), whole.collect(base, [7, 0]))
    assert torch.equal(part.take([7]).collect(base), whole.collect(base, [7]))
    whole.feature_sets = {"found": torch.tensor([60, 7]), "mask": chosen}
    again = whole.take([60, 7, 9])
    for name in ("found", "mask"):
        assert torch.equal(
            again.collect(base, again.feature_sets[name]).sort().values,
            whole.collect(base, whole.feature_sets[name]).sort().values,
        )
    with pytest.raises(FeatureIndexError, match="feature 5 is not among the 3 of 64"):
        part.interchange(base, source, [5])
    with pytest.raises(FeatureIndexError):
        whole.take([64])


def test_loading_a_slice_reads_it_alone_and_is_that_slice(tmp_path):
    whole = dictionary("jumprelu").in_units("decoder-norm")
    whole.site = featurizers.Site("resid.post", 1)
    whole.feature_sets = {"found": torch.tensor([7, 9])}
    folder = whole.save_pretrained(tmp_path / "whole")
    part = featurizers.load(folder, indices=[60, 7, 8, 9], verify=True)
    taken = whole.take([60, 7, 8, 9])
    assert part.site == whole.site
    assert {n: t.shape for n, t in part.state_dict().items()} == {n: t.shape for n, t in taken.state_dict().items()}
    for name, tensor in taken.state_dict().items():
        assert torch.equal(part.state_dict()[name], tensor), name
    x = batch(3)
    assert torch.equal(part.collect(x, part.feature_sets["found"]), whole.collect(x, [7, 9]))
    again = featurizers.load(part.save_pretrained(tmp_path / "part"))
    assert torch.equal(again.collect(x, [9]), whole.collect(x, [9]))
    with pytest.raises(UsageError, match="slice of a dictionary already"):
        featurizers.load(tmp_path / "part", indices=[7])
    with pytest.raises(FeatureIndexError, match="64"):
        featurizers.load(folder, indices=[64])


def test_a_slice_of_what_compares_features_is_refused(tmp_path):
    f = dictionary("topk", k=3)
    with pytest.raises(UsageError, match="compares all features"):
        featurizers.load(f.save_pretrained(tmp_path / "topk"), indices=[1])
    with pytest.raises(UsageError, match="compares all features"):
        f.take([1])
    subspace = featurizers.create("subspace", d_in=8, n_features=2).save_pretrained(tmp_path / "subspace")
    with pytest.raises(UsageError, match="'subspace' is loaded whole"):
        featurizers.load(subspace, indices=[1])


# ---------------------------------------------------------------------- units


@pytest.mark.parametrize("rule", RULES)
def test_units_change_the_features_and_nothing_else(rule):
    raw = dictionary(rule, k=4, bias=-1.0)
    x, norms = batch(5), raw.W_dec.norm(dim=-1)
    features, error = raw.featurize(x)
    for units in ("decoder-norm", "folded"):
        if units == "folded" and rule in ("topk", "abstopk", "groupmax"):
            with pytest.raises(UsageError, match="cannot be rescaled"):
                raw.in_units(units)
            continue
        converted = raw.in_units(units)
        in_units, residual = converted.featurize(x)
        torch.testing.assert_close(in_units, features * norms, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(residual, error, rtol=1e-5, atol=1e-5)
        back = converted.in_units("raw")
        torch.testing.assert_close(back.encode(x), features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back.W_dec, raw.W_dec)
        assert back.config.units == "raw"
    if rule == "relu":
        torch.testing.assert_close(raw.in_units("folded").W_dec.norm(dim=-1), torch.ones(64))
        torch.testing.assert_close(
            raw.in_units("folded").in_units("decoder-norm").encode(x), features * norms, rtol=1e-5, atol=1e-5
        )


def test_a_decoder_row_of_zeros_has_no_unit():
    f = DictionaryFeaturizer.from_tensors(torch.ones(2, 3), torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
    with pytest.raises(UsageError, match="feature 1 has a decoder row of zeros"):
        f.in_units("decoder-norm")


# ---------------------------------------------------------------------- heads, special tokens, low precision


def test_heads_may_stand_apart():
    f = dictionary("relu", n_heads=2)
    flat, source = batch(3, 5), batch(3, 5, seed=2)
    apart = flat.unflatten(-1, (2, 4))
    features, error = f.featurize(apart)
    assert torch.equal(features, f.featurize(flat)[0])
    torch.testing.assert_close(f.inverse_featurize(features, error), apart)
    for mixed in (source, source.unflatten(-1, (2, 4))):
        swapped = f.interchange(apart, mixed)
        assert swapped.shape == apart.shape
        assert torch.equal(swapped.flatten(-2), f.interchange(flat, source))
    assert torch.equal(f.steer(apart, 1.0, [0]).flatten(-2), f.steer(flat, 1.0, [0]))
    assert torch.equal(f.splice(apart, lambda _: None), apart)
    with pytest.raises(ShapeError):
        f.collect(torch.zeros(3, 4, 2))


def test_special_tokens_are_left_alone():
    model = tiny_model("gpt2")
    width = model.config.hidden_size
    f = dictionary("relu", d_in=width, special_tokens=[7])
    plain = dictionary("relu", d_in=width)
    base = {"input_ids": torch.tensor([[7, 1, 2], [3, 7, 4]])}
    seen = {}

    def run(featurizer, **options):
        site = "resid.post:0"
        keep = featurizers.Collect(featurizers.create("identity"))
        steer = featurizers.Steer(featurizer, delta=3.0, indices=[0], **options)
        with featurizers.intervene(model, {site: [steer, keep]}) as collected:
            model(**base)
        return collected[site]

    seen = {
        "none": featurizers.collect(model, base, ["resid.post:0"])["resid.post:0"],
        "all": run(plain),
        "some": run(f),
    }
    special = base["input_ids"] == 7
    assert torch.equal(seen["some"][special], seen["none"][special])
    assert torch.equal(seen["some"][~special], seen["all"][~special])
    assert not torch.equal(seen["all"][special], seen["none"][special])
    at = run(f, positions=[0, 1])
    assert torch.equal(at[special], seen["none"][special])
    assert torch.equal(at[0, 1], seen["all"][0, 1])
    with (
        featurizers.intervene(model, {"resid.post:0": featurizers.Steer(f, delta=1.0)}),
        pytest.raises(PositionError, match="give the model input_ids"),
    ):
        model(inputs_embeds=torch.zeros(1, 2, width))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["relu", "topk", "jumprelu"])
def test_an_edit_of_nothing_is_exact_in_a_dictionary_of_low_precision(rule, dtype):
    f = dictionary(rule, k=3, bias=-6.0, dtype=dtype, normalize="layer-norm", pre_bias=True)
    base = (batch(6) * 30).to(dtype)
    assert torch.equal(f.interchange(base, base.clone()), base)
    assert torch.equal(f.mask(base, batch(6, seed=2).to(dtype), torch.zeros(64)), base)
    assert torch.equal(f.interchange(base, base.clone(), [0, 3]), base)
    assert f.encode(base).dtype == dtype


# ---------------------------------------------------------------------- rules of plugins, and refusals


def test_a_new_rule_is_one_function(monkeypatch):
    from featurizers.registry.plugin_host import PluginHost

    @featurizers.activation_rule("capped.relu", tensors=("cap",), sparse=True)
    def capped(pre: torch.Tensor, cap: torch.Tensor) -> torch.Tensor:
        return torch.minimum(pre.clamp(min=0), cap)

    monkeypatch.setattr(
        PluginHost,
        "rule",
        lambda self, name, known=PluginHost.rule: capped if name == capped.name else known(self, name),
    )
    t = weights("relu", bias=-1.0)
    f = DictionaryFeaturizer.from_tensors(**t, rule="capped.relu", cap=torch.full((64,), 0.7))
    x, source = batch(4), batch(4, seed=2)
    expected = (x @ t["W_enc"].T + t["b_enc"]).clamp(0, 0.7)
    torch.testing.assert_close(f.encode(x), expected)
    torch.testing.assert_close(f.encode(x, torch.tensor([3, 1])), expected[:, [3, 1]])
    after = (source @ t["W_enc"].T + t["b_enc"]).clamp(0, 0.7)
    torch.testing.assert_close(f.interchange(x, source), x + (after - expected) @ t["W_dec"], rtol=1e-5, atol=1e-5)


REFUSED = {
    "an unknown rule": ({"rule": "softplus"}, "no installed plugin has the activation rule 'softplus'"),
    "an import path": ({"rule": "os.system"}, "no installed plugin has the activation rule 'os.system'"),
    "an option too many": ({"rule_options": {"k": 3}}, r"takes the options \[\]"),
    "an option missing": ({"rule": "topk"}, r"takes the options \['k'\]"),
    "k of none": ({"rule": "topk", "rule_options": {"k": 0}}, "k must be between 1 and the 16 features, got 0"),
    "k of too many": ({"rule": "topk", "rule_options": {"k": 17}}, "got 17"),
    "k of a part": ({"rule": "topk", "rule_options": {"k": 1.5}}, "got 1.5"),
    "unequal groups": ({"rule": "groupmax", "rule_options": {"k": 3}}, "do not make 3 equal groups"),
    "a scale of nothing": ({"input_scale": 2.0}, "belongs to normalize='scale'"),
    "a negative scale": ({"normalize": "scale", "input_scale": -1.0}, "greater than 0"),
    "unequal heads": ({"n_heads": 3}, "do(es)? not make 3 equal heads"),
    "an unknown normalisation": ({"normalize": "batch-norm"}, "normalize"),
    "a slice of less": ({"slice_of": 3}, "cannot be a slice of 3"),
}


@pytest.mark.parametrize(("config", "words"), REFUSED.values(), ids=REFUSED)
def test_a_config_that_does_not_fit_is_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        featurizers.create("dictionary", d_in=8, n_features=16, **config)


def test_tensors_that_do_not_fit_are_refused():
    w = torch.ones(4, 3)
    with pytest.raises(ShapeError, match=r"\(4, 3\) and \(3, 4\)"):
        DictionaryFeaturizer.from_tensors(w, w.T)
    with pytest.raises(ShapeError, match=r"b_enc has shape \(3,\), it must be \(4,\)"):
        DictionaryFeaturizer.from_tensors(w, w, torch.ones(3))
    with pytest.raises(ConfigError, match="threshold"):
        DictionaryFeaturizer.from_tensors(w, w, rule="jumprelu")
    with pytest.raises(ConfigError, match="threshold"):
        DictionaryFeaturizer.from_tensors(w, w, threshold=1.0)
    with pytest.raises(ConfigError, match=r"special_tokens\.0"):
        DictionaryFeaturizer.from_tensors(w, w, special_tokens=["a"])
    with pytest.raises(UsageError, match="the error that featurize returned"):
        dictionary().inverse_featurize(torch.zeros(1, 64), None)


def test_weights_are_shared_where_they_can_be_and_need_no_gradient():
    w = torch.randn(4, 3)
    f = DictionaryFeaturizer.from_tensors(w, w.clone().T.contiguous().T)
    assert f.W_enc.data_ptr() == w.data_ptr()
    assert f.W_dec.is_contiguous()
    assert not any(p.requires_grad for p in f.parameters())


@pytest.mark.parametrize("how", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_under_autocast_are_those_of_the_formulas_in_single_precision(dtype, how):
    t = weights("relu")
    scale = {"input_scale": 2.5} if how == "scale" else {}
    f = DictionaryFeaturizer.from_tensors(**t, normalize=how, **scale)
    x = batch(6) * 100_000  # more than float16 holds
    expected = (normalized_by_hand(how, x)[0] @ t["W_enc"].T + t["b_enc"]).clamp(min=0)
    with torch.autocast("cpu", dtype):
        found = [f.encode(x), f.featurize(x)[0], f.collect(x)]
        assert torch.equal(f.interchange(x, x.clone()), x)
        assert torch.equal(f.mask(x, x.flip(0), torch.zeros(64)), x)
        torch.testing.assert_close(f.inverse_featurize(*f.featurize(x)), x, rtol=1e-5, atol=1e-5 * float(x.max()))
    for features in found:
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def overflowing(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return activations of which one token is beyond float16, and others that are not."""
    base = batch(4)
    base[1, 3] = 1e5
    return base.to(dtype), batch(4, seed=2).to(dtype)


HALF = {
    **{
        f"{rule}-{how}": (lambda rule=rule, how=how: dictionary(rule, k=4, normalize=how, pre_bias=True).half())
        for rule in RULES
        for how in ("none", "layer-norm", "constant-norm")
    },
    "subspace": lambda: featurizers.create("subspace", d_in=8, n_features=3).half(),
    "composition": lambda: (
        featurizers.create("subspace", d_in=8, n_features=8).half()
        >> featurizers.create("subspace", d_in=8, n_features=3)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HALF)
def test_a_token_that_overflows_float16_is_given_back_or_refused(kind, dtype):
    f, (base, source) = HALF[kind](), overflowing(dtype)
    n = f.n_features
    for result in (
        f.interchange(base, base.clone()),
        f.interchange(base, base.clone(), [0]),
        f.interchange(base, source, []),
        f.interchange(base, source, [[0], [], [1, 2], [0]])[1:2],
        f.mask(base, source, torch.zeros(n)),
        f.mask(base, base.clone(), torch.full((n,), 0.3)),
        f.steer(base, 0.0),
        f.steer(base, torch.tensor([[1.0], [0.0], [1.0], [1.0]]).expand(4, n))[1:2],
        f.splice(base, lambda _: None),
    ):
        assert torch.equal(result, base if len(result) == 4 else base[1:2])
    fine = f.interchange(base[2:], source[2:])
    assert fine.isfinite().all()
    for edit in (
        lambda: f.interchange(base, source),
        lambda: f.interchange(source, base),
        lambda: f.interchange(base, source, [0]),
        lambda: f.mask(base, source, torch.full((n,), 0.3)),
        lambda: f.steer(base, 1.0),
        lambda: f.ablate(base),
        lambda: f.splice(base, lambda z: torch.zeros_like(z) + 1),
    ):
        with pytest.raises(UsageError, match=r"float16, which ends at 65504, and activations of up to .*e\+0[45]"):
            edit()
    assert f.float().interchange(base, source).isfinite().all()


# ---------------------------------------------------------------------- other processes


@pytest.mark.parametrize("rule", RULES)
def test_a_dictionary_is_pickled_and_saved_by_torch(rule, tmp_path):
    f, x = dictionary(rule, k=4), batch(6)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), f)
    torch.save(module, tmp_path / "module.pt")
    for again in (
        pickle.loads(pickle.dumps(f)),
        torch.load(tmp_path / "module.pt", weights_only=False)[1],
        copy.deepcopy(f),
        pickle.loads(pickle.dumps(featurizers.create("identity", d_in=8) >> f)),
    ):
        assert torch.equal(again.encode(x), f.encode(x))
        assert torch.equal(again.interchange(x, x.flip(0)), f.interchange(x, x.flip(0)))
    assert pickle.loads(pickle.dumps(f)).rule is f.rule


def test_a_dictionary_works_in_a_spawned_process():
    fs, x = [dictionary(rule, k=4) for rule in RULES], batch(6)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.starmap_async(encoded, [(f, x.numpy()) for f in fs]).get(timeout=120)
    for f, features in zip(fs, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(features), f.encode(x))


def encoded(f, x):
    return f.encode(torch.from_numpy(x)).numpy()


def test_a_gate_of_exactly_zero_is_closed():
    """Rajamanoharan et al. 2024, equation 4: the gate is the indicator of what is above zero."""
    f = DictionaryFeaturizer.from_tensors(
        torch.eye(3),
        torch.eye(3),
        rule="gated",
        b_gate=torch.full((3,), -1.0),
        r_mag=torch.zeros(3),
        b_mag=torch.ones(3),
    )
    x = torch.tensor([[0.5, 1.0, 1.5]])
    assert f.encode(x).tolist() == [[0.0, 0.0, 2.5]]
    assert f.encode_sparse(x).indices.tolist() == [[2]]
