"""Damaged pyvene models: each raises one clear error and takes little memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import featurizers
import pytest
from featurizers.errors import ArtefactError, ManifestError
from featurizers_pyvene import interventions, load_intervenable, save_intervenable
from torch import nn

from tests.support.damages import INTERVENABLE
from tests.support.intervenables import several
from tests.support.models import tiny_model
from tests.support.processes import run_python


@pytest.mark.parametrize("damage", INTERVENABLE.values(), ids=INTERVENABLE)
def test_every_damage_is_one_clear_error(damage, tmp_path):
    folder = save_intervenable(several(), tmp_path / "it")
    damage.spoil(folder)
    with pytest.raises(damage.error, match=damage.words) as caught:
        load_intervenable(folder, tiny_model("gpt2"))
    assert type(caught.value) is damage.error
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000


def test_a_folder_that_there_is_not(tmp_path):
    with pytest.raises(ManifestError, match=r"none: intervenable\.json cannot be read: No such file"):
        load_intervenable(tmp_path / "none", tiny_model("gpt2"))


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "~nobody-of-this-name/x", "\x1b[2J", "\udcff", "a\nb"])
def test_names_that_no_folder_has(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtefactError) as caught:
        load_intervenable(Path(name), tiny_model("gpt2"))
    assert str(caught.value).isprintable()


def test_tensors_are_made_when_the_file_was_looked_at(tmp_path, monkeypatch):
    """A file that claims very many features takes no memory before its size is checked."""
    made = []

    class Gate(interventions.SigmoidGate):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self.logits.device.type)

    folder = save_intervenable(several(), tmp_path / "it")
    monkeypatch.setattr(interventions, "SigmoidGate", Gate)
    load_intervenable(folder, tiny_model("gpt2"))
    assert made == ["meta"]


EVERY_DAMAGE = """
import resource, shutil, tempfile, time
from pathlib import Path

import featurizers
from featurizers.errors import FeaturizerError
from tests.support.damages import INTERVENABLE
from tests.support.intervenables import several
from tests.support.models import tiny_model

scratch = Path(tempfile.mkdtemp())
model = tiny_model("gpt2")
whole = featurizers.save_intervenable(several(), scratch / "whole")
featurizers.load_intervenable(whole, model)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
for number, (name, damage) in enumerate(INTERVENABLE.items()):
    folder = Path(shutil.copytree(whole, scratch / str(number) / "a"))
    damage.spoil(folder)
    before = time.process_time()
    try:
        featurizers.load_intervenable(folder, model)
    except FeaturizerError as error:
        assert type(error) is damage.error, (name, error)
    else:
        raise AssertionError(f"{name} was loaded")
    assert time.process_time() - before < 20, name
print("refused", number + 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_every_damage_costs_less_than_300_mb():
    assert int(run_python(EVERY_DAMAGE, timeout=300).split()[-1]) == len(INTERVENABLE)


def test_many_interventions_ask_their_shared_featurizer_for_its_state_once(tmp_path, monkeypatch):
    """The state of a subspace costs a product of matrices: of 2000 interventions that share one, that adds up."""
    folder = save_intervenable(several(), tmp_path / "it")
    path = folder / "intervenable.json"
    record = json.loads(path.read_text())
    record["interventions"] += [{"kind": "interchange", "config": {}, "featurizer": 0}] * 2000
    place = {"component": "mlp_output", "unit": "pos", "max_number_of_units": 1, "layer": 0}
    record["representations"] += [{**place, "intervention": 4 + i} for i in range(2000)]
    path.write_text(json.dumps(record, separators=(",", ":")))
    asked = []
    state_dict = nn.Module.state_dict

    def counted(self, *arguments, **options):
        asked.append(isinstance(self, featurizers.Featurizer))
        return state_dict(self, *arguments, **options)

    monkeypatch.setattr(nn.Module, "state_dict", counted)
    loaded = load_intervenable(folder, tiny_model("gpt2"))
    assert len(loaded.representations) == 2004
    assert sum(asked) < 50
