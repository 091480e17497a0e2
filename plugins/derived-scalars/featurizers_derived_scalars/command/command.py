"""Command ``scalars``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from featurizers.cli import dtype_named, layer_numbers, progress_bar
from featurizers.errors import UsageError
from featurizers.files import os_errors, refuse_unwritable

if TYPE_CHECKING:
    from rich.table import Table

    from featurizers_derived_scalars.api import ByKind, Plan
    from featurizers_derived_scalars.capturing import LogitDifference, Metric
    from featurizers_derived_scalars.circuit import Circuit
    from featurizers_derived_scalars.nodes import Node
    from featurizers_derived_scalars.results import Ranked


def _list(asked: bool) -> None:
    """Print a table of the quantities of each plugin, and exit."""
    if not asked:
        return
    from rich.console import Console
    from rich.table import Table

    from featurizers_derived_scalars.registry import specs

    tables: dict[str, Table] = {}
    for one in dict.fromkeys(specs().values()):
        plugin, dot, name = one.name.rpartition(".")
        title = f"Quantities of {plugin}" if dot else "Quantities"
        columns = ("name", "units", "what it is")
        tables.setdefault(title, Table(*columns, title=title, title_justify="left")).add_row(name, one.group, one.text)
    for table in tables.values():
        Console(emoji=False).print(table)
    raise typer.Exit


def scalars_command(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="Hub id, folder or .gguf file of a language model.")],
    prompt: Annotated[str, typer.Option(help="A text.")],
    what: Annotated[
        str, typer.Option(help="Quantities with commas between, NAME or NAME:KIND.")
    ] = "act_times_grad,write_to,write_norm",
    target: Annotated[list[str] | None, typer.Option(help="A token whose logit is the metric; repeatable.")] = None,
    distractor: Annotated[list[str] | None, typer.Option(help="A token whose logit is subtracted.")] = None,
    position: Annotated[int, typer.Option(help="Position whose next token is predicted.")] = -1,
    node: Annotated[
        str | None, typer.Option(help="A node, such as mlp.neurons:3@4,17: the metric, or the end of edges.")
    ] = None,
    latent: Annotated[int | None, typer.Option(min=0, help="Number of a feature, for names that need one.")] = None,
    featurizer: Annotated[
        list[str] | None, typer.Option(help="SITE=SOURCE: see a site through an artefact; repeatable.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 4,8 or 0-11; all by default.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many nodes of each quantity.")] = 20,
    signed: Annotated[
        bool, typer.Option("--signed", help="The largest and the smallest values, not the magnitudes.")
    ] = False,
    mask_first: Annotated[
        int, typer.Option(min=0, help="Tokens to leave out at the start, and what attends to them.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="FILE.html or a new folder for a page with plots.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16 or auto.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    _listed: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list, help="Show every quantity and exit.")
    ] = False,
) -> None:
    """Show the largest scalars of a prompt: direct effects, attributions, norms, edges, of heads, neurons, features."""
    import torch
    from featurizers.models import load_model

    from featurizers_derived_scalars.capturing import capture
    from featurizers_derived_scalars.circuit import Circuit
    from featurizers_derived_scalars.command import labels, options
    from featurizers_derived_scalars.command.observing import Observation, observed, unmasked
    from featurizers_derived_scalars.registry import spec

    names = [word.strip() for word in what.split(",") if word.strip()]
    for name in names:
        spec(name.partition(":")[0])
    model_dtype = dtype_named(dtype)
    page_file = None if out is None else _new_page(out.expanduser())
    by_kind = options.load_featurizers(featurizer or [], device)
    loaded = load_model(model, device=device, dtype=model_dtype)
    ids = options.prompt_ids(loaded.tokenizer, prompt, loaded.model)
    if mask_first >= len(ids):
        raise UsageError(f"--mask-first {mask_first} leaves out all {len(ids)} tokens of the prompt; leave out fewer")
    tokens = [loaded.tokenizer.decode([i]) for i in ids]
    metric = _metric(loaded.tokenizer, target or [], distractor or [], position)
    traced = None if node is None else options.parse_node(node, by_kind)
    circuit = Circuit(loaded.model)
    chosen = None if layers is None else layer_numbers(layers, circuit.n_layers)
    plans = _plans(circuit, names, metric or traced, by_kind, chosen, {"node": traced, "latent": latent})
    needs = frozenset().union(*(one.needs for one in plans.values()))
    captured_metric = next(iter(plans.values())).metric
    graded = [name for name, one in plans.items() if any(need.pass_ == "backward" for need in one.needs)]
    if captured_metric is None and graded:
        raise UsageError(f"{graded[0]} is of a gradient; say of what: --target ' Paris', or --node")
    (raw,) = capture(circuit, torch.tensor(ids), needs, metric=captured_metric)
    about = _about(metric, traced, loaded.tokenizer, raw.metric)
    observations = {name: Observation() for name in plans}
    largest: dict[str, list[Ranked]] = {}
    rows: dict[str, list[dict[str, object]]] = {}
    derived = {name: one.derive(raw) for name, one in plans.items()}
    with progress_bar(sum(map(len, derived.values())), "scalars", shown=not as_json) as bar:
        for name, scalars in derived.items():
            seen = observed(scalars, observations[name], bar.advance, mask_first)
            best = seen.topk(top, both_ends=signed, absolute=not signed)
            largest[name] = [unmasked(entry, scalars.about[entry.name], mask_first) for entry in best]
            rows[name] = labels.rows_of(largest[name], scalars.about, tokens)
    if page_file is not None:
        from featurizers_derived_scalars.command.page import Page, write_page

        described = {key: one for scalars in derived.values() for key, one in scalars.about.items()}
        content = Page(model, tokens, about, rows, described, observations, largest, loaded.tokenizer, raw)
        write_page(page_file, replace(content, command=_command_line(context), masked=mask_first))
    if as_json:
        result = {"model": model, "tokens": tokens, "metric": about, "value": raw.metric, "scalars": rows}
        print(json.dumps({**result, **({} if page_file is None else {"page": str(page_file)})}, indent=2))
        return
    _print(f"{len(ids)} tokens; {about}", rows)
    if page_file is not None:
        print(f"Page: {page_file}")


def _print(title: str, rows: Mapping[str, list[dict[str, object]]]) -> None:
    """Print a table of each quantity."""
    from rich.console import Console

    from featurizers_derived_scalars.command import labels
    from featurizers_derived_scalars.registry import spec

    console = Console(emoji=False)
    console.print(title, highlight=False, markup=False)
    for name, part in rows.items():
        console.print(f"{name}: {spec(name.partition(':')[0]).text}", highlight=False, markup=False)
        console.print(labels.table(part))


def _command_line(context: typer.Context) -> str:
    """Return the command with the options that were given."""
    words = ["featurizers", "scalars"]
    for param in context.command.params:
        source, value = context.get_parameter_source(str(param.name)), context.params.get(str(param.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        if value is True:
            words.append(param.opts[0])
        for one in () if isinstance(value, bool) else value if isinstance(value, (list, tuple)) else (value,):
            words += [param.opts[0], str(one)]
    return shlex.join(words)


def _plans(
    circuit: Circuit,
    names: list[str],
    metric: Metric | Node | None,
    by_kind: ByKind,
    layers: list[int] | None,
    options: Mapping[str, Any],
) -> dict[str, Plan]:
    """Return a plan for each name, with the options that the quantity takes.

    Raises:
        UsageError: there is no name, or no quantity takes an option.
    """
    from featurizers_derived_scalars.api import plan
    from featurizers_derived_scalars.nodes import Node
    from featurizers_derived_scalars.registry import spec

    if not names:
        raise UsageError("--what names no quantity; `featurizers scalars --list` shows all")
    set_options = {option: value for option, value in options.items() if value is not None}
    unused = set(set_options) - ({"node"} if isinstance(metric, Node) else set())
    plans: dict[str, Plan] = {}
    for name in names:
        fields = spec(name.partition(":")[0]).config.model_fields
        own = {option: value for option, value in set_options.items() if option in fields}
        unused -= set(own)
        plans[name] = plan(circuit, name, metric=metric, featurizers=by_kind, layers=layers, **own)
    if unused:
        raise UsageError(f"none of {', '.join(names)} takes --{min(unused)}; leave it out")
    return plans


def _metric(tokenizer: Any, targets: list[str], distractors: list[str], position: int) -> LogitDifference | None:
    from featurizers_derived_scalars.capturing import LogitDifference
    from featurizers_derived_scalars.command.options import one_token

    if not targets:
        if distractors:
            raise UsageError("a distractor's logit is subtracted from the target's: give --target too")
        return None
    ids = [one_token(tokenizer, text, "the target") for text in targets]
    others = [one_token(tokenizer, text, "the distractor") for text in distractors]
    return LogitDifference(ids, others, position=position)


def _about(metric: LogitDifference | None, traced: Node | None, tokenizer: Any, value: float | None) -> str:
    """Return the metric in words, with its value."""
    from featurizers_derived_scalars.capturing.metrics import ids_of

    if metric is None:
        return "no metric" if traced is None or value is None else f"{traced}: {value:.4g}"
    signs = [("", ids_of(metric.targets)), ("less ", ids_of(metric.distractors))]
    words = [sign + " and ".join(repr(tokenizer.decode([i])) for i in ids) for sign, ids in signs if ids]
    return f"logit of {' '.join(words)} at token {metric.position}: {value or 0.0:.4g}"


def _new_page(out: Path) -> Path:
    """Return the file of the page.

    Raises:
        UsageError: it exists.
        ArtefactError: it cannot be written.
    """
    file = out if out.suffix == ".html" else out / "index.html"
    with os_errors(file):
        if file.exists():
            raise UsageError(f"{file} is there already; name another --out")
    refuse_unwritable(file, file.parent)
    return file
