"""Files of CausalAbstraction and causalab: read, checked for consistency, written for the loader of the benchmark."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import featurizers
import pytest
import torch
from featurizers import Site
from featurizers.errors import (
    ArtefactError,
    ConversionError,
    FeaturizerError,
    ManifestError,
    SourceError,
    UsageError,
    WeightsError,
)
from featurizers_causalab import read_submission, units, write_submission
from featurizers_causalab.rotations import rotation_of, state_of
from safetensors.torch import load_file
from torch import nn

from tests.support.damages import BUNDLES, DAS, TRIPLETS, UNIT, Damage
from tests.support.processes import run_python

FIXTURES = Path(__file__).parents[2] / "fixtures" / "causalab"
SUBMISSION, BUNDLE = FIXTURES / "submission", FIXTURES / "bundle"
MCQA = "4_answer_MCQA_Gemma2ForCausalLM_answer_pointer"
IOI = "ioi_task_GPT2LMHeadModel_output_token/DAS_GPT2LMHeadModel_output_token"
UNITS = {
    f"{MCQA}/ResidualStream.Layer-3.Token-last_token": ("subspace", "resid.post:3", (-1,), None),
    f"{MCQA}/ResidualStream.Layer-5.Token-last_token": ("identity", "resid.post:5", (-1,), [1, 4]),
    f"{MCQA}/ResidualStream.Layer-6.Token-last_token": ("identity", "resid.post:6", (-1,), []),
    f"{MCQA}/ResidualStream.Layer-8.Token-last_token": ("subspace", "resid.post:8", (-1,), None),
    f"{MCQA}/ResidualStream.Layer_7.Token_correct_symbol": ("subspace", "resid.post:7", None, [2, 0]),
    f"{IOI}/AttentionHead.Layer-2.Head-1.Token-all": ("subspace", "attn.z:2:1", None, [0, 2]),
}


def original(key: str) -> str:
    """Return the name of a unit's files, given its name in a collection."""
    path = next(path for path in SUBMISSION.rglob("*_indices") if unit_key(path) == key)
    return str(path.relative_to(SUBMISSION)).removesuffix("_indices")


def unit_key(path: Path) -> str:
    return str(path.relative_to(SUBMISSION)).removesuffix("_indices").replace("(", ".").replace(",", ".").strip(")")


class Rotate(nn.Module):
    """Layer with a weight that torch parametrises, as the benchmark's loader builds it."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.empty(shape))
        layer.weight.data.copy_(torch.linalg.qr(torch.randn(shape))[0])
        self.rotate = nn.utils.parametrizations.orthogonal(layer)


def as_the_benchmark_loads(path: Path) -> torch.Tensor | None:
    """Load two files as the benchmark does, the inverse last; return the rotation, None for an identity."""
    forward, inverse = (
        torch.load(f"{path}{part}", weights_only=True) for part in ("_featurizer", "_inverse_featurizer")
    )
    info = forward["model_info"]
    if info["featurizer_class"] == "IdentityFeaturizerModule":
        assert forward["state_dict"] == inverse["state_dict"] == {}
        return None
    assert info["featurizer_class"] == "SubspaceFeaturizerModule"
    module = Rotate(info["additional_config"]["rotation_matrix"].shape).requires_grad_(
        info["additional_config"]["requires_grad"]
    )
    module.load_state_dict(forward["state_dict"], strict=True)
    module.load_state_dict(inverse["state_dict"], strict=True)
    return module.rotate.weight.detach()


# ---------------------------------------------------------------------- reading


def test_a_submission_is_read_with_its_features_and_sites():
    by_unit = read_submission(SUBMISSION)
    assert list(by_unit) == sorted(UNITS)
    golden = load_file(FIXTURES / "golden.safetensors")
    for key, (kind, site, position, selected) in UNITS.items():
        f, name = by_unit[key], original(key)
        assert (f.kind, str(f.site), f.site.position) == (kind, site, position)
        assert f.id == f.metadata["causalab"]["unit"] == name.rpartition("/")[2]
        chosen = f.feature_sets.get("selected")
        assert (None if chosen is None else chosen.tolist()) == selected
        base, source = golden[f"{name}:base"], golden[f"{name}:source"]
        torch.testing.assert_close(f.encode(base), golden[f"{name}:features"])
        edited = f.interchange(base, source, chosen)
        torch.testing.assert_close(edited, golden[f"{name}:interchange"])
        assert torch.equal(edited, base) == (selected == [])
    gemma = by_unit[f"{MCQA}/ResidualStream.Layer_7.Token_correct_symbol"]
    assert gemma.site.model == "google/gemma-2-2b"
    said = {"token": "correct_symbol", "task": "4_answer_MCQA", "model": "Gemma2ForCausalLM"}
    assert gemma.metadata["causalab"].items() >= {**said, "variable": "answer_pointer"}.items()


def test_a_rotation_is_the_one_that_torch_parametrises():
    for d, k in ((6, 2), (5, 5), (7, 6), (1, 1), (3, 1)):
        module = Rotate(torch.Size((d, k)))
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0)
        for _ in range(5):
            optimizer.zero_grad()
            (module.rotate.weight @ torch.randn(k, 4) - 1).square().sum().backward()
            optimizer.step()
        expected = module.rotate.weight.detach()
        torch.testing.assert_close(rotation_of(module.state_dict(), "x"), expected)
        again = Rotate(torch.Size((d, k)))
        again.load_state_dict(state_of(expected), strict=True)
        torch.testing.assert_close(again.rotate.weight.detach(), expected, atol=2e-6, rtol=0)


def test_one_unit_is_loaded_and_many_are_listed(tmp_path):
    for path in SUBMISSION.glob(f"{MCQA}/*Layer-3*"):
        shutil.copy(path, tmp_path)
    f = featurizers.load(tmp_path)
    assert (f.kind, str(f.site)) == ("subspace", "resid.post:3")
    assert featurizers.load(SUBMISSION, subfolder=IOI).site == Site("attn.z", 2, head=1)
    with pytest.raises(ManifestError, match=r"holds 5 units .*Layer-3,Token-last_token\)'.*read_submission"):
        featurizers.load(SUBMISSION, subfolder=MCQA)
    with pytest.raises(UsageError, match="it is loaded whole"):
        featurizers.load(tmp_path, indices=[0])
    assert f.training is False
    assert f.basis.requires_grad


def test_a_unit_without_a_list_acts_on_all_features(tmp_path):
    for path in SUBMISSION.glob(f"{IOI}/*featurizer"):
        shutil.copy(path, tmp_path / path.name.replace("AttentionHead(Layer-2,Head-1,Token-all)", "mine"))
    f = featurizers.load(tmp_path)
    assert (f.feature_sets, f.site, f.id) == ({}, None, "mine")


def test_a_unit_that_was_saved_on_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    for part in ("featurizer", "inverse_featurizer"):
        path = next(SUBMISSION.glob(f"{MCQA}/*Layer-3*)_{part}"))
        torch.save(torch.load(path, weights_only=True), tmp_path / path.name)
    assert b"cuda:0" in (tmp_path / path.name).read_bytes()
    assert featurizers.load(tmp_path).basis.device.type == "cpu"


def test_python_beside_a_unit_is_not_run(tmp_path):
    shutil.copytree(SUBMISSION, tmp_path / "it")
    for name in ("featurizer.py", "token_position.py", f"{MCQA}/featurizer.py"):
        (tmp_path / "it" / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert len(read_submission(tmp_path / "it")) == len(UNITS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "component", "site", "position"),
    [
        ("ResidualStream(Layer-3,Token-last_token)", None, "resid.post:3", (-1,)),
        ("ResidualStream(Layer:3,Token:last)", None, "resid.post:3", (-1,)),
        ("ResidualStream(Layer_12,Token_entity_last_token)", None, "resid.post:12", None),
        ("ResidualStream(Layer-0,block_input,Token-[2, 3])", None, "resid.pre:0", (2, 3)),
        ("ResidualStream(Layer-0,Token-x)", "block_input", "resid.pre:0", None),
        ("AttentionHead(Layer-3,Head-5,Token-all)", None, "attn.z:3:5", None),
        ("MLP(Layer-1,mlp_activation,Token-[-1])", None, "mlp.act:1", (-1,)),
        ("AttentionOutput(Layer-1,attention_output,Token-last_token)", None, "attn.out:1", (-1,)),
        ("ResidualStream(Layer--1,Token-x)", None, None, None),
        ("AttentionHead(Layer-3,Head-5,head_query_output,Token-all)", None, None, None),
        ("AttentionHead(Layer-3,Token-all)", None, None, None),
    ],
)
def test_names_of_units_say_the_site(name, component, site, position):
    unit = units.parse(name, component)
    assert unit is not None
    assert (None if unit.site is None else str(unit.site)) == site
    assert unit.site is None or unit.site.position == position


@pytest.mark.parametrize("name", ["", "unit", "ResidualStream(Layer-3)", "ResidualStream(Layer-3,Token-../../x)"])
def test_other_names_say_nothing(name):
    assert units.parse(name) is None


@pytest.mark.parametrize(
    "site",
    [
        Site("resid.post", 3, position=(-1,)),
        Site("resid.pre", 3, position=(2, 3)),
        Site("attn.z", 3, head=5),
        Site("attn.out", 3),
        Site("mlp.out", 3),
        Site("mlp.act", 3, position=(0,)),
    ],
)
def test_a_site_has_the_name_that_says_it(site):
    unit = units.parse(units.name_of(site))
    assert unit.site == site
    assert unit.site.position == site.position


def test_sites_without_a_unit_have_no_name():
    for site in (Site("embed"), Site("attn.z", 3), Site.parse("module:x:output")):
        assert units.name_of(site) is None


# ---------------------------------------------------------------------- format 2.0


def test_a_bundle_of_causalab_is_read():
    by_unit = read_submission(BUNDLE)
    rows = {key: (f.kind, f.id, str(f.site), f.feature_sets) for key, f in by_unit.items()}
    assert {key: row[:3] for key, row in rows.items()} == {
        "ResidualStream.Layer-3.block_output.Token-last_token": ("subspace", "DAS", "resid.post:3"),
        "ResidualStream.Layer-0.block_input.Token-last_token": (
            "identity",
            "ResidualStream(Layer-0,block_input,Token-last_token)",
            "resid.pre:0",
        ),
        "AttentionHead.Layer-2.Head-1.Token-all": ("identity", "mask", "attn.z:2:1"),
        "MLP.Layer-1.mlp_output.Token-last_token": ("subspace", "mlp", "mlp.out:1"),
    }
    das = by_unit["ResidualStream.Layer-3.block_output.Token-last_token"]
    assert das.feature_sets["selected"].tolist() == [1]
    stored = load_file(BUNDLE / "featurizers.safetensors")
    matrix = stored[f"{DAS}/model_info/additional_config/rotation_matrix"]
    torch.testing.assert_close(das.orthonormal_basis(), matrix)
    with pytest.raises(ManifestError, match="holds 4 units"):
        featurizers.load(BUNDLE)
    with pytest.raises(UsageError, match="loaded whole"):
        featurizers.load(BUNDLE, indices=[0])


def test_a_bundle_of_one_unit_is_loaded(tmp_path):
    record = json.loads((BUNDLE / "units_metadata.json").read_text())
    name = "ResidualStream(Layer-0,block_input,Token-last_token)"
    (tmp_path / "units_metadata.json").write_text(json.dumps({name: record[name]}))
    f = featurizers.load(tmp_path)
    assert (f.kind, f.d_in, f.feature_sets["selected"].tolist()) == ("identity", 6, [5, 0])


# ---------------------------------------------------------------------- damages


def a_unit(folder: Path) -> Path:
    """Make a folder of one unit: three features of six dimensions, and a list of two of them."""
    folder.mkdir()
    for path in SUBMISSION.glob(f"{MCQA}/*Layer_7*"):
        shutil.copy(path, folder / f"{UNIT}{path.name.partition(')')[2]}")
    return folder


@pytest.fixture(scope="module")
def good_unit(tmp_path_factory):
    folder = a_unit(tmp_path_factory.mktemp("unit") / "it")
    assert featurizers.load(folder).feature_sets["selected"].tolist() == [2, 0]
    return folder


def refused(damage: Damage, good: Path, tmp_path: Path, read) -> None:
    folder = tmp_path / "it"
    shutil.copytree(good, folder)
    damage.spoil(folder)
    with pytest.raises(FeaturizerError, match=damage.words) as caught:
        read(folder)
    message = str(caught.value)
    assert type(caught.value) is damage.error
    assert message.isprintable()
    assert len(message) < 2500
    assert str(tmp_path) in message


@pytest.mark.parametrize("damage", TRIPLETS.values(), ids=TRIPLETS)
def test_a_damaged_unit_is_refused(damage, good_unit, tmp_path):
    refused(damage, good_unit, tmp_path, featurizers.load)


@pytest.mark.parametrize("damage", BUNDLES.values(), ids=BUNDLES)
def test_a_damaged_bundle_is_refused(damage, tmp_path):
    refused(damage, BUNDLE, tmp_path, read_submission)


def test_a_wide_rotation_is_not_computed(tmp_path):
    state = {name: t.expand(9000, 9000) for name, t in state_of(torch.ones(1, 1)).items()}
    with pytest.raises(WeightsError, match="8192 dimensions at most, not 9000"):
        rotation_of(state, "x")


def test_two_units_of_one_name_are_refused(tmp_path):
    for path in SUBMISSION.glob(f"{MCQA}/*Layer-3*"):
        shutil.copy(path, tmp_path)
        shutil.copy(path, tmp_path / path.name.replace("(", ".").replace(",", "."))
    with pytest.raises(ManifestError, match="two units get the name"):
        read_submission(tmp_path)


def test_a_unit_of_both_formats_is_refused(tmp_path):
    shutil.copytree(BUNDLE, tmp_path / "it")
    for path in SUBMISSION.glob(f"{MCQA}/*Layer-3*"):
        shutil.copy(path, tmp_path / "it" / f"{DAS}{path.name.partition(')')[2]}")
    with pytest.raises(ManifestError, match=r"is in a triplet and in units_metadata\.json"):
        read_submission(tmp_path / "it")


def test_what_is_no_submission_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="no files of CausalAbstraction's units"):
        read_submission(tmp_path)
    with pytest.raises(SourceError, match="entry of a catalogue"):
        read_submission("sae-lens:a/b")
    for name in ("my_indices", "my_featurizer", "other_inverse_featurizer"):
        (tmp_path / name).write_text("[1]")
    (tmp_path / "data.bin").write_text("")
    with pytest.raises(ManifestError, match="no installed plugin knows the format"):
        featurizers.load(tmp_path)


# ---------------------------------------------------------------------- writing


def test_what_was_read_is_written_as_the_benchmark_reads_it(tmp_path):
    by_unit = read_submission(SUBMISSION)
    write_submission(by_unit, tmp_path / "out")
    names = {str(path.relative_to(SUBMISSION)) for path in SUBMISSION.rglob("*_*") if path.is_file()}
    assert {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == names
    for key, f in by_unit.items():
        name = original(key)
        before, after = (as_the_benchmark_loads(folder / name) for folder in (SUBMISSION, tmp_path / "out"))
        assert (before is None) == (after is None) == (f.kind == "identity")
        if before is not None:
            torch.testing.assert_close(after, before)
        indices = [json.loads((folder / f"{name}_indices").read_text()) for folder in (SUBMISSION, tmp_path / "out")]
        assert indices[0] == indices[1]
    again = read_submission(tmp_path / "out")
    for key, f in by_unit.items():
        assert again[key].state_dict().keys() == f.state_dict().keys()
        for name, tensor in f.state_dict().items():
            torch.testing.assert_close(again[key].state_dict()[name], tensor, atol=0, rtol=0)
        assert again[key].metadata == f.metadata
        assert again[key].site == f.site


def test_a_collection_goes_both_ways(tmp_path):
    featurizers.save_collection(read_submission(SUBMISSION), tmp_path / "collection")
    loaded = {
        name: featurizers.load(tmp_path / "collection", subfolder=name)
        for name in featurizers.list_artefacts(tmp_path / "collection")
    }
    assert list(loaded) == sorted(UNITS)
    assert sum(path.stat().st_size for path in (tmp_path / "collection").rglob("model.safetensors")) < 2000
    write_submission(loaded, tmp_path / "submission")
    assert read_submission(tmp_path / "submission").keys() == UNITS.keys()


def test_a_featurizer_of_ones_own_is_written_by_its_site(tmp_path):
    f = featurizers.create("subspace", d_in=6, n_features=2, seed=3)
    f.site = Site("resid.post", 4).at(position=(-1,))
    f.feature_sets = {"selected": torch.tensor([1])}
    write_submission({"ARC_easy_Gemma2ForCausalLM_answer/layer-4": f}, tmp_path / "out")
    path = tmp_path / "out/ARC_easy_Gemma2ForCausalLM_answer/ResidualStream(Layer-4,Token-last_token)"
    torch.testing.assert_close(as_the_benchmark_loads(path), f.orthonormal_basis().detach())
    assert Path(f"{path}_indices").read_text() == "[1]"
    info = torch.load(f"{path}_featurizer", weights_only=True)["model_info"]
    assert (info["n_features"], info["featurizer_id"]) == (2, "subspace")


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    f = featurizers.create("identity", d_in=6)
    other = featurizers.create("standardize", d_in=6)
    f.site = other.site = Site("resid.post", 4)
    for named, error, words in (
        ({}, UsageError, "at least one"),
        ({"../x": f}, UsageError, "no name of a folder"),
        ({"a": f, "b": f}, UsageError, "both of the unit 'ResidualStream"),
        ({"a": featurizers.create("identity", d_in=6)}, ConversionError, "no unit for the site None"),
        ({"a": f >> other}, ConversionError, "a: .* reads identities and subspaces, not the kind 'composition'"),
        ({"a": other}, ConversionError, "not the kind 'standardize'"),
    ):
        with pytest.raises(error, match=words):
            write_submission(named, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("")
    with pytest.raises(ArtefactError, match="it is there already"):
        write_submission({"a": f}, tmp_path / "out")


def test_a_unit_named_by_metadata_is_no_path(tmp_path):
    f = featurizers.create("identity", d_in=6)
    f.metadata = {"causalab": {"unit": "../../ResidualStream(Layer-4,Token-last_token)"}}
    with pytest.raises(ConversionError, match="no unit for the site None"):
        write_submission({"a": f}, tmp_path / "out")
    f.metadata = {"causalab": {"unit": "ResidualStream(Layer-4,Token-last_token)"}}
    f.site = Site("resid.post", 5).at(position=(-1,))  # the site was changed after reading
    write_submission({"a": f}, tmp_path / "out")
    assert (tmp_path / "out" / "ResidualStream(Layer-5,Token-last_token)_indices").exists()


def test_convert_writes_a_unit_and_says_what_is_lost(tmp_path):
    f = featurizers.create("subspace", d_in=6, n_features=3)
    f.site = Site("resid.post", 4).at(position=(-1,), model="owner/model")
    f.id, f.metadata = "mine", {"accuracy": 0.9}
    f.feature_sets = {"selected": torch.tensor([2]), "gate_logits": torch.tensor([-1.0, -1.0, 1.0])}
    from featurizers.store import convert

    assert convert(f, tmp_path / "out", to="causalab") == [
        "The model 'owner/model' is not kept; the benchmark takes it from the name of the folder.",
        "The metadata 'accuracy' are not kept.",
        "The feature sets 'gate_logits' are not kept.",
    ]
    back = featurizers.load(tmp_path / "out")
    assert torch.equal(back.basis, f.basis)
    assert (back.id, back.site.position, back.feature_sets["selected"].tolist()) == ("mine", (-1,), [2])


def test_files_need_no_pyvene(tmp_path):
    printed = run_python(f"""
        import sys
        sys.modules["pyvene"] = None
        import featurizers, featurizers_causalab
        from featurizers_causalab.featurizers import Featurizer
        units = featurizers_causalab.read_submission({str(SUBMISSION)!r})
        featurizers_causalab.write_submission(units, {str(tmp_path / "out")!r})
        f = Featurizer.load_modules({str(SUBMISSION / MCQA / "ResidualStream(Layer-3,Token-last_token)")!r})
        try:
            f.get_interchange_intervention()
        except featurizers.errors.MissingDependencyError as error:
            print(error)
    """)
    assert "pip install 'featurizers[pyvene]'" in printed
