"""The command ``scalars``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from featurizers.cli import dtype_named, layer_numbers
from featurizers.errors import UsageError
from featurizers.models import load_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from featurizers_derived_scalars import asking, labels
from featurizers_derived_scalars.capturing import capture
from featurizers_derived_scalars.circuit import Circuit
from featurizers_derived_scalars.entry import Plan, plan
from featurizers_derived_scalars.metrics import LogitDifference, Metric, logit_difference
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.ranking import Ranked
from featurizers_derived_scalars.specs import spec, specs
from featurizers_derived_scalars.watching import Seen, watched


def _list(wanted: bool) -> None:
    if not wanted:
        return
    table = Table("name", "units", "what it is", title="Quantities", title_justify="left")
    for name, one in specs().items():
        table.add_row(name, one.group, one.text)
    Console().print(table)
    raise typer.Exit


def scalars_command(
    model: Annotated[str, typer.Option("--model", help="Hub id, folder or .gguf file of a language model.")],
    prompt: Annotated[str, typer.Option(help="A text.")],
    what: Annotated[
        str, typer.Option(help="Quantities with commas between, NAME or NAME:KIND.")
    ] = "act_times_grad,write_to,write_norm",
    target: Annotated[list[str] | None, typer.Option(help="A token whose logit is the metric; repeatable.")] = None,
    distractor: Annotated[list[str] | None, typer.Option(help="A token whose logit is taken off.")] = None,
    position: Annotated[int, typer.Option(help="Of the token whose next token is meant.")] = -1,
    node: Annotated[
        str | None, typer.Option(help="A node, such as mlp.neurons:3@4,17: the metric, or the end of edges.")
    ] = None,
    latent: Annotated[int | None, typer.Option(min=0, help="Number of a feature, for names of one.")] = None,
    featurizer: Annotated[
        list[str] | None, typer.Option(help="SITE=SOURCE: see a site through an artefact; repeatable.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 4,8 or 0-11; all if not given.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many nodes of each quantity.")] = 20,
    signed: Annotated[bool, typer.Option("--signed", help="The largest and the smallest, not the magnitudes.")] = False,
    out: Annotated[Path | None, typer.Option(help="FILE.html or a new folder for a page with plots.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16 or auto.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    _listed: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list, help="Show every quantity and end.")
    ] = False,
) -> None:
    """The largest scalars of a prompt: direct effects, attributions, norms, edges, of heads, neurons and features."""
    names = [word.strip() for word in what.split(",") if word.strip()]
    for name in names:
        spec(name.partition(":")[0])
    stored = dtype_named(dtype)
    page_file = None if out is None else _new_page(out.expanduser())
    by_kind = asking.load_featurizers(featurizer or [], device)
    loaded = load_model(model, device=device, dtype=stored)
    ids = asking.prompt_ids(loaded.tokenizer, prompt, loaded.model)
    tokens = [loaded.tokenizer.decode([i]) for i in ids]
    metric = _metric(loaded.tokenizer, target or [], distractor or [], position)
    traced = None if node is None else asking.parse_node(node, by_kind)
    circuit = Circuit(loaded.model)
    chosen = None if layers is None else layer_numbers(layers, circuit.n_layers)
    options = {"node": traced, "latent": latent}
    plans = _plans(circuit, names, metric or traced, by_kind, chosen, options)
    needs = frozenset().union(*(one.needs for one in plans.values()))
    captured_metric = next(iter(plans.values())).metric
    if captured_metric is None and any(need.pass_ == "backward" for need in needs):
        kinds = [name for name, one in plans.items() if any(need.pass_ == "backward" for need in one.needs)]
        raise UsageError(f"{kinds[0]} is of a gradient; say of what: --target ' Paris', or --node")
    (raw,) = capture(circuit, torch.tensor(ids), needs, metric=captured_metric)
    about = _about(metric, traced, loaded.tokenizer, raw.metric)
    seen: dict[str, Seen] = {}
    found: dict[str, list[Ranked]] = {}
    rows: dict[str, list[dict[str, object]]] = {}
    derived = {name: one.derive(raw) for name, one in plans.items()}
    with _bar(sum(map(len, derived.values())), shown=not as_json) as tick:
        for name, scalars in derived.items():
            seen[name] = Seen()
            looked = watched(scalars, seen[name], tick).computed() if signed else watched(scalars, seen[name], tick)
            found[name] = looked.topk(top, both_ends=True) if signed else looked.topk(top, absolute=True)
            rows[name] = labels.rows_of(found[name], dict(scalars.about), tokens)
    if page_file is not None:
        from featurizers_derived_scalars.page import Page, write_page

        write_page(page_file, Page(prompt, model, tokens, about, rows, seen, found, circuit, loaded.tokenizer, raw))
    if as_json:
        result = {"model": model, "tokens": tokens, "metric": about, "value": raw.metric, "scalars": rows}
        print(json.dumps({**result, **({} if page_file is None else {"page": str(page_file)})}, indent=2))
        return
    console = Console()
    console.print(f"{len(ids)} tokens; {about}", highlight=False, markup=False)
    for name, part in rows.items():
        console.print(f"{name}: {spec(name.partition(':')[0]).text}", highlight=False, markup=False)
        console.print(labels.table(part))
    if page_file is not None:
        print(f"Page: {page_file}")


def _plans(
    circuit: Circuit,
    names: list[str],
    metric: Metric | Node | None,
    by_kind: Any,
    layers: list[int] | None,
    options: Mapping[str, Any],
) -> dict[str, Plan]:
    """A plan for each name, with the options that it takes.

    Raises:
        UsageError: there is no name, or an option that none takes.
    """
    if not names:
        raise UsageError("--what names no quantity; `featurizers scalars --list` shows all")
    given = {key: value for key, value in options.items() if value is not None}
    unused = set(given) - ({"node"} if isinstance(metric, Node) else set())
    plans: dict[str, Plan] = {}
    for name in names:
        fields = spec(name.partition(":")[0]).config.model_fields
        own = {key: value for key, value in given.items() if key in fields}
        unused -= set(own)
        plans[name] = plan(circuit, name, metric=metric, featurizers=by_kind, layers=layers, **own)
    if unused:
        raise UsageError(f"none of {', '.join(names)} takes --{min(unused)}; leave it out")
    return plans


def _metric(tokenizer: Any, targets: list[str], distractors: list[str], position: int) -> LogitDifference | None:
    if not targets:
        if distractors:
            raise UsageError("a distractor is taken off the target's logit: give --target too")
        return None
    ids = [asking.one_token(tokenizer, text, "the target") for text in targets]
    others = [asking.one_token(tokenizer, text, "the distractor") for text in distractors]
    return logit_difference(ids, others, position=position)


def _about(metric: LogitDifference | None, traced: Node | None, tokenizer: Any, value: float | None) -> str:
    """The metric in words, and its value."""
    if metric is None:
        return "no metric" if traced is None or value is None else f"{traced}: {value:.4g}"
    signs = [("", metric.targets), ("less ", metric.distractors)]
    words = [sign + " and ".join(repr(tokenizer.decode([i])) for i in ids) for sign, ids in signs if ids]
    return f"logit of {' '.join(words)} at token {metric.position}: {value or 0.0:.4g}"


def _new_page(out: Path) -> Path:
    """The file of the page.

    Raises:
        UsageError: it is there already.
    """
    file = out if out.suffix == ".html" else out / "index.html"
    if file.exists():
        raise UsageError(f"{file} is there already; name another --out")
    return file


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Any]:
    """What to call for each tensor that was computed; a bar where stderr is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("scalars"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as progress:
        task = progress.add_task("scalars", total=total)
        yield lambda: progress.advance(task)
