"""Writes a map as a folder of circuit-tracer: a set of transcoders, or a cross-layer transcoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from featurizers import Site
from featurizers.errors import ConversionError
from featurizers.features import FeatureSpace
from featurizers.format import write_tensors
from featurizers_transcoder import CrossLayerTranscoder, Transcoder
from featurizers_transcoder import LinearMap as Map
from torch import Tensor

from featurizers_circuit_tracer.config import CONFIG, CircuitTracerConfig, config_text
from featurizers_circuit_tracer.reading import THRESHOLD
from featurizers_circuit_tracer.sites import GEMMA_EPS, NORMALIZED, READS, WRITES, is_gemma, read_hook, write_site


def write(featurizer: FeatureSpace[Any], folder: Path) -> list[str]:
    """Write a map whose groups each read their own layer; return a sentence for each thing that is lost.

    A map whose groups write their own layers alone becomes a set of transcoders, any other a cross-layer transcoder.

    Raises:
        ConversionError: circuit-tracer has no such map.
    """
    where = str(folder)
    if not isinstance(featurizer, Transcoder | CrossLayerTranscoder):
        raise ConversionError(where, f"circuit-tracer has transcoders only, not the kind {featurizer.kind!r}")
    layers = _Layers(featurizer, where)
    lost = _lost(featurizer)
    names: dict[str, Any] = dict(zip(("feature_input_hook", "feature_output_hook"), layers.hooks(), strict=True))
    raw = featurizer.metadata.get("circuit_tracer")
    kept = {k: v for k, v in raw.items() if k != "transcoders"} if isinstance(raw, dict) else {}
    config = CircuitTracerConfig(
        model_kind="cross_layer_transcoder" if layers.across else "transcoder_set", model_name=layers.model, **names
    )
    if layers.across:
        _write_cross_layer(layers, folder, where, lost)
    else:
        _write_set(layers, folder, where)
    text = config_text(config, {**kept, "scan": featurizer.id})
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return lost


class _Layers:
    """A map whose groups, reads and writes are those of the layers from 0 on.

    Attributes:
        map: the map.
        groups: group of each layer.
        reads: read of each layer.
        writes: write of each layer.
        across: True if a group writes another layer than its own.
        model: name of the model; None if it is not known.
    """

    def __init__(self, featurizer: Map, where: str) -> None:
        self.map, self.where, config = featurizer, where, featurizer.config
        read_layers = {name: _layer(site) for name, site in featurizer.reads.items()}
        write_layers = {name: _layer(site) for name, site in featurizer.writes.items()}
        if not read_layers or not write_layers or None in (*read_layers.values(), *write_layers.values()):
            raise ConversionError(
                where,
                "circuit-tracer stores the layer and the hook of each read and write: set f.reads and f.writes to "
                "sites with layers, such as 'mlp.in:3' and 'mlp.out:3'",
            )
        self.groups = _by_layer({g: read_layers[own.reads[0]] for g, own in config.groups.items()}, "group", where)
        self.reads = [config.groups[group].reads[0] for group in self.groups]
        self.writes = _by_layer(write_layers, "write", where)
        if len(self.writes) != len(self.groups) or len(config.reads) != len(self.groups):
            raise ConversionError(where, "circuit-tracer has as many reads and writes as groups, one a layer")
        self.across = False
        for layer, group in enumerate(self.groups):
            own = {write_layers[write] or 0 for write in config.groups[group].writes}
            if min(own) < layer:
                raise ConversionError(where, f"the group {group!r} reads layer {layer} and writes layer {min(own)}")
            self.across = self.across or own != {layer}
        if len({config.groups[group].n_features for group in self.groups}) > 1:
            raise ConversionError(where, "circuit-tracer has the same number of features in each layer")
        if len({*(read.width for read in config.reads.values()), *config.writes.values()}) > 1:
            raise ConversionError(where, "circuit-tracer's reads and writes have one width")
        self._check_maps()
        models = {site.model for site in featurizer.sites.values()}
        raw = featurizer.metadata.get("circuit_tracer")
        named = raw.get("model_name") if isinstance(raw, dict) else None
        self.model = next(iter(models)) if len(models) == 1 else None
        self.model = self.model or (named if isinstance(named, str) else None)

    def _check_maps(self) -> None:
        config = self.map.config
        rules = {own.rule for own in config.groups.values()}
        if not rules <= {"relu", "jumprelu"}:
            raise ConversionError(self.where, f"circuit-tracer has the rules relu and jumprelu, not {sorted(rules)}")
        if self.across and len(rules) > 1:
            raise ConversionError(self.where, "a cross-layer transcoder has one rule for all layers")
        if self.across and config.skips:
            raise ConversionError(self.where, "circuit-tracer reads no skip connection of a cross-layer transcoder")
        for write, reads in config.skips.items():
            if reads != [self.reads[self.writes.index(write)]]:
                raise ConversionError(self.where, f"the skip to {write!r} must come from its own layer")
        if len({(read.normalize, read.eps) for read in config.reads.values() if read.normalize != "none"}) > 1:
            raise ConversionError(self.where, "the reads are normalised in different ways")

    def hooks(self) -> tuple[str, str]:
        """Return the hooks of the reads and of the writes.

        Raises:
            ConversionError: circuit-tracer has no hook at these sites.
        """
        config, raw = self.map.config, self.map.metadata.get("circuit_tracer")
        old = raw if isinstance(raw, dict) else {}
        normalize = {read.normalize for read in config.reads.values()}
        eps = {read.eps for read in config.reads.values()}
        readers = [old.get("feature_input_hook"), *READS]
        for hook in readers:
            if hook not in READS or (hook == NORMALIZED and not (is_gemma(self.model) and eps == {GEMMA_EPS})):
                continue
            found = [read_hook(hook, self.model, i) for i in range(len(self.reads))]
            if {one.normalize for one in found} == normalize and all(
                one.site == self.map.reads[read] for one, read in zip(found, self.reads, strict=True)
            ):
                break
        else:
            raise ConversionError(
                self.where,
                f"circuit-tracer has no hook for reads such as {str(self.map.reads[self.reads[0]])!r} with "
                f"normalisation {'/'.join(sorted(normalize))!r}; it has {', '.join(READS)}",
            )
        for written in [old.get("feature_output_hook"), *WRITES]:
            if isinstance(written, str) and all(
                write_site(written, self.model, i) == self.map.writes[name] for i, name in enumerate(self.writes)
            ):
                return hook, written
        raise ConversionError(
            self.where,
            f"circuit-tracer has no hook for writes such as {str(self.map.writes[self.writes[0]])!r}; it has "
            f"{', '.join(WRITES)}, and the model is {self.model!r}",
        )

    def encoder(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the encoder, its bias with the centre of the read in it, and the threshold of a layer."""
        group, read = self.groups[layer], self.reads[layer]
        W_enc = _part(self.map.W_enc, group, read)
        bias: Tensor = self.map.b_enc[group]
        if read in self.map.centre:
            if self.map.config.reads[read].normalize != "none":
                raise ConversionError(self.where, f"the read {read!r} is centred and then normalised")
            bias = bias - W_enc @ self.map.centre[read]
        if self.map.config.groups[group].rule == "relu":
            return W_enc, bias, None
        return W_enc, bias, _part(self.map.rule_tensors, "threshold", group).clamp(min=0)


def _part(tensors: Any, outer: str, inner: str) -> Tensor:
    result: Tensor = tensors[outer][inner]
    return result


def _layer(site: Site) -> int | None:
    if site.kind != "module":
        return site.layer
    numbers = [int(part) for part in str(site.module).split(".") if part.isascii() and part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else None


def _by_layer(layers: dict[str, int | None], what: str, where: str) -> list[str]:
    """Return the names by layer; each layer from 0 on must have one."""
    names = {layer: name for name, layer in layers.items()}
    if len(names) < len(layers) or set(names) != set(range(len(names))):
        raise ConversionError(
            where,
            f"circuit-tracer has one {what} for each layer of a model from 0 on, not for "
            f"{sorted(layer for layer in layers.values() if layer is not None)[:10]}",
        )
    return [names[layer] for layer in range(len(names))]


def _lost(featurizer: Map) -> list[str]:
    lost = []
    if any(own.slice_of is not None for own in featurizer.config.groups.values()):
        lost.append("The numbers that the features have in the whole map are not kept; they count from 0.")
    if featurizer.config.special_tokens:
        lost.append(f"The special tokens {list(featurizer.config.special_tokens)} are not kept.")
    if len(featurizer.centre):
        lost.append("What is subtracted from the reads is in the encoder's biases; features are the same to rounding.")
    if other := sorted(featurizer.metadata.keys() - {"circuit_tracer"}):
        lost.append(f"The metadata {', '.join(map(repr, other))} are not kept.")
    return lost


def _write_set(layers: _Layers, folder: Path, where: str) -> None:
    own = layers.map
    for layer, (group, read, write) in enumerate(zip(layers.groups, layers.reads, layers.writes, strict=True)):
        W_enc, b_enc, threshold = layers.encoder(layer)
        W_dec = _part(own.W_dec, group, write)
        tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": own.b_dec[write]}
        if threshold is not None:
            tensors[THRESHOLD] = threshold
        if own.config.skips:  # circuit-tracer takes it that all layers have one if the first has
            skips = write in own.config.skips
            width = W_enc.shape[1]
            tensors["W_skip"] = _part(own.W_skip, write, read).T if skips else W_dec.new_zeros(width, width)
        write_tensors(tensors, folder / f"layer_{layer}.safetensors", where)


def _write_cross_layer(layers: _Layers, folder: Path, where: str, lost: list[str]) -> None:
    own, filled = layers.map, False
    for layer, group in enumerate(layers.groups):
        W_enc, b_enc, threshold = layers.encoder(layer)
        encoder = {f"W_enc_{layer}": W_enc, f"b_enc_{layer}": b_enc, f"b_dec_{layer}": own.b_dec[layers.writes[layer]]}
        if threshold is not None:
            encoder[f"threshold_{layer}"] = threshold
        decoders = []
        for write in layers.writes[layer:]:
            has = (group, write) in own.decoders
            filled = filled or not has
            decoders.append(_part(own.W_dec, group, write) if has else torch.zeros_like(W_enc))
        write_tensors(encoder, folder / f"W_enc_{layer}.safetensors", where)
        decoder = {f"W_dec_{layer}": torch.stack(decoders, dim=1)}
        write_tensors(decoder, folder / f"W_dec_{layer}.safetensors", where)
    if filled:
        lost.append("Groups have decoders of zeros for the later layers that they did not write.")
