"""Kill programs in the middle of a save, a conversion, a pull or a push, and let many work on one folder.

``python benchmarks/faults.py`` prints a table. The exit code is 1 unless its last two columns are zero. The time of a
kill is uniform over the duration of the operation; "in the middle" counts the kills that came before its end.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support import faults

Row = tuple[str, Callable[[], faults.Tally | faults.Crowd]]


def on_disk(place: Path, kills: int) -> Iterator[Row]:
    """Yield kills of programs that write a folder."""
    with faults.Nursery() as nursery:
        over = {
            "save over an artefact": "save",
            "save over an artefact, in two renames": "save_in_two_steps",
            "save over a collection": "save_collection",
        }
        for name, work in over.items():
            yield name, lambda work=work: faults.kills_over(nursery, place / work / "a", kills, work)
        yield "save anew", lambda: faults.kills_anew(nursery, place / "anew", kills)
        for to in ("featurizers", "sae-lens", "dictionary-learning"):
            yield (
                f"convert to {to}",
                lambda to=to: faults.kills_of_convert(nursery, place / f"convert-{to}", kills, to),
            )


def with_the_hub(place: Path, kills: int) -> Iterator[Row]:
    """Yield kills of programs that talk to the Hub, which stores uploads by plain HTTP or by Xet."""
    for xet in [False] + [True] * (importlib.util.find_spec("hf_xet") is not None):
        how = "Xet" if xet else "plain"
        with faults.HubProcess(place / how, xet) as hub, faults.Nursery(hub.environment) as nursery:
            yield f"push ({how})", lambda: faults.kills_of_push(nursery, hub, kills)
            yield f"pull --out ({how})", lambda: faults.kills_of_pull(nursery, hub, kills)


def crowds(place: Path, seconds: float, processes: int) -> Iterator[Row]:
    """Yield crowds of programs that save and load one folder; none is killed."""
    with faults.Nursery() as nursery:
        for name, in_two_steps in {"": False, ", in two renames": True}.items():
            folder = place / f"crowd{int(in_two_steps)}" / "a"
            yield (
                f"a crowd of {processes}{name}",
                lambda folder=folder, how=in_two_steps: faults.crowd(nursery, folder, seconds, processes, how),
            )


def main(
    kills: Annotated[int, typer.Option(min=1, help="Kills of each operation on the disk.")] = 500,
    hub_kills: Annotated[int, typer.Option(min=1, help="Kills of each operation with the Hub.")] = 200,
    crowd_seconds: Annotated[float, typer.Option(min=0.1, help="Duration of each crowd in seconds.")] = 60.0,
    processes: Annotated[int, typer.Option(min=1, help="Processes of each crowd.")] = 8,
    only: Annotated[str, typer.Option(help="Run only the faults with this text in their name.")] = "",
    json_: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Kill programs and count bad states and lost bytes."""
    torch.set_num_threads(1)
    console, table, figures = Console(), Table("fault"), []
    if not console.is_terminal:
        console.width = 120
    for column in ("kills", "in the middle", "new one there", "saves", "loads", "seconds", "bad states", "bytes lost"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        place = Path(folder)
        for rows in (on_disk(place, kills), with_the_hub(place, hub_kills), crowds(place, crowd_seconds, processes)):
            for name, work in rows:
                if only not in name:
                    continue
                start = time.monotonic()
                done = work()
                figures.append(figure := {"fault": name, "took": round(time.monotonic() - start, 1), **vars(done)})
                cells = [
                    str(figure.get(count, "")) for count in ("kills", "middle", "finished", "saves", "loads", "took")
                ]
                table.add_row(name, *cells, str(len(done.bad)), str(done.lost))
                print(name, *done.bad[:5], sep="\n  ", file=sys.stderr)
    console.print(table)
    if json_ is not None:
        json_.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if any(figure["bad"] or figure["lost"] for figure in figures):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
