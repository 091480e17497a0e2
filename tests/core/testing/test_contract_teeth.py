"""Conformance suite: a featurizer with any of these faults fails it, and a correct one passes."""

import inspect

import featurizers
import pytest
import torch
from featurizers.errors import UnknownKindError
from featurizers.registry.plugin_host import PluginHost
from featurizers.testing import FeaturizerContract
from featurizers_identity import IdentityFeaturizer
from featurizers_subspace import StandardizeFeaturizer, SubspaceFeaturizer
from pydantic import BaseModel, ConfigDict


def broken_laws(featurizer, activations, tmp_path):
    """Yield the names of the laws that a featurizer breaks."""
    for name, law in inspect.getmembers(FeaturizerContract, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        values = {"featurizer": featurizer(), "activations": activations.clone(), "tmp_path": tmp_path / name}
        wanted = {key: values[key] for key in inspect.signature(law).parameters if key in values}
        try:
            law(FeaturizerContract(), **wanted)
        except (Exception, pytest.fail.Exception):
            yield name


def subspace():
    return featurizers.create("subspace", d_in=8, n_features=3, seed=5)


def identity():
    return featurizers.create("identity", d_in=8)


def standardize():
    return StandardizeFeaturizer.fit(3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) + 2)


@pytest.fixture
def activations():
    return 3 * torch.randn(12, 8, generator=torch.Generator().manual_seed(0)) + 2


@pytest.mark.parametrize("sound", [subspace, identity, standardize])
def test_a_sound_featurizer_breaks_no_law(sound, activations, tmp_path):
    assert list(broken_laws(sound, activations, tmp_path)) == []


def drop_the_error(patch):
    original = SubspaceFeaturizer.featurize
    patch(SubspaceFeaturizer, "featurize", lambda self, x: (original(self, x)[0], None))


def zero_the_error(patch):
    original = SubspaceFeaturizer.featurize

    def featurize(self, x):
        features, error = original(self, x)
        return features, torch.zeros_like(error)

    patch(SubspaceFeaturizer, "featurize", featurize)


def ignore_the_indices(patch):
    from featurizers.features import featurizer as module

    original = module.select
    patch(module, "select", lambda indices, n, device=None: original(None, n, device))


def ignore_the_indices_of_each_example(patch):
    from featurizers.features.indices import Selection

    original = Selection.mask_for
    patch(Selection, "mask_for", lambda *a: original(*a).any(0))


def flip_the_sign_of_an_edit(patch):
    original = SubspaceFeaturizer.apply_edit
    patch(SubspaceFeaturizer, "apply_edit", lambda self, b, f, e, c=None: original(self, b, e, f, c))


def flip_the_sign_of_the_inverse(patch):
    original = SubspaceFeaturizer.inverse_featurize
    patch(SubspaceFeaturizer, "inverse_featurize", lambda self, f, e: original(self, -f, e))


def change_the_base_in_place(patch):
    original = SubspaceFeaturizer.apply_edit
    patch(SubspaceFeaturizer, "apply_edit", lambda self, b, *a: b.copy_(original(self, b.clone(), *a)).clone())


def hand_the_base_back(patch):
    from featurizers.features.featurizer import Featurizer

    original = Featurizer.interchange

    def interchange(self, base, source, indices=None):
        return base if indices == [] else original(self, base, source, indices)

    patch(Featurizer, "interchange", interchange)


def alias_the_source(patch):
    patch(IdentityFeaturizer, "featurize", lambda self, x: (x, None))


def keep_state_on_the_module(patch):
    original, inverse = SubspaceFeaturizer.featurize, SubspaceFeaturizer.inverse_featurize

    def featurize(self, x):
        features, self._error = original(self, x)
        return features, None

    patch(SubspaceFeaturizer, "featurize", featurize)
    patch(SubspaceFeaturizer, "inverse_featurize", lambda self, f, _: inverse(self, f, self._error))


def consume_state_on_the_module(patch):
    original, inverse = StandardizeFeaturizer.featurize, StandardizeFeaturizer.inverse_featurize

    def featurize(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return original(self, x)

    def inverse_featurize(self, features, error):
        self.calls -= 1
        return inverse(self, features, error) + max(0, -self.calls)

    patch(StandardizeFeaturizer, "featurize", featurize)
    patch(StandardizeFeaturizer, "inverse_featurize", inverse_featurize)


def compute_in_bfloat16(patch):
    original = SubspaceFeaturizer.encode
    patch(SubspaceFeaturizer, "encode", lambda self, x, c=None: original(self, x.bfloat16(), c))


def round_the_features_to_the_models_dtype(patch):
    original = SubspaceFeaturizer.encode
    patch(SubspaceFeaturizer, "encode", lambda self, x, c=None: original(self, x, c).to(x.dtype))


def decode_both_sides_without_a_difference(patch):
    def apply_edit(self, base, features, edited, columns=None):
        full, error = self.featurize(base)
        full = edited if columns is None else full.index_copy(-1, columns, edited)
        return self.inverse_featurize(full, error).to(base.dtype)

    patch(SubspaceFeaturizer, "apply_edit", apply_edit)


def forget_the_scale(patch):
    patch(StandardizeFeaturizer, "apply_edit", lambda self, b, f, e, c=None: b + (e - f) if c is None else b)


def detach_the_source(patch):
    original = SubspaceFeaturizer.encode
    patch(SubspaceFeaturizer, "encode", lambda self, x, c=None: original(self, x, c).detach())


def detach_the_basis(patch):
    original = SubspaceFeaturizer.orthonormal_basis
    patch(SubspaceFeaturizer, "orthonormal_basis", lambda self: original(self).detach())


def change_a_weight_after_load(patch):
    from featurizers.store import artefact

    original = artefact.read_folder

    def read_folder(*args, **options):
        loaded = original(*args, **options)
        with torch.no_grad():
            next(loaded.parameters())[0, 0] += 1e-4
        return loaded

    patch(artefact, "read_folder", read_folder)


def lose_the_site(patch):
    from featurizers.store import artefact

    original = artefact.SiteRecord.site
    patch(artefact.SiteRecord, "site", lambda self: featurizers.Site(original(self).kind, original(self).layer))


def mix_the_examples(patch):
    original = SubspaceFeaturizer.encode
    patch(SubspaceFeaturizer, "encode", lambda self, x, c=None: original(self, x - x.mean(0, keepdim=True), c))


def hook_the_wrong_position(patch):
    from featurizers.models import carrying

    original = carrying.columns
    patch(carrying, "columns", lambda p, h, c, **_: None if p is None else (original(p, h, c) + 1) % h.shape[1])


MUTANTS = {
    subspace: [
        drop_the_error,
        zero_the_error,
        ignore_the_indices,
        ignore_the_indices_of_each_example,
        flip_the_sign_of_an_edit,
        flip_the_sign_of_the_inverse,
        change_the_base_in_place,
        hand_the_base_back,
        keep_state_on_the_module,
        compute_in_bfloat16,
        round_the_features_to_the_models_dtype,
        decode_both_sides_without_a_difference,
        detach_the_source,
        detach_the_basis,
        change_a_weight_after_load,
        lose_the_site,
        mix_the_examples,
        hook_the_wrong_position,
    ],
    identity: [alias_the_source, ignore_the_indices],
    standardize: [consume_state_on_the_module, forget_the_scale],
}


@pytest.mark.parametrize(
    ("sound", "fault"), [pytest.param(s, f, id=f.__name__) for s, faults in MUTANTS.items() for f in faults]
)
def test_a_fault_is_caught(sound, fault, activations, tmp_path, monkeypatch):
    fault(monkeypatch.setattr)
    assert next(broken_laws(sound, activations, tmp_path), None)


def test_a_law_cannot_be_overridden_quietly():
    with pytest.raises(TypeError, match="xfail"):

        class Weak(FeaturizerContract):
            def test_inverse_recovers_the_activations(self):
                pass

    class Honest(FeaturizerContract):
        @pytest.mark.xfail(reason="lossy in half precision")
        def test_inverse_recovers_the_activations(self):
            pass


class TransposedConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Transposed(featurizers.Featurizer[TransposedConfig]):
    """A kind whose buffer is a transposed matrix in memory."""

    kind = "transposed"
    Config = TransposedConfig

    def __init__(self, config):
        super().__init__(config)
        self.d_in = self.n_features = 64
        rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator("cpu").manual_seed(0), device="cpu"))[
            0
        ]
        rotation = rotation.contiguous().to(torch.empty(0).device)
        self.register_buffer("rotation", rotation.T.clone())

    def featurize(self, x):
        return x.to(self.rotation.dtype) @ self.rotation, None

    def inverse_featurize(self, features, error):
        return features @ self.rotation.T


@pytest.fixture
def transposed(monkeypatch):
    known = PluginHost.featurizer_class
    monkeypatch.setattr(
        PluginHost, "featurizer_class", lambda self, kind: Transposed if kind == "transposed" else known(self, kind)
    )
    return Transposed(TransposedConfig())


def test_a_buffer_of_any_layout_is_saved_and_loaded_to_the_same_bits(transposed, tmp_path):
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    expected = x @ transposed.rotation
    assert not transposed.rotation.is_contiguous()
    loaded = featurizers.load(transposed.save_pretrained(tmp_path / "it"))
    assert loaded.rotation.stride() == (1, 64)
    assert torch.equal(loaded.encode(x), expected)
    FeaturizerContract().test_a_saved_featurizer_loads_to_the_same_bits(transposed, x, tmp_path / "again")


def test_a_layout_that_only_this_featurizer_has_is_named(transposed, tmp_path):
    transposed.rotation = transposed.rotation.contiguous()
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    with pytest.raises(AssertionError, match=r"'rotation' has the strides \(64, 1\), and \(1, 64\) after it was saved"):
        FeaturizerContract().test_a_saved_featurizer_loads_to_the_same_bits(transposed, x, tmp_path / "it")


def test_the_suite_composes_a_kind_without_any_other_plugin(monkeypatch):
    known = PluginHost.featurizer_class

    def only_of_the_core(self, kind):
        if kind not in ("composition", "dictionary"):
            raise UnknownKindError(kind, ["composition", "dictionary"], "")
        return known(self, kind)

    monkeypatch.setattr(PluginHost, "featurizer_class", only_of_the_core)
    weights = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(2))
    activations = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    featurizer = featurizers.DictionaryFeaturizer.from_tensors(*weights)
    FeaturizerContract().test_composes_with_the_identity(featurizer, activations)
