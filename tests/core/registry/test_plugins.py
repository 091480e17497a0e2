"""Plugin host: a broken plugin does not affect the others, and no conflict of names is resolved silently."""

import importlib.metadata
import subprocess
import sys
import textwrap
import tomllib
import uuid
from pathlib import Path

import featurizers
import pytest
from featurizers.errors import (
    ConfigError,
    FeaturizerError,
    ManifestError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    SourceError,
    UnknownKindError,
)
from featurizers.features.rules import relu
from featurizers.registry.plugin_host import FIRST_PARTY, OWNERS, PluginHost, check_plugins, host

ROOT = Path(__file__).parents[3]

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
    """Install a distribution for one test: its module and metadata on `sys.path`, as pip would leave them."""

    def install(name, code, entry=None, distribution=None, version="1.0", requires=(), metadata=None, points=None):
        distribution = distribution or f"dist-{name}"
        folder = tmp_path / distribution
        module = f"plugin_{uuid.uuid4().hex}"  # Python would find one it has imported before
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
        lines = [f"Name: {distribution}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
        text = "\n".join(["Metadata-Version: 2.1", *lines, ""]).encode()
        (info / "METADATA").write_bytes(text if metadata is None else metadata)
        text = points or f"[featurizers]\n{name} = {entry or module}\n"
        (info / "entry_points.txt").write_text(text.replace("MODULE", module))
        monkeypatch.syspath_prepend(str(folder))

        return module

    return install


@pytest.fixture
def only(tmp_path, monkeypatch):
    """Hide all installed distributions except some and those of the test."""
    installed = importlib.metadata.entry_points

    def only(*names):
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda group: [
                entry
                for entry in installed(group=group)
                if tmp_path in Path(entry.dist._path).parents or entry.dist.name in {*names, "featurizers"}
            ],
        )

    return only


@pytest.fixture
def fresh(only):
    """Replace the process-wide host by a new one with few plugins, and those that the test installs."""
    only("featurizers-identity", "featurizers-subspace")
    host.cache_clear()
    yield host
    host.cache_clear()


def info(host, name):
    return next(plugin for plugin in host.plugins() if plugin.name == name)


def hooks(**bodies):
    """Write the code of a plugin with these hooks, each with its arguments and its body."""
    return "\n".join(
        ["import featurizers", *(f"@featurizers.hookimpl\ndef {name}{body}" for name, body in bodies.items())]
    )


def imported(code=""):
    """Write the code of a plugin that counts its imports."""
    return f"import sys\nsys.featurizers_imported = getattr(sys, 'featurizers_imported', 0) + 1\n{code}"


@pytest.fixture
def imports(monkeypatch):
    monkeypatch.setattr(sys, "featurizers_imported", 0, raising=False)
    return lambda: sys.featurizers_imported


def one_line(text):
    return text.isprintable() and len(text) < 500


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
    "stops the program at import": ("import sys\nsys.exit(3)", "SystemExit"),
    "stops the program in its hook": (hooks(featurizers_register="(register): raise SystemExit('bye')"), "bye"),
    "raises what is no Exception": ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: 'odd'"),
    "raises an essay": (
        "raise ValueError('first\\n' + 'word ' * 10_000 + '\\x1b[31m')",
        r"ValueError: 'first\nword word",
    ),
    "raises an essay as our error": (
        "from featurizers.errors import PluginError\nraise PluginError('first\\n' + 'word ' * 10_000 + '\\x1b[31m')",
        "first word word",
    ),
    "raises what cannot be shown": (
        "class Odd(Exception):\n    def __str__(self): raise KeyError('x')\nraise Odd",
        "Odd",
    ),
    "registers a class and then no rule": (
        GOOD.format(kind="bad") + "\n    @featurizers.hookimpl\n    def featurizers_rules(register): register(len)\n",
        "activation_rule",
    ),
    "registers a class and then fails": (
        textwrap.dedent(GOOD.format(kind="bad")) + "    raise KeyError('late')\n",
        "late",
    ),
    "registers a class twice": (textwrap.dedent(GOOD.format(kind="bad")) + "    register(Good)\n", "'bad' twice"),
    "registers something long": (
        hooks(featurizers_register="(register): register('word ' * 10_000)"),
        "not a subclass",
    ),
    "wraps the hooks of others": (
        "import featurizers\n@featurizers.hookimpl(wrapper=True)\ndef featurizers_read(source): return (yield)",
        "featurizers_read is a wrapper",
    ),
    "asks for itself and then fails": (
        textwrap.dedent(GOOD.format(kind="bad"))
        + "from featurizers.registry import host\nhost().featurizer_class('bad')\nraise RuntimeError('late')\n",
        "late",
    ),
}


@pytest.mark.parametrize(("code", "words"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_plugin_is_named_with_its_version_and_the_rest_go_on(install, fresh, code, words):
    install("good", GOOD.format(kind="good"))
    install("bad", code, version="6.6")
    host = fresh()
    for _ in range(2):
        with pytest.raises(PluginLoadError, match=r"dist-bad 6\.6") as caught:
            host.featurizer_class("bad")
        assert words in str(caught.value)
        assert one_line(str(caught.value))
    assert info(host, "bad").state == "failed"
    assert words in info(host, "bad").error
    assert not host.is_loaded("bad")
    assert host.featurizer_class("good").kind == "good"
    assert featurizers.create("identity", d_in=3).n_features == 3
    host.load_all()
    assert info(host, "subspace").state == "loaded"


def test_an_entry_point_that_is_none_is_a_faulty_plugin(install):
    install("bad", "nothing = None", entry=install("other", "nothing = None") + ":nothing")
    host = PluginHost()
    with pytest.raises(PluginLoadError, match="its entry point is None"):
        host.load("bad")
    assert info(host, "bad").state == "failed"


def test_a_plugin_whose_attributes_fail_does_not_stop_those_that_are_loaded_later(install):
    install("aaa", "import featurizers\ndef __getattr__(name): raise ValueError(name)")
    install(
        "good", GOOD.format(kind="good") + "    @featurizers.hookimpl\n    def featurizers_read(source): return 7\n"
    )
    host = PluginHost()
    host.load("aaa")
    assert host.featurizer_class("good").kind == "good"
    assert host.ask("featurizers_read", "good", source=None) == 7


@pytest.mark.parametrize("late", [False, True], ids=["at import", "in its hook"])
def test_a_plugin_that_is_interrupted_is_whole_the_next_time(install, monkeypatch, late):
    stop = "import sys\nif getattr(sys, 'featurizers_stop', False): raise KeyboardInterrupt\n"
    good = textwrap.dedent(GOOD.format(kind="good"))
    install("good", good + textwrap.indent(stop, "    ") if late else stop + good)
    host = PluginHost()
    monkeypatch.setattr(sys, "featurizers_stop", True, raising=False)
    with pytest.raises(KeyboardInterrupt):
        host.featurizer_class("good")
    assert info(host, "good").state == "available"
    monkeypatch.setattr(sys, "featurizers_stop", False)
    assert host.featurizer_class("good").kind == "good"
    assert info(host, "good").state == "loaded"


def test_a_plugin_may_use_itself_while_it_is_imported(install, fresh):
    code = (
        GOOD.format(kind="good")
        + """
    EXAMPLE = featurizers.create("good", d_in=3)

    @featurizers.hookimpl
    def featurizers_read(source): return "read"
"""
    )
    install("good", code)
    assert fresh().featurizer_class("good").kind == "good"
    assert fresh().ask("featurizers_read", "good", source=None) == "read"
    assert info(fresh(), "good").state == "loaded"


# ---------------------------------------------------------------------- hooks that fail


class Model:
    """Build a model that a plugin can recognise."""


READS = "(source): return 'read' if source == 'mine' else None"
FAILS = "(source): return {}['x']"


@pytest.mark.parametrize("names", [("aaa", "zzz"), ("zzz", "aaa")], ids=["the faulty one first", "the other one first"])
def test_a_reader_that_fails_does_not_silence_another_and_is_named_if_none_answers(install, fresh, names):
    reads, fails = names
    install(reads, hooks(featurizers_read=READS))
    install(fails, hooks(featurizers_read=FAILS), version="6.6")
    host = fresh()
    assert host.ask("featurizers_read", source="mine") == "read"
    with pytest.raises(PluginError, match=rf"'{fails}' of dist-{fails} 6\.6 fails in its featurizers_read: KeyError"):
        host.ask("featurizers_read", source="other")
    assert host.ask("featurizers_read", reads, source="other") is None
    assert featurizers.create("identity", d_in=3).n_features == 3


def test_all_the_plugins_that_fail_are_named(install, fresh):
    install("aaa", hooks(featurizers_read=FAILS))
    install("zzz", hooks(featurizers_read="(source): raise SystemExit('first\\n' + 'word ' * 10_000)"))
    with pytest.raises(PluginError, match=r"'zzz' of dist-zzz 1\.0 .*SystemExit: .*'aaa' of dist-aaa 1\.0 ") as caught:
        fresh().ask("featurizers_read", source=None)
    assert one_line(str(caught.value).replace("'aaa'", "\0").partition("\0")[0])
    assert isinstance(caught.value.__cause__, SystemExit)


def test_a_foreign_folder_is_read_beside_a_faulty_reader(install, fresh, tmp_path):
    reads = "(source):\n    if 'a.foreign' in source.names: return featurizers.create('identity', d_in=3)"
    install("good", hooks(featurizers_read=reads))
    install("zzz", hooks(featurizers_read=FAILS))
    folder, other = tmp_path / "folder", tmp_path / "other"
    for path, name in ((folder, "a.foreign"), (other, "b.foreign")):
        path.mkdir()
        (path / name).write_text("x")
    assert featurizers.load(folder).kind == "identity"
    with pytest.raises(PluginError, match=r"'zzz' of dist-zzz 1\.0 fails in its featurizers_read: KeyError"):
        featurizers.load(other)


def test_a_source_that_names_nothing_is_answered_by_a_plugin_and_no_fault_hides_the_error(install, fresh):
    install("good", hooks(featurizers_suggest="(reference): return {'a/b/c': 'good:a\\x1b[2J'}.get(reference)"))
    fresh()
    with pytest.raises(SourceError, match=r"cannot tell what .*\. Did you mean 'good:a\\+x1b\[2J'\?$"):
        featurizers.load("a/b/c")
    install("zzz", hooks(featurizers_suggest="(reference): return 3 if reference == 'd/e/f' else {}[reference]"))
    fresh()
    for source in ("d/e/f", "g/h/i"):
        with pytest.raises(SourceError, match=r"for an entry of a plugin's catalogue$"):
            featurizers.load(source)


def test_the_plugin_that_is_asked_alone_is_named_when_it_fails(install, fresh):
    install("bad", hooks(featurizers_resolve="(reference, repository): return {}[reference]"), version="6.6")
    with pytest.raises(
        PluginError, match=r"'bad' of dist-bad 6\.6 fails in its featurizers_resolve: KeyError"
    ) as caught:
        fresh().ask("featurizers_resolve", "bad", reference="x", repository=None)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_ours_is_the_answer_of_the_plugin_that_knows_the_format(install, fresh):
    refuses = "(source):\n    from featurizers.errors import ManifestError\n    raise ManifestError('there', 'damaged')"
    install("aaa", hooks(featurizers_read=READS))
    install("mmm", hooks(featurizers_read=refuses))
    install("zzz", hooks(featurizers_read=FAILS))
    for plugin in (None, "mmm"):
        with pytest.raises(ManifestError, match="there: damaged"):
            fresh().ask("featurizers_read", plugin, source="mine")


def test_plugins_are_asked_in_the_order_of_pluggy(install, fresh):
    """Plugins are called last loaded first; ``tryfirst`` comes before all others, ``trylast`` after them."""
    for name, option in {"aaa": "tryfirst=True", "bbb": "", "ccc": "", "ddd": "trylast=True"}.items():
        code = f"import featurizers, sys\n@featurizers.hookimpl({option})\ndef featurizers_read(source):"
        install(name, f"{code} source.append('{name}')")
    asked = []
    assert fresh().ask("featurizers_read", source=asked) is None
    assert asked == ["aaa", "ccc", "bbb", "ddd"]


def test_an_anatomy_that_fails_does_not_silence_another(install, fresh):
    install("aaa", hooks(featurizers_anatomy="(model): return 'blocks'"))
    install("zzz", hooks(featurizers_anatomy="(model): return model.blocks"), version="6.6")
    host = fresh()
    assert host.anatomy(Model()) is None
    host.load("zzz")
    with pytest.raises(PluginError, match=r"'zzz' of dist-zzz 6\.6 fails in its featurizers_anatomy: AttributeError"):
        host.anatomy(Model())
    host.load("aaa")
    host.load("zzz")
    assert host.anatomy(Model()) == "blocks"


# ---------------------------------------------------------------------- who may have a name


def test_two_claims_to_one_name_are_an_error_that_names_both(install):
    install("good", GOOD.format(kind="good"), distribution="one")
    install("good", GOOD.format(kind="good"), distribution="two")
    host = PluginHost()
    assert info(host, "good").state == "conflict"
    with pytest.raises(PluginConflictError, match=r"one 1\.0 and by two 1\.0"):
        host.featurizer_class("good")
    assert host.featurizer_class("identity").kind == "identity"


@pytest.mark.parametrize("name", ["subspace", "identity", "dictionary", "composition"])
def test_an_impostor_is_never_imported_and_the_genuine_plugin_goes_on(install, fresh, imports, name):
    install("good", GOOD.format(kind="good"))
    install(name, imported(textwrap.dedent(GOOD.format(kind=name))), distribution="evil")
    host = fresh()
    assert host.featurizer_class(name).__module__.startswith("featurizers")
    host.load_all()
    genuine, impostor = sorted(
        (row for row in host.plugins() if row.name == name), key=lambda row: row.state != "loaded"
    )
    assert (genuine.distribution, genuine.state) == (OWNERS[name], "loaded")
    assert (impostor.distribution, impostor.version, impostor.state) == ("evil", "1.0", "failed")
    assert f"the name '{name}' belongs to {OWNERS[name]}; uninstall evil" in impostor.error
    assert featurizers.kinds().count(name) == 1
    assert host.featurizer_class("good").kind == "good"
    assert not imports()


@pytest.mark.parametrize("name", FIRST_PARTY)
def test_an_impostor_alone_is_refused_and_the_genuine_plugin_is_named(install, only, imports, name):
    only()
    install(name, imported(textwrap.dedent(GOOD.format(kind=name))), distribution="featurizers-evil")
    host = PluginHost()
    for attempt in (host.load, host.featurizer_class, lambda name: host.ask("featurizers_read", name, source=None)):
        with pytest.raises(PluginError, match=rf"featurizers-evil.*refused.*pip install {FIRST_PARTY[name]}"):
            attempt(name)
    host.load_all()
    assert not imports()
    assert [row.state for row in host.plugins() if row.name == name] == ["failed"]


def test_a_distribution_owns_its_names_however_it_is_written(install, fresh):
    install("subspace", GOOD.format(kind="subspace"), distribution="Featurizers_Subspace")
    assert fresh().featurizer_class("subspace").__name__ == "Good"


def test_every_first_party_name_has_its_owner():
    owners = {}
    for path in [ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")]:
        project = tomllib.loads(path.read_text())["project"]
        owners |= dict.fromkeys(project["entry-points"]["featurizers"], project["name"])
    assert {**owners, "reference": "featurizers"} == OWNERS  # a kind of the store that no entry point has


def test_a_distribution_that_is_on_two_paths_is_one(install, monkeypatch):
    install("good", GOOD.format(kind="good"))
    twice = [entry for entry in importlib.metadata.entry_points(group="featurizers") for _ in range(2)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: twice)
    host = PluginHost()
    assert host.featurizer_class("good").kind == "good"
    assert [row.state for row in host.plugins() if row.name == "good"] == ["loaded"]


@pytest.mark.parametrize("name", ["os.system", "good.log", "", "Good", "a b", "x\x1b[31m", "-", "a" * 300 + "!"])
def test_an_entry_point_that_is_not_named_as_a_kind_is_never_imported(install, fresh, imports, name):
    install("good", GOOD.format(kind="good"))
    install(name, imported(), distribution="evil")
    host = fresh()
    (row,) = [row for row in host.plugins() if row.distribution == "evil"]
    assert row.state == "failed"
    assert row.name.startswith(f"'{name[:1]}".encode("unicode_escape").decode())
    assert row.name in row.error
    assert "lower-case words" in row.error
    assert one_line(row.name + row.error)
    assert len(row.name) <= 80
    with pytest.raises(UnknownKindError if name in ("", "Good", "a b") else PluginError):
        host.featurizer_class(name)
    with pytest.raises(PluginError, match=r"evil 1\.0 is refused"):
        host.ask("featurizers_read", name, source=None)
    with pytest.raises(ConfigError):
        host.rule(name)
    host.load_all()
    assert not imports()
    assert name not in featurizers.kinds()
    with pytest.raises(UnknownKindError) as caught:
        host.featurizer_class("unknown")
    assert str(caught.value).isprintable()
    assert host.featurizer_class("good").kind == "good"


# ---------------------------------------------------------------------- metadata

UNMET = {
    "featurizers>=9": "it needs featurizers >=9, this is 0.1.0",
    "featurizers<0.1": "it needs featurizers <0.1, this is 0.1.0",
    "Featurizers (>=9)": "it needs featurizers >=9, this is 0.1.0",
    "featurizers[demo]>=9,<10": "it needs featurizers <10,>=9, this is 0.1.0",
    'featurizers>=9; python_version >= "3"': "it needs featurizers >=9",
    "featurizers === \x1b[31m": r"'===\x1b[31m'",
    "featurizers >>> 1": "its requirements cannot be read: InvalidRequirement",
    "!": "its requirements cannot be read: InvalidRequirement",
    "featurizers>=9; nonsense": "its requirements cannot be read: InvalidRequirement",
}


@pytest.mark.parametrize(("requires", "words"), UNMET.items())
def test_a_plugin_for_another_version_is_listed_as_failed_and_never_imported(install, fresh, imports, requires, words):
    install("good", GOOD.format(kind="good"))
    code = imported(textwrap.dedent(GOOD.format(kind="bad")))
    install("bad", code, version="6.6", requires=["numpy>=1", "featurizers", requires])
    host = fresh()
    for _ in range(2):
        assert info(host, "bad").state == "failed"
        assert words in info(host, "bad").error
        with pytest.raises(PluginLoadError, match=r"dist-bad 6\.6") as caught:
            host.featurizer_class("bad")
        assert words in str(caught.value)
        assert one_line(str(caught.value))
    host.load_all()
    assert not imports()
    assert host.featurizer_class("good").kind == "good"
    assert featurizers.create("identity", d_in=3).n_features == 3


def test_a_version_that_does_not_fit_is_seen_without_listing_the_plugins(install):
    install("bad", GOOD.format(kind="bad"), requires=["featurizers>=9"])
    with pytest.raises(PluginLoadError, match="it needs featurizers >=9"):
        PluginHost().load("bad")


@pytest.mark.parametrize(
    "requires",
    [
        "featurizers",
        "featurizers>=0.1,<0.2",
        'featurizers>=9; extra == "next"',
        'featurizers>=9; python_version < "3"',
        "featurizers @ https://example.org/featurizers.whl",
        "featurizers-subspace>=9",
        "featurizers.extra>=9",
        "numpy >>> 1",
        "NumPy >>> 1",
    ],
)
def test_a_plugin_for_this_version_is_loaded(install, requires):
    install("good", GOOD.format(kind="good"), requires=[requires])
    host = PluginHost()
    assert info(host, "good").state == "available"
    assert host.featurizer_class("good").kind == "good"


def test_a_prerelease_of_the_core_is_within_the_versions_that_a_plugin_takes(install, monkeypatch):
    monkeypatch.setattr(featurizers, "__version__", "0.2.0rc1")
    install("good", GOOD.format(kind="good"), requires=["featurizers>=0.1,<0.3"])
    assert PluginHost().featurizer_class("good").kind == "good"


def test_what_a_plugin_requires_is_read_when_it_is_wanted():
    code = (
        "import sys, importlib.metadata as m, featurizers\n"
        "from featurizers.registry.plugin_host import host\n"
        "m.Distribution.requires = property(lambda self: sys.exit('requires was read'))\n"
        "host(); featurizers.kinds()\n"
        "assert not [name for name in sys.modules if name.startswith('packaging')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


BROKEN = {
    "no version": (b"Metadata-Version: 2.1\nName: dist-good\n", "dist-good", "?"),
    "no name": (b"Metadata-Version: 2.1\nVersion: 1.0\n", "?", "1.0"),
    "nothing": (b"", "?", "?"),
    "escapes": (b"Metadata-Version: 2.1\nName: x\x1b[31m\nVersion: 1\x07\n", r"'x\x1b[31m'", r"'1\x07'"),
    "an essay": (b"Name: " + b"word " * 10_000 + b"\nVersion: " + b"1." * 10_000, "'word", "'1.1.1"),
}


@pytest.mark.parametrize(("metadata", "distribution", "version"), BROKEN.values(), ids=BROKEN)
def test_a_distribution_with_broken_metadata_is_listed_and_works(install, fresh, metadata, distribution, version):
    install("good", GOOD.format(kind="good"), metadata=metadata)
    host = fresh()
    row = info(host, "good")
    assert (row.distribution[: len(distribution)], row.version[: len(version)]) == (distribution, version)
    assert one_line(row.distribution + row.version)
    assert host.featurizer_class("good").kind == "good"


def test_metadata_in_another_encoding_are_a_failure_that_is_named(install, fresh):
    module = install("bad", "", metadata="Name: ä\n".encode("utf-16"))
    host = fresh()
    assert (info(host, "bad").distribution, info(host, "bad").state) == ("?", "failed")
    with pytest.raises(PluginLoadError, match=f"'{module}'.*cannot be read: UnicodeDecodeError"):
        host.load("bad")
    assert featurizers.create("identity", d_in=3).n_features == 3


def test_an_entry_point_of_no_distribution_is_listed_and_works(install, monkeypatch):
    module = install("good", GOOD.format(kind="good"))
    entries = [importlib.metadata.EntryPoint(name, module, "featurizers") for name in ("good", "subspace")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    host = PluginHost()
    assert [(row.name, row.distribution, row.version, row.state) for row in host.plugins()] == [
        ("good", "?", "?", "available"),
        ("subspace", "?", "?", "failed"),
    ]
    assert host.featurizer_class("good").kind == "good"


def test_entry_points_of_any_package_that_cannot_be_read_stop_no_plugin(install):
    install("good", GOOD.format(kind="good"))
    install("bad", "", distribution="broken", points="[console_scripts]\nno equals sign\n")
    host = PluginHost()
    assert host.featurizer_class("good").kind == "good"
    assert host.featurizer_class("identity").kind == "identity"
    assert {row.state for row in host.plugins()} == {"available", "loaded"}


# ---------------------------------------------------------------------- the strict mode


def test_in_the_strict_mode_every_plugin_is_imported_and_listed(install, fresh):
    install("good", GOOD.format(kind="good"))
    rows = check_plugins()
    assert {row.state for row in rows} == {"loaded"}
    assert {row.name for row in rows} >= {"good", "identity", "dictionary", "composition"}
    assert rows == featurizers.plugins()


def test_in_the_strict_mode_every_plugin_that_cannot_be_used_is_named(install, fresh):
    install("good", GOOD.format(kind="good"))
    install("aaa", "raise RuntimeError('first\\nsecond')")
    install("bbb", "", requires=["featurizers>=9"])
    install("subspace", "", distribution="evil")
    install("os.system", "", distribution="odd")
    install("ccc", "", distribution="one")
    install("ccc", "", distribution="two")
    with pytest.raises(PluginError) as caught:
        check_plugins()
    parts = str(caught.value).split("; ")
    for words in ("'aaa' of dist-aaa 1.0", "'bbb' of dist-bbb 1.0", "'subspace' of evil 1.0", "'os.system' of odd 1.0"):
        assert sum(words in part for part in parts) == 1
    assert "one 1.0 and by two 1.0" in str(caught.value)
    assert "good" not in str(caught.value)
    assert str(caught.value).isprintable()


# ---------------------------------------------------------------------- what is not installed


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


def test_the_kinds_of_this_project_are_those_that_its_plugins_register():
    host = PluginHost()
    before = host.known_kinds()
    host.load_all()
    assert before == sorted(kind for kind in host._classes if kind.partition(".")[0] in OWNERS)


def test_kinds_of_other_plugins_are_those_that_they_register(install, fresh):
    install("good", GOOD.format(kind="good.better"))
    install("reads", hooks(featurizers_read="(source): return None"))
    install("broken", "1 / 0")
    assert featurizers.kinds() == ["composition", "dictionary", "good.better", "identity", "standardize", "subspace"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: featurizers.create("subspce"), r"'subspce'\. Did you mean 'subspace'\?"),
        (lambda: featurizers.create("Identity"), r"'Identity'\. Did you mean 'identity'\?"),
        (lambda: featurizers.create("sae-lens.matching-pursit"), r"Did you mean 'sae-lens\.matching-pursuit'\?"),
        (lambda: featurizers.create("nothing-like-it"), r"Installed kinds: .*subspace"),
        (lambda: host().rule("TopKK"), r"'TopKK'\. Did you mean '.*topk'"),
        (lambda: host().rule("nothing-like-it"), r"Known are: .*relu"),
        (lambda: featurizers.create("subspace", d_in=8, n_feature=2), r"Did you mean 'n_features'\?"),
        (
            lambda: featurizers.create("subspace", n_features=2),
            r"The arguments of 'subspace': d_in: int, n_features: int, seed: int = 0$",
        ),
    ],
)
def test_a_name_that_is_not_known_is_answered_by_those_like_it(call, words):
    with pytest.raises(FeaturizerError, match=words):
        call()


def test_a_plugin_without_a_kind_says_so():
    with pytest.raises(
        UnknownKindError, match=r"'sparsify' provides no kind of that name.*Installed kinds: .*subspace"
    ):
        featurizers.create("sparsify")


RULE = """
    import featurizers

    @featurizers.activation_rule("{name}")
    def rule(pre):
        return pre.relu()

    @featurizers.hookimpl
    def featurizers_rules(register):
        register(rule)
"""


def test_loading_a_plugin_of_a_rules_name_keeps_the_rule():
    host = PluginHost()
    assert host.rule("identity").name == "identity"
    host.load("identity")
    assert host.rule("identity").name == "identity"


def test_a_rule_of_the_core_is_not_replaced(install):
    install("relu", RULE.format(name="relu"))
    install("leaky", RULE.format(name="leaky.relu"))
    host = PluginHost()
    with pytest.raises(PluginLoadError, match="it registers the rule 'relu', which is the core's"):
        host.load("relu")
    assert host.rule("relu") is relu
    assert host.rule("leaky.relu").name == "leaky.relu"
    assert info(host, "relu").state == "failed"


# ---------------------------------------------------------------------- output


def call(*words):
    """Return the exit code and the output of the ``featurizers`` command, or raise its FeaturizerError."""
    from featurizers.cli.app import app
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, FeaturizerError):
        raise result.exception
    return result.exit_code, result.output


ODD = """
    import featurizers
    from featurizers_identity import IdentityConfig
    from pydantic import Field

    class OddConfig(IdentityConfig):
        size: str = Field("\\x1b[31m", description="A size\\x1b[2J.")

    class Odd(featurizers.Featurizer):
        "A kind\\x1b]0;title\\x07\\u202e of mine."
        kind = "odd"
        Config = OddConfig
        def featurize(self, x): return x, None
        def inverse_featurize(self, f, e): return f
        @classmethod
        def fit(cls, x): "Fit\\x1b[2J it."

    @featurizers.hookimpl
    def featurizers_register(register):
        register(Odd)
"""


def test_what_a_plugin_says_of_itself_is_printed_escaped(install, fresh):
    install("odd", ODD, version="1\x1b[2J", points="[featurizers]\nodd = MODULE\nb\x1b[2J = MODULE\n")
    fresh()
    for arguments in (("plugins",), ("kinds",), ("kinds", "odd")):
        code, out = call(*arguments)
        assert code == 0, (arguments, out)
        assert all(character.isprintable() for character in out.replace("\n", "")), (arguments, out)
    assert r"A kind\x1b]0;title\x07\u202e of mine." in call("kinds", "odd")[1]
