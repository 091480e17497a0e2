"""`Graph`: an attribution graph, pruned, named, stored and shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from featurizers.errors import UsageError, shown

from featurizers_graphs.graph_data import Edge, GraphData, IncompleteGraphError, Node, NodeKind, NodeLike, Target
from featurizers_graphs.graph_files import push_graph, save_graph
from featurizers_graphs.influence import check_share, pruned
from featurizers_graphs.neuronpedia import to_neuronpedia
from featurizers_graphs.page import write_page
from featurizers_graphs.uploading import upload

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["Edge", "Graph", "IncompleteGraphError", "Node", "NodeKind", "NodeLike", "Target"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Graph(GraphData):
    """Attribution graph of a prompt; made by `featurizers.graph`, and read by `featurizers.load_graph`.

    Its numbers and names are those of `GraphData`. A graph never changes: `prune`, `label` and `group` return another.
    """

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> Graph:
        """Return the graph of the nodes and edges that carry most of the influence, by circuit-tracer's rule.

        Influence, sums and scores stay those of the whole graph.

        Args:
            nodes: share of the influence that the nodes hold which are kept; tokens and targets are kept always.
            edges: share of the edges' influence that is kept among these nodes.

        Raises:
            UsageError: a share is not above 0 and at most 1.
        """
        check_share("nodes", nodes)
        check_share("edges", edges)
        kept, chosen = pruned(
            self.sizes,
            self.reader(torch.arange(len(self.total))),
            self.offsets,
            self.sources,
            self.weights,
            self.influence,
            self._start,
            self.kept,
            self.expanded,
            (nodes, edges),
        )
        rows = torch.searchsorted(self.offsets, chosen, right=True) - 1
        counts = torch.bincount(rows, minlength=len(self.total))
        about = {**self.about, "pruning": {"nodes": nodes, "edges": edges}}
        return replace(
            self,
            kept=kept,
            offsets=torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]),
            sources=self.sources[chosen],
            weights=self.weights[chosen],
            groups={name: left for name, own in self.groups.items() if (left := tuple(i for i in own if kept[i]))},
            about=about,
        )

    # ---- names

    def label(self, labels: Mapping[tuple[int, int], str]) -> Graph:
        """Return the graph with texts for features, by layer and number in the map."""
        return replace(self, labels={**self.labels, **labels})

    def group(self, name: str, nodes: Iterable[NodeLike]) -> Graph:
        """Return the graph with a named set of nodes, a supernode.

        Raises:
            UsageError: there is no such node, or none is given, or one is in another group.
        """
        members = tuple(dict.fromkeys(self.number(node) for node in nodes))
        if not members:
            raise UsageError(f"the group {shown(name)} has no nodes")
        for other, own in self.groups.items():
            if other != name and (both := set(own) & set(members)):
                raise UsageError(f"the node {min(both)} is in the group {shown(other)} already")
        return replace(self, groups={**self.groups, name: members})

    def group_edges(self) -> dict[tuple[str, str], float]:
        """Return the summed weights of the kept edges from each group to each other group."""
        owner = {node: name for name, own in self.groups.items() for node in own}
        sums: dict[tuple[str, str], float] = {}
        ends = (self.edge_targets.tolist(), self.sources.tolist(), self.weights.tolist())
        for target, source, weight in zip(*ends, strict=True):
            start, end = owner.get(source), owner.get(target)
            if start is not None and end is not None and start != end:
                sums[start, end] = sums.get((start, end), 0.0) + weight
        return sums

    # ---- files

    def save(self, folder: str | Path) -> Path:
        """Write ``graph.safetensors`` and a card ``README.md`` to a folder for `load_graph`; return the folder.

        Other files in the folder, and what people wrote in the card, are kept.

        Raises:
            ArtefactError: the folder is not empty and no graph's, or cannot be written.
        """
        return save_graph(self, folder)

    def push(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        private: bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Upload the graph and its card to the Hugging Face Hub, in one commit.

        Args:
            repo_id: ``owner/name``.
            subfolder: folder of the repository; its root if None.
            private: whether a new repository is private; the account's default if None.
            branch: branch to commit to, ``main`` if None.
            create_pr: whether to open a pull request instead.
            commit_message: title of the commit.
            token: token for the Hub; the stored one if None.

        Raises:
            ManifestError: the place in the repository holds a featurizer, or the subfolder has no valid name.
            HubConflictError: someone else pushed meanwhile; nothing was changed.
            HubError: the Hub refused.
        """
        options = {"private": private, "branch": branch, "create_pr": create_pr, "token": token}
        return push_graph(self, repo_id, subfolder, commit_message, **options)

    # ---- Neuronpedia

    def to_neuronpedia(
        self,
        slug: str,
        scan: str,
        *,
        source_set: str | None = None,
        feature_url: str | None = None,
        description: str | None = None,
        creator: str | None = None,
    ) -> dict[str, Any]:
        """Return the kept nodes and edges as a JSON object that Neuronpedia and circuit-tracer's page read.

        Groups become supernodes, whose nodes are pinned.

        Args:
            slug: name of the graph in its address; letters, digits and ``_ . -``.
            scan: model, as Neuronpedia calls it, such as ``gemma-2-2b``.
            source_set: dashboards of the features on Neuronpedia, such as ``gemmascope-transcoder-16k``.
            feature_url: address of a folder with a JSON file for each feature, instead.
            description: of the graph.
            creator: name of who made it.

        Raises:
            UsageError: a name has other characters, the graph is too large, or two targets are one token.
        """
        details = {"source_set": source_set, "feature_url": feature_url}
        return to_neuronpedia(self, slug, scan, **details, description=description, creator=creator)

    def upload(self, slug: str, scan: str, *, key: str | None = None, **options: Any) -> str:
        """Upload the graph to Neuronpedia, and return the address of its page. Nothing else sends a graph there.

        Args:
            slug: as in `to_neuronpedia`.
            scan: as in `to_neuronpedia`; the model must be on Neuronpedia.
            key: of an account; if None, the environment variable ``NEURONPEDIA_API_KEY``.
            options: of `to_neuronpedia`.

        Raises:
            UsageError: there is no key, or as `to_neuronpedia`.
            ArtefactError: the server refused or did not answer.
        """
        return upload(self.to_neuronpedia(slug, scan, **options), key=key)

    # ---- page

    def plot(self, path: str | Path = "graph.html") -> Path:
        """Write a page of the kept nodes and edges, in one HTML file that needs no network; return its path.

        Rows are layers and columns tokens. A click on a node lists its inputs and outputs and draws its edges.

        Raises:
            UsageError: the graph is too large for a page; prune it first.
            ArtefactError: the file cannot be written.
        """
        return write_page(Path(path).expanduser(), self)
