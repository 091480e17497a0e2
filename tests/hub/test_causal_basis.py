"""Causal bases on the Hub."""

import featurizers
import pytest
import torch
from featurizers.errors import UsageError
from featurizers_causal_basis import BasisRecord, CausalBasisFeaturizer


@pytest.fixture
def basis():
    vectors = torch.linalg.qr(torch.randn(16, 4, generator=torch.Generator().manual_seed(0))).Q
    record = BasisRecord(mode="mean", side="input", readout="logit-lens", n_tokens=64, steps=[0, 1, 3, 2])
    return CausalBasisFeaturizer.of(
        vectors, torch.tensor([0.8, 0.4, 0.2, 0.1]), torch.ones(16), record, site="resid.pre:5"
    )


def test_it_is_pushed_and_loaded_like_any_other_artefact(hub, basis):
    commit = basis.push_to_hub("alice/basis")
    f = featurizers.load("alice/basis", verify=True)
    assert f.revision == commit.oid
    assert f.record == basis.record
    assert str(f.site) == "resid.pre:5"
    assert torch.equal(f.vectors, basis.vectors)
    assert torch.equal(f.energies, basis.energies)
    assert torch.equal(CausalBasisFeaturizer.from_pretrained("alice/basis").mean, basis.mean)


def test_its_first_vectors_are_loaded_alone(hub, basis):
    basis.push_to_hub("alice/basis")
    f = featurizers.load("alice/basis", indices=range(2))
    assert torch.equal(f.vectors, basis.vectors[:, :2])
    assert f.record.steps == (0, 1)
    with pytest.raises(UsageError, match="the first directions"):
        featurizers.load("alice/basis", indices=[2])


def test_layers_are_stored_as_a_collection(hub, basis, tmp_path):
    folder = featurizers.save_collection({"resid.pre.5": basis, "part": basis.truncate(1)}, tmp_path / "layers")
    featurizers.push(folder, "alice/layers")
    assert featurizers.list_artefacts("alice/layers")["resid.pre.5"].site == "resid.pre:5"
    assert featurizers.load("alice/layers", subfolder="part").n_features == 1
