"""`Sources`: what features, errors and constants write to the residual stream at one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, final

import featurizers
import torch
from featurizers.errors import SiteError, UsageError
from featurizers_derived_scalars import Place
from featurizers_transcoder import LinearMap, normalized_read
from jaxtyping import Float, Int
from torch import Tensor

from featurizers_graphs.collection import Collection, Read, Reader, Write
from featurizers_graphs.local_model import LocalModel


class Written(NamedTuple):
    """What the nodes of a graph write at the MLP of one layer.

    Attributes:
        vectors: of each token its features' writes, padded with zeros, and last its error, ``(T, most, d)``.
        features: number of each feature, sorted by token.
        positions: token of each feature.
        slots: place of each feature within its token's vectors.
    """

    vectors: Float[Tensor, "T most d"]
    features: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    slots: Int[Tensor, " n"]


@final
class Sources:
    """Active features of a prompt, the errors of their maps, and the constants that no node brings.

    Args:
        local: the model at the prompt.
        collection: its maps.
        first: number of tokens at the start whose features and errors are constants.
        cache_bytes: memory that the written vectors of all layers may take; above it they are gathered anew each time.

    Attributes:
        features: layer, position and column of each active feature, int64 ``(F, 3)``, sorted.
        numbers: numbers of the features in their maps, int64 ``(F,)``.
        values: their activations, ``(F,)``.
        pre_activations: what their rules read, ``(F,)``.
        errors: what the maps leave out of the output of each MLP, ``(layers, T, d)``.
        embeddings: what each token's embedding writes, without its position, ``(T, d)``.
        constants: the part of the residual stream at each point that no node brings, ``(points, T, d)``.

    Raises:
        SiteError: what a map reads is not computed from the residual stream as its site says.
        UsageError: activations, or what a map computes of them, are not finite.
    """

    def __init__(self, local: LocalModel, collection: Collection, first: int, cache_bytes: int) -> None:
        self._local, self._collection, self._first = local, collection, first
        self._inputs = self._read()
        self._frozen = {read: self._frozen_input(read) for read in collection.reads}
        self._encode()
        # padding at most doubles what is counted here
        count = sum(len(features) for write in collection.writes for _, features in self._written_by(write))
        size = count * local.width * 8
        self._cache: dict[int, Written] | None = {} if size <= cache_bytes else None
        self._reconstruct()

    # ---- encoding

    def _read(self) -> dict[Read, Tensor]:
        """Return the activations at each read, and check that they come from the stream as the site says."""
        local, found = self._local, {}
        sites = {read: read.site for read in self._collection.reads}
        inputs = {"input_ids": local.tokens[None]}
        activations = featurizers.collect(local.circuit.model, inputs, list(dict.fromkeys(sites.values())))
        for read, site in sites.items():
            x = activations[site][0].to(local.device, local.dtype)
            expected = local.normed(read.norm, local.stream(read.point))
            if not bool(x.isfinite().all()):
                raise UsageError(f"the activations at {site} are not finite, so that no graph can be made of them")
            slack = 1e-3 if local.raw[Place("resid.embed"), "forward"].dtype.itemsize >= 4 else 5e-2
            if float((x - expected).norm()) > slack * float(expected.norm()):
                raise SiteError(
                    f"{read.map.id!r} reads {site}, whose activations are not the residual stream or a norm of it, so "
                    "that no graph can be traced through it"
                )
            found[read] = x
        return found

    def _frozen_input(self, read: Read) -> tuple[Tensor, bool]:
        """Return what the map multiplies each token's activations by before it encodes them, and whether it centres."""
        config, x = read.map.config.reads[read.name], self._centred(read, self._inputs[read])
        normed = normalized_read(config, x)
        centred = config.normalize in ("layer-norm", "standard")
        x = x - x.mean(-1, keepdim=True) if centred else x
        return normed.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True).clamp(min=1e-30), centred

    def _centred(self, read: Read, x: Tensor) -> Tensor:
        centre: Any = read.map.centre.get(read.name, 0.0)
        centred: Tensor = x - centre
        return centred

    def encoder_input(self, read: Read, x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
        """Return what the encoder sees for activations at its site, its normalisation held."""
        factor, centred = self._frozen[read]
        x = self._centred(read, x)
        return (x - x.mean(-1, keepdim=True) if centred else x) * factor

    def pull_reader(
        self, reader: Reader, g: Float[Tensor, "n d"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d"]:
        """Pull directions at the encoder's input, each at a token, back to the residual stream."""
        factor, centred = self._frozen[reader.read]
        g = g * factor[positions]
        g = g - g.mean(-1, keepdim=True) if centred else g
        return self._local.pull_norm(reader.read.norm, g, positions)

    def encoders(self, reader: Reader, columns: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return the encoder's rows of some features."""
        weight: Any = reader.read.map.W_enc[reader.group]
        rows: Tensor = weight[reader.read.name][columns]
        return rows.to(self._local.device, self._local.dtype)

    def _bias(self, reader: Reader, columns: Tensor) -> Tensor:
        biases = reader.read.map.b_enc
        if reader.group not in biases:
            return torch.zeros(len(columns), dtype=self._local.dtype, device=self._local.device)
        bias: Tensor = biases[reader.group][columns]
        return bias.to(self._local.device, self._local.dtype)

    def _encode(self) -> None:
        found, numbers, values, pre = [], [], [], []
        for layer, reader in sorted(self._collection.readers.items()):
            x, read = self._inputs[reader.read], reader.read
            z = read.map.encode(reader.group, {read.name: x}).to(self._local.device, self._local.dtype)
            z[: self._first] = 0
            position, column = z.nonzero(as_tuple=True)
            _check_finite(read.map, z, self.pre_activation(reader, column, position))
            found.append(torch.stack([torch.full_like(position, layer), position, column], 1))
            numbers.append(read.map.numbers(reader.group).to(column.device)[column])
            values.append(z[position, column])
            pre.append(self.pre_activation(reader, column, position))
        self.features, self.numbers, self.values, self.pre_activations = map(torch.cat, (found, numbers, values, pre))

    def pre_activation(self, reader: Reader, columns: Tensor, positions: Tensor) -> Float[Tensor, " n"]:
        """Return what the rule reads for some features, each at a token."""
        return self._affine(reader, columns, positions, self._inputs[reader.read])

    def constant_of(self, reader: Reader, columns: Tensor, positions: Tensor) -> Float[Tensor, " n"]:
        """Return what biases and other constants add to the same."""
        constant = self._local.normed(reader.read.norm, self.constants[reader.read.point])
        return self._affine(reader, columns, positions, constant)

    def _affine(self, reader: Reader, columns: Tensor, positions: Tensor, x: Float[Tensor, "T d"]) -> Tensor:
        products = self.encoder_input(reader.read, x)[positions] * self.encoders(reader, columns)
        return products.sum(1) + self._bias(reader, columns)

    # ---- writing

    def to_stream(self, write: Write, rows: Float[Tensor, "n d"], positions: Tensor | slice) -> Float[Tensor, "n d"]:
        """Return what vectors at a write, each at a token, add to the residual stream."""
        if write.place.kind == "mlp.delta":
            return rows
        matrix, scale = self._local.circuit.write_matrix(write.place), self._local.raw.write_scale(write.place)
        rows = rows if matrix is None else rows @ matrix.to(rows)
        return rows if scale is None else rows / scale.to(rows)[positions]

    def skip(self, read: Read, write: Write, x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
        """Return what a skip connection adds to the stream for activations at its read."""
        return self.to_stream(write, x @ self._skip_weight(read, write), slice(None))

    def push_skip(self, read: Read, write: Write, x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
        """Return what a skip connection adds to the stream for a change of the stream that it reads."""
        if (known := self._local.norm(read.norm)) is not None:
            x = known[0].linear(x) / known[1]
        return self.skip(read, write, x)

    def pull_skip(self, read: Read, write: Write, g: Float[Tensor, "tokens rows d"]) -> Float[Tensor, "tokens rows d"]:
        """Pull directions after an MLP back through a skip connection, to the stream that it reads."""
        every = (slice(len(g)), None)
        if write.place.kind != "mlp.delta":
            matrix, scale = self._local.circuit.write_matrix(write.place), self._local.raw.write_scale(write.place)
            g = g if scale is None else g / scale.to(g)[every]
            g = g if matrix is None else g @ matrix.to(g).T
        return self._local.pull_norm(read.norm, g @ self._skip_weight(read, write).T, every)

    def _skip_weight(self, read: Read, write: Write) -> Tensor:
        weight: Any = read.map.W_skip[write.name]
        matrix: Tensor = weight[read.name]
        return matrix.to(self._local.device, self._local.dtype)

    def _written_by(self, write: Write) -> Iterator[tuple[Reader, Tensor]]:
        """Yield each reader that is decoded to a write, with the numbers of its features."""
        for layer, reader in sorted(self._collection.readers.items()):
            if any(own is write for own in reader.writes):
                yield reader, (self.features[:, 0] == layer).nonzero().flatten()

    def written_by_feature(self, feature: int) -> dict[int, Float[Tensor, " d"]]:
        """Return what one active feature adds to the stream after the MLP of each layer that it writes."""
        layer, position, column = self.features[feature].tolist()
        reader, found = self._collection.readers[layer], {}
        for write in reader.writes:
            weight: Any = write.map.W_dec[reader.group]
            own = weight[write.name][column][None].to(self._local.device, self._local.dtype) * self.values[feature]
            found[write.layer] = self.to_stream(write, own, torch.tensor([position]))[0]
        return found

    def _vectors(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return features that write at the MLP of a layer, sorted by token, and what each adds to the stream."""
        numbers, rows = [], []
        for write in self._collection.writes_at(layer):
            for reader, features in self._written_by(write):
                weight: Any = write.map.W_dec[reader.group]
                own = weight[write.name][self.features[features, 2]].to(self._local.device, self._local.dtype)
                added = self.to_stream(write, own * self.values[features, None], self.features[features, 1])
                _check_finite(write.map, added)
                rows.append(added)
                numbers.append(features)
        if not rows:
            none = torch.zeros(0, dtype=torch.long, device=self._local.device)
            return none, torch.zeros(0, self._local.width, dtype=self._local.dtype, device=self._local.device)
        features, vectors = torch.cat(numbers), torch.cat(rows)
        order = self.features[features, 1].argsort(stable=True)
        return features[order], vectors[order]

    def written(self, layer: int) -> Written:
        """Return what features and errors write at the MLP of a layer."""
        if self._cache is not None and layer in self._cache:
            return self._cache[layer]
        features, rows = self._vectors(layer)
        positions = self.features[features, 1]
        counts = torch.bincount(positions, minlength=self._local.length)
        slots = torch.arange(len(features), device=rows.device) - (counts.cumsum(0) - counts)[positions]
        vectors = rows.new_zeros(self._local.length, int(counts.max()) + 1, self._local.width)
        vectors[positions, slots], vectors[:, -1] = rows, self.errors[layer]
        found = Written(vectors, features, positions, slots)
        if self._cache is not None:
            self._cache[layer] = found
        return found

    def _reconstruct(self) -> None:
        """Compute the errors, and carry the constants from the embedding to the last layer."""
        local, first = self._local, self._first
        self.embeddings = local.circuit.token_embeddings()[local.tokens].to(local.device, local.dtype)
        self.errors = torch.stack([local.at("mlp.delta", layer) for layer in range(local.n_layers)])
        constant = local.at("resid.embed") - self.embeddings
        self.constants = constant.new_zeros(2 * local.n_layers + 1, *constant.shape)
        for layer in range(local.n_layers):
            self.constants[2 * layer] = constant
            after = constant + self._attention_constant(layer, constant)
            self.constants[2 * layer + 1] = after
            features, rows = self._vectors(layer)
            self.errors[layer].index_add_(0, self.features[features, 1], -rows)
            added = torch.zeros_like(constant)
            for write in self._collection.writes_at(layer):
                bias = write.map.b_dec[write.name].to(local.device, local.dtype)
                _check_finite(write.map, bias)
                added += self.to_stream(write, bias.expand(local.length, -1), slice(None))
            if any(write.place.kind == "mlp.out" for write in self._collection.writes_at(layer)):
                added += self._norm_bias(layer)
            self.errors[layer] -= added
            for read, write in self._collection.skips:
                if write.layer == layer:
                    skipped = self.skip(read, write, self._inputs[read])
                    _check_finite(write.map, skipped)
                    self.errors[layer] -= skipped
                    added += self.skip(read, write, local.normed(read.norm, self.constants[read.point]))
            # features of the first tokens are off, so that their errors are all that their maps leave
            added[:first] += self.errors[layer, :first]
            self.errors[layer, :first] = 0
            constant = after + added
        self.constants[-1] = constant

    def _attention_constant(self, layer: int, constant: Tensor) -> Tensor:
        """Return what attention adds for the constant part of the stream: its own output less that of the rest."""
        rest = self._local.stream(2 * layer) - constant
        return self._local.at("attn.delta", layer) - self._local.push_attention(layer, rest).sum(0)

    def _norm_bias(self, layer: int) -> Tensor | float:
        place = Place("mlp.out", layer)
        norm = self._local.circuit.post_norm(place)
        if norm is None or norm.bias is None:
            return 0.0
        return norm.bias.to(self._local.device, self._local.dtype) * self._local.circuit.factor(place)


def _check_finite(map_: LinearMap, *tensors: Tensor) -> None:
    """Raise UsageError if a map computes NaN or infinity."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise UsageError(
            f"{map_.id!r} gives NaN or infinity for this prompt, so that no graph can be made: load it again, in "
            "float32 if its dtype is narrower"
        )
