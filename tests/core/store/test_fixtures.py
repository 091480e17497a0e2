"""Files that every release so far wrote can still be read."""

from pathlib import Path

import featurizers
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

FORMATS = sorted((Path(__file__).parents[2] / "fixtures").glob("format-*"))
X = torch.linspace(-1, 1, 24).reshape(4, 6).sin()


def test_every_format_version_has_a_fixture():
    from featurizers.format.manifest import FORMAT_VERSION

    assert [folder.name for folder in FORMATS] == [f"format-{n}" for n in range(1, FORMAT_VERSION + 1)]


@pytest.mark.parametrize(
    ("folder", "name"),
    [(FORMATS[0], name) for name in featurizers.list_artefacts(FORMATS[0])],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_old_artefact_gives_the_features_it_gave(folder, name):
    f = featurizers.load(folder, subfolder=name, verify=True)
    lines = (folder / name / "features.txt").read_text().splitlines()
    expected = torch.tensor([[float(number) for number in line.split()] for line in lines])
    features, error = f.featurize(X)
    torch.testing.assert_close(features.float(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(f.inverse_featurize(features, error).float(), X, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", featurizers.list_artefacts(FORMATS[1]))
def test_an_old_map_gives_the_writes_it_gave(name):
    f = featurizers.load(FORMATS[1], subfolder=name, verify=True)
    lines = (FORMATS[1] / name / "writes.txt").read_text().splitlines()
    expected = torch.tensor([[float(number) for number in line.split()] for line in lines])
    rows = torch.arange(12.0).reshape(3, 4)
    x = {read: (rows + number).sin() for number, read in enumerate(f.read_widths)}
    features = {group: f.encode(group, x) for group in f.groups}
    writes = torch.cat([f.decode(write, features, x) for write in f.write_widths])
    torch.testing.assert_close(writes, expected, rtol=1e-6, atol=1e-6)


def test_what_was_recorded_of_a_map_is_there():
    f = featurizers.load(FORMATS[1], subfolder="transcoder")
    assert (f.id, f.metadata, f.special_tokens) == ("a transcoder", {"accuracy": 0.5}, (2,))
    at = {"position": (-1,), "model": "owner/model"}
    assert vars(f.reads["in"]) == vars(featurizers.Site("mlp.in", 3).at(**at))
    assert vars(f.writes["out"]) == vars(featurizers.Site("mlp.out", 3).at(**at))
    assert featurizers.load(FORMATS[1], subfolder="transcoder-slice").numbers("features").tolist() == [5, 1]


def test_what_was_recorded_is_there():
    f = featurizers.load(FORMATS[0], subfolder="subspace")
    assert f.id == "a subspace"
    assert vars(f.site) == vars(
        featurizers.Site("attn.z", 3, head=1).at(position=(-1, 0), model="owner/model", model_revision="v1")
    )
    assert f.feature_sets["chosen"].tolist() == [1]
    assert f.metadata == {"accuracy": 0.5, "nested": {"list": [1, None, "é"]}}


SUBSPACES = [[[0]] * 2, None, [[1]] * 2]
"""Argument ``subspaces`` for each intervention of the saved pyvene model."""


def small_gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=5, bos_token_id=None, eos_token_id=None)
    )


def base_and_source():
    """Return base and source, ``(2, 1, 8)`` each."""
    return torch.linspace(-2, 3, 32).sin().reshape(2, 2, 1, 8)


def test_an_old_pyvene_model_does_what_it_did():
    folder = FORMATS[0].parent / "intervenable-1"
    loaded = featurizers.load_intervenable(folder, small_gpt2())
    assert list(loaded.representations) == [
        "layer_0_comp_mlp_output_unit_pos_nunit_1#0",
        "comp_transformer_h[1]_output_unit_pos_nunit_2#0",
        "layer_1_comp_attention_output_unit_pos_nunit_1#0",
    ]
    first, second, third = loaded.interventions.values()
    assert first is third
    assert first is not second
    lines = (folder / "outputs.txt").read_text().splitlines()
    for intervention, subspaces, line in zip(loaded.interventions.values(), SUBSPACES, lines, strict=True):
        expected = torch.tensor([float(number) for number in line.split()]).reshape(2, 1, 8)
        torch.testing.assert_close(intervention(*base_and_source(), subspaces).detach(), expected, rtol=1e-6, atol=1e-6)
