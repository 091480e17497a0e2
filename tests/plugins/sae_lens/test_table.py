"""The table of SAELens' catalogue, compared with SAELens' own catalogue and with what its loaders take from names."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from featurizers import SiteMap
from featurizers_sae_lens import catalogue, cross_layer, featurizers_suggest, scopes, table, torch_files, transcoders
from featurizers_transcoder.hooks import site_of

PLUGIN = Path(__file__).parents[3] / "plugins/sae-lens"


@pytest.fixture(scope="module")
def script() -> Any:
    """Return ``make_catalogue.py`` as a module."""
    spec = importlib.util.spec_from_file_location("make_catalogue", PLUGIN / "make_catalogue.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_script_makes_of_the_installed_saelens(sae_lens, script):
    version, source = script.installed()
    assert script.table(version, source) == (script.FOLDER / table.FILE).read_text(encoding="utf-8")


def test_the_table_is_saelens_own_catalogue(sae_lens):
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    ours = table.catalogue()
    assert ours.version == sae_lens.__version__
    assert list(ours.releases) == list(directory)
    assert sum(len(release.entries) for release in ours.releases.values()) == 13857
    for name, release in ours.releases.items():
        theirs = directory[name]
        assert (release.repo_id, release.model, release.overrides) == (
            theirs.repo_id,
            theirs.model,
            theirs.config_overrides or {},
        )
        assert release.loader == get_conversion_loader_name(name)
        expected = {
            key: {
                "id": key,
                "path": path,
                "neuronpedia": theirs.neuronpedia_id[key],
                "l0": theirs.expected_l0[key] or None,
                "norm_scaling_factor": theirs.norm_scaling_factor.get(key),
                "variance_explained": theirs.expected_var_explained[key],
            }
            for key, path in theirs.saes_map.items()
        }
        # SAELens has 1.0 for a variance that the file does not have, and 0.0 for an l0
        found = {key: dataclasses.asdict(entry) for key, entry in release.entries.items()}
        for facts in found.values():
            facts["l0"] = facts["l0"] or None
            facts["variance_explained"] = 1.0 if facts["variance_explained"] is None else facts["variance_explained"]
        assert found == expected


def test_every_release_and_id_of_saelens_is_answered_by_its_source(sae_lens):
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    for name, release in get_pretrained_saes_directory().items():
        ids = list(release.saes_map)
        for id_ in {ids[0], ids[-1]}:
            assert featurizers_suggest(f"{name}/{id_}") == f"sae-lens:{name}/{id_}"


@pytest.mark.parametrize(
    ("reference", "source"),
    [
        ("gpt2-small-res-jb", "sae-lens:gpt2-small-res-jb/blocks.0.hook_resid_pre"),
        ("gpt2-small-res-jb/blocks.8.hook_resid", "sae-lens:gpt2-small-res-jb/blocks.8.hook_resid_pre"),
        ("gpt2-small-res-jb/" + "x" * 100_000, "sae-lens:gpt2-small-res-jb/blocks.0.hook_resid_pre"),
        ("owner/name", None),
        ("", None),
        ("/", None),
    ],
)
def test_what_is_no_entry_is_answered_by_the_nearest_of_its_release(reference, source):
    assert featurizers_suggest(reference) == source


def test_a_catalogue_that_says_more_is_refused_by_the_script(script):
    sae = {"id": "layer_0", "path": "0"}
    release = {"repo_id": "a/b", "model": "m", "saes": [sae]}
    assert table.parse(script.table("6", {"r": release})).releases["r"].entries["layer_0"].path == "0"
    with pytest.raises(SystemExit, match=r"the release 'r' has unknown fields \['revision'\]"):
        script.table("6", {"r": {**release, "revision": "main"}})
    with pytest.raises(SystemExit, match=r"r/layer_0 has unknown fields \['dtype'\]"):
        script.table("6", {"r": {**release, "saes": [{**sae, "dtype": "float16"}]}})
    for odd in ("layer_2*2", "layer_0 1", "layer_{0}"):
        with pytest.raises(SystemExit, match="cannot hold names with a space, a brace or"):
            script.table("6", {"r": {**release, "saes": [sae, {"id": odd, "path": "1"}]}})


def test_an_extra_of_earlier_commands_needs_nothing():
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"] == {"catalogue": []}
    assert [requirement for requirement in project["dependencies"] if "sae-lens" in requirement] == []


class Read(Exception):
    """A reader has the configuration."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        self.cfg = cfg


FROM_NAMES = ("gemma_2", "gemma_2_transcoder", "gemma_3", "goodfire", "deepseek_r1", "qwen_scope")
"""Loaders of SAELens that take the model and the site, or k, from names."""


def test_names_say_what_saelens_loaders_make_of_them(sae_lens, monkeypatch):
    """Each entry of these loaders has the site, model and options that SAELens has; files of one number stand in."""
    from huggingface_hub.errors import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def absent(*_: Any, **__: Any) -> Any:
        raise EntryNotFoundError("no config.json")

    monkeypatch.setattr(loaders, "hf_hub_download", absent)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: {"w_enc": [1, 1], "w_dec": [1, 1]})

    def finish(source: Any, cfg: dict[str, Any], *_: Any) -> Any:
        raise Read(cfg)

    for module in (scopes, torch_files, transcoders):
        monkeypatch.setattr(module, "finish", finish)
    one, vector = torch.ones(1, 1), torch.ones(1)
    arrays = {"W_enc": one, "W_dec": one, "b_enc": vector, "b_dec": vector}
    linear = {"encoder.weight": one, "decoder.weight": one, "encoder.bias": vector, "decoder.bias": vector}
    states = {
        "qwen_scope": arrays,
        "deepseek_r1": linear,
        "goodfire": {key.replace(".", "_linear."): tensor for key, tensor in linear.items()},
    }
    npz = {**arrays, "threshold": vector}
    tensors = {key.lower(): tensor for key, tensor in npz.items()}
    affine = {**tensors, "affine_skip_connection": one}
    checked = {"autoencoders": 0, "transcoders": 0}
    for release in table.catalogue().releases.values():
        if release.loader not in FROM_NAMES:
            continue

        def repository(repo_id: str, path: str = "", loader: str = release.loader) -> Any:
            own = affine if path.endswith("_affine") else tensors
            file = SimpleNamespace(shapes={key: tuple(t.shape) for key, t in own.items()}, read=lambda k, **_: own[k])
            return SimpleNamespace(
                where=f"{repo_id}/{path}",
                names=(),
                indices=None,
                group_indices=None,
                npz=lambda _: dict(npz),
                safetensors=lambda _: file,
                torch=lambda _: states[loader],
            )

        for name, entry in release.entries.items():
            getter = loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[release.loader]
            theirs = loaders.handle_config_defaulting(getter(release.repo_id, entry.path, "cpu", False, None))
            with pytest.raises(Read) as caught:
                catalogue.resolve(f"{release.name}/{name}", repository)
            ours, where = caught.value.cfg, theirs["metadata"]
            for key in ("architecture", "apply_b_dec_to_input", "k"):
                assert ours.get(key) == theirs.get(key), f"{release}/{name}"
            if "transcoder" in theirs["architecture"]:
                for key in ("hook_name", "hook_name_out"):
                    assert ours["metadata"][key] == where[key]
                assert f"google/{where['model_name']}".endswith(ours["metadata"]["model_name"])
                checked["transcoders"] += 1
                continue
            site = site_of(where["hook_name"], where["model_name"])
            assert site is not None
            assert site_of(ours["metadata"]["hook_name"], ours["metadata"]["model_name"]) == site, f"{release}/{name}"
            checked["autoencoders"] += 1
    assert checked == {"autoencoders": 8588, "transcoders": 3602}


MAPS = {"gemma_3": 3576, "gemma_2_transcoder": 26, "mwhanna_transcoder": 208, "mntss_clt_layer_transcoder": 26}
"""Loaders of transcoders in the catalogue, and the number of entries of each."""


def test_every_transcoder_of_the_catalogue_has_sites_in_its_model(tmp_path, monkeypatch):
    """Files of one number stand in; the sites are told by the layer in the entry's path and by its model."""
    monkeypatch.setattr(cross_layer, "read_yaml", lambda *_: {"model_name": "google/gemma-2-2b"})
    vector, tensors = torch.ones(1), {}
    for key in ("w_enc", "w_dec", "W_enc", "W_dec"):
        tensors[key] = torch.ones(1, 1)
    tensors |= {"b_enc": vector, "b_dec": vector, "threshold": vector, "affine_skip_connection": torch.ones(1, 1)}
    npz = {key: tensors[key] for key in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}

    def of(names: list[str], suffix: str = "", **more: torch.Tensor) -> Any:
        own = {f"{name}{suffix}": tensors[name] for name in names} | more
        return SimpleNamespace(
            shapes={key: tuple(t.shape) for key, t in own.items()}, path=tmp_path, read=lambda key, **_: own[key]
        )

    counted = dict.fromkeys(MAPS, 0)
    for release in table.catalogue().releases.values():
        for name, entry in release.entries.items():
            whole = f"{release.repo_id}/{entry.path}"
            if release.loader not in MAPS or (release.loader == "gemma_3" and not scopes.is_transcoder(whole)):
                continue

            def safetensors(file: str, path: str = entry.path) -> Any:
                layers = torch.ones(1, 26 - int(path), 1) if path.isdecimal() else vector
                if file.startswith("W_dec_"):
                    return of([], **{f"W_dec_{path}": layers})
                if file.startswith("W_enc_"):
                    return of(["W_enc", "b_enc", "b_dec"], f"_{path}")
                if file.startswith("layer_"):
                    return of(["W_enc", "W_dec", "b_enc", "b_dec"])
                skip = ["affine_skip_connection"] if path.endswith("_affine") else []
                return of(["w_enc", "w_dec", "b_enc", "b_dec", "threshold", *skip])

            def repository(repo_id: str, path: str = "", safetensors: Any = safetensors) -> Any:
                return SimpleNamespace(
                    where=f"{repo_id}/{path}",
                    names=(),
                    indices=None,
                    group_indices=None,
                    npz=lambda _: dict(npz),
                    safetensors=safetensors,
                )

            f = catalogue.resolve(f"{release.name}/{name}", repository)
            assert isinstance(f, SiteMap)
            layer = int(re.search(r"(?:layer_|^)(\d+)", entry.path)[1])  # type: ignore[index]
            size = release.repo_id.split("-")[3] if release.loader == "gemma_3" else ""
            blocks = "model.layers" if size in ("", "270m", "1b") else "model.language_model.layers"
            norm = "module:{}.{}.post_feedforward_layernorm:output"
            (read,), writes = f.reads.values(), list(map(str, f.writes.values()))
            if release.loader == "mntss_clt_layer_transcoder":
                assert str(read) == f"resid.mid:{layer}"
                assert writes == [norm.format(blocks, number) for number in range(layer, 26)]
            elif release.loader == "mwhanna_transcoder":
                assert (str(read), writes) == (f"mlp.in:{layer}", [f"mlp.out:{layer}"])
                assert read.model == f"Qwen/{release.model.replace('q', 'Q').replace('b', 'B')}"
            else:
                kind, normalize = ("mlp.in", "none") if release.loader == "gemma_3" else ("resid.mid", "rms")
                assert (str(read), writes) == (f"{kind}:{layer}", [norm.format(blocks, layer)])
                assert f.config.reads["in"].normalize == normalize
                assert bool(f.config.skips) == entry.path.endswith("_affine")
            assert {site.model for site in f.sites.values()} == {read.model}
            assert read.model is not None
            counted[release.loader] += 1
    assert counted == MAPS
