"""What people read: the words for nodes and tokens, and the tables of the largest scalars."""

from __future__ import annotations

from collections.abc import Sequence

from featurizers.errors import printable
from rich.markup import escape
from rich.table import Table

from featurizers_derived_scalars.axes import Axis, pair_of
from featurizers_derived_scalars.ranking import Ranked
from featurizers_derived_scalars.results import Scalar

_KINDS = {
    "resid.embed": "embedding",
    "attn.bias": "attention's bias",
    "mlp.bias": "MLP's bias",
    "attn.delta": "attention",
    "mlp.delta": "MLP",
}
_UNITS = {"head": "head", "neuron": "neuron", "feature": "feature", "d_model": "channel", "d_head": "channel",
          "vocab": "token"}  # fmt: skip


def token_label(token: str, position: int) -> str:
    """A token between quotes, after its position."""
    return f"{position} {printable(token, 24)!r}"


def node_label(name: str, about: Scalar, entry: Ranked) -> str:
    """Which of the nodes of its layer it is: ``head 3``, ``neuron 17``, ``feature 5 of mlp.delta``."""
    basis = about.basis
    words = [f"{_UNITS[axis]} {i}" for axis, i in zip(about.axes, entry.at, strict=True) if axis in _UNITS]
    if basis is None:
        return ", ".join(words) or name
    plain = basis.kind in ("attn.probs", "attn.z", "mlp.neurons") and basis.featurizer is None
    if plain:
        return ", ".join(words)
    where = _KINDS.get(basis.kind, basis.kind) if basis.featurizer is None else basis.kind
    if basis.featurizer is not None and basis.part != "features":
        where = f"{basis.part} of {where}"
    if not words:
        return where
    return f"{', '.join(words)} of {where}"


def positions_of(about: Scalar, entry: Ranked) -> tuple[int | None, int | None]:
    """Token and key of an entry, where it has them."""
    where: dict[Axis, int] = dict(zip(about.axes, entry.at, strict=True))
    if "pair" in where:
        return pair_of(where["pair"])
    return where.get("token"), where.get("key")


def rows_of(entries: Sequence[Ranked], abouts: dict[str, Scalar], tokens: Sequence[str]) -> list[dict[str, object]]:
    """Entries as records: value, layer, node, token and, of heads at pairs, the key."""
    rows: list[dict[str, object]] = []
    for entry in entries:
        about = abouts[entry.name]
        token, key = positions_of(about, entry)
        row: dict[str, object] = {
            "value": entry.value,
            "layer": entry.layer,
            "node": node_label(entry.name, about, entry),
            "token": None if token is None else token_label(tokens[token], token),
            "key": None if key is None else token_label(tokens[key], key),
            "scalar": entry.name,
            "index": list(entry.at),
        }
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, object]]) -> Table:
    """The largest scalars of one quantity."""
    keys = any(row["key"] is not None for row in rows)
    found = Table()
    found.add_column("value", justify="right")
    found.add_column("layer", justify="right")
    for column in ("node", "token", *(["attends to"] if keys else [])):
        found.add_column(column)
    for row in rows:
        cells = [f"{row['value']:+.4g}", "" if row["layer"] is None else str(row["layer"]), str(row["node"])]
        cells += ["" if row[name] is None else str(row[name]) for name in ("token", *(["key"] if keys else []))]
        found.add_row(*map(escape, cells))
    return found
