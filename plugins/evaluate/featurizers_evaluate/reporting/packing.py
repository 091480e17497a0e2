"""A report as bytes that a page reads: JSON and typed arrays, compressed, as text."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import numpy as np
import torch
from featurizers import Label
from featurizers.errors import printable
from numpy.typing import NDArray
from torch import Tensor

from featurizers_evaluate.reporting.data import Contexts, ReportData
from featurizers_evaluate.reporting.effects import Effects

Array = NDArray[Any]


def packed(report: ReportData) -> str:
    """Return the data of a page: base64 of gzip of the length of JSON (4 bytes), JSON, and arrays.

    The JSON says where each array is, from the first multiple of 8 bytes after the JSON on. Bytes are the same for the
    same report.
    """
    ids = sorted(report.texts)
    arrays = _arrays(report, np.asarray(ids, dtype=np.int64))
    places, blob = {}, bytearray()
    for name, array in arrays.items():
        blob += b"\0" * (-len(blob) % 8)
        places[name] = [len(blob), array.dtype.name, list(array.shape)]
        blob += array.astype(array.dtype.newbyteorder("<")).tobytes()
    data = {**_about(report), "texts": [report.texts[number] for number in ids], "arrays": places}
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).encode("ascii")
    text += b" " * (-(4 + len(text)) % 8)
    raw = len(text).to_bytes(4, "little") + text + bytes(blob)
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode("ascii")


def _about(report: ReportData) -> dict[str, Any]:
    effects, near, about = report.effects, report.neighbours, report.about
    return {
        "dense": report.is_dense,
        "tokens": about["tokens"],
        "groups": [printable(str(name), 80) for name in about["groups"]],
        "writes": [printable(f"{name} ({site})", 120) for name, site in about["writes"].items()],
        "effects": {"how": effects.how, "why": ""} if isinstance(effects, Effects) else {"how": "", "why": effects},
        "neighbours": {"why": near if isinstance(near, str) else ""},
        "note": report.note,
        "link": about["neuronpedia"],
        "labels": {str(place): [_label(each) for each in rows] for place, rows in sorted(report.labels.items())},
    }


def _label(label: Label) -> list[Any]:
    """Return text, author and score of a label."""
    score = None if label.score is None else float(f"{label.score:.4g}")
    return [printable(label.text, 500), printable(label.author, 80), score]


def _arrays(report: ReportData, ids: Array) -> dict[str, Array]:
    least = torch.where(report.least.isfinite(), report.least, 0.0)
    most = torch.where(report.most.isfinite(), report.most, 0.0)
    found: dict[str, Array] = {
        "number": _small(report.numbers),
        "group": _small(report.groups),
        "count": _small(report.count),
        "mean": _float(report.mean),
        "std": _float(report.std),
        "least": _float(least),
        "most": _float(most),
        "bars": _small(report.bars),
        "centre": _float(report.centre),
        "exponent": report.exponent.numpy().astype(np.int16),
    }
    middle = report.mean.float() if report.is_dense else torch.zeros_like(most)
    largest = torch.maximum((most - middle).abs(), (least - middle).abs())
    for name, contexts in (("high", report.high), ("low", report.low)):
        if contexts is not None:
            found |= _contexts(name, contexts, ids, middle, largest)
    if isinstance(report.effects, Effects):
        for name in ("high", "low"):
            tokens, values = getattr(report.effects, name), getattr(report.effects, f"{name}_values")
            found[f"{name}_tokens"] = _small(torch.from_numpy(np.searchsorted(ids, tokens.numpy())))
            found[f"{name}_logits"] = _float(values)
    if not isinstance(report.neighbours, str):
        found["near"] = _small(report.neighbours.rows + 1)
        found["cosine"] = (report.neighbours.cosines * 1000).round().clamp(-1000, 1000).numpy().astype(np.int16)
    if report.norms is not None:
        found["norms"] = _float(report.norms)
    if report.energies is not None:
        found["energy"] = _float(report.energies)
    return found


def _contexts(name: str, contexts: Contexts, ids: Array, middle: Tensor, largest: Tensor) -> dict[str, Array]:
    """Return values (NaN where there is none), places of tokens in the texts plus 1, and strengths from -127 to 127."""
    given = contexts.ids.numpy()
    places = np.where(given < 0, 0, np.searchsorted(ids, given) + 1)
    off = torch.where(contexts.strengths == 0, 0.0, contexts.strengths - middle[:, None, None])
    share = off / torch.where(largest > 0, largest, 1.0)[:, None, None]
    marks = (share * 127).round().clamp(-127, 127)
    marks = torch.where((marks == 0) & (share != 0), share.sign(), marks)  # weak is not nothing
    return {
        f"{name}_values": _float(contexts.values),
        f"{name}_ids": _small(torch.from_numpy(places)),
        f"{name}_marks": marks.numpy().astype(np.int8),
    }


def _small(values: Tensor) -> Array:
    """Return counts in the smallest type of 1, 2 or 4 bytes that holds them."""
    array: Array = values.numpy()
    most = int(array.max()) if array.size else 0
    return array.astype(np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.uint32)


def _float(values: Tensor) -> Array:
    """Return numbers in float32 with 12 bits of the mantissa, which compress."""
    bits = values.float().contiguous().numpy().view(np.uint32)
    rounded = np.where(np.isfinite(values.numpy()), (bits + np.uint32(0x400)) & np.uint32(0xFFFFF800), bits)
    array: Array = rounded.astype(np.uint32).view(np.float32)
    return array
