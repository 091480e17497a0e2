"""Classes of the dictionary-learning plugin, compared with golden tensors of dictionary_learning itself."""

from __future__ import annotations

import importlib.util
import sys
import types

import featurizers_dictionary_learning as dl
import pytest
import torch
from featurizers.errors import ConfigError, UsageError, WeightsError

from tests.support.dictionary_learning import NAMES, SEED, D, F, K, close, golden, model

SCALED = [name for name in NAMES if "scaled" in golden(name)[1]]


@pytest.mark.parametrize("name", NAMES)
def test_the_classes_are_those_of_dictionary_learning(name, tmp_path):
    state, expected = golden(name)
    torch.save(state, tmp_path / "ae.pt")
    autoencoder = getattr(dl, name).from_pretrained(str(tmp_path / "ae.pt"), device="cpu")
    assert {n: t.shape for n, t in autoencoder.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert (autoencoder.activation_dim, autoencoder.dict_size) == (D, F)
    x = expected["x"].clone().requires_grad_()
    close(autoencoder.encode(x), expected["features"])
    close(autoencoder(x), expected["x_hat"])
    close(autoencoder.decode(expected["features"]), expected["x_hat"])
    (autoencoder.encode(x) * torch.linspace(-1, 1, F)).sum().backward()
    close(x.grad, expected["gradient"], 1e-5)
    x_hat, f = autoencoder(x, output_features=True)
    close(x_hat, expected["x_hat"])
    close(f, expected["first_features" if name in SEED else "features"])
    assert all(parameter.requires_grad for parameter in autoencoder.parameters())


@pytest.mark.parametrize("name", SCALED)
def test_biases_are_scaled_like_activations(name):
    _, expected = golden(name)
    autoencoder = model(name)
    autoencoder.scale_biases(2.0)
    close(autoencoder.encode(expected["x"]), expected["scaled"])
    if "BatchTopK" in name:
        autoencoder.threshold.fill_(-1.0)
        autoencoder.scale_biases(2.0)
        assert float(autoencoder.threshold) == -1


@pytest.mark.parametrize("name", NAMES)
def test_new_ones_have_the_same_tensors(name):
    sizes = {"AutoEncoderTopK": [K], "BatchTopKSAE": [K], "MatryoshkaBatchTopKSAE": [K, [16, 16, 32]]}.get(name, [])
    autoencoder = getattr(dl, name)(D, F, *sizes)
    assert {n: (t.shape, t.dtype) for n, t in autoencoder.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in golden(name)[0].items()
    }
    rows = autoencoder.W_dec if hasattr(autoencoder, "W_dec") else autoencoder.decoder.weight.T
    close(rows.norm(dim=1), torch.full((F,), 0.1 if name == "AutoEncoderNew" else 1.0))
    assert autoencoder(torch.randn(2, 3, D)).shape == (2, 3, D)


def test_ghost_mode():
    _, expected = golden("AutoEncoder")
    autoencoder, mask = model("AutoEncoder"), torch.arange(F) % 3 == 0
    x_hat, x_ghost = autoencoder(expected["x"], ghost_mask=mask)
    close(x_hat, expected["x_hat"])
    close(x_ghost, expected["x_ghost"])
    x_hat, x_ghost, f = autoencoder(expected["x"], output_features=True, ghost_mask=mask)
    close(x_hat, expected["x_hat"])
    close(x_ghost, expected["x_ghost"])
    close(f, expected["features"])


def test_gates():
    _, expected = golden("GatedAutoEncoder")
    autoencoder, x = model("GatedAutoEncoder"), expected["x"]
    f, gate = autoencoder.encode(x, return_gate=True)
    close(f, expected["features"])
    close(gate, expected["gate"])
    normalized = autoencoder.encode(x, normalize_decoder=True)
    close(normalized, expected["normalized"])
    close(autoencoder.decode(normalized, normalize_decoder=True), expected["x_hat"])
    close(autoencoder(x, output_features=True)[1], expected["normalized"])
    close(autoencoder(x, output_features=True, normalize_decoder=False)[1], expected["features"])
    ones = dl.GatedAutoEncoder(D, F, initialization=lambda module: module.r_mag.data.fill_(1.0))
    assert (ones.r_mag == 1).all()
    with pytest.raises(UsageError, match="must be 'default' or a function of the module, not 'orthogonal'"):
        dl.GatedAutoEncoder(D, F, initialization="orthogonal")


def test_the_jump_is_an_offset():
    _, expected = golden("JumpAutoEncoder")
    autoencoder = model("JumpAutoEncoder")
    f, pre_jump = autoencoder.encode(expected["x"], output_pre_jump=True)
    close(pre_jump, expected["pre_jump"])
    close(f, torch.where(pre_jump > 0, pre_jump + autoencoder.jump, torch.zeros(())))
    x_hat, f2, pre2 = autoencoder(expected["x"], output_pre_jump=True)
    assert torch.equal(f2, f)
    assert torch.equal(pre2, pre_jump)
    close(x_hat, expected["x_hat"])


def test_jumprelu_with_and_without_pre_bias():
    _, expected = golden("JumpReluAutoEncoder")
    autoencoder = model("JumpReluAutoEncoder")
    close(autoencoder.encode(expected["x"], output_pre_jump=True)[1], expected["pre_jump"])
    autoencoder.apply_b_dec_to_input = True
    close(autoencoder.encode(expected["x"]), expected["pre_biased"])
    close(autoencoder.as_featurizer().encode(expected["x"]), expected["pre_biased"])


def test_top_k_and_its_threshold():
    _, expected = golden("AutoEncoderTopK")
    autoencoder, x = model("AutoEncoderTopK"), expected["x"]
    f, values, indices, p = autoencoder.encode(x, return_topk=True)
    assert values.shape == indices.shape == (6, K)
    assert torch.equal(f.gather(-1, indices), values)
    assert ((f > 0) <= (p > 0)).all()
    close(autoencoder.encode(x, use_threshold=True), expected["above"])


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
@pytest.mark.parametrize("batch_mode", [False, True])
def test_three_axes_are_tokens_like_any_other(name, batch_mode):
    """dictionary_learning zeroes positions of the sequence instead of features, and counts k for each sequence."""
    _, expected = golden(name)
    autoencoder, x = model(name), expected["x"]
    flat, active, p = autoencoder.encode(x, return_active=True, use_threshold=not batch_mode)
    close(flat, expected["batch_features" if batch_mode else "features"])
    assert torch.equal(active, (flat > 0).any(0))
    assert (p > 0).sum() > (flat > 0).sum()
    apart, active_apart, _ = autoencoder.encode(x.reshape(2, 3, D), return_active=True, use_threshold=not batch_mode)
    assert torch.equal(apart.reshape(6, F), flat)
    assert torch.equal(active_apart, active)
    assert autoencoder.encode(x[0], return_active=True)[1].shape == (F,)
    if batch_mode:
        assert (flat > 0).sum() == 6 * K


def test_groups_that_are_not_active_are_silent_features():
    _, expected = golden("MatryoshkaBatchTopKSAE")
    autoencoder, x = model("MatryoshkaBatchTopKSAE"), expected["x"]
    autoencoder.active_groups = 1
    close(autoencoder.encode(x), expected["first_group"])
    apart = autoencoder.encode(x.reshape(1, 6, D))
    close(apart[0], expected["first_group"])
    assert (apart[..., 16:] == 0).all()
    assert (apart[0, :, :16] > 0).any(-1).all()  # no position is zeroed
    f = autoencoder.as_featurizer()
    assert (f.n_features, f.numbers.tolist()) == (16, list(range(16)))
    close(f.encode(x), expected["first_group"][:, :16])
    close(x - f.featurize(x)[1], autoencoder(x), 1e-5)


def test_identity():
    identity = dl.IdentityDict(4)
    x = torch.randn(2, 4)
    assert identity(x) is x
    assert identity(x, output_features=True) == (x, x)
    assert identity.decode(identity.encode(x)) is x
    assert (identity.dict_size, dl.IdentityDict().dict_size) == (4, None)
    assert dl.IdentityDict(4, dtype=torch.float16)(x).dtype == torch.float16
    assert dl.IdentityDict.from_pretrained(4, "no file").activation_dim == 4
    f = identity.as_featurizer()
    assert (f.kind, f.d_in) == ("identity", 4)


def test_units_are_raw_and_the_other_is_offered(tmp_path):
    state, expected = golden("AutoEncoder")
    torch.save(state, tmp_path / "ae.pt")
    raw = dl.AutoEncoder.from_pretrained(tmp_path / "ae.pt")
    normalized = dl.AutoEncoder.from_pretrained(tmp_path / "ae.pt", normalize_decoder=True)
    close(normalized.norms(), torch.ones(F))
    close(normalized.encode(expected["x"]), expected["normalized"], 1e-5)  # the default of later versions
    close(normalized(expected["x"]), expected["x_hat"], 1e-5)
    close(raw.encode(expected["x"]), expected["features"])
    for units in ("folded", "decoder-norm"):
        close(raw.as_featurizer().in_units(units).encode(expected["x"]), expected["normalized"], 1e-5)
    before = {n: t.clone() for n, t in normalized.state_dict().items()}
    normalized.normalize_decoder()
    assert all(torch.equal(before[n], t) for n, t in normalized.state_dict().items())
    with torch.no_grad():
        raw.decoder.weight[:, 3] = 0
    with pytest.raises(UsageError, match="the decoder column of feature 3 is zero"):
        raw.normalize_decoder()
    assert raw.encode(expected["x"]).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_class_and_its_featurizer_are_one_map(name):
    autoencoder = model(name)
    x, source = torch.randn(2, 2, 3, D, generator=torch.Generator().manual_seed(0))
    f = autoencoder.as_featurizer()
    features, error = f.featurize(x)
    close(features, autoencoder.encode(x))
    x_hat = autoencoder.decode(autoencoder.encode(x))
    close(x - error, x_hat, 1e-5)
    mixed = autoencoder.encode(x)
    mixed[..., [3, 40]] = autoencoder.encode(source)[..., [3, 40]]
    close(f.interchange(x, source, [3, 40]), autoencoder.decode(mixed) + x - x_hat, 1e-5)
    grads = []
    for encode, decode in ((autoencoder.encode, autoencoder.decode), (f.encode, f.decode)):
        for through in (lambda z: z * torch.linspace(-1, 1, F), lambda z, decode=decode: decode(z).square()):
            leaf = x.clone().requires_grad_()
            through(encode(leaf)).sum().backward()
            grads.append(leaf.grad)
    close(grads[2], grads[0], 1e-5)
    close(grads[3], grads[1], 1e-5)
    with torch.no_grad():  # further training must not change the featurizer
        for parameter in autoencoder.parameters():
            parameter.add_(1.0)
    assert torch.equal(f.encode(x), features)


def test_gradients_of_the_weights_are_those_of_the_formula():
    autoencoder = model("AutoEncoder")
    x = torch.randn(5, D, dtype=torch.float64)
    autoencoder.double()
    x_hat, f = autoencoder(x, output_features=True)
    (0.5 * (x_hat - x).square().sum()).backward()
    e = (x_hat - x).detach()
    pre = (e @ autoencoder.decoder.weight) * (f > 0)
    close(autoencoder.decoder.weight.grad, e.T @ f, 1e-9)
    close(autoencoder.encoder.bias.grad, pre.sum(0), 1e-9)
    close(autoencoder.encoder.weight.grad, pre.T @ (x - autoencoder.bias), 1e-9)
    close(autoencoder.bias.grad, (e - pre @ autoencoder.encoder.weight).sum(0), 1e-9)


# ---------------------------------------------------------------------- from a file


def test_dtypes_and_devices(tmp_path):
    state, _ = golden("AutoEncoder")
    path = tmp_path / "ae.pt"
    torch.save({n: t.half() for n, t in state.items()}, path)
    assert dl.AutoEncoder.from_pretrained(path).bias.dtype == torch.float32
    assert dl.AutoEncoder.from_pretrained(path, dtype=None).bias.dtype == torch.float16
    assert dl.AutoEncoder.from_pretrained(path, "cpu", torch.bfloat16).bias.dtype == torch.bfloat16
    with pytest.raises(UsageError, match=r"which is a dtype; write dtype=torch\.float16"):
        dl.AutoEncoder.from_pretrained(path, torch.float16)
    autoencoder = dl.AutoEncoder.from_pretrained(path, dtype=None)
    torch.save({n: torch.zeros_like(t) for n, t in state.items()}, path)  # must not change what was loaded
    assert torch.equal(autoencoder.bias, state["bias"].half())


def test_what_is_asked_of_a_file_must_be_there(tmp_path):
    for name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        torch.save(golden(name)[0], tmp_path / f"{name}.pt")
        assert int(getattr(dl, name).from_pretrained(tmp_path / f"{name}.pt", k=K).k) == K
        with pytest.raises(UsageError, match="its k is 5, not 6"):
            getattr(dl, name).from_pretrained(tmp_path / f"{name}.pt", k=6)
    with pytest.raises(UsageError, match=r"featurizers\.load\('sae-lens:RELEASE/ID'\)"):
        dl.JumpReluAutoEncoder.from_pretrained(load_from_sae_lens=True, release="r", sae_id="s")
    with pytest.raises(UsageError, match=r"no options but dtype and device; got .'release'"):
        dl.JumpReluAutoEncoder.from_pretrained(tmp_path / "x.pt", release="r")
    with pytest.raises(WeightsError, match=r"x\.pt cannot be read"):
        dl.AutoEncoder.from_pretrained(tmp_path / "x.pt")
    torch.save(golden("JumpReluAutoEncoder")[0], tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"lacks 'encoder\.weight', and has .'W_dec'"):
        dl.AutoEncoder.from_pretrained(tmp_path / "x.pt")
    state, _ = golden("AutoEncoder")
    for wrong, words in (
        ({**state, "gain": torch.ones(F)}, 'Unexpected key.*"gain"'),
        ({n: t for n, t in state.items() if n != "bias"}, 'Missing key.*"bias"'),
        ({**state, "bias": torch.ones(F)}, "size mismatch for bias"),
        ({**state, "bias": 3.0}, "no state dict of a AutoEncoder"),
        ([1, 2], "no state dict of a AutoEncoder"),
    ):
        with pytest.raises(WeightsError, match=words):
            dl.AutoEncoder.from_state(wrong, "here")
    state, _ = golden("MatryoshkaBatchTopKSAE")
    for wrong, words in (
        ({"k": torch.tensor(2.5)}, "k must be a positive integer, not 2.5"),
        ({"k": torch.tensor(0)}, "k must be a positive integer, not 0"),
        ({"group_sizes": torch.tensor([16, 16])}, "sum to dict_size 64, got"),
    ):
        with pytest.raises(WeightsError, match=words):
            dl.MatryoshkaBatchTopKSAE.from_state({**state, **wrong}, "here")


def test_sizes_are_checked():
    with pytest.raises(ConfigError, match="sum to dict_size 64"):
        dl.MatryoshkaBatchTopKSAE(D, F, 3, [1, 2])
    for k in (0, -1, True, 2.0):
        with pytest.raises(ConfigError, match="k must be a positive integer, not"):
            dl.BatchTopKSAE(D, F, k)


# ---------------------------------------------------------------------- the package's own name


def test_an_alias_serves_code_written_for_the_package(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "dictionary_learning"]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    try:
        dl.alias()
        dl.alias()
        from dictionary_learning import AutoEncoder
        from dictionary_learning.dictionary import GatedAutoEncoder, IdentityDict, JumpReluAutoEncoder
        from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
        from dictionary_learning.trainers.top_k import AutoEncoderTopK
        from dictionary_learning.utils import load_dictionary

        classes = (AutoEncoder, GatedAutoEncoder, IdentityDict, JumpReluAutoEncoder, AutoEncoderTopK, BatchTopKSAE)
        assert all(cls is getattr(dl, cls.__name__) for cls in (*classes, MatryoshkaBatchTopKSAE))
        assert load_dictionary is dl.load_dictionary
        assert not issubclass(BatchTopKSAE, AutoEncoderTopK)  # so that isinstance tells them apart
        with pytest.raises(ModuleNotFoundError, match=r"dictionary_learning\.buffer"):
            importlib.import_module("dictionary_learning.buffer")
        assert importlib.util.find_spec("dictionary_learning.utils")
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "dictionary_learning":
                del sys.modules[name]
    package = types.ModuleType("dictionary_learning")
    package.__file__ = "/site-packages/dictionary_learning/__init__.py"
    monkeypatch.setitem(sys.modules, "dictionary_learning", package)
    with pytest.raises(UsageError, match="already imported, from '/site-packages/"):
        dl.alias()
