"""What the commands' options say: positions, sites, layers, methods, pairs that are held out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from featurizers import Site
from featurizers.errors import UsageError

from featurizers_training.methods import BASELINES, METHODS, Method
from featurizers_training.pairs import Pairs, Position

OPTION_OF = {"n_features": "features", "gate_lr": "gate-lr"}
"""Fields of methods whose options have another name."""


def position(text: str) -> Position:
    """A position: ``-1``, ``0+1`` for several tokens at once, or a name that the records give."""
    if not re.fullmatch(r"-?\d+(\+-?\d+)*", text):
        return text
    numbers = [int(part) for part in text.split("+")]
    return numbers[0] if len(numbers) == 1 else numbers


def sites_and_positions(texts: Sequence[str]) -> tuple[list[Site], list[Position]]:
    """Sites, and the position of each where they say it after an ``@``; no positions if none does.

    Raises:
        UsageError: some do and others do not.
        SiteError: a site is misspelt.
    """
    parts = [text.partition("@") for text in texts]
    said = [position(at) for _, _, at in parts if at]
    if said and len(said) < len(parts):
        raise UsageError("say the position of each site or of none: --site resid.post:8@-1")
    return [Site.parse(site) for site, _, _ in parts], said


def words(text: str | None) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def make_methods(names: Sequence[str], options: Mapping[str, Any], *, baselines: bool) -> list[Method]:
    """Methods by their names, each with those of the options that it has.

    Args:
        names: of methods.
        options: by the names of the methods' fields; None where it was not given.
        baselines: whether methods that train nothing are allowed.

    Raises:
        UsageError: there is no such method, it lacks an option, or no method has one that was given.
    """
    known = {**METHODS, **BASELINES} if baselines else METHODS
    given = {name: value for name, value in options.items() if value is not None}
    unused, made = set(given), []
    for name in names:
        if name not in known:
            raise UsageError(f"a method is one of {', '.join(known)}, not {name!r}")
        fields = {field.name: field for field in dataclasses.fields(known[name])}
        for field in fields.values():
            if field.default is dataclasses.MISSING and field.name not in given:
                raise UsageError(f"the method {name!r} needs --{_option(field.name)}")
        unused -= set(fields)
        made.append(known[name](**{key: value for key, value in given.items() if key in fields}))
    if unused:
        raise UsageError(f"--{_option(min(unused))} is no option of {' or '.join(names)}; leave it out")
    return made


def temperatures(text: str | None) -> tuple[float, float] | None:
    """The first and the last temperature, of ``1,0.01``.

    Raises:
        UsageError: it is not like that.
    """
    if text is None:
        return None
    try:
        first, last = map(float, text.split(","))
    except ValueError as error:
        raise UsageError(f"a temperature is the first and the last, such as 1,0.01, not {text!r}") from error
    return first, last


def hold_out(
    pairs: Pairs, option: str | None, seed: int, read: Callable[[str], Pairs], name: str
) -> tuple[Pairs, Pairs | None]:
    """The pairs that are left, and those that are held out: a share of them, or a file of their own.

    Raises:
        UsageError: it is neither, or leaves nothing.
        PairError: the file holds something else than pairs.
    """
    try:
        share = float(option or 0)
    except ValueError:
        return pairs, read(str(option))
    if share == 0:
        return pairs, None
    if not math.isfinite(share) or not 0 < share < 1:
        raise UsageError(f"--{name} is a file, or a share of the pairs between 0 and 1, not {option!r}")
    return pairs.split(share, seed)


def _option(field: str) -> str:
    return OPTION_OF.get(field, field)
