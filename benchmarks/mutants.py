"""Change the code at random, one change at a time, and see if a test fails: ``python benchmarks/mutants.py``.

A sample of mutants, drawn by a seed, is tried in a copy of the repository. Results are stored after each mutant, and a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from mutant_bench import REPOSITORY, Bench, sha256
from mutating import Mutant, is_python, mutants
from rich.console import Console
from rich.table import Table

RESULTS = REPOSITORY / "benchmarks" / "results"
DOCUMENT = REPOSITORY / "docs" / "benchmarks.md"
START, END = "<!-- results: mutants -->", "<!-- end of results: mutants -->"

FILES = [
    *(f"core/featurizers/{room}/*.py" for room in ("builtin", "features", "store")),
    *(f"core/featurizers/files/{name}.py" for name in ("archives", "pickles", "regular", "numpy_files", "torch_files")),
    *(f"core/featurizers/format/{name}.py" for name in ("manifest", "sites", "state_files", "weights")),
    *(f"core/featurizers/models/{name}.py" for name in ("anatomy", "attached", "backend", "hooks", "norms")),
    *(
        f"core/featurizers/models/{name}.py"
        for name in ("operations", "positions", "prepared", "projections", "reading")
    ),
    *(f"core/featurizers/models/{name}.py" for name in ("restart", "unembedding", "watching")),
    "plugins/subspace/featurizers_subspace/*.py",
    "plugins/identity/featurizers_identity/*.py",
    "plugins/sae-lens/featurizers_sae_lens/*.py",
    "plugins/sparsify/featurizers_sparsify/*.py",
    "plugins/dictionary-learning/featurizers_dictionary_learning/*.py",
    "plugins/patching/featurizers_patching/engine/*.py",
    *(
        f"plugins/patching/featurizers_patching/{name}.py"
        for name in ("additions", "answers", "estimates", "grid", "grid_files", "grid_run", "group", "metrics", "pairs")
    ),
    *(f"plugins/patching/featurizers_patching/{name}.py" for name in ("patching", "positions", "sites")),
    *(
        f"plugins/graphs/featurizers_graphs/{name}.py"
        for name in (
            "attention",
            "graph_files",
            "graphing",
            "influence",
            "local_model",
            "result",
            "targets",
            "validation",
        )
    ),
    *(
        f"plugins/harvest/featurizers_harvest/{name}.py"
        for name in ("harvesting", "index", "parts", "plan", "reading", "shards", "tables")
    ),
    *(f"plugins/training/featurizers_training/{name}.py" for name in ("evaluation", "pairs", "methods/*", "search/*")),
    *(f"plugins/causal-basis/featurizers_causal_basis/{name}.py" for name in ["ablation", "featurizer", "inputs"]),
    *(f"plugins/causal-basis/featurizers_causal_basis/{name}/*.py" for name in ("lens", "solve")),
    *(
        f"plugins/derived-scalars/featurizers_derived_scalars/{name}/*.py"
        for name in ["capturing", "circuit", "featurize", "nodes", "quantities", "results"]
    ),
]
"""Files that are changed."""


def main(
    count: Annotated[int, typer.Option(min=1, help="Mutants, those that are equivalent not counted.")] = 200,
    seed: Annotated[int, typer.Option(help="Which mutants.")] = 0,
    file: Annotated[list[str] | None, typer.Option(help="Only files with this text in their path.")] = None,
    only: Annotated[str | None, typer.Option(help="Try again: survivors, with all tests that fit.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 1,
    seconds: Annotated[float, typer.Option(help="Tests for a mutant, fastest first, in seconds of the CPU.")] = 60.0,
    work: Annotated[Path, typer.Option(help="Folder for copies and traces.")] = Path("/tmp/featurizers-mutants"),
    results: Annotated[Path, typer.Option("--json", help="File for the results.")] = RESULTS / "mutants.json",
    docs: Annotated[bool, typer.Option(help="Write the table into docs/benchmarks.md, and do nothing else.")] = False,
) -> None:
    """Try mutants; those whose result is stored already are not tried again."""
    if only not in (None, "survivors"):
        raise typer.BadParameter("choose survivors", param_hint="--only")
    store = json.loads(results.read_text()) if results.exists() else {"seed": seed, "mutants": []}
    if store["seed"] != seed:
        raise typer.BadParameter(f"the stored results are of seed {store['seed']}: choose another --json")
    left_out = {
        entry["mutant"]: entry.get("needs", "")
        for entry in json.loads((RESULTS / "mutants-equivalent.json").read_text())
    }
    sources = _sources(file or [""])
    sample = _sample(sources, count, seed, set(left_out))
    done = {tried["mutant"]: tried for tried in store["mutants"]}
    wanted = [m for m in sample if m.name not in left_out]
    besides = Counter(left_out[m.name] for m in sample if m.name in left_out)
    if docs:
        _write(store, wanted, besides)
        return
    again = [m for m in wanted if only and done.get(m.name, {}).get("status") in ("survived", "not run")]
    pending = again if only else [m for m in wanted if m.name not in done]
    pending.sort(key=lambda mutant: mutant.file)  # tests are traced when a part of the code first needs them
    bench = Bench(work, jobs, seconds, sources)
    for tried in bench.run(pending, wide=only is not None):
        done[tried["mutant"]] = tried
        store["mutants"] = sorted(done.values(), key=lambda tried: str(tried["mutant"]))
        partial = results.with_suffix(".partial")
        partial.write_text(json.dumps(store, indent=1, ensure_ascii=False) + "\n")
        partial.replace(results)
    _print(store, wanted, besides)


def _sources(texts: list[str]) -> dict[str, bytes]:
    paths = sorted({path for pattern in FILES for path in REPOSITORY.glob(pattern)})
    names = {
        str(path.relative_to(REPOSITORY)): path
        for path in paths
        if path.name != "__init__.py" or path.stat().st_size > 1000
    }
    return {name: path.read_bytes() for name, path in names.items() if any(text in name for text in texts)}


def _sample(sources: dict[str, bytes], count: int, seed: int, equivalent: set[str]) -> list[Mutant]:
    """Return mutants in a random order that hardly changes if the code does, up to a count of those not equivalent.

    The chance of a file goes by its number of mutants; in a file every kind of change has the same chance. Each mutant
    has the key ``-log(u)/weight``, where u is uniform and follows from the seed and its name; the least come first.
    """
    keyed = []
    for file, source in sources.items():
        found = mutants(file, source)
        kinds = Counter(mutant.kind for mutant in found)
        for mutant in found:
            u = (int(sha256(f"{seed}:{mutant.name}".encode())[:12], 16) + 0.5) / 16**12
            weight = len(found) / len(kinds) / kinds[mutant.kind]
            keyed.append((-math.log(u) / weight, mutant))
    chosen, counted = [], 0
    for _, mutant in sorted(keyed, key=lambda pair: pair[0]):
        if counted == count:
            break
        if is_python(mutant.applied(sources[mutant.file])):
            chosen.append(mutant)
            counted += mutant.name not in equivalent
    return chosen


def _counts(store: dict[str, Any], wanted: list[Mutant]) -> dict[str, Counter[str]]:
    """Return how many mutants of each part of the code came to what."""
    done = {tried["mutant"]: tried["status"] for tried in store["mutants"]}
    counts: dict[str, Counter[str]] = {}
    for mutant in wanted:
        parts = Path(mutant.file).parts
        counts.setdefault(f"`{parts[2] if parts[0] == 'core' else parts[1]}`", Counter())[
            done.get(mutant.name, "not run")
        ] += 1
    return counts


def _print(store: dict[str, Any], wanted: list[Mutant], besides: Counter[str]) -> None:
    table = Table(*("part", "killed", "survived", "not run"))
    counts = _counts(store, wanted)
    for part, count in counts.items():
        table.add_row(part, *(str(count[status]) for status in ("killed", "survived", "not run")))
    console = Console()
    console.print(table)
    console.print(_sentence(counts, besides), highlight=False)


def _sentence(counts: dict[str, Counter[str]], besides: Counter[str]) -> str:
    """Return the counts as text; ``besides`` counts mutants that are not tried, by what they need, empty if nothing."""
    total = sum(counts.values(), Counter[str]())
    ran = total["killed"] + total["survived"]
    return (
        f"{total['killed']} of {ran} killed ({total['killed'] / max(ran, 1):.1%}), {total['survived']} survived; "
        f"{total['not run']} not run. Besides these, {besides['']} of the sample are equivalent"
        + "".join(f", and {number} can be seen only with {needs}" for needs, number in besides.items() if needs)
        + "."
    )


def _write(store: dict[str, Any], wanted: list[Mutant], besides: Counter[str]) -> None:
    """Write the table between its markers in the document."""
    counts = _counts(store, wanted)
    lines = [
        _sentence(counts, besides),
        "",
        "| part | killed | survived | not run |",
        "| --- | ---: | ---: | ---: |",
    ]
    for part, count in sorted(counts.items()):
        lines.append(f"| {part} | {count['killed']} | {count['survived']} | {count['not run']} |")
    names = {mutant.name for mutant in wanted}
    survivors = [tried for tried in store["mutants"] if tried["status"] == "survived" and tried["mutant"] in names]
    if survivors:
        lines += ["", "Survivors:", "", *(f"- `{tried['mutant']}`" for tried in survivors)]
    before, rest = DOCUMENT.read_text().split(START)
    DOCUMENT.write_text("\n".join([before + START, *lines, END + rest.split(END)[1]]))


if __name__ == "__main__":
    typer.run(main)
