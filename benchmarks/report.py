"""Results of a run: printed as a table, stored as JSON, and written into docs/benchmarks.md.

``python benchmarks/report.py FILE...`` writes the tables of JSON files into the document.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from timing import Row, Settings

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


class Machine(BaseModel):
    """Description of the machine and the versions of the packages."""

    device: str
    cpu: str
    cores: int
    threads: int
    versions: dict[str, str]

    @classmethod
    def here(cls, settings: Settings) -> Machine:
        """Describe this machine."""
        gpu = torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda" else None
        names = ("featurizers", "torch", "pyvene", "sae-lens", "transformers")
        return cls(
            device=gpu or "CPU",
            cpu=_cpu(),
            cores=os.cpu_count() or 0,
            threads=torch.get_num_threads(),
            versions={"python": platform.python_version(), **{name: _version(name) for name in names}},
        )

    def __str__(self) -> str:
        """Return the description as a sentence."""
        cpu = f"{self.cpu}, {self.cores} cores, {self.threads} torch thread{'s' * (self.threads != 1)}"
        what = cpu if self.device == "CPU" else f"{self.device} beside {cpu}"
        return f"{what}; {', '.join(f'{name} {number}' for name, number in self.versions.items())}"


class Report(BaseModel):
    """Results of a run.

    Attributes:
        device: ``cpu`` or ``cuda``.
        load: load average of the machine over one minute, before and after the run.
        table: name of the table in the document; the device if None.
    """

    device: str
    dtype: str
    quick: bool
    pairs: int
    machine: Machine
    load: tuple[float, float]
    rows: list[Row]
    table: str | None = None

    def print(self, console: Console | None = None) -> None:
        """Print the table, the checks and the reasons for skipped rows."""
        console = console or Console()
        table = Table(title=str(self.machine), title_justify="left", title_style="dim")
        for name in ("name", "featurizers", "peer", "ratio", "spread", "CPU ratio", "required", ""):
            table.add_column(name, justify="left" if name in ("name", "") else "right", no_wrap=True)
        for row in self.rows:
            if row.skipped is None:
                table.add_row(row.name, *_numbers(row), {True: "met", False: "[red]missed", None: ""}[row.met])
            else:
                table.add_row(row.name, *["–"] * 5, _required(row), "skipped")
        console.print(table)
        for row in self.rows:
            if row.skipped is None:
                checks = "; ".join(filter(None, (row.checked, row.outcome)))
                console.print(f"[dim]{row.name}: {row.what}, against {row.peer}. {checks}", highlight=False)
            else:
                console.print(f"{row.name} skipped: {row.skipped}", highlight=False)
        console.print(f"load average {self.load[0]:.1f} before, {self.load[1]:.1f} after", highlight=False)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [
            f"{self.machine}. Activations in {self.dtype}. Load average "
            f"{self.load[0]:.1f} before the run and {self.load[1]:.1f} after.",
            "",
            "| name | measurement; *peer* | featurizers | peer | ratio | spread | CPU ratio | required |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in self.rows:
            if row.skipped is None:
                ours, theirs, ratio, spread, cpu, required = _numbers(row)
                cells = (f"{row.what}; *{row.peer}*", ours, theirs, f"**{ratio}**", spread, cpu, required)
            else:
                cells = (f"skipped: {row.skipped}", *["–"] * 5, _required(row))
            lines.append(f"| `{row.name}` | {' | '.join(cells)} |")
        outcomes = [f"- `{row.name}`: {row.outcome}." for row in self.rows if row.outcome]
        lines += ["", *outcomes] if outcomes else []
        return "\n".join(lines)


def write_document(report: Report, path: Path = DOCUMENT) -> None:
    """Write the table of a run between its markers in the document.

    Raises:
        ValueError: the run was a quick one, or the document has no markers for the table.
    """
    if report.quick:
        raise ValueError("a quick run cannot go into the document; run without --quick")
    table = report.table or report.device
    start, end = f"<!-- results: {table} -->", f"<!-- end of results: {table} -->"
    text = path.read_text()
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{path.name} has no markers {start!r} and {end!r}")
    path.write_text(pattern.sub(lambda _: f"{start}\n{report.markdown()}\n{end}", text))


def _numbers(row: Row) -> tuple[str, str, str, str, str, str]:
    spread = "–" if row.pairs == 0 else f"{_times(row.spread[0])} – {_times(row.spread[1])}"
    cpu = "–" if row.cpu_ratio is None else _times(row.cpu_ratio)
    return _amount(row.ours, row.unit), _amount(row.theirs, row.unit), _times(row.ratio), spread, cpu, _required(row)


def _required(row: Row) -> str:
    if row.required is None:
        return "–"
    return f"{'≥' if row.sense == 'at least' else '≤'} {row.required:g}×"


def _times(ratio: float) -> str:
    digits = 0 if ratio >= 100 else 1 if ratio >= 10 else 2 if ratio >= 2 else 3
    return f"{ratio:,.{digits}f}×"


def _amount(value: float, unit: str) -> str:
    steps = {
        "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
        "bytes": ((2**20, "MiB"), (2**10, "KiB"), (1, "B")),
        "FLOP": ((1e9, "GFLOP"), (1e6, "MFLOP"), (1, "FLOP")),
    }[unit]
    size, name = next((step for step in steps if value >= step[0]), steps[-1])
    return f"{value / size:.3g} {name}" if value / size < 1000 else f"{value / size:.0f} {name}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if names:
            return str(names[0])
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    for file in sys.argv[1:]:
        write_document(Report.model_validate_json(Path(file).read_text()))
