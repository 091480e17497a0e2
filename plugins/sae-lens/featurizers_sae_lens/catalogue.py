"""Finds an entry of SAELens' catalogue, and reads its files as its loader in SAELens does."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from featurizers import FeatureSpace, Featurizer
from featurizers.errors import ManifestError, SourceError, shown
from featurizers.format import ExternalFiles
from featurizers_transcoder.hooks import site_of

from featurizers_sae_lens import cross_layer, formats, scopes, temporal_files, torch_files, transcoders
from featurizers_sae_lens.legacy import MAP, OVERRIDDEN
from featurizers_sae_lens.table import Entry, Release, catalogue


def resolve(reference: str, repository: Callable[..., ExternalFiles]) -> FeatureSpace[Any]:
    """Read the featurizer of ``release/id``.

    Args:
        reference: the release, a slash, and the id, which may itself contain slashes.
        repository: opens a repository of the Hub.

    Raises:
        SourceError: there is no such release or id.
        ManifestError: the catalogue or a file says something unknown.
        HubError: its files cannot be downloaded.
    """
    release, sae = _find(reference)
    loader, repo_id = release.loader, release.repo_id
    where = f"sae-lens:{reference}"
    overrides = dict(release.overrides)
    overrides |= {"neuronpedia_id": sae.neuronpedia} if sae.neuronpedia else {}
    if unknown := sorted(overrides.keys() - set(OVERRIDDEN) - (MAP if loader == "sae_lens" else set())):
        raise ManifestError(
            where, f"the catalogue overrides {unknown!r}, which is not known here; upgrade featurizers-sae-lens"
        )
    featurizer = _load(loader, repo_id, sae.path, overrides, sae.norm_scaling_factor, repository, where)
    featurizer.id = where
    if isinstance(featurizer, Featurizer) and (featurizer.site is None or featurizer.site.model is None):
        metadata = featurizer.metadata["sae_lens"]["metadata"]
        site = site_of(metadata.get("hook_name"), release.model, metadata.get("hook_head_index"))
        featurizer.site = site or featurizer.site
    facts = {"l0": sae.l0, "variance_explained": sae.variance_explained}
    known = {name: fact for name, fact in facts.items() if fact is not None}
    featurizer.metadata["catalogue"] = {
        "release": release.name,
        "id": sae.id,
        "repo_id": repo_id,
        "path": sae.path,
        **known,
    }
    return featurizer


def suggest(reference: str) -> str | None:
    """Return the source of an entry, given its release and its id or one like it, without ``sae-lens:``.

    Returns None if there is no such release. A release without an id gives its first entry.
    """
    name, _, id_ = reference.partition("/")
    release = catalogue().releases.get(name)
    if release is None:
        return None
    near = [id_] if id_ in release.entries else difflib.get_close_matches(id_[:200], release.entries, n=1)
    return f"sae-lens:{name}/{near[0] if near else next(iter(release.entries))}"


def _find(reference: str) -> tuple[Release, Entry]:
    """Return the release and the entry that a reference names.

    Raises:
        SourceError: there is no such release or id.
    """
    whole = catalogue()
    name, _, id_ = reference.partition("/")
    release = whole.releases.get(name)
    if release is None:
        repo_id = "/".join(reference.split("/", 2)[:2])
        if releases := [known.name for known in whole.releases.values() if known.repo_id == repo_id]:
            near = f"; releases of the repository {shown(repo_id)} are {', '.join(map(repr, releases))}"
        else:
            near = _near(name, whole.releases)
        raise SourceError(
            f"SAELens' catalogue, as of sae-lens {whole.version}, has no release {shown(name)}{near}; write "
            "'sae-lens:release/id', or load a repository by its own id, with subfolder="
        )
    if id_ not in release.entries:
        raise SourceError(
            f"the release {name!r} has no {shown(id_)}{_near(id_, release.entries)}; write "
            f"'sae-lens:{name}/{next(iter(release.entries))}' or another of its {len(release.entries)} ids"
        )
    return release, release.entries[id_]


def _load(
    loader: str,
    repo_id: str,
    path: str,
    overrides: dict[str, Any],
    scale: float | None,
    repository: Callable[..., ExternalFiles],
    where: str,
) -> FeatureSpace[Any]:
    if loader in ("connor_rob_hook_z", "goodfire", "deepseek_r1", "qwen_scope"):
        source = repository(repo_id)
        if loader == "connor_rob_hook_z":
            return torch_files.hook_z(source, path, overrides)
        featurizer = torch_files.single_file(source, path, overrides, f"{repo_id}/{path}")
        if featurizer is None:
            raise ManifestError(where, f"{path} is not in the format {loader!r}")
        return featurizer
    if loader == "mwhanna_transcoder":
        return transcoders.mwhanna(repository(repo_id), path, overrides)
    if loader == "mntss_clt_layer_transcoder":
        return cross_layer.layer(repository(repo_id), path, overrides)
    source = repository(repo_id, path)
    if loader == "temporal":
        return temporal_files.checkpoint(source, path, overrides)
    if loader == "sae_lens":
        return formats.folder(source, overrides, scale)
    if loader in ("llama_scope", "llama_scope_r1_distill"):
        read = scopes.llama_scope if loader == "llama_scope" else scopes.llama_scope_r1
        return read(source, overrides, scale)
    readers = {
        "gemma_2": scopes.gemma_scope,
        "gemma_2_transcoder": scopes.gemma_scope,
        "gemma_3": scopes.gemma_scope_2,
        "dictionary_learning_1": torch_files.dictionary_learning,
    }
    if loader not in readers:
        raise ManifestError(
            where, f"the catalogue names the loader {loader!r}, which is not known here; upgrade featurizers-sae-lens"
        )
    return readers[loader](source, overrides)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:200], known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
