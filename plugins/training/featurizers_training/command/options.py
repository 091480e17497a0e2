"""Options that several commands have, and functions that parse them. Heavy packages are imported when they are used."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from featurizers import Site
from featurizers.cli import dtype_named
from featurizers.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from featurizers.models import LanguageModel

    from featurizers_training.methods.base import Method
    from featurizers_training.pairs import Pairs
    from featurizers_training.records import Position

ModelOption = Annotated[str, typer.Option("--model", help="Hub id, folder or .gguf file of a language model.")]
PairsOption = Annotated[str, typer.Option("--pairs", help="File of JSON lines, one counterfactual pair each.")]
Out = Annotated[Path, typer.Option(help="A new folder.")]
Features = Annotated[int | None, typer.Option(min=1, help="Dimensions of the subspace.")]
Test = Annotated[str, typer.Option("--test", help="File of held-out pairs, or the share of the pairs to hold out.")]
ObjectiveOption = Annotated[str, typer.Option("--objective", help="cross-entropy or logit-difference.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the pairs.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pairs in an optimizer step.")]
MicroBatch = Annotated[int | None, typer.Option(min=1, help="Pairs in a forward pass, if fewer.")]
Lr = Annotated[float | None, typer.Option(help="Learning rate of the subspace.")]
GateLr = Annotated[float | None, typer.Option(help="Learning rate of the gate.")]
Sparsity = Annotated[float | None, typer.Option(help="Added to the loss for the features that are taken.")]
Temperature = Annotated[str | None, typer.Option(help="Of the gate, first and last, such as 1,0.01.")]
Precision = Annotated[str, typer.Option(help="fp32 (as the model is), bf16 or fp16.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; an accelerator if there is one.")]
Dtype = Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16 or auto.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

OPTION_OF = {"n_features": "features", "gate_lr": "gate-lr"}
"""Options of methods whose names differ from the fields' names."""


def device_of(name: str | None) -> Any:
    """Return the device of this name, or that of this process."""
    from accelerate import PartialState

    return PartialState().device if name is None else name


def load(model: str, device: str | None, dtype: str) -> LanguageModel:
    """Load the model that the options name."""
    from featurizers.models import load_model

    return load_model(model, device=device_of(device), dtype=dtype_named(dtype))


def words(text: str | None) -> list[str]:
    """Split a list with commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def position(text: str) -> Position:
    """Parse a position: ``-1``, ``0+1`` for several tokens at once, or a name that the records give."""
    if not re.fullmatch(r"-?\d+(\+-?\d+)*", text):
        return text
    numbers = [int(part) for part in text.split("+")]
    return numbers[0] if len(numbers) == 1 else numbers


def sites_and_positions(texts: Sequence[str]) -> tuple[list[Site], list[Position]]:
    """Parse sites, with or without ``@`` and a position; the positions are empty if no site has one.

    Raises:
        UsageError: some have a position and others do not.
        SiteError: a site is misspelt.
    """
    parts = [text.partition("@") for text in texts]
    positions = [position(at) for _, _, at in parts if at]
    if positions and len(positions) < len(parts):
        raise UsageError("say the position of each site or of none: --site resid.post:8@-1")
    return [Site.parse(site) for site, _, _ in parts], positions


def read_pairs(path: str, tokenizer: Any, positions: Sequence[Position]) -> Pairs:
    """Read the pairs of a file, at a position for each site or, if there are none, at their own."""
    from featurizers_training.pairs import Pairs

    pairs = Pairs.read(path, tokenizer, position=positions[0] if positions else None)
    return pairs.at(*positions) if len(positions) > 1 else pairs


def hold_out(
    pairs: Pairs, option: str | None, seed: int, read: Callable[[str], Pairs], name: str
) -> tuple[Pairs, Pairs | None]:
    """Return the remaining pairs and the held-out ones; the option is a share of the pairs, or a file to ``read``.

    Raises:
        UsageError: the option is neither, or leaves no pairs.
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


def make_methods(
    names: Sequence[str],
    features: int | None,
    lr: float | None,
    gate_lr: float | None,
    sparsity: float | None,
    temperature: str | None,
    *,
    baselines: bool,
) -> list[Method]:
    """Make methods from their names; each takes the options that are fields of it.

    Raises:
        UsageError: there is no such method, it lacks an option, or no method has an option that was given.
    """
    from featurizers_training.methods.searches import BASELINES, METHODS

    known = {**METHODS, **BASELINES} if baselines else METHODS
    temperatures = None if temperature is None else _temperatures(temperature)
    by_field = {"n_features": features, "lr": lr, "gate_lr": gate_lr, "sparsity": sparsity, "temperature": temperatures}
    options = {name: value for name, value in by_field.items() if value is not None}
    unused = set(options)
    methods: list[Method] = []
    for name in names:
        if name not in known:
            near = did_you_mean(name, known, " ").strip()
            raise UsageError(f"a method is one of {', '.join(known)}, not {name!r}. {near}")
        fields = {field.name: field for field in dataclasses.fields(known[name])}
        for field in fields.values():
            if field.default is dataclasses.MISSING and field.name not in options:
                raise UsageError(f"the method {name!r} needs --{_option(field.name)}")
        unused -= set(fields)
        own: dict[str, Any] = {key: value for key, value in options.items() if key in fields}
        methods.append(known[name](**own))
    if unused:
        raise UsageError(f"--{_option(min(unused))} is no option of {' or '.join(names)}; leave it out")
    return methods


def _temperatures(text: str) -> tuple[float, float]:
    try:
        first, last = map(float, text.split(","))
    except ValueError as error:
        raise UsageError(f"a temperature is the first and the last, such as 1,0.01, not {text!r}") from error
    return first, last


def _option(field: str) -> str:
    return OPTION_OF.get(field, field)
