"""Cost of starting: neither ``import featurizers`` nor ``featurizers plugins`` loads torch or a plugin."""

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "numpy", "pyvene", "transformers", "huggingface_hub", "matplotlib", "safetensors"]
REPORT = "import json, sys; print(json.dumps(sorted(sys.modules)))"


def modules(code):
    done = subprocess.run([sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import featurizers",
        "import featurizers; featurizers.plugins(); featurizers.kinds()",
        "import featurizers; featurizers.Site('resid.post', 3); featurizers.hookimpl",
        "import sys; sys.argv = ['featurizers', 'plugins']\n"
        "from featurizers.cli.app import app\n"
        "app(standalone_mode=False)",
        "import sys; sys.argv = ['featurizers', 'kinds', '--json']\n"
        "from featurizers.cli.app import app\n"
        "app(standalone_mode=False)",
        *(
            f"import sys; sys.argv = ['featurizers', {word!r}]\n"
            "from featurizers.cli.app import app\n"
            "app(standalone_mode=False)"
            for word in ("--help", "--version")
        ),
        "import os, sys; sys.argv = ['featurizers']\n"
        "os.environ.update(_FEATURIZERS_COMPLETE='complete_bash', COMP_WORDS='featurizers sca', COMP_CWORD='1')\n"
        "from featurizers.cli.app import app\n"
        "try: app(prog_name='featurizers')\n"
        "except SystemExit: pass",
    ],
    ids=["import", "plugins()", "Site and hookimpl", "plugins command", "kinds command", "help", "version", "complete"],
)
def test_nothing_heavy_and_no_plugin_is_imported(code):
    loaded = modules(code)
    assert not loaded.intersection(HEAVY)
    assert not {name for name in loaded if name.startswith("featurizers_")}


def test_asking_for_one_kind_imports_the_one_plugin_that_owns_it():
    loaded = modules("import featurizers; featurizers.create('identity')")
    assert {name for name in loaded if name.startswith("featurizers_")} == {"featurizers_identity"}
    assert not loaded.intersection(["pyvene", "transformers", "huggingface_hub", "matplotlib"])


def test_a_command_of_a_plugin_imports_that_plugin_alone():
    loaded = modules(
        "import sys; sys.argv = ['featurizers', 'demo', '--help']\n"
        "from featurizers.cli.app import app\n"
        "app(standalone_mode=False)"
    )
    plugins = {name.partition(".")[0] for name in loaded if name.startswith("featurizers_")}
    assert plugins == {"featurizers_training"}
    assert not loaded.intersection(HEAVY)


def test_a_search_needs_neither_the_engine_of_patching_nor_a_picture_when_it_is_imported():
    loaded = modules("from featurizers_training import train, sweep")
    plugins = {name.partition(".")[0] for name in loaded if name.startswith("featurizers_")}
    assert plugins == {"featurizers_training", "featurizers_subspace", "featurizers_patching"}
    assert not loaded.intersection(["transformers.masking_utils", "torch._dynamo", "matplotlib"])


def test_every_public_name_is_there_and_every_other_is_an_attribute_error():
    import featurizers

    for name in featurizers.__all__:
        assert getattr(featurizers, name) is not None
    assert set(featurizers.__all__) <= set(dir(featurizers))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = featurizers.no_such_name


def test_the_package_knows_the_version_of_its_distribution():
    from importlib.metadata import version

    import featurizers

    assert featurizers.__version__ == version("featurizers")
