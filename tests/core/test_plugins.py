"""The plugin host: one faulty plugin never takes the others down, and no name is decided silently."""

import textwrap
import uuid

import featurizers
import pytest
from featurizers.errors import PluginConflictError, PluginError, PluginLoadError, UnknownKindError
from featurizers.plugins import FIRST_PARTY, PluginHost

GOOD = """
    import featurizers
    from featurizers_identity import IdentityConfig

    class Good(featurizers.Featurizer):
        kind = "{kind}"
        Config = IdentityConfig
        def featurize(self, x): return x, None
        def inverse_featurize(self, f, e): return f

    @featurizers.hookimpl
    def featurizers_register(register):
        register(Good)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution on the path as an installer leaves it: a module and its metadata."""

    def install(name, code, entry=None, distribution=None, version="1.0"):
        distribution = distribution or f"dist-{name}"
        folder = tmp_path / distribution
        module = f"plugin_{uuid.uuid4().hex}"  # Python would find one it has imported before
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[featurizers]\n{name} = {entry or module}\n")
        monkeypatch.syspath_prepend(str(folder))

    return install


def info(host, name):
    return next(plugin for plugin in host.plugins() if plugin.name == name)


def test_plugins_are_listed_with_distribution_and_version_before_and_after_loading(install):
    install("good", GOOD.format(kind="good"), version="2.5")
    host = PluginHost()
    assert (info(host, "good").distribution, info(host, "good").version) == ("dist-good", "2.5")
    assert info(host, "good").state == "available"
    assert host.featurizer_class("good").kind == "good"
    assert info(host, "good").state == "loaded"
    assert host.featurizer_class("good") is host.featurizer_class("good")


def test_a_plugin_may_own_kinds_below_its_name(install):
    install("good", GOOD.format(kind="good.special"))
    host = PluginHost()
    assert host.featurizer_class("good.special").kind == "good.special"
    with pytest.raises(UnknownKindError, match=r"good\.special"):
        host.featurizer_class("good.other")


FAULTS = {
    "fails at import": ("import no_such_module", "ModuleNotFoundError"),
    "raises at import": ("raise RuntimeError('no luck')", "no luck"),
    "raises in its hook": (
        "import featurizers\n@featurizers.hookimpl\ndef featurizers_register(register): raise KeyError('x')",
        "KeyError",
    ),
    "registers something else": (
        "import featurizers\n@featurizers.hookimpl\ndef featurizers_register(register): register(int)",
        "not a subclass",
    ),
    "registers another's kind": (GOOD.format(kind="subspace"), "'subspace'"),
    "registers an import path": (GOOD.format(kind="os.system"), "os.system"),
    "misspells a hook": (
        "import featurizers\n@featurizers.hookimpl\ndef featurizers_registr(register): pass",
        "featurizers_registr",
    ),
    "takes an argument that a hook has not": (
        "import featurizers\n@featurizers.hookimpl\ndef featurizers_register(register, other): pass",
        "other",
    ),
    "has a config that takes anything": (
        "from pydantic import BaseModel as IdentityConfig\n"
        + textwrap.dedent(GOOD.format(kind="bad")).replace("from featurizers_identity import IdentityConfig", ""),
        "strict",
    ),
}


@pytest.mark.parametrize(("code", "words"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_plugin_is_named_with_its_version_and_the_rest_go_on(install, code, words):
    install("bad", code, version="6.6")
    host = PluginHost()
    for _ in range(2):
        with pytest.raises(PluginLoadError, match=r"dist-bad 6\.6") as caught:
            host.featurizer_class("bad")
        assert words in str(caught.value)
    assert info(host, "bad").state == "failed"
    assert words in info(host, "bad").error
    assert host.featurizer_class("identity").kind == "identity"
    host.load_all()
    assert info(host, "subspace").state == "loaded"


def test_two_claims_to_one_name_are_an_error_that_names_both(install):
    install("good", GOOD.format(kind="good"), distribution="one")
    install("good", GOOD.format(kind="good"), distribution="two")
    host = PluginHost()
    assert info(host, "good").state == "conflict"
    with pytest.raises(PluginConflictError, match=r"one 1\.0 and by two 1\.0"):
        host.featurizer_class("good")
    assert host.featurizer_class("identity").kind == "identity"


def test_a_claim_to_a_first_party_kind_is_a_conflict_not_a_takeover(install):
    install("subspace", GOOD.format(kind="subspace"), distribution="evil")
    host = PluginHost()
    with pytest.raises(PluginConflictError, match=r"evil 1\.0.*featurizers-subspace"):
        host.featurizer_class("subspace")


def test_an_entry_point_whose_module_is_missing_is_a_plugin_error(install):
    install("gone", "", entry="no_such_module_at_all")
    with pytest.raises(PluginLoadError, match="no_such_module_at_all"):
        PluginHost().featurizer_class("gone")


@pytest.mark.parametrize("kind", ["os.system.x", "torch.nn:Linear", "../x", "", "Subspace", "a b", "x\x1b[31m"])
def test_what_is_not_a_kinds_name_is_never_looked_up(kind):
    with pytest.raises(UnknownKindError) as caught:
        PluginHost().featurizer_class(kind)
    assert repr(kind) in str(caught.value)


def test_only_first_party_kinds_come_with_a_pip_command(monkeypatch):
    host = PluginHost()
    monkeypatch.setattr(host, "_entries", {})
    for kind, distribution in FIRST_PARTY.items():
        with pytest.raises(UnknownKindError, match=f"pip install {distribution}"):
            host.featurizer_class(kind)
    with pytest.raises(UnknownKindError) as caught:
        host.featurizer_class("someone-elses")
    assert "pip install" not in str(caught.value)
    assert isinstance(caught.value, PluginError)


def test_a_plugin_without_a_kind_says_so():
    with pytest.raises(
        UnknownKindError, match=r"'sparsify' provides no kind of that name.*Installed kinds: .*subspace"
    ):
        featurizers.create("sparsify")
