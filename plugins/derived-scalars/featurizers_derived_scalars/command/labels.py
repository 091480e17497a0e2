"""Labels of nodes and tokens, and tables of the largest scalars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featurizers.errors import printable
from rich.markup import escape
from rich.table import Table

from featurizers_derived_scalars.nodes import NodeAxis, pair_of
from featurizers_derived_scalars.results import Ranked, Scalar

_KINDS = {
    "resid.embed": "embedding",
    "attn.bias": "attention's bias",
    "mlp.bias": "MLP's bias",
    "attn.delta": "attention",
    "mlp.delta": "MLP",
}
_GROUPS = {"attn.probs": "heads", "attn.z": "heads", "mlp.neurons": "neurons", "resid.post": "residual stream"}
_UNITS = {"head": "head", "neuron": "neuron", "feature": "feature", "d_model": "channel", "d_head": "channel",
          "vocab": "token"}  # fmt: skip


def token_label(token: str, position: int) -> str:
    """Return a token in quotes, after its position."""
    return f"{position} {printable(token, 24)!r}"


def node_label(name: str, about: Scalar, entry: Ranked) -> str:
    """Return the label of a node within its layer: ``head 3``, ``neuron 17``, ``feature 5 of mlp.delta``."""
    basis = about.basis
    units = ", ".join(f"{_UNITS[axis]} {i}" for axis, i in zip(about.axes, entry.at, strict=True) if axis in _UNITS)
    if basis is None:
        return units or name
    if basis.featurizer is None and basis.kind in ("attn.probs", "attn.z", "mlp.neurons"):
        return units
    owner = basis.kind if basis.featurizer is not None else _KINDS.get(basis.kind, basis.kind)
    if basis.featurizer is not None and basis.part != "features":
        owner = f"{basis.part} of {owner}"
    return f"{units} of {owner}" if units else owner


def basis_label(name: str, about: Scalar | None) -> str:
    """Return what the nodes of a scalar are: ``heads``, ``neurons``, ``features of mlp.delta``; else its name."""
    basis = None if about is None else about.basis
    if basis is None:
        return name
    if basis.featurizer is not None:
        return f"{basis.part} of the featurizer at {basis.kind}"
    return _GROUPS.get(basis.kind) or _KINDS.get(basis.kind) or name


def positions_of(about: Scalar, entry: Ranked) -> tuple[int | None, int | None]:
    """Return token and key of an entry; None for an axis that it lacks."""
    where: dict[NodeAxis, int] = dict(zip(about.axes, entry.at, strict=True))
    if "pair" in where:
        return pair_of(where["pair"])
    return where.get("token"), where.get("key")


def rows_of(entries: Sequence[Ranked], about: Mapping[str, Scalar], tokens: Sequence[str]) -> list[dict[str, object]]:
    """Return entries as records: value, layer, node, token and, for heads at pairs, the key."""
    rows: list[dict[str, object]] = []
    for entry in entries:
        token, key = positions_of(about[entry.name], entry)
        row: dict[str, object] = {
            "value": entry.value,
            "layer": entry.layer,
            "node": node_label(entry.name, about[entry.name], entry),
            "token": None if token is None else token_label(tokens[token], token),
            "key": None if key is None else token_label(tokens[key], key),
            "scalar": entry.name,
            "index": list(entry.at),
        }
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, object]]) -> Table:
    """Return a table of the largest scalars of one quantity."""
    headers = {"node": "node", "token": "token"}
    if any(row["key"] is not None for row in rows):
        headers["key"] = "attends to"
    rich = Table()
    rich.add_column("value", justify="right")
    rich.add_column("layer", justify="right")
    for header in headers.values():
        rich.add_column(header)
    for row in rows:
        cells = [row[name] for name in ("layer", *headers)]
        rich.add_row(f"{row['value']:+.4g}", *(escape("" if cell is None else str(cell)) for cell in cells))
    return rich
