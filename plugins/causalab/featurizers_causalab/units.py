"""Names of units such as ``ResidualStream(Layer-3,Token-last_token)``, converted to sites and tokens and back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from featurizers import Site

NAME: Final = re.compile(
    r"(?P<unit>ResidualStream|AttentionHead|AttentionOutput|MLP)"
    r"\(Layer[-:_](?P<layer>-?\d{1,5})"
    r"(?:,Head[-:_](?P<head>\d{1,5}))?"
    r"(?:,(?P<component>[a-z_]{1,40}))?"
    r",Token[-:_](?P<token>[\w .,\[\]+-]{1,100})\)",
    re.ASCII,
)
SITES: Final = {
    "block_input": "resid.pre",
    "block_output": "resid.post",
    "mlp_output": "mlp.out",
    "mlp_activation": "mlp.act",
    "attention_output": "attn.out",
    "head_attention_value_output": "attn.z",
}
"""Kind of site of each component of pyvene that causalab names."""
COMPONENTS: Final = {
    "ResidualStream": "block_output",
    "AttentionHead": "head_attention_value_output",
    "AttentionOutput": "attention_output",
    "MLP": "mlp_output",
}
"""Component of a unit whose name does not give one: that which the experiments of CausalAbstraction use."""
LAST: Final = ("last_token", "last")
"""Names of the last token of a prompt."""


@dataclass(frozen=True)
class Unit:
    """Site and token in the name of a unit.

    Attributes:
        site: the site, with a position if the token is at the same position of every prompt; None if this library has
            no such site.
        token: the name of the token; in general only its task can find it in a prompt.
    """

    site: Site | None
    token: str


def parse(name: str, component: str | None = None) -> Unit | None:
    """Parse the name of a unit, with ``-``, ``:`` or ``_`` between its words; return None for any other name.

    Args:
        name: name of the unit.
        component: component of pyvene, if another source gives it.

    Examples:
        >>> parse("ResidualStream(Layer:3,Token:last_token)").site
        Site('resid.post:3', position=(-1,))
        >>> parse("AttentionHead(Layer-3,Head-5,Token-all)").site.head
        5
    """
    match = NAME.fullmatch(name)
    if match is None:
        return None
    layer, head, token = int(match["layer"]), match["head"], match["token"]
    kind = SITES.get(component or match["component"] or COMPONENTS[match["unit"]])
    if kind is None or layer < 0 or (head is not None) != (kind == "attn.z"):
        return Unit(None, token)
    return Unit(Site(kind, layer, None if head is None else int(head), position=_positions(token)), token)


def name_of(site: Site) -> str | None:
    """Return CausalAbstraction's name of the unit at a site, None if it has no such unit.

    The component is left out for the output of a block, as in the benchmark's experiments, and for heads.

    Examples:
        >>> name_of(Site("resid.post", 3, position=(-1,)))
        'ResidualStream(Layer-3,Token-last_token)'
    """
    unit, component = next(
        ((unit, component) for unit, component in _units() if SITES[component] == site.kind), (None, None)
    )
    if unit is None or (unit == "AttentionHead") != (site.head is not None):
        return None
    implied = component == COMPONENTS[unit] and unit in ("ResidualStream", "AttentionHead")
    head = "" if site.head is None else f",Head-{site.head}"
    return f"{unit}(Layer-{site.layer}{head}{'' if implied else f',{component}'},Token-{_token(site.position)})"


def _units() -> list[tuple[str, str]]:
    return [*COMPONENTS.items(), ("ResidualStream", "block_input"), ("MLP", "mlp_activation")]


def _positions(token: str) -> tuple[int, ...] | None:
    """Return the positions of a token that are the same in every prompt: a list of numbers, or the last; else None."""
    if token in LAST:
        return (-1,)
    if match := re.fullmatch(r"\[(-?\d{1,6}(?:, -?\d{1,6})*)\]", token, re.ASCII):
        return tuple(map(int, match[1].split(", ")))
    return None


def _token(position: tuple[int, ...] | None) -> str:
    if position is None:
        return "all"
    return LAST[0] if position == (-1,) else str(list(position))
