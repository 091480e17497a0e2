"""Reads Gemma Scope 2's cross-layer transcoders and crosscoders, whose features are each read in one layer.

A folder has a file ``params_layer_i.safetensors`` for each layer, with ``w_enc (d, n)``, ``b_enc``, ``threshold``,
``w_dec (n, layers, d)``, the ``b_dec`` of what this layer's write gets, and maybe ``affine_skip_connection (d, d)``:

    z_i = relu(h_i) [h_i > threshold_i], h_i = x_i w_enc_i + b_enc_i
    ŷ_w = b_dec_w + Σ_i z_i w_dec_i[:, w] + x_w affine_w
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from featurizers import Site
from featurizers.errors import FeaturizerError, ManifestError, UsageError, WeightsError, shown
from featurizers.features import select
from featurizers.format import ExternalFiles, TensorFile
from featurizers_transcoder import Crosscoder, CrossLayerTranscoder
from featurizers_transcoder.hooks import hookless, site_of_point
from torch import Tensor

from featurizers_sae_lens.scopes import OTHER_FOLDER, SKIP, gemma_2_model

FILE = re.compile(r"params_layer_(0|[1-9]\d{0,2})\.safetensors")
FOLDER_LAYERS = re.compile(r"layer((?:_\d{1,4}){1,1000})_width")
POINTS = "model.layers.{all}.pre_feedforward_layernorm.output", "model.layers.{all}.post_feedforward_layernorm.output"
"""Where cross-layer transcoders read and write, if ``config.json`` does not say it."""
CLASSES: dict[str, type[CrossLayerTranscoder] | type[Crosscoder]] = {
    "clt": CrossLayerTranscoder,
    "crosscoder": Crosscoder,
}


def is_multi_layer(names: Iterable[str]) -> bool:
    """Return whether files are those of a map of several layers."""
    return any(map(FILE.fullmatch, names))


def multi_layer(source: ExternalFiles) -> CrossLayerTranscoder | Crosscoder:
    """Read all features of a folder, or some, as one map in float32; only the rows of these features are read.

    A decoder from a layer to an earlier one is left out if all its numbers are zero, and kept if not: the map is then
    not causal. Of a slice this concerns the features that are read.

    Raises:
        ManifestError: ``config.json`` is not known, or does not fit the files.
        WeightsError: the files are damaged, or do not fit each other.
        UsageError: features are requested without their group.
        FeatureIndexError: a feature is out of range.
    """
    raw = source.json("config.json") if "config.json" in source.names else {}
    layout = _layout(source, raw)
    parts = _Parts(layout, raw.get("affine_connection"), source)
    for group, indices in _chosen(source, layout).items():
        parts.add_group(layout.groups.index(group), indices)
    parts.add_writes()
    try:
        result = CLASSES[layout.kind].from_tensors(parts.config, parts.tensors)
    except FeaturizerError as error:
        raise WeightsError(source.where, str(error)) from error
    notes = _set_sites(result, layout, gemma_2_model(source.where, raw.get("model_name")))
    result.id = source.where.rstrip("/").rpartition("/")[2]
    result.metadata = {"gemma_scope_2": raw}
    if parts.early:
        result.metadata["writes_earlier_layers"] = parts.early
        notes.append(
            "It is not causal: features also write layers before the one that they are read from, as "
            "writes_earlier_layers lists. Its edits need later='frozen'."
        )
    if notes:
        result.metadata["notes"] = notes
    return result


class _Layout(NamedTuple):
    """What the files are.

    Attributes:
        kind: ``clt`` or ``crosscoder``.
        layers: numbers of the layers in the model, ascending.
        points: hook points of reads and writes with ``{…}`` for the layer, None where they are not known.
    """

    kind: str
    layers: list[int]
    points: tuple[object, object]

    @property
    def groups(self) -> list[str]:
        """Name of the features of each layer."""
        return [f"layer-{layer}" for layer in self.layers]

    @property
    def reads(self) -> list[str]:
        """Name of each read."""
        return self.groups if self.kind == "crosscoder" else [f"in-{layer}" for layer in self.layers]

    @property
    def writes(self) -> list[str]:
        """Name of each write."""
        return self.groups if self.kind == "crosscoder" else [f"out-{layer}" for layer in self.layers]


def _layout(source: ExternalFiles, raw: dict[str, Any]) -> _Layout:
    """Find out what the files are, from ``config.json`` and the names of the folders.

    Raises:
        ManifestError: they do not say it, or contradict each other.
    """
    where = source.where
    if (architecture := raw.get("architecture", "jump_relu")) != "jump_relu":
        raise ManifestError(
            where, f"the architecture {shown(architecture)} of Gemma Scope 2 is not known, only 'jump_relu'"
        )
    found = {int(match[1]) for match in map(FILE.fullmatch, source.names) if match is not None}
    if missing := sorted(set(range(max(found) + 1)) - found):
        raise ManifestError(where, f"params_layer_{missing[0]}.safetensors is missing; the files go to {max(found)}")
    points = raw.get("hf_hook_point_in"), raw.get("hf_hook_point_out")
    kind = _kind(where, raw, points)
    if points == (None, None) and kind == "clt":
        points = POINTS
    layers = _layers(where, kind, points, len(found))
    if len(layers) != len(found):
        raise ManifestError(where, f"there are files of {len(found)} layers, and the layers {shown(layers)} are named")
    return _Layout(kind, layers, points)


def _kind(where: str, raw: dict[str, Any], points: tuple[object, object]) -> str:
    kind = raw.get("type")
    if kind is None and points != (None, None):
        kind = "crosscoder" if points[0] == points[1] else "clt"
    if kind is None:
        matches = map(OTHER_FOLDER.match, reversed(where.split("/")))
        kind = next((match[1] for match in matches if match is not None), None)
    if not isinstance(kind, str) or kind not in CLASSES:
        raise ManifestError(
            where, f"files of several layers are of a type {' or '.join(map(repr, CLASSES))}, not {shown(kind)}"
        )
    if points != (None, None) and (points[0] == points[1]) != (kind == "crosscoder"):
        raise ManifestError(where, f"a {kind} does not read {shown(points[0])} and write {shown(points[1])}")
    return kind


def _layers(where: str, kind: str, points: tuple[object, object], count: int) -> list[int]:
    """Return the numbers of the layers, which the braces of the hook points list, or the folder of a crosscoder.

    Raises:
        ManifestError: they are not ascending numbers, or not the same for both points.
    """
    if points == (None, None):
        match = FOLDER_LAYERS.search(where)
        if match is None or kind != "crosscoder":
            raise ManifestError(where, "neither config.json nor the folder's name says which layers it reads")
        texts = {match[1].strip("_").replace("_", ",")}
    else:
        texts = {str(point).partition("{")[2].partition("}")[0] for point in points}
    numbers = next(iter(texts)).split(",") if len(texts) == 1 else []
    if numbers == ["all"]:
        return list(range(count))
    valid = [int(number) for number in numbers if re.fullmatch(r"\s?\d{1,4}", number, re.ASCII)]
    if not valid or len(valid) < len(numbers) or valid != sorted(set(valid)):
        raise ManifestError(
            where,
            f"the hook points {shown(points)} must have the same layers, as in 'model.layers.{{5,9,12}}.output' or "
            "'{all}', in ascending order",
        )
    return valid


def _chosen(source: ExternalFiles, layout: _Layout) -> Mapping[str, Tensor | None]:
    """Return the features to read of each group, None for all."""
    names, asked = layout.groups, source.group_indices
    if asked is not None:
        if unknown := sorted(asked.keys() - set(names)):
            raise UsageError(f"{source.where} has the groups {', '.join(names)}; there is no {shown(unknown[0])}")
        return {name: asked[name] for name in names if name in asked}
    if source.indices is not None:
        raise UsageError(f"{source.where}: give features by layer, such as indices={{{names[0]!r}: [0, 1]}}")
    return dict.fromkeys(names)


class _Parts:
    """Config and tensors of a map while its files are read.

    Attributes:
        config: of the map.
        tensors: by the names of `featurizers_transcoder.LinearMap`.
        early: layers before its own that a group writes, by group.
    """

    def __init__(self, layout: _Layout, skip: object, source: ExternalFiles) -> None:
        self._layout, self._skip, self._source = layout, skip, source
        self._files: dict[int, _File] = {}
        self.config: dict[str, Any] = {"reads": {}, "writes": {}, "groups": {}, "skips": {}}
        self.tensors: dict[str, Tensor] = {}
        self.early: dict[str, list[int]] = {}

    def _file(self, place: int) -> _File:
        if place not in self._files:
            self._files[place] = _File(self._source, place, len(self._layout.layers))
            if self._files[place].skip != self._files[min(self._files)].skip:
                raise WeightsError(self._source.where, f"some layers have {SKIP}, and others, such as {place}, do not")
            if self._skip is True and not self._files[place].skip:
                raise WeightsError(
                    self._source.where, f"config.json says affine_connection, but {self._files[place].name} lacks it"
                )
        return self._files[place]

    def add_group(self, place: int, indices: Tensor | None) -> None:
        """Add the features of the layer at this place of the list, or some of them."""
        layout, file = self._layout, self._file(place)
        group, read = layout.groups[place], layout.reads[place]
        rows = None if indices is None else select(indices, file.n).as_columns()
        w_dec = file.read("w_dec", rows=rows)
        early = [to for to in range(place) if bool(w_dec[:, to].any())]
        if early:
            self.early[group] = [layout.layers[to] for to in early]
        writes = [*early, *range(place, len(layout.layers))]
        self.config["groups"][group] = {
            "reads": [read],
            "writes": [layout.writes[to] for to in writes],
            "n_features": file.n if rows is None else len(rows),
            "rule": "jumprelu",
            "slice_of": None if rows is None else file.n,
        }
        self.tensors |= {
            f"W_enc.{group}.{read}": file.read("w_enc", columns=rows).T,
            f"b_enc.{group}": file.read("b_enc", rows=rows),
            f"rule_tensors.threshold.{group}": file.read("threshold", rows=rows),
            **{f"W_dec.{group}.{layout.writes[to]}": w_dec[:, to] for to in writes},
            **({} if rows is None else {f"numbers-{group}": rows}),
        }

    def add_writes(self) -> None:
        """Add the biases and skip connections of what the groups write, and the reads of both.

        A crosscoder keeps all its sites, because it reads and writes the same.
        """
        layout, groups = self._layout, self.config["groups"].values()
        written = {write for group in groups for write in group["writes"]}
        for place, (read, write) in enumerate(zip(layout.reads, layout.writes, strict=True)):
            is_written = write in written or layout.kind == "crosscoder"
            if is_written:
                file = self._file(place)
                self.config["writes"][write] = file.d_out
                self.tensors[f"b_dec.{write}"] = file.read("b_dec")
                if file.skip:
                    self.config["skips"][write] = [read]
                    self.tensors[f"W_skip.{write}.{read}"] = file.read(SKIP)
            skipped = is_written and self._file(place).skip
            if skipped or layout.kind == "crosscoder" or any(read in group["reads"] for group in groups):
                self.config["reads"][read] = {"width": self._file(place).d_in}


class _File:
    """File of one layer, whose tensors are known to fit each other.

    Attributes:
        name: of the file.
        n: number of features.
        d_in: width that is read.
        d_out: width that is written.
        skip: whether it has a skip connection.
    """

    def __init__(self, source: ExternalFiles, place: int, layers: int) -> None:
        self.name, self._where = f"params_layer_{place}.safetensors", source.where
        self._file: TensorFile = source.safetensors(self.name)
        specs = self._file.specs
        self.skip = SKIP in specs
        axes = {"w_enc": 2, "w_dec": 3, "b_enc": 1, "threshold": 1, "b_dec": 1, **({SKIP: 2} if self.skip else {})}
        if wrong := sorted(axes.keys() ^ specs.keys()):
            raise WeightsError(self._where, f"{self.name}: missing or unknown tensors {shown(wrong)}")
        for name, count in axes.items():
            shape, dtype = specs[name].shape, specs[name].dtype
            if len(shape) != count or 0 in shape or not dtype.startswith(("float", "bfloat")):
                raise WeightsError(
                    self._where, f"{self.name}: {name} must be floats with {count} axes, it is {dtype} {shape}"
                )
        self.d_in, self.n = specs["w_enc"].shape
        self.d_out = specs["w_dec"].shape[2]
        expected: dict[str, tuple[int, ...]] = {
            "w_dec": (self.n, layers, self.d_out),
            "b_enc": (self.n,),
            "threshold": (self.n,),
            "b_dec": (self.d_out,),
            **({SKIP: (self.d_in, self.d_out)} if self.skip else {}),
        }
        for name, shape in expected.items():
            if specs[name].shape != shape:
                raise WeightsError(
                    self._where, f"{self.name}: {name} has shape {specs[name].shape}, it must be {shape}"
                )

    def read(self, name: str, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Read a tensor, or some of its rows or columns, in float32."""
        return self._file.read(name, rows, columns).float()


def _set_sites(result: CrossLayerTranscoder | Crosscoder, layout: _Layout, model: str | None) -> list[str]:
    """Set the sites of a map, all or none, and return a note if there are none."""
    sides: list[dict[str, Site]] = []
    for point, names in zip(layout.points, (layout.reads, layout.writes), strict=True):
        sites = {name: _site(layout, point, layer, model) for name, layer in zip(names, layout.layers, strict=True)}
        sides.append({name: site for name, site in sites.items() if site is not None})
    reads, writes = sides
    if reads.keys() < result.read_widths.keys() or writes.keys() < result.write_widths.keys():
        return [hookless(*layout.points)]
    result.reads = {name: reads[name] for name in result.read_widths}
    result.writes = {name: writes[name] for name in result.write_widths}
    return []


def _site(layout: _Layout, point: object, layer: int, model: str | None) -> Site | None:
    if point is None and layout.kind == "crosscoder":
        return Site("resid.post", layer).at(model=model)
    before, _, after = str(point).partition("{")
    return site_of_point(f"{before}{layer}{after.partition('}')[2]}", model)
