"""Graphs on disk: one safetensors file with JSON in its header, and a card."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import torch
from featurizers.errors import ArtefactError, explain, one_line, printable, shown
from featurizers.files import contained, read_bytes, replacing, resolved, temporary_folder
from featurizers.format import markdown, write_card, write_state
from featurizers.hub import REPO_ID
from featurizers.store import push_files
from jaxtyping import Int, UInt8
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from featurizers_graphs.graph_data import GraphData, Node, Target, targets_text

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

FILE_NAME: Final = "graph.safetensors"
CARD_NAME: Final = "README.md"
FORMAT: Final = "featurizers-graphs.graph"
VERSION: Final = 1
MAX_CARD_BYTES: Final = 10_000_000
MAX_LAYERS: Final = 100_000
VERSIONS: Final = ("featurizers", "featurizers-graphs", "torch", "transformers")
"""Distributions whose versions a file names."""

NUMBERS: Final[Mapping[str, torch.dtype]] = {
    "tokens": torch.int64,
    "features": torch.int64,
    "values": torch.float32,
    "influence": torch.float32,
    "expanded": torch.bool,
    "offsets": torch.int64,
    "sources": torch.int32,
    "weights": torch.float32,
    "constant": torch.float32,
    "total": torch.float32,
    "summed": torch.float32,
    "absolute": torch.float32,
    "error_share": torch.float32,
    "kept": torch.bool,
}
"""Tensors of a file that are fields of `GraphData`, with their dtypes."""

UNKNOWN: Final = ("constant", "total")
"""Tensors that hold NaN if another program made the graph, which did not compute them."""

Count = Annotated[int, Field(ge=0, lt=2**63)]


class TargetRecord(BaseModel):
    """A `Target` as JSON."""

    model_config = ConfigDict(strict=True, extra="forbid")

    kind: Literal["logit", "metric", "feature"]
    label: str
    weight: Annotated[float, Field(ge=0, le=1.001)]
    position: Count
    token: Count | None = None
    layer: Count | None = None
    feature: Count | None = None


class GraphRecord(BaseModel):
    """What a file says of a graph beside its tensors; see `GraphData` for the fields.

    Texts of tokens and labels are tensors of bytes: prompts may be long, and labels many.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    targets: Annotated[tuple[TargetRecord, ...], Field(min_length=1)]
    groups: dict[str, tuple[Count, ...]]
    about: dict[str, JsonValue]
    saved_with: dict[str, str]


# ---------------------------------------------------------------------- writing


def write_graph(path: Path, graph: GraphData) -> None:
    """Write a graph to a file, replaced as a whole.

    Raises:
        ArtefactError: the file cannot be written, or what the graph says of itself is no JSON or too large.
    """
    tensors = {name: getattr(graph, name).to(dtype) for name, dtype in NUMBERS.items()}
    keys = list(graph.labels)
    tensors["label_features"] = torch.tensor(keys, dtype=torch.int64).reshape(-1, 2)
    for name, texts in (("token_texts", graph.token_texts), ("label_texts", [graph.labels[key] for key in keys])):
        tensors[name], tensors[f"{name}_ends"] = _packed(texts, str(path))
    record = {
        "n_layers": graph.n_layers,
        "targets": [vars(target) for target in graph.targets],
        "groups": {name: list(nodes) for name, nodes in graph.groups.items()},
        "about": dict(graph.about),
        "saved_with": {name: metadata.version(name) for name in VERSIONS},
    }
    write_state(path, tensors, record, format=FORMAT, version=VERSION)


def _packed(texts: Sequence[str], where: str) -> tuple[UInt8[Tensor, " bytes"], Int[Tensor, " texts"]]:
    """Return the bytes of all texts, and where each ends."""
    try:
        raw = [text.encode() for text in texts]
    except UnicodeEncodeError as error:
        raise ArtefactError(where, f"a text of the graph is no valid Unicode: {one_line(error)}") from error
    data = (
        torch.frombuffer(bytearray(b"".join(raw)), dtype=torch.uint8) if any(raw) else torch.empty(0, dtype=torch.uint8)
    )
    return data, torch.tensor([len(part) for part in raw], dtype=torch.int64).cumsum(0)


def write_graph_card(path: Path, graph: GraphData, source: str, subfolder: str | None = None) -> None:
    """Write or update the card of a graph.

    Args:
        path: of the card.
        graph: that it describes.
        source: that the example loads.
        subfolder: that the example loads.

    Raises:
        ArtefactError: the existing card is no text, or cannot be written.
    """
    model = graph.about.get("model")
    whole = graph.scores
    prompt = printable("".join(graph.token_texts), 300)
    rows = [
        ("prompt", markdown(prompt)),
        ("model", markdown(printable(str(model), 200)) if model else "not recorded"),
        ("explains", markdown(printable(targets_text(graph.targets, 5), 300))),
        ("nodes", f"{len(graph)} of {graph.n_nodes}, among {graph.n_features} active features"),
        ("edges", str(graph.n_edges)),
        ("replacement score", str(whole.replacement)),
        ("completeness score", str(whole.completeness)),
    ]
    if len(graph) < graph.n_nodes:
        rows.append(("scores of what pruning left", str(graph.kept_scores)))
    arguments = json.dumps(source) + (f", subfolder={json.dumps(subfolder)}" if subfolder else "")
    lines = [
        f"# Attribution graph: {markdown(printable(prompt, 80))}",
        "",
        "Which features of transcoders bring about what a language model says next, after one prompt.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in rows),
        "",
        "| feature | token | activation | influence |",
        "|---|---|---|---|",
        *(_feature_row(graph, node) for node in graph.top(20)),
        "",
        "```python",
        "import featurizers",
        "",
        f"graph = featurizers.load_graph({arguments})  # reads one safetensors file, runs no code",
        'graph.prune().plot("graph.html")',
        "```",
    ]
    write_card(path, lines, "attribution-graph", base_model=model if _is_repository(model) else None)


def _feature_row(graph: GraphData, node: Node) -> str:
    label, token = printable(node.label, 120), printable(repr(graph.token_texts[node.position]), 40)
    return f"| {markdown(label)} | {node.position} {markdown(token)} | {node.value:.3g} | {node.influence:.4f} |"


def save_graph(graph: GraphData, folder: str | Path) -> Path:
    """Write a graph and its card to a folder, and return the folder; other files in it are kept.

    The two files replace those of a graph that is there, or nothing if the save fails.

    Raises:
        ArtefactError: the folder is not empty and no graph's, or cannot be written.
    """
    target = resolved(folder)

    def check(place: Path) -> None:
        if any(place.iterdir()) and not (place / FILE_NAME).exists():
            raise ArtefactError(str(place), "it is not empty, and no graph's; choose a new or an empty folder")

    with replacing(target, {FILE_NAME, CARD_NAME}.__contains__, check) as new:
        write_graph(new / FILE_NAME, graph)
        old = target / CARD_NAME
        if old.exists():
            text = read_bytes(
                contained(target, old, str(target), ArtefactError), str(old), ArtefactError, MAX_CARD_BYTES
            )
            (new / CARD_NAME).write_bytes(text)
        write_graph_card(new / CARD_NAME, graph, f"./{target.name}")
    return Path(folder).expanduser()


def push_graph(graph: GraphData, repo_id: str, subfolder: str | None, title: str | None, **options: Any) -> CommitInfo:
    """Upload a graph and its card in one commit.

    Raises:
        HubError: the Hub refused.
    """
    with temporary_folder() as folder:
        write_graph(folder / FILE_NAME, graph)
        return push_files(
            folder,
            (FILE_NAME,),
            repo_id,
            lambda path: write_graph_card(path, graph, repo_id, subfolder),
            title=title or f"Upload {subfolder or 'attribution graph'} with featurizers",
            subfolder=subfolder,
            **options,
        )


def _is_repository(model: object) -> bool:
    return isinstance(model, str) and REPO_ID.fullmatch(model) is not None


# ---------------------------------------------------------------------- reading


def fields_of(tensors: dict[str, Tensor], about: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the content of a graph's file, and return the fields of `GraphData`.

    Args:
        tensors: of the file.
        about: its JSON, without ``format`` and ``version``.
        where: name of the file in errors.

    Raises:
        ArtefactError: the file is damaged.
    """
    try:
        record = GraphRecord.model_validate_json(json.dumps(about))
    except ValidationError as error:
        raise ArtefactError(where, f"its header is not that of a graph: {explain(error)}") from error
    tensors = dict(tensors)
    texts, labels = (_unpacked(tensors, name, where) for name in ("token_texts", "label_texts"))
    keys = tensors.pop("label_features", torch.empty(0))
    if keys.dtype != torch.int64 or keys.shape != (len(labels), 2):
        raise ArtefactError(where, "label_features does not have layer and number of a feature for each label")
    _check_sizes(tensors, record, len(texts), where)
    targets = tuple(Target(**vars(target)) for target in record.targets)
    fields: dict[str, Any] = {
        **tensors,
        "token_texts": texts,
        "n_layers": record.n_layers,
        "targets": targets,
        "about": record.about,
        "labels": dict(zip(map(tuple, keys.tolist()), labels, strict=True)),
        "groups": record.groups,
    }
    check_graph(GraphData(**fields), where)
    return fields


def _unpacked(tensors: dict[str, Tensor], name: str, where: str) -> tuple[str, ...]:
    """Take texts out of tensors."""
    data, ends = tensors.pop(name, torch.empty(0)), tensors.pop(f"{name}_ends", torch.empty(0))
    whole = data.dtype == torch.uint8 and ends.dtype == torch.int64 and data.dim() == ends.dim() == 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends]) if whole else ends
    if not whole or bool((starts.diff() < 0).any()) or int(starts[-1]) != len(data):
        raise ArtefactError(where, f"{name} are no texts with their ends")
    raw, at = data.numpy().tobytes(), starts.tolist()
    try:
        return tuple(raw[a:b].decode() for a, b in itertools.pairwise(at))
    except UnicodeDecodeError as error:
        raise ArtefactError(where, f"{name} are not UTF-8: {one_line(error)}") from error


def _check_sizes(tensors: Mapping[str, Tensor], record: GraphRecord, n_tokens: int, where: str) -> None:
    """Raise unless the tensors are those of a graph, and their sizes fit one another."""
    if unknown := sorted(tensors.keys() ^ NUMBERS.keys()):
        missing = [name for name in unknown if name in NUMBERS]
        what = f"lacks {', '.join(missing)}" if missing else f"has {shown(unknown[0])}, which graphs do not have"
        raise ArtefactError(where, f"it {what}")
    count, features = len(record.targets), tensors["features"].shape[0] if tensors["features"].dim() else 0
    rows, nodes = features + count, features + record.n_layers * n_tokens + n_tokens + count
    edges = tensors["sources"].shape[0] if tensors["sources"].dim() else 0
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("constant", "total", "summed", "absolute", "error_share"), (rows,)
    )
    sizes |= dict.fromkeys(("influence", "kept"), (nodes,)) | dict.fromkeys(("sources", "weights"), (edges,))
    sizes |= dict.fromkeys(("values", "expanded"), (features,))
    sizes |= {"tokens": (n_tokens,), "features": (features, 3), "offsets": (rows + 1,)}
    for name, dtype in NUMBERS.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != sizes[name]:
            has = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            fits = f"{str(dtype).removeprefix('torch.')} {list(sizes[name])}"
            raise ArtefactError(where, f"{name} is {has}, and {fits} fits the rest of the graph")


def check_graph(graph: GraphData, where: str) -> None:
    """Raise unless the numbers of a graph are possible.

    Args:
        graph: whose tensors have the right sizes.
        where: name of the file in errors.

    Raises:
        ArtefactError: they are not.
    """
    for possible, problem in itertools.chain(_of_nodes(graph), _of_edges(graph)):
        if not possible:
            raise ArtefactError(where, problem)


def _of_nodes(graph: GraphData) -> Iterator[tuple[bool, str]]:
    """Yield whether each condition on nodes holds, and what is wrong otherwise; each may rely on those before it."""
    for name, dtype in NUMBERS.items():
        numbers: Tensor = getattr(graph, name)
        fit = ~numbers.isinf() if name in UNKNOWN else numbers.isfinite()
        yield not dtype.is_floating_point or bool(fit.all()), f"{name} has NaN or infinity"
    yield len(graph.tokens) > 0 and bool((graph.tokens >= 0).all()), "tokens are empty or negative"
    limits = torch.tensor([graph.n_layers, len(graph.tokens), 2**62])
    inside = (graph.features >= 0) & (graph.features < limits)
    yield bool(inside.all()), "features have a layer or a position that the graph does not have, or a negative number"
    yield _rise(graph.features), "features are not sorted by layer, position and number, or one is there twice"
    for name in ("influence", "error_share", "absolute"):
        yield bool((getattr(graph, name) >= 0).all()), f"{name} has a negative number"
    yield sum(target.weight for target in graph.targets) <= 1.001, "the weights of the targets add up to more than 1"
    ends = [(target.position, len(graph.tokens), target.layer or 0, graph.n_layers) for target in graph.targets]
    fits = all(position < count and layer < n_layers for position, count, layer, n_layers in ends)
    yield fits, "a target is at a token or a layer that the graph does not have"
    members = [node for nodes in graph.groups.values() for node in nodes]
    yield len(set(members)) == len(members), "groups have a node twice"
    yield all(node < graph.n_nodes for node in members), "groups have nodes that the graph does not have"


def _of_edges(graph: GraphData) -> Iterator[tuple[bool, str]]:
    """Yield whether each condition on edges holds, as `_of_nodes`, and rely on those."""
    ends = int(graph.offsets[0]), int(graph.offsets[-1])
    rise = ends == (0, len(graph.sources)) and bool((graph.offsets.diff() >= 0).all())
    yield rise, "offsets do not rise from 0 to the number of edges"
    known = (graph.sources >= 0) & (graph.sources < graph.first_target)
    yield bool(known.all()), "sources has nodes that the graph does not have, or targets"
    yield _forward(graph), "an edge does not lead to a later layer, or leads to an earlier token"
    kept = graph.kept[graph.sources.long()] & graph.kept[graph.edge_targets]
    yield bool(kept.all()), "an edge begins or ends at a node that kept leaves out"


def _rise(features: Int[Tensor, "F 3"]) -> bool:
    """Return whether rows rise in the order of their columns."""
    before, after = features[:-1], features[1:]
    tie, rises = torch.ones(len(before), dtype=torch.bool), torch.zeros(len(before), dtype=torch.bool)
    for column in range(3):
        rises |= tie & (before[:, column] < after[:, column])
        tie &= before[:, column] == after[:, column]
    return bool(rises.all())


def _forward(graph: GraphData) -> bool:
    """Return whether each edge leads to a later layer and to no earlier token; so there are no cycles."""
    count = len(graph.tokens)
    each = torch.arange(count)
    layers = torch.cat(
        [graph.features[:, 0], torch.arange(graph.n_layers).repeat_interleave(count), -torch.ones_like(each)]
    )
    positions = torch.cat([graph.features[:, 1], each.repeat(graph.n_layers), each])
    ends = [graph.n_layers if target.layer is None else target.layer for target in graph.targets]
    layers = torch.cat([layers, torch.tensor(ends)])
    positions = torch.cat([positions, torch.tensor([target.position for target in graph.targets])])
    source, target = graph.sources.long(), graph.edge_targets
    return bool(((layers[source] < layers[target]) & (positions[source] <= positions[target])).all())
