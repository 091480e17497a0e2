"""What attention does in a graph: how much of an edge each head carries, and why a head looks where it looks.

Sources: Kamath et al. 2025, "Tracing Attention Computation Through Feature Interactions"; both are exact in the local
replacement model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, final

import torch
from featurizers import Site
from featurizers.errors import UsageError, shown
from featurizers.models import backend_of, evaluating, unedited
from featurizers_derived_scalars import Circuit, Place
from jaxtyping import Float
from torch import Tensor

from featurizers_graphs.collection import Collection
from featurizers_graphs.local_model import LocalModel
from featurizers_graphs.result import Edge, Graph, NodeLike
from featurizers_graphs.sources import Sources
from featurizers_graphs.sweep import contracted, descending
from featurizers_graphs.targets import rows_of

BYTES = 2**30


@final
class HeadLoadings(NamedTuple):
    """How an edge goes through the attention of each layer on its way.

    Attributes:
        edge: as it is in the graph.
        layers: between its source and its target.
        heads: what goes through each head of each of these layers, ``(layers, heads)``; later layers carry on what
            earlier ones have moved.
        bypass: what passes each layer beside its attention, ``(layers,)``. The heads of a layer and its bypass add up
            to what the source has written before the layer; that is the edge, unless the source writes several layers.
    """

    edge: Edge
    layers: tuple[int, ...]
    heads: Float[Tensor, "layers heads"]
    bypass: Float[Tensor, " layers"]


@final
class Marginals(NamedTuple):
    """What each node adds to an attention score, through the query or through the key, the other held.

    Attributes:
        query: of each node, ``(nodes,)``, through the query at its token.
        key: of each node, through the key at its token.
        query_constant: what biases, positions and dropped tokens add through the query.
        key_constant: likewise through the key.
        score: the score, as softmax takes it.
        offset_query: score less all that goes through the query: what the query's own bias adds.
        offset_key: likewise of the key.
    """

    query: Float[Tensor, " nodes"]
    key: Float[Tensor, " nodes"]
    query_constant: float
    key_constant: float
    score: float
    offset_query: float
    offset_key: float


class Traced:
    """A graph with the model and the maps that it was made of, to look into its attention.

    Args:
        graph: as `featurizers.graph` made it.
        model: the same model.
        maps: the same maps.

    Raises:
        UsageError: model or maps are not those of the graph: other features are active.
    """

    def __init__(self, graph: Graph, model: Any, maps: Any) -> None:
        self._graph = graph
        with torch.no_grad(), unedited(), evaluating(backend_of(model).model):
            circuit = Circuit(backend_of(model).model)
            circuit.check_tokens(graph.tokens)
            self._collection = Collection.of(circuit, maps)
            self._local = LocalModel(circuit, graph.tokens, BYTES)
            self._sources = Sources(self._local, self._collection, _first(graph), BYTES)
            numbered = torch.cat([self._sources.features[:, :2], self._sources.numbers[:, None]], 1).cpu()
            if not torch.equal(numbered, graph.features):
                raise UsageError(
                    "other features are active than in the graph: give the model and the maps it was made of"
                )

    def ablation(self, feature: int) -> list[tuple[Site, int, Float[Tensor, " d"]]]:
        """Return what takes an active feature away: sites where it writes, its token, and vectors to add there."""
        layer, position, column = self._sources.features[feature].tolist()
        reader, value = self._collection.readers[layer], self._sources.values[feature]
        found = []
        for write in reader.writes:
            weight: Any = write.map.W_dec[reader.group]
            row: Tensor = weight[write.name][column].to(self._local.device, self._local.dtype)
            found.append((write.map.writes[write.name], position, -value * row))
        return found

    @torch.no_grad()
    def heads(self, edges: Iterable[Edge | tuple[NodeLike, NodeLike]]) -> list[HeadLoadings]:
        """Return what each head carries of some edges.

        Args:
            edges: edges of the graph, or pairs of a source and a target.
        """
        listed = list(edges)
        if wrong := [
            edge for edge in listed if not (isinstance(edge, Edge) or (isinstance(edge, tuple) and len(edge) == 2))
        ]:
            raise UsageError(f"edges are those of the graph, or pairs of a source and a target, not {shown(wrong[0])}")
        return [self._heads(edge) for edge in listed]

    def _heads(self, edge: Edge | tuple[NodeLike, NodeLike]) -> HeadLoadings:
        graph, local = self._graph, self._local
        source, target = graph.number(edge[0]), graph.number(edge[1])
        point, direction = self._read_by(target)
        read = {p: g[:, 0] for p, g in descending(local, self._collection, self._sources, point, direction[:, None])}
        written, streams = self._written_by(source), {}
        layers, heads, bypass = [], [], []
        stream = written.get(-1, torch.zeros_like(direction))
        for layer in range(local.n_layers):
            parallel = local.circuit.layout.blocks[layer].parallel
            streams[2 * layer] = stream
            each = local.push_attention(layer, stream)
            after = 2 * layer + (2 if parallel else 1)
            if after in read and bool(stream.any()):
                layers.append(layer)
                heads.append((each * read[after]).sum((1, 2)))
                bypass.append((stream * read[2 * layer]).sum() - heads[-1].sum())
            stream = stream + each.sum(0)
            if not parallel:
                streams[2 * layer + 1] = stream
            for skip_read, write in self._collection.skips:
                if write.layer == layer:
                    stream = stream + self._sources.push_skip(skip_read, write, streams[skip_read.point])
            stream = stream + written.get(layer, 0.0)
        weight = sum(
            float((each * read[2 * layer + 2]).sum()) for layer, each in written.items() if 2 * layer + 2 in read
        )
        found = torch.stack(heads) if heads else direction.new_zeros(0, local.circuit.n_heads)
        beside = torch.stack(bypass) if bypass else direction.new_zeros(0)
        return HeadLoadings(Edge(source, target, weight), tuple(layers), found.float().cpu(), beside.float().cpu())

    def _read_by(self, target: int) -> tuple[int, Float[Tensor, "T d"]]:
        """Return the point at which a node reads the stream, and the direction that it reads there."""
        graph, row = self._graph, self._graph.row(target)
        if target < graph.n_features:
            layer, position, column = self._sources.features[target].tolist()
            reader = self._collection.readers[layer]
            at, columns = torch.tensor([position]), torch.tensor([column])
            direction = torch.zeros(
                self._local.length, self._local.width, dtype=self._local.dtype, device=self._local.device
            )
            direction[position] = self._sources.pull_reader(reader, self._sources.encoders(reader, columns), at)[0]
            return reader.read.point, direction
        chosen = graph.targets[row - graph.n_features]
        if chosen.kind == "metric":
            raise UsageError("the directions of a metric are not kept in a graph; take logits or features as targets")
        wanted: Any = chosen.token if chosen.kind == "logit" else (chosen.layer, chosen.position, chosen.feature)
        (rows,) = rows_of([wanted], self._local, self._collection, self._sources, None)
        return rows.point, rows.directions[:, 0]

    def _written_by(self, source: int) -> dict[int, Float[Tensor, "T d"]]:
        """Return what a node writes after the MLP of each layer; after layer -1 the embeddings are written."""
        graph, local = self._graph, self._local
        if source >= graph.first_target:
            raise UsageError("edges come out of features, errors and tokens, not out of targets")
        if source >= graph.first_token:
            position = source - graph.first_token
            vectors = {-1: self._sources.embeddings[position]}
        elif source >= graph.first_error:
            layer, position = divmod(source - graph.first_error, local.length)
            vectors = {layer: self._sources.errors[layer, position]}
        else:
            position = int(self._sources.features[source, 1])
            vectors = self._sources.written_by_feature(source)
        found = {layer: torch.zeros_like(self._sources.embeddings) for layer in vectors}
        for layer, vector in vectors.items():
            found[layer][position] = vector
        return found

    @torch.no_grad()
    def attention(self, layer: int, head: int, query: int, key: int) -> Marginals:
        """Return what each node adds to the score of one head between two tokens.

        A score is a product of a query and a key. Each of the two is linear in the nodes, the other held at its value.
        Under a soft cap of the scores, the derivative at this prompt is taken.

        Args:
            layer: of the head.
            head: its number among query heads.
            query: token that looks.
            key: token that is looked at.

        Raises:
            UsageError: there is no such head, or the key comes after the query.
        """
        local, length = self._local, self._local.length
        if not 0 <= layer < local.n_layers or not 0 <= head < local.circuit.n_heads:
            raise UsageError(
                f"the model has {local.n_layers} layers of {local.circuit.n_heads} heads, so no head "
                f"{shown((layer, head))}"
            )
        if not 0 <= key <= query < length:
            raise UsageError(
                f"give tokens from 0 to {length - 1}, the key not after the query; not {shown((query, key))}"
            )
        resid = local.raw[Place("resid.pre", layer), "forward"]
        sides, score = {}, 0.0
        for through in ("q", "k"):

            def scores(x: Tensor, through: Any = through) -> Tensor:
                return local.raw.recompute(Place("attn.logits", layer), x, through=through)[query, key, head]

            derivative: Any = torch.func.vjp(scores, resid)
            score = float(derivative[0])
            direction = derivative[1](torch.ones_like(derivative[0]))[0].to(local.dtype)
            points = descending(local, self._collection, self._sources, 2 * layer, direction[:, None])
            nodes = contracted(local, self._sources, points)[:, 0].float().cpu()
            constant = float((direction * self._sources.constants[2 * layer]).sum())
            sides[through] = (nodes, constant, score - float((direction * local.stream(2 * layer)).sum()))
        (by_query, of_query, rest_query), (by_key, of_key, rest_key) = sides["q"], sides["k"]
        return Marginals(by_query, by_key, of_query, of_key, score, rest_query, rest_key)


def _first(graph: Graph) -> int:
    """Return the number of tokens at the start whose features a graph leaves out."""
    first = graph.about.get("first")
    if type(first) is not int or not 0 <= first < len(graph.tokens):
        raise UsageError(
            f"the graph does not say how many tokens at the start it left out ({shown(first)}); only graphs that "
            "featurizers.graph made can be looked into"
        )
    return first
