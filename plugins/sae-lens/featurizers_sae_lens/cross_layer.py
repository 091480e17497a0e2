"""Reads a layer of mntss' cross-layer transcoders, in the format of circuit-tracer, as SAELens' catalogue names it."""

from __future__ import annotations

from typing import Any

from featurizers.errors import FeaturizerError, ManifestError, WeightsError, shown
from featurizers.format import ExternalFiles, TensorFile
from featurizers_transcoder import CrossLayerTranscoder
from featurizers_transcoder.hooks import Read, hookless, read_of, site_of
from torch import Tensor

from featurizers_sae_lens.reading import check_indices
from featurizers_sae_lens.transcoders import of_group
from featurizers_sae_lens.yaml_files import read_yaml

MOST_LAYERS = 1000
"""Largest number of layers that a decoder writes."""


def layer(source: ExternalFiles, number: str, overrides: dict[str, Any]) -> CrossLayerTranscoder:
    """Read the features of one layer i, which write the layers i, i + 1 … to the last, in float32.

    SAELens adds these decoders up, which gives the reconstruction of no layer. Here each write keeps its own. A write
    lacks the features of earlier layers and, but for layer i, the bias: edits are those of the whole transcoder, and
    the reconstruction is this layer's part of it. Where the file has thresholds the rule is JumpReLU; SAELens ignores
    them.

    Args:
        source: the repository.
        number: of the layer, from the catalogue.
        overrides: metadata that the catalogue adds.

    Raises:
        ManifestError: ``config.yaml`` does not name a model, or the layer is not a number.
        WeightsError: the files are damaged, or have other tensors, or a threshold is negative.
    """
    if not (number.isascii() and number.isdecimal() and len(number) < 6):
        raise ManifestError(source.where, f"{shown(number)} is not the number of a layer")
    group, first = f"layer-{number}", int(number)
    source = of_group(source, group)
    raw = read_yaml(source, "config.yaml")
    if not isinstance(model := raw.get("model_name"), str):
        raise ManifestError(source.where, "config.yaml lacks model_name")
    hooks = [raw.get("feature_input_hook", "hook_resid_mid"), raw.get("feature_output_hook", "hook_mlp_out")]
    read = read_of(f"blocks.{number}.{hooks[0]}", model)
    tensors, n_features = _tensors(source, number)
    writes = range(first, first + len(tensors) - len(_own(tensors)))
    sites = {f"out-{i}": site_of(f"blocks.{i}.{hooks[1]}", model) for i in writes}
    if None in sites.values():  # without sites it takes the hook's own activations
        read = Read(None)
    rule = "jumprelu" if "threshold" in tensors else "relu"
    rows = source.indices
    config = {
        "reads": {f"in-{number}": _read(read, tensors["W_enc"])},
        "writes": {f"out-{i}": tensors[f"W_dec {i}"].shape[-1] for i in writes},
        "groups": {
            group: {
                "reads": [f"in-{number}"],
                "writes": list(sites),
                "n_features": len(tensors["b_enc"]),
                "rule": rule,
                "slice_of": None if rows is None else n_features,
            }
        },
    }
    named = {
        f"W_enc.{group}.in-{number}": tensors["W_enc"],
        f"b_enc.{group}": tensors["b_enc"],
        f"b_dec.out-{number}": tensors["b_dec"],
        **{f"W_dec.{group}.out-{i}": tensors[f"W_dec {i}"] for i in writes},
        **({f"rule_tensors.threshold.{group}": tensors["threshold"]} if rule == "jumprelu" else {}),
        **({} if rows is None else {f"numbers-{group}": rows}),
    }
    try:
        featurizer = CrossLayerTranscoder.from_tensors(config, named)
    except FeaturizerError as error:
        raise WeightsError(source.where, str(error)) from error
    notes = [
        f"It is layer {number} of a cross-layer transcoder: edits are those of the whole, and the reconstruction of "
        "each write is the part of this layer's features alone."
    ]
    known = {name: site for name, site in sites.items() if site is not None}
    if read.site is not None and len(known) == len(sites):
        featurizer.reads, featurizer.writes = {f"in-{number}": read.site}, known
    else:
        notes.append(hookless(*hooks))
    metadata = {"hook_name": f"blocks.{number}.{hooks[0]}", "hook_name_out": hooks[1], "model_name": model, **overrides}
    featurizer.metadata = {"sae_lens": {"metadata": metadata}, "circuit_tracer": raw, "notes": notes}
    return featurizer


def _read(read: Read, encoder: Tensor) -> dict[str, Any]:
    return {"width": encoder.shape[-1], "normalize": read.normalize, "eps": read.eps}


def _own(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in tensors if not name.startswith("W_dec ")]


def _tensors(source: ExternalFiles, number: str) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of a layer, of the requested features, and the number of all features.

    The decoder of the write j has the name ``W_dec j``.
    """
    encoder = source.safetensors(f"W_enc_{number}.safetensors")
    decoder = source.safetensors(f"W_dec_{number}.safetensors")
    names = {name: f"{name}_{number}" for name in ("W_enc", "b_enc", "b_dec", "threshold")}
    _check(source, encoder, {names["W_enc"]: 2, names["b_enc"]: 1, names["b_dec"]: 1}, {names["threshold"]: 1})
    _check(source, decoder, {f"W_dec_{number}": 3}, {})
    n_features, n_writes, _ = decoder.shapes[f"W_dec_{number}"]
    check_indices(source, n_features)
    if not 1 <= n_writes <= MOST_LAYERS:
        raise WeightsError(
            source.where, f"{decoder.path.name} writes {n_writes} layers; at most {MOST_LAYERS} are known"
        )
    rows = source.indices
    for name in names.values():
        if name in encoder.shapes and name != names["b_dec"] and encoder.shapes[name][0] != n_features:
            raise WeightsError(
                source.where,
                f"{name!r} has {encoder.shapes[name][0]} features, but W_dec_{number} has {n_features}",
            )
    tensors = {
        name: encoder.read(key, rows=None if name == "b_dec" else rows).float()
        for name, key in names.items()
        if key in encoder.shapes
    }
    if "threshold" in tensors and (negative := int((tensors["threshold"] < 0).sum())):
        raise WeightsError(
            source.where,
            f"{negative} thresholds are negative: in circuit-tracer such a feature may be negative too, which no rule "
            "here allows",
        )
    planes = decoder.read(f"W_dec_{number}", rows=rows)
    first = int(number)
    return {**tensors, **{f"W_dec {first + j}": planes[:, j].float() for j in range(n_writes)}}, n_features


def _check(source: ExternalFiles, file: TensorFile, required: dict[str, int], optional: dict[str, int]) -> None:
    """Raise `WeightsError` unless a file has these tensors, with these numbers of dimensions, and no others."""
    if unknown := sorted(file.shapes.keys() - required.keys() - optional.keys()):
        raise WeightsError(source.where, f"{file.path.name} has unknown tensors {shown(unknown)}")
    for name, dimensions in {**required, **optional}.items():
        if name in required and name not in file.shapes:
            raise WeightsError(source.where, f"{file.path.name} lacks the tensor {name!r}")
        if name in file.shapes and len(file.shapes[name]) != dimensions:
            raise WeightsError(
                source.where,
                f"{file.path.name}: {name!r} has the shape {file.shapes[name]}, not {dimensions} dimensions",
            )
