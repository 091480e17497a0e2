"""Reads SAELens' catalogue of releases from its package, without importing the package."""

from __future__ import annotations

import difflib
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featurizers import Featurizer
from featurizers.errors import ManifestError, MissingDependencyError, SourceError
from featurizers.format import ExternalFiles

from featurizers_sae_lens import formats, scopes, torch_files
from featurizers_sae_lens.assembly import refuse_other_sites
from featurizers_sae_lens.legacy import MAP, OVERRIDDEN
from featurizers_sae_lens.sites import site_of

FILE = "pretrained_saes.yaml"
REFUSED = {
    "gemma_2_transcoder": "transcoder",
    "mwhanna_transcoder": "transcoder",
    "mntss_clt_layer_transcoder": "clt",
    "temporal": "temporal",
}
"""Loaders of SAELens for architectures that are not featurizers of a single site."""


def resolve(reference: str, repository: Callable[..., ExternalFiles]) -> Featurizer[Any]:
    """Read the featurizer of ``release/id``.

    Args:
        reference: the release, a slash, and the id, which may itself contain slashes.
        repository: opens a repository of the Hub.

    Raises:
        MissingDependencyError: SAELens, whose package holds the catalogue, is not installed.
        SourceError: there is no such release or id.
        ManifestError: it is not a featurizer of a single site, or the catalogue says something unknown.
        HubError: its files cannot be downloaded.
    """
    release, _, name = reference.partition("/")
    releases = _catalogue()
    if release not in releases:
        raise SourceError(f"SAELens' catalogue has no release {release!r}{_near(release, releases)}")
    entry = releases[release]
    saes = {str(sae["id"]): sae for sae in entry["saes"]}
    if name not in saes:
        raise SourceError(
            f"the release {release!r} has no {name!r}{_near(name, saes)}; write 'sae-lens:{release}/{next(iter(saes))}'"
        )
    sae = saes[name]
    loader = entry.get("conversion_func")
    where = f"sae-lens:{reference}"
    if loader in REFUSED:
        refuse_other_sites(REFUSED[loader], where)
    if loader == "gemma_3":
        scopes.refuse_other_folders(f"{entry['repo_id']}/{sae['path']}")
    overrides = dict(entry.get("config_overrides") or {})
    overrides |= {"neuronpedia_id": sae["neuronpedia"]} if sae.get("neuronpedia") else {}
    if unknown := sorted(overrides.keys() - set(OVERRIDDEN) - (MAP if loader in (None, "sae_lens") else set())):
        raise ManifestError(
            where, f"the catalogue overrides {unknown!r}, which is not known here; upgrade featurizers-sae-lens"
        )
    repo_id, path = entry["repo_id"], str(sae["path"])
    featurizer = _load(loader, repo_id, path, overrides, sae.get("norm_scaling_factor"), repository, where)
    featurizer.id = where
    if featurizer.site is None or featurizer.site.model is None:
        metadata = featurizer.metadata["sae_lens"]["metadata"]
        site = site_of(metadata.get("hook_name"), entry.get("model"), metadata.get("hook_head_index"))
        featurizer.site = site or featurizer.site
    known = {key: sae[key] for key in ("l0", "variance_explained") if key in sae}
    featurizer.metadata["catalogue"] = {"release": release, "id": name, "repo_id": repo_id, "path": path, **known}
    return featurizer


def _load(
    loader: str | None,
    repo_id: str,
    path: str,
    overrides: dict[str, Any],
    scale: float | None,
    repository: Callable[..., ExternalFiles],
    where: str,
) -> Featurizer[Any]:
    if loader in ("connor_rob_hook_z", "goodfire", "deepseek_r1", "qwen_scope"):
        source = repository(repo_id)
        if loader == "connor_rob_hook_z":
            return torch_files.hook_z(source, path, overrides)
        featurizer = torch_files.single_file(source, path, overrides, f"{repo_id}/{path}")
        if featurizer is None:
            raise ManifestError(where, f"{path} is not in the format {loader!r}")
        return featurizer
    source = repository(repo_id, path)
    if loader in (None, "sae_lens"):
        return formats.folder(source, overrides, scale)
    if loader in ("llama_scope", "llama_scope_r1_distill"):
        read = scopes.llama_scope if loader == "llama_scope" else scopes.llama_scope_r1
        return read(source, overrides, scale)
    readers = {
        "gemma_2": scopes.gemma_scope,
        "gemma_3": scopes.gemma_scope_2,
        "dictionary_learning_1": torch_files.dictionary_learning,
    }
    if loader not in readers:
        raise ManifestError(
            where, f"the catalogue names the loader {loader!r}, which is not known here; upgrade featurizers-sae-lens"
        )
    return readers[loader](source, overrides)


@functools.cache
def _catalogue() -> dict[str, Any]:
    spec = importlib.util.find_spec("sae_lens")
    folders = (spec and spec.submodule_search_locations) or ()
    file = next((path for folder in folders if (path := Path(folder) / FILE).exists()), None)
    if file is None:
        raise MissingDependencyError("SAELens' catalogue", "sae-lens", "pip install 'featurizers-sae-lens[catalogue]'")
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with file.open(encoding="utf-8") as stream:
        data = yaml.load(stream, Loader=loader)
    if not isinstance(data, dict):
        raise ManifestError(str(file), f"a catalogue must be a mapping, not a {type(data).__name__}")
    return data


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(map(str, known)), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
