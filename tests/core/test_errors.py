"""Errors go from process to process whole."""

import concurrent.futures
import copy
import inspect
import multiprocessing
import pickle
import pkgutil

import featurizers
import pytest
from featurizers import errors

ARGUMENTS = {
    errors.MissingDependencyError: ("drawing", "matplotlib", "pip install matplotlib"),
    errors.UnknownKindError: ("no-kind", ["b", "a"], "Install it."),
    errors.PluginConflictError: ("name", ["b", "a"]),
    errors.PluginLoadError: ("name", "distribution 1.0", "it is broken"),
}


def every_class(cls=errors.FeaturizerError):
    return [cls, *(below for part in cls.__subclasses__() for below in every_class(part))]


def arguments_of(cls):
    if cls in ARGUMENTS:
        return ARGUMENTS[cls]
    if issubclass(cls, errors.ArtefactError):
        return "./folder", "a problem\nof two lines \x1b[31m"
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty]
    return tuple(1.5 if p.annotation == "float" else f"{p.name} of it" for p in required) or ("a message",)


def classes():
    """Every class of the core and of all first-party plugins."""
    for module in pkgutil.iter_modules():
        if module.name.startswith("featurizers_") and module.name != "featurizers_scale":
            for name in ("errors", "records"):
                try:
                    __import__(f"{module.name}.{name}")
                except ImportError:
                    continue
    return sorted(set(every_class()), key=lambda cls: (cls.__module__, cls.__name__))


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
@pytest.mark.parametrize(
    "cls", [c for c in classes() if c.__module__.startswith("featurizers")], ids=lambda c: c.__name__
)
def test_an_error_is_pickled_and_copied_whole(cls, way):
    error = cls(*arguments_of(cls))
    error.note = "a field that was added"
    again = pickle.loads(way(error)) if way is pickle.dumps else way(error)
    assert type(again) is cls
    assert str(again) == str(error) != ""
    assert again.args == error.args
    assert vars(again) == vars(error)
    assert repr(again) == repr(error)
    assert getattr(again, "msg", None) == getattr(error, "msg", None)


@pytest.fixture
def bad_file(tmp_path):
    (tmp_path / "config.json").write_text('{"library_name": "featurizers", "format_version": 1}')
    return tmp_path


def test_a_bad_file_in_a_worker_ends_the_pool(bad_file):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with pytest.raises(errors.ManifestError, match=r"config\.json") as caught:
            pool.apply_async(featurizers.load, (str(bad_file),)).get(timeout=120)
        assert caught.value.where == str(bad_file)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        for _ in range(2):  # the second finds the executor working
            with pytest.raises(errors.ManifestError):
                executor.submit(featurizers.load, str(bad_file)).result(timeout=120)
