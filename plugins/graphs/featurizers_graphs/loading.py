"""`load_graph`: a graph from a folder, a file or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from featurizers.errors import ArtefactError, SourceError, shown
from featurizers.files import contained, recover
from featurizers.format import read_state
from featurizers.hub import FolderSource, HubSource, Remote, parse_source
from featurizers.store import read_unchanged

from featurizers_graphs import circuit_tracer, graph_files
from featurizers_graphs.result import Graph

PICKLES: Final = (".pt", ".pth", ".pkl", ".pickle", ".bin")


def load_graph(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Graph:
    """Load a graph that `Graph.save` or `Graph.push` wrote, or that was converted from one of circuit-tracer.

    It reads one safetensors file, and checks sizes and numbers; it runs no code.

    Args:
        source: a folder or a ``.safetensors`` file, as ``./name`` or a path, or ``owner/name`` or
            ``owner/name@revision`` on the Hub.
        revision: branch, tag or commit, for a repository.
        subfolder: folder of the source that holds the graph.
        token: token for the Hub; the stored one if None.
        cache_dir: folder of the Hub's cache; the default one if None.
        force_download: whether to download a file again that is cached.
        local_files_only: whether to use the cache alone.

    Raises:
        ArtefactError: the file is missing or damaged, or is a pickle, which is never opened.
        SourceError: the source fits no form, or two.
        HubError: the Hub refused or did not answer.
    """
    if str(source).lower().endswith(PICKLES):
        raise ArtefactError(
            str(source),
            "a .pt file of circuit-tracer is a pickle, which may run any code when it is opened, so it is not read. "
            "Convert it with the script in docs/graphs.md, section 'Graphs of circuit-tracer', where circuit-tracer is "
            "installed and you trust the file; then load the .safetensors file that it writes",
        )
    parsed = parse_source(source, revision)
    if isinstance(parsed, HubSource):
        options: dict[str, Any] = {"force_download": force_download, "local_files_only": local_files_only}
        remote = Remote(parsed, subfolder, token, cache_dir, **options)
        return _read(remote.file(graph_files.FILE_NAME), str(remote))
    if not isinstance(parsed, FolderSource):
        raise SourceError(f"a graph is in a folder or on the Hub, not in a plugin's catalogue: {shown(str(source))}")
    path = parsed.path.expanduser()
    if path.is_file() and subfolder is None:
        return _read_unchanged(path, str(path))
    recover(path)
    folder = path / subfolder if subfolder else path
    if not folder.is_dir():
        raise ArtefactError(str(folder), "there is no such folder or file; a graph on the Hub is 'owner/name'")
    file = contained(path, folder / graph_files.FILE_NAME, str(folder), ArtefactError)
    if not file.exists():
        raise ArtefactError(str(folder), f"it has no {graph_files.FILE_NAME}; Graph.save writes one")
    return _read_unchanged(file, str(folder))


def _read_unchanged(path: Path, where: str) -> Graph:
    """Read a file that another program may replace meanwhile: header and tensors are of one version."""
    return read_unchanged(path.parent, (path.name,), lambda: _read(path, where), where)


def _read(path: Path, where: str) -> Graph:
    """Read a file in one of the two formats."""
    tensors, about = read_state(path, format=None, expected="an attribution graph")
    name, version = about.pop("format", None), about.pop("version", None)
    readers = {
        graph_files.FORMAT: (graph_files.VERSION, graph_files.fields_of),
        circuit_tracer.FORMAT: (circuit_tracer.VERSION, circuit_tracer.converted),
    }
    if not isinstance(name, str) or name not in readers:
        raise ArtefactError(where, f"its format is {shown(name)}, not that of a graph, {graph_files.FORMAT!r}")
    known, read = readers[name]
    if type(version) is not int or version != known:
        hint = "; upgrade with: pip install -U featurizers-graphs" if type(version) is int and version > known else ""
        raise ArtefactError(where, f"it has version {shown(version)}, and this release reads version {known}{hint}")
    return Graph(**read(tensors, about, where))
