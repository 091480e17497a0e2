"""Reads folders of circuit-tracer: a whole set of transcoders, some of its features, or one layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featurizers.errors import FeaturizerError, ManifestError, SourceError, UsageError, WeightsError, shown
from featurizers.features import FeatureSpace, select
from featurizers.format import ExternalFiles, TensorFile
from featurizers_transcoder import CrossLayerTranscoder, Transcoder
from torch import Tensor

from featurizers_circuit_tracer.config import CONFIG, CircuitTracerConfig, read_config
from featurizers_circuit_tracer.sites import GEMMA_EPS, NORMALIZED, is_gemma, read_hook, write_site

FILE = re.compile(r"(?:layer|W_enc)_(0|[1-9]\d{0,3})\.safetensors")
GROUP = re.compile(r"layer-(0|[1-9]\d{0,3})")
THRESHOLD = "activation_function.threshold"


def read(source: ExternalFiles) -> FeatureSpace[Any] | None:
    """Read all transcoders of a folder as one map in float32, None for a folder of another library.

    Raises:
        ManifestError: ``config.yaml`` is not valid, or a layer is missing.
        WeightsError: the weights do not fit each other, or a threshold is negative.
        UsageError: features are requested without their group.
        FeatureIndexError: a feature is out of range.
    """
    opened = _open(source)
    if opened is None:
        return None
    config, raw = opened
    layers = _layers(source, config)
    names = [f"layer-{layer}" for layer in layers]
    chosen: Mapping[str, Tensor | None]
    if source.group_indices is not None:
        if unknown := [group for group in source.group_indices if group not in names]:
            raise UsageError(
                f"{source.where}: there is no group {shown(unknown[0])}; the groups are {names[0]!r} to {names[-1]!r}"
            )
        chosen = {group: source.group_indices[group] for group in names if group in source.group_indices}
    elif source.indices is not None:
        if len(names) > 1:
            raise UsageError(f"{source.where}: give features by layer, such as indices={{{names[0]!r}: [0, 1]}}")
        chosen = {names[0]: source.indices}
    else:
        chosen = dict.fromkeys(names)
    return _described(_map(source, config, chosen, layers), source, raw)


def resolve(reference: str, repository: Callable[..., ExternalFiles]) -> FeatureSpace[Any]:
    """Read ``owner/name``, ``owner/name/folder``, or one layer of it, whose other files are not downloaded.

    Raises:
        SourceError: the reference has another form, or the repository has no such layer or no ``config.yaml``.
    """
    owner, _, rest = reference.partition("/")
    name, _, folder = rest.partition("/")
    if not (owner and name):
        raise SourceError(
            f"cannot read {shown('circuit-tracer:' + reference)}; write 'circuit-tracer:owner/name' or "
            "'circuit-tracer:owner/name/layer-5'"
        )
    above, _, last = folder.rpartition("/")
    match = GROUP.fullmatch(last)
    source = repository(f"{owner}/{name}", (above if match else folder) or None)
    if match is None:
        whole = read(source)
        if whole is None:
            raise SourceError(f"{owner}/{name} has no {CONFIG} of circuit-tracer in the folder {folder!r}")
        return whole
    opened = _open(source)
    if opened is None:
        raise SourceError(f"{owner}/{name} has no {CONFIG} of circuit-tracer in the folder {above!r}")
    config, raw = opened
    layers = _layers(source, config)
    layer = int(match[1])
    if layer not in layers:
        raise SourceError(f"{source.where} has the layers {layers[0]} to {layers[-1]}, not {layer}")
    if source.group_indices is not None:
        raise UsageError(f"{source.where}: {last} is one group; give its features as a list of numbers")
    if config.model_kind == "cross_layer_transcoder":
        return _described(_map(source, config, {last: source.indices}, layers), source, raw, last)
    return _described(_one(source, config, layer), source, raw, last)


def _open(source: ExternalFiles) -> tuple[CircuitTracerConfig, dict[str, Any]] | None:
    """Read the config of a folder; None for a folder of another library."""
    if CONFIG not in source.names:
        return None
    has_files = any(map(FILE.fullmatch, source.names))
    try:
        opened = read_config(source)
    except ManifestError:
        if has_files or not any(name.endswith(".safetensors") for name in source.names):
            raise
        return None
    if opened is None and has_files:
        raise ManifestError(source.where, f"{CONFIG} has no model_kind: transcoder_set or cross_layer_transcoder")
    return opened


def _layers(source: ExternalFiles, config: CircuitTracerConfig) -> list[int]:
    """Return the layers, which must be all from 0 on.

    Raises:
        ManifestError: one is missing, or a file is not in this folder.
    """
    if config.transcoders is not None:
        if config.model_kind != "transcoder_set":
            raise ManifestError(source.where, f"{CONFIG} lists transcoders, which belong to a transcoder_set")
        for name in config.transcoders:
            if name not in source.names or not name.endswith(".safetensors"):
                raise ManifestError(
                    source.where,
                    f"{CONFIG} names the file {shown(name, 200)}, which is not a safetensors file of this folder; "
                    "load the repository that it belongs to, with the plugin of its format",
                )
        return list(range(len(config.transcoders)))
    kind = "layer" if config.model_kind == "transcoder_set" else "W_enc"
    found = {int(m[1]) for m in map(FILE.fullmatch, source.names) if m is not None and m[0].startswith(kind)}
    if not found:
        raise ManifestError(source.where, f"there is no file {kind}_0.safetensors")
    if missing := sorted(set(range(max(found) + 1)) - found):
        raise ManifestError(source.where, f"the layer {missing[0]} is missing, and the files go up to {max(found)}")
    return sorted(found)


def _described(
    featurizer: CrossLayerTranscoder | Transcoder, source: ExternalFiles, raw: dict[str, Any], layer: str | None = None
) -> FeatureSpace[Any]:
    scan = raw.get("scan")
    name = scan if isinstance(scan, str) and scan else Path(source.where).name
    featurizer.id = name if layer is None else f"{name}/{layer}"
    featurizer.metadata = {"circuit_tracer": raw}
    return featurizer


class _File:
    """Safetensors file whose tensors are checked for their shapes and read in float32, as circuit-tracer does."""

    def __init__(self, source: ExternalFiles, name: str) -> None:
        self.where, self.name = source.where, name
        self.file: TensorFile = source.safetensors(name)

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor of floats that has a number of axes."""
        spec = self.file.specs.get(name)
        if spec is None or len(spec.shape) != axes or 0 in spec.shape or not spec.dtype.startswith(("float", "bfloat")):
            got = "nothing" if spec is None else f"{spec.dtype} of shape {spec.shape}"
            raise WeightsError(self.where, f"{self.name}: {name} must be floats with {axes} axes, there is {got}")
        return spec.shape

    def read(self, name: str, shape: tuple[int, ...], rows: Tensor | None = None) -> Tensor:
        """Read a tensor of this shape, or some of its rows."""
        if self.shape(name, len(shape)) != shape:
            raise WeightsError(
                self.where, f"{self.name}: {name} has shape {self.file.shapes[name]}, it must be {shape}"
            )
        return self.file.read(name, rows).float()

    def threshold(self, name: str, n: int, rows: Tensor | None) -> Tensor:
        """Read thresholds, which must not be negative: circuit-tracer lets negative features pass such ones."""
        threshold = self.read(name, (n,), rows)
        if (threshold < 0).any():
            raise WeightsError(
                self.where,
                f"{self.name}: {name} has a negative threshold, for which circuit-tracer's JumpReLU has negative "
                "features; no rule of this library does",
            )
        return threshold

    def check_names(self, known: set[str]) -> None:
        """Raise WeightsError for a tensor that would not be read."""
        if unknown := sorted(self.file.specs.keys() - known):
            raise WeightsError(self.where, f"{self.name} has the tensor {shown(unknown[0])}, which is not known")


def _columns(rows: Tensor | None, n: int) -> Tensor | None:
    return None if rows is None else select(rows, n).as_columns()


def _read_config(source: ExternalFiles, config: CircuitTracerConfig, width: int) -> dict[str, Any]:
    """Return the configuration of a read.

    Raises:
        ManifestError: the hook is within a norm whose eps is not known.
    """
    hook, model = config.feature_input_hook, config.model_name
    if hook == NORMALIZED and not is_gemma(model):
        raise ManifestError(
            source.where,
            f"{CONFIG}: {hook} is inside the norm of the model {shown(model)}; its eps is known for Gemma 2 and 3 only",
        )
    return {"width": width, "normalize": read_hook(hook, model, 0).normalize, "eps": GEMMA_EPS}


def _one(source: ExternalFiles, config: CircuitTracerConfig, layer: int) -> Transcoder:
    """Read the transcoder of one layer of a set."""
    part = _Transcoder(source, config, layer, source.indices)
    read = _read_config(source, config, part.widths[0])
    tensors = {} if part.threshold is None else {"threshold": part.threshold}
    with _weights_errors(source.where):
        result = Transcoder.from_weights(
            part.W_enc,
            part.W_dec,
            part.b_enc,
            part.b_dec,
            part.W_skip,
            rule=part.rule,
            normalize=read["normalize"],
            eps=read["eps"],
            numbers=part.rows,
            slice_of=None if part.rows is None else part.n,
            **tensors,  # type: ignore[arg-type]  # mypy takes them for the other options
        )
    reads = read_hook(config.feature_input_hook, config.model_name, layer).site
    writes = write_site(config.feature_output_hook, config.model_name, layer)
    result.reads, result.writes = {"in": reads} if reads else {}, {"out": writes} if writes else {}
    return result


class _Transcoder:
    """Weights of one layer of a set, or of some of its features."""

    def __init__(self, source: ExternalFiles, config: CircuitTracerConfig, layer: int, indices: Tensor | None) -> None:
        name = f"layer_{layer}.safetensors" if config.transcoders is None else config.transcoders[layer]
        file = _File(source, name)
        file.check_names({"W_enc", "W_dec", "b_enc", "b_dec", "W_skip", THRESHOLD})
        self.n, d_in = file.shape("W_enc", 2)
        d_out = file.shape("W_dec", 2)[1]
        self.widths = d_in, d_out
        self.rows = _columns(indices, self.n)
        self.W_enc = file.read("W_enc", (self.n, d_in), self.rows)
        self.W_dec = file.read("W_dec", (self.n, d_out), self.rows)
        self.b_enc = file.read("b_enc", (self.n,), self.rows)
        self.b_dec = file.read("b_dec", (d_out,))
        self.W_skip = file.read("W_skip", (d_out, d_in)).T if "W_skip" in file.file.specs else None
        self.threshold = file.threshold(THRESHOLD, self.n, self.rows) if THRESHOLD in file.file.specs else None
        self.rule = "relu" if self.threshold is None else "jumprelu"


def _map(
    source: ExternalFiles, config: CircuitTracerConfig, chosen: Mapping[str, Tensor | None], layers: list[int]
) -> CrossLayerTranscoder:
    """Read the groups of a map and what they write; the files of a set's other layers are not opened.

    Args:
        source: the folder.
        config: of it.
        chosen: features to read of each group, None for all.
        layers: all layers of the folder.
    """
    parts = _Parts()
    for group, indices in chosen.items():
        layer = int(group.removeprefix("layer-"))
        if config.model_kind == "transcoder_set":
            _add_transcoder(parts, source, config, layer, indices)
        else:
            _add_cross_layer(parts, source, config, layer, indices, layers)
    if config.model_kind == "cross_layer_transcoder":
        _add_biases(parts, source)
    whole = {"reads": parts.reads, "writes": parts.writes, "groups": parts.groups, "skips": parts.skips}
    with _weights_errors(source.where):
        result = CrossLayerTranscoder.from_tensors(whole, parts.tensors)
    reads = {f"in-{i}": read_hook(config.feature_input_hook, config.model_name, i).site for i in parts.read_layers}
    writes = {f"out-{i}": write_site(config.feature_output_hook, config.model_name, i) for i in parts.write_layers}
    known_reads = {name: site for name, site in reads.items() if site is not None}
    known_writes = {name: site for name, site in writes.items() if site is not None}
    result.reads, result.writes = known_reads, known_writes  # the same hook in each layer, so all or none
    return result


class _Parts:
    """Config and tensors of a map while its layers are read."""

    def __init__(self) -> None:
        self.reads: dict[str, Any] = {}
        self.writes: dict[str, int] = {}
        self.groups: dict[str, Any] = {}
        self.skips: dict[str, list[str]] = {}
        self.tensors: dict[str, Tensor] = {}

    @property
    def read_layers(self) -> list[int]:
        """Numbers of the layers that are read."""
        return [int(name.removeprefix("in-")) for name in self.reads]

    @property
    def write_layers(self) -> list[int]:
        """Numbers of the layers that are written."""
        return [int(name.removeprefix("out-")) for name in self.writes]

    def add_group(self, layer: int, writes: list[int], n: int, rows: Tensor | None, threshold: Tensor | None) -> None:
        """Add the group of a layer, with the numbers of its features if it is a slice."""
        group = f"layer-{layer}"
        self.groups[group] = {
            "reads": [f"in-{layer}"],
            "writes": [f"out-{write}" for write in writes],
            "n_features": n if rows is None else len(rows),
            "rule": "relu" if threshold is None else "jumprelu",
            "slice_of": None if rows is None else n,
        }
        if rows is not None:
            self.tensors[f"numbers-{group}"] = rows
        if threshold is not None:
            self.tensors[f"rule_tensors.threshold.{group}"] = threshold


def _add_transcoder(
    parts: _Parts, source: ExternalFiles, config: CircuitTracerConfig, layer: int, indices: Tensor | None
) -> None:
    """Add the group of a layer that writes this layer alone."""
    own = _Transcoder(source, config, layer, indices)
    d_in, d_out = own.widths
    read, write, group = f"in-{layer}", f"out-{layer}", f"layer-{layer}"
    parts.reads[read], parts.writes[write] = _read_config(source, config, d_in), d_out
    parts.add_group(layer, [layer], own.n, own.rows, own.threshold)
    parts.tensors |= {
        f"W_enc.{group}.{read}": own.W_enc,
        f"W_dec.{group}.{write}": own.W_dec,
        f"b_enc.{group}": own.b_enc,
        f"b_dec.{write}": own.b_dec,
    }
    if own.W_skip is not None:
        parts.skips[write] = [read]
        parts.tensors[f"W_skip.{write}.{read}"] = own.W_skip


def _add_cross_layer(
    parts: _Parts,
    source: ExternalFiles,
    config: CircuitTracerConfig,
    layer: int,
    indices: Tensor | None,
    layers: list[int],
) -> None:
    """Add the group of a layer that writes this layer and all later ones."""
    encoder, decoder = _File(source, f"W_enc_{layer}.safetensors"), _File(source, f"W_dec_{layer}.safetensors")
    threshold_name, later = f"threshold_{layer}", layers[layer:]
    encoder.check_names({f"W_enc_{layer}", f"b_enc_{layer}", f"b_dec_{layer}", threshold_name})
    decoder.check_names({f"W_dec_{layer}"})
    n, d_in = encoder.shape(f"W_enc_{layer}", 2)
    d_out = decoder.shape(f"W_dec_{layer}", 3)[2]
    rows = _columns(indices, n)
    has = threshold_name in encoder.file.specs
    threshold = encoder.threshold(threshold_name, n, rows) if has else None
    if parts.groups and (threshold is None) != (next(iter(parts.groups.values()))["rule"] == "relu"):
        raise WeightsError(source.where, f"some layers have thresholds and others, such as {layer}, do not")
    group = f"layer-{layer}"
    parts.reads[f"in-{layer}"] = _read_config(source, config, d_in)
    parts.add_group(layer, later, n, rows, threshold)
    parts.tensors[f"W_enc.{group}.in-{layer}"] = encoder.read(f"W_enc_{layer}", (n, d_in), rows)
    parts.tensors[f"b_enc.{group}"] = encoder.read(f"b_enc_{layer}", (n,), rows)
    W_dec = decoder.read(f"W_dec_{layer}", (n, len(later), d_out), rows)
    for place, write in enumerate(later):
        if parts.writes.setdefault(f"out-{write}", d_out) != d_out:
            raise WeightsError(source.where, f"the layers write {write} with different widths")
        parts.tensors[f"W_dec.{group}.out-{write}"] = W_dec[:, place]


def _add_biases(parts: _Parts, source: ExternalFiles) -> None:
    """Add the decoder's bias of each write, which is in the encoder's file of that layer."""
    parts.writes = dict(sorted(parts.writes.items(), key=lambda item: int(item[0].removeprefix("out-"))))
    for write, width in parts.writes.items():
        layer = write.removeprefix("out-")
        file = _File(source, f"W_enc_{layer}.safetensors")
        parts.tensors[f"b_dec.{write}"] = file.read(f"b_dec_{layer}", (width,))


@contextmanager
def _weights_errors(where: str) -> Iterator[None]:
    """Raise errors of tensors that do not fit each other as WeightsError with the name of the folder."""
    try:
        yield
    except WeightsError:
        raise
    except FeaturizerError as error:
        raise WeightsError(where, str(error)) from error
