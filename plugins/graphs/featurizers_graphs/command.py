"""Command ``featurizers graph``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import featurizers
import typer
from featurizers.cli import dtype_named, print_json, progress_bar, write_results
from featurizers.errors import FeaturizerError, UsageError, printable, shown
from featurizers.files import refuse_full

if TYPE_CHECKING:
    from featurizers import SiteMap
    from rich.table import Table

    from featurizers_graphs.graph_data import Node
    from featurizers_graphs.influence import Scores
    from featurizers_graphs.result import Graph

STEPS: Final = 1000
PAGE_NAME: Final = "graph.html"
NEURONPEDIA_NAME: Final = "neuronpedia.json"


def graph_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file of a language model.")],
    maps: Annotated[
        list[str], typer.Option(help="Transcoders, or a collection of them: id or folder. May be given several times.")
    ],
    prompt: Annotated[str, typer.Option(help="What the model continues.")],
    out: Annotated[Path, typer.Option(help="A new folder for the graph, its card and a page.")],
    target: Annotated[
        list[str] | None,
        typer.Option(help="Token to explain, such as ' Austin'; the most probable ones if none. May be given again."),
    ] = None,
    first: Annotated[
        int | None, typer.Option(min=0, help="Tokens at the start without features; the maps' special tokens, or one.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=0, help="Features whose inputs are traced.")] = 10_000,
    keep: Annotated[float, typer.Option(help="Share of each node's inputs whose edges are kept.")] = 0.99,
    memory: Annotated[str, typer.Option(help="Beside model and maps, such as 500MiB or 8GiB.")] = "2GiB",
    node_share: Annotated[float, typer.Option(help="Share of the influence that the page's nodes hold.")] = 0.8,
    edge_share: Annotated[float, typer.Option(help="Share of the influence that the page's edges hold.")] = 0.98,
    top: Annotated[int, typer.Option(min=1, help="Features to show.")] = 10,
    neuronpedia: Annotated[
        str | None, typer.Option(metavar="SLUG", help="Write JSON for Neuronpedia too, under this name.")
    ] = None,
    scan: Annotated[str | None, typer.Option(help="Model, as Neuronpedia calls it; with --neuronpedia.")] = None,
    source_set: Annotated[
        str | None, typer.Option(help="Dashboards of the features there; with --neuronpedia.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; an accelerator if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16 or auto.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Trace which features of transcoders bring about the next token of a prompt, and write a page of them."""
    import torch
    from featurizers.models import load_model
    from rich.console import Console

    from featurizers_graphs.graph_files import CARD_NAME, FILE_NAME
    from featurizers_graphs.graphing import bytes_of, graph

    for name, share in (("keep", keep), ("node-share", node_share), ("edge-share", edge_share)):
        if not 0 < share <= 1:
            raise UsageError(f"--{name} is a share above 0 and at most 1, not {share}")
    _check_names(neuronpedia, scan, source_set)
    bytes_of(memory)
    refuse_full(out.expanduser())
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(model, device=where, dtype=dtype_named(dtype))
    found_maps = _maps(maps, where)
    with progress_bar(STEPS, "tracing", shown=not as_json) as bar:
        found = graph(
            loaded.model,
            prompt,
            found_maps,
            targets=target or None,
            first=first,
            nodes=nodes,
            keep=keep,
            memory=memory,
            tokenizer=loaded.tokenizer,
            progress=lambda share: bar.reach(round(STEPS * share)),
        )
    pruned = found.prune(nodes=node_share, edges=edge_share)
    notes: list[str] = []
    names: list[str] = []

    def write(folder: Path) -> None:
        found.save(folder)
        names[:], notes[:] = [FILE_NAME, CARD_NAME], []
        try:
            pruned.plot(folder / PAGE_NAME)
            names.append(PAGE_NAME)
            if neuronpedia is not None and scan is not None:
                data = pruned.to_neuronpedia(neuronpedia, scan, source_set=source_set)
                (folder / NEURONPEDIA_NAME).write_text(json.dumps(data), encoding="utf-8")
                names.append(NEURONPEDIA_NAME)
        except UsageError as error:  # too large: the graph itself is kept
            notes.append(str(error))

    folder = write_results(out, write)
    best = pruned.top(top)
    if as_json:
        print_json(_summary(found, pruned, best, folder, names, notes))
        return
    if best:
        Console(emoji=False).print(_table(pruned, best))
    else:
        print("No feature is left: none is active on this prompt, or errors and tokens have all the influence.")
    print(f"Whole graph: {found.scores}; {found.n_nodes} nodes, {found.n_edges} edges.")
    print(f"Pruned: {pruned.kept_scores}; {len(pruned)} nodes, {pruned.n_edges} edges.")
    for note in notes:
        print(f"Not written: {printable(note, 300)}")
    print(f"Written: {folder}/{', '.join(names)}")


def _check_names(neuronpedia: str | None, scan: str | None, source_set: str | None) -> None:
    from featurizers_graphs.neuronpedia import NAME

    if (neuronpedia is None) != (scan is None) or (source_set is not None and neuronpedia is None):
        raise UsageError("--neuronpedia and --scan go together, and --source-set goes with them")
    for option, name in (("neuronpedia", neuronpedia), ("scan", scan)):
        if name is not None and not NAME.fullmatch(name):
            raise UsageError(f"--{option} is letters, digits and _ . - such as gemma-2-2b, not {shown(name)}")


def _maps(sources: Sequence[str], device: str) -> list[SiteMap[Any]]:
    """Load the maps of each source; all of a collection."""
    from featurizers import SiteMap

    found: list[SiteMap[Any]] = []
    for source in sources:
        try:
            names = list(featurizers.list_artefacts(source))
        except FeaturizerError:  # of another library; or load says what is wrong
            names = [""]
        for name in names:
            one: Any = featurizers.load(source, subfolder=name or None, device=device)
            if not isinstance(one, SiteMap):
                text = f"{shown(source)} is no map between sites, such as a transcoder, but a featurizer of one site"
                raise UsageError(text)
            found.append(one)
    return found


def _table(pruned: Graph, best: Sequence[Node]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from featurizers_graphs.graph_data import targets_text

    prompt = printable("".join(pruned.token_texts), 60)
    title = f"{printable(targets_text(pruned.targets), 80)} after {prompt!r}"
    table = Table(title=escape(title), title_justify="left")
    for column in ("feature", "token", "activation", "influence"):
        table.add_column(column, justify="left" if column in ("feature", "token") else "right")
    for node in best:
        token = f"{node.position} {printable(repr(pruned.token_texts[node.position]), 30)}"
        label = escape(printable(node.label, 60))
        table.add_row(label, escape(token), f"{node.value:.3g}", f"{node.influence:.4f}")
    return table


def _summary(
    found: Graph, pruned: Graph, best: Sequence[Node], folder: Path, names: Sequence[str], notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "about": dict(found.about),
        "targets": [vars(target) for target in found.targets],
        "whole": _scores(found.scores) | {"nodes": found.n_nodes, "edges": found.n_edges},
        "pruned": _scores(pruned.kept_scores) | {"nodes": len(pruned), "edges": pruned.n_edges},
        "top": [node._asdict() | {"token": pruned.token_texts[node.position]} for node in best],
        "written": [str(folder / name) for name in names],
        "not_written": list(notes),
    }


def _scores(scores: Scores) -> dict[str, Any]:
    """Return each score as its bounds, which are equal if it is exact."""
    return {name: list(bounds) for name, bounds in scores._asdict().items()}
