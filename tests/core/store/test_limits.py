"""Limits: untrusted files cost little memory, and a failure in a plugin's code is one error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import featurizers
import pytest
import torch
from featurizers.errors import ConfigError, ManifestError, PluginError, UsageError, WeightsError
from featurizers.format.weights import check_finite
from featurizers.registry.plugin_host import host
from featurizers_identity import IdentityConfig
from safetensors.torch import load_file, save_file

from tests.support.dictionaries import dictionary
from tests.support.hub import edit, subspace

ROOT = Path(__file__).parents[3]

EVERY_DAMAGE = """
import resource, shutil, sys, tempfile, time
from pathlib import Path

import featurizers
from featurizers.errors import FeaturizerError
from tests.plugins.causalab.test_files import BUNDLE, a_unit
from tests.support.damages import BUNDLES, CONFIG, OTHERS, SPECIAL, TRIPLETS, WEIGHTS
from tests.support.hub import subspace

scratch = Path(tempfile.mkdtemp())
whole, unit = subspace().save_pretrained(scratch / "whole"), a_unit(scratch / "unit")
featurizers.load(whole), featurizers.load(unit)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
rows = [(whole, row) for row in {**WEIGHTS, **CONFIG, **OTHERS, **SPECIAL}.items()]
rows += [(unit, row) for row in TRIPLETS.items()] + [(BUNDLE, row) for row in BUNDLES.items()]
for number, (good, (name, damage)) in enumerate(rows):
    folder = Path(shutil.copytree(good, scratch / str(number) / "a"))
    damage.spoil(folder)
    before = time.process_time()
    try:
        featurizers.load(folder)
    except FeaturizerError as error:
        assert type(error) is damage.error, (name, error)
    else:
        raise AssertionError(f"{name} was loaded")
    assert time.process_time() - before < 20, name
print("refused", number + 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_every_damage_costs_less_than_300_mb():
    done = subprocess.run(
        [sys.executable, "-c", EVERY_DAMAGE], cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 220


# ---------------------------------------------------------------------- NaN and infinity


@pytest.fixture
def with_nan(tmp_path):
    folder = subspace().save_pretrained(tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    tensors["basis"][2, 1] = float("nan")
    tensors["basis"][3, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_nan_is_named_with_its_place(with_nan):
    with pytest.raises(
        WeightsError, match=r"'basis' holds NaN or infinity: 2 of its 24 numbers, the first at \[2, 1\]"
    ):
        featurizers.load(with_nan)


def test_nan_can_be_had_to_look_at_it(with_nan, tmp_path):
    f = featurizers.load(with_nan, allow_nonfinite=True)
    assert (~f.basis.isfinite()).nonzero().tolist() == [[2, 1], [3, 0]]
    with pytest.raises(WeightsError, match="holds NaN or infinity"):
        f.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_opt_out_is_for_nan_alone(tmp_path):
    folder = subspace().save_pretrained(tmp_path / "a")
    save_file({"basis": 2 * load_file(folder / "model.safetensors")["basis"]}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="orthonormal"):
        featurizers.load(folder, allow_nonfinite=True)


def test_a_refusal_of_nan_costs_no_more_than_the_tensor(tmp_path):
    """Finding the index of the first NaN costs little as well, for any number of axes."""
    tensor = torch.zeros(2, 3, 4)
    tensor[1, 0, 2:] = float("nan")
    with pytest.raises(WeightsError, match=r"2 of its 24 numbers, the first at \[1, 0, 2\]"):
        check_finite({"a": tensor}, "here")
    script = (
        "import resource, torch; from featurizers.format.weights import check_finite\n"
        "a = torch.full((10_000_000,), float('nan'), dtype=torch.float16).reshape([1] * 15 + [-1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: check_finite({'a': a}, 'here')\n"
        "except ValueError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    assert int(done.stdout) < 200_000


# ---------------------------------------------------------------------- a kind whose code is at fault


class Faulty(featurizers.Featurizer):
    """Featurizer that fails in the method named by ``fails_in``."""

    kind = "faulty"
    Config = IdentityConfig
    fails_in = ""

    def __init__(self, config):
        self._fail("__init__")
        super().__init__(config)
        self.register_buffer("scale", torch.ones(2))

    def _fail(self, where):
        if where == Faulty.fails_in:
            raise KeyError("the author's mistake\n\x1b[2J")

    def featurize(self, x):
        return x, None

    def inverse_featurize(self, f, e):
        return f

    def check(self):
        self._fail("check")

    def load_state_dict(self, *arguments, **options):
        self._fail("load_state_dict")
        return super().load_state_dict(*arguments, **options)

    @classmethod
    def sliced(cls, config, columns):
        cls._fail(None, "sliced")
        return super().sliced(config, columns)


@pytest.mark.parametrize("where", ["__init__", "check", "load_state_dict", "sliced"])
def test_a_kind_that_fails_is_named(tmp_path, monkeypatch, where):
    monkeypatch.setitem(host()._classes, "faulty", Faulty)
    monkeypatch.setattr(Faulty, "fails_in", "")
    folder = Faulty(IdentityConfig()).save_pretrained(tmp_path / "a")
    assert featurizers.load(folder).kind == "faulty"
    monkeypatch.setattr(Faulty, "fails_in", where)
    with pytest.raises(PluginError, match=r"a: the kind 'faulty' failed on it: KeyError: .*\\x1b\[2J") as caught:
        featurizers.load(folder, indices=[0] if where == "sliced" else None)
    assert str(caught.value).isprintable()
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_config_that_allocates_does_so_on_no_device(tmp_path, monkeypatch):
    """A kind may allocate a tensor of a size from its config; it is built without memory until the size is checked."""

    class Large(Faulty):
        kind = "large"

        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("large", torch.zeros(config.d_in or 1, 2**20))

    monkeypatch.setitem(host()._classes, "large", Large)
    folder = Large(IdentityConfig()).save_pretrained(tmp_path / "a")
    edit(folder / "config.json", '"d_in": null', '"d_in": 1048576')
    with pytest.raises(
        WeightsError, match=r"'large' has shape \[1, 1048576\], but its config implies \[1048576, 1048576\]"
    ):
        featurizers.load(folder)


# ---------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    "options", [{"device": "nowhere"}, {"device": 1.5}, {"dtype": torch.int8}, {"dtype": "float16"}]
)
def test_an_argument_that_cannot_be_is_refused_first(options):
    with pytest.raises(UsageError, match=r"device must be a device such as|dtype must be a floating-point"):
        featurizers.load("./nowhere", **options)


@pytest.mark.parametrize("name", ["\0", "a\0b", "x" * 5000, "~nobody-of-this-name/x", "\x1b[2J", "\udcff", "a\nb"])
def test_names_that_no_folder_has(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ManifestError, UsageError)) as caught:
        featurizers.load(Path(name))
    assert str(caught.value).isprintable()


def test_no_descriptor_is_left_open(tmp_path):
    folder = subspace().save_pretrained(tmp_path / "a")
    broken = tmp_path / "b"
    broken.mkdir()
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])

    def once():
        featurizers.load(folder)
        with pytest.raises(WeightsError):
            featurizers.load(broken)
        subspace().save_pretrained(folder)

    once()
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        once()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("kind", [5, None, [], {}])
def test_a_kind_is_a_string(kind):
    with pytest.raises(UsageError, match="a kind is a string such as 'subspace'"):
        featurizers.create(kind)


@pytest.mark.parametrize(("to", "name"), [("sae-lens", "blocks.{}.hook_resid_post"), ("sparsify", "layers.{}")])
def test_a_layer_of_many_digits_is_no_layer(tmp_path, to, name):
    """Python raises for a number of more than 4300 digits."""
    f = dictionary("topk")
    f.site = featurizers.Site("resid.post", 3)
    folder = tmp_path / ("layers.3" if to == "sae-lens" else "layers." + "9" * 200)
    featurizers.convert(f, folder, to=to)
    if to == "sae-lens":
        edit(folder / "cfg.json", "blocks.3.hook_resid_post", name.format("9" * 5000))
    assert featurizers.load(folder).site is None


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("dictionary", {"d_in": 2, "n_features": 2, "special_tokens": [10**30]}, "'special_tokens.0': .* less than"),
        ("sae-lens.matching-pursuit", {"d_in": 2, "n_features": 2, "max_iterations": 10**18}, "'max_iterations': "),
        (
            "composition",
            {"stages": [{"kind": "a" * 129, "id": "a", "config": {}}] * 2},
            "'stages.0.kind': .* at most 128",
        ),
    ],
)
def test_numbers_that_would_take_for_ever_are_refused(kind, config, words):
    with pytest.raises(ConfigError, match=words):
        featurizers.create(kind, **config)


def test_a_name_of_another_library_can_be_saved(tmp_path):
    f = dictionary("relu")
    f.id = "plain"
    folder = tmp_path / "d"
    featurizers.convert(f, folder, to="dictionary-learning")
    edit(folder / "config.json", '"plain"', '"a\\u001b[2J' + "x" * 10_000 + '"')
    loaded = featurizers.load(folder)
    assert loaded.id.isprintable()
    assert featurizers.load(loaded.save_pretrained(tmp_path / "ours")).id == loaded.id
