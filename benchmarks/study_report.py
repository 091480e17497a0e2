"""Tables and picture of docs/training-study.md, from the results of ``study.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from featurizers_training import Estimate, clustered_mean, holm, paired_difference
from matplotlib import pyplot
from matplotlib.axes import Axes
from study import COUNTS, FEATURES, MAIN, RATES, RESULTS, Cell, share

HERE: Final = Path(__file__).resolve().parent
PAGE: Final = HERE.parent / "docs" / "training-study.md"
PICTURE: Final = HERE.parent / "docs" / "training-study-features.png"

NAMES: Final = {"das": "DAS", "dbm": "DBM", "full-vector": "full vector", "pca": "PCA", "random": "random"}
PARTS: Final = {"choose": "choose", "report": "report", "unseen": "unseen kind", "same": "same kind"}
SHOWN: Final = ("choose", "report", "unseen")
COMPARED: Final = (("das", "dbm"), ("dbm", "full-vector"), ("das", "full-vector"), ("das", "pca"))
"""Pairs of methods that are tested against each other."""


@dataclass(frozen=True)
class Study:
    """Results of a study.

    Attributes:
        cells: searches and baselines, of all folds.
        folds: pairs of each fold, by its seed.
    """

    cells: Sequence[Cell]
    folds: Mapping[int, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a file that ``study.py`` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls([Cell(**cell) for cell in data["cells"]], {fold["seed"]: fold for fold in data["folds"]})

    @property
    def seeds(self) -> list[int]:
        """Seeds of the folds."""
        return sorted(self.folds)

    def of(
        self, method: str, position: str, block: int, *, k: int | None = None, control: str | None = None
    ) -> list[Cell]:
        """Return the cells of a method at a place, one for each fold; none if a fold lacks it.

        Several learning rates are compared by the accuracy on the pairs ``choose`` of all folds.
        """
        at = (method, position, block, control)
        own = [c for c in self.cells if at == (c.method, c.position, c.block, c.control) and k in (None, c.k)]
        by_rate = {rate: [c for c in own if c.rate == rate] for rate in dict.fromkeys(c.rate for c in own)}
        whole = {rate: cells for rate, cells in by_rate.items() if sorted(c.seed for c in cells) == self.seeds}
        if not whole:
            return []
        best = max(whole, key=lambda rate: share([c.outcomes["choose"] for c in whole[rate]]))
        return sorted(whole[best], key=lambda c: c.seed)

    def clusters(self, cells: Sequence[Cell], part: str, key: str = "label") -> list[str]:
        """Return what each pair of a part shares with others: its label, base_label or source."""
        return [record[key] for c in cells for record in self.folds[c.seed]["parts"][part]]

    def estimate(self, cells: Sequence[Cell], part: str, key: str = "label") -> Estimate:
        """Return the accuracy on a part, over all folds, with the interval of the word that is the label."""
        return clustered_mean(outcomes(cells, part), self.clusters(cells, part, key))

    def difference(self, first: Sequence[Cell], second: Sequence[Cell], part: str) -> Estimate:
        """Return the difference of two methods on the same pairs of all folds, and its test."""
        return paired_difference(outcomes(first, part), outcomes(second, part), self.clusters(first, part))


def outcomes(cells: Sequence[Cell], part: str) -> list[float]:
    """Return 1 for each right answer on a part and 0 for each wrong one, over all folds."""
    return [float(digit) for c in cells for digit in c.outcomes[part]]


def chosen_k(method: str, cells_k: int | None) -> int | None:
    """Return the number of features to ask for: that of DAS, PCA and random subspaces is given."""
    return cells_k if method in ("das", "pca", "random") else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, its columns but the first on the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def places(study: Study) -> list[tuple[str, int]]:
    """Return positions and blocks with a result of DAS, in order."""
    found = sorted({(c.position, c.block) for c in study.cells if c.control is None})
    return [place for place in found if study.of("das", *place, k=FEATURES)]


def main_table(study: Study) -> str:
    """Return the accuracies of all methods where they were compared."""
    rows = []
    for method in ("das", "dbm", "full-vector", "pca", "random"):
        cells = study.of(method, *MAIN, k=chosen_k(method, FEATURES))
        if not cells:
            continue
        each = [study.estimate([c], "report").value for c in cells]
        train = sum(c.train for c in cells) / len(cells)
        features = f"{sum(c.k for c in cells) / len(cells):.0f}"
        rate = "–" if cells[0].rate is None else str(cells[0].rate)
        rows.append(
            [
                NAMES[method], features, rate, f"{train:.0%}",
                *(f"{study.estimate(cells, part)}" for part in ("report", "unseen")),
                f"{min(each):.0%} – {max(each):.0%}",
                f"{study.estimate(cells, 'same').value:.0%}",
            ]
        )  # fmt: skip
    header = ["", "features", "rate", "search", "report", "unseen kind", "by seed", "same kind"]
    return table(header, rows)


def tests_table(study: Study) -> str:
    """Return the differences of methods with their tests, adjusted together."""
    made = []
    for a, b in COMPARED:
        for part in ("report", "unseen"):
            first, second = (study.of(m, *MAIN, k=chosen_k(m, FEATURES)) for m in (a, b))
            if first and second:
                made.append((f"{NAMES[a]} − {NAMES[b]}", part, study.difference(first, second, part)))
    adjusted = holm([estimate.p or 0.0 for _, _, estimate in made])
    rows = [[name, PARTS[part], str(e), probability(p)] for (name, part, e), p in zip(made, adjusted, strict=True)]
    return table(["difference", "pairs", "points", "p"], rows)


def probability(p: float) -> str:
    """Return a probability as text."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def clusters_table(study: Study) -> str:
    """Return the interval of DAS by what pairs are in clusters by."""
    cells, rows = study.of("das", *MAIN, k=FEATURES), []
    for name, key in (("label", "label"), ("answer to the base", "base_label"), ("source", "source"), ("pair", "")):
        if key:
            e = study.estimate(cells, "report", key)
        else:
            values = outcomes(cells, "report")
            e = clustered_mean(values, range(len(values)))
        rows.append([name, str(e.clusters), str(e)])
    return table(["clusters by", "number", "DAS, report"], rows)


def places_table(study: Study) -> str:
    """Return the accuracies at each place."""
    methods = ("das", "dbm", "full-vector", "pca", "random")
    rows = []
    for position, block in places(study):
        row = [f"{block} at `{position}`"]
        for method in methods:
            cells = study.of(method, position, block, k=chosen_k(method, FEATURES))
            row.append("/".join(f"{share([c.outcomes[part] for c in cells]):.0%}" for part in SHOWN) if cells else "")
        shuffled = study.of("das", position, block, control="shuffled-labels")
        row.append(f"{study.estimate(shuffled, 'report').value:.0%}" if shuffled else "")
        rows.append(row)
    return table(["after block", *(NAMES[m] for m in methods), "DAS, shuffled labels"], rows)


def rates_table(study: Study) -> str:
    """Return the accuracies on the pairs ``choose`` and ``report`` by learning rate."""
    rows = []
    for method, rates in RATES.items():
        for rate in rates:
            at = (method, rate, *MAIN, None)
            cells = [c for c in study.cells if at == (c.method, c.rate, c.position, c.block, c.control)]
            cells = [c for c in cells if method == "dbm" or c.k == FEATURES]
            if sorted(c.seed for c in cells) == study.seeds:
                shares = [f"{share([c.outcomes[part] for c in cells]):.0%}" for part in ("choose", "report")]
                rows.append([f"{NAMES[method]}, {rate}", *shares])
    return table(["method and rate", "choose", "report"], rows)


def curve(study: Study, axes: Axes, part: str) -> None:
    """Draw the accuracy by the number of features."""
    for method, color in (("das", "C0"), ("pca", "C1"), ("random", "0.6")):
        ks = sorted({c.k for c in study.cells if (c.method, c.position, c.block, c.control) == (method, *MAIN, None)})
        points = [(k, study.estimate(cells, part)) for k in ks if (cells := study.of(method, *MAIN, k=k))]
        if points:
            draw_points(axes, points, color, NAMES[method])
    for method, color, style in (("dbm", "C2", "--"), ("full-vector", "0.3", ":")):
        if cells := study.of(method, *MAIN):
            k = sum(c.k for c in cells) / len(cells)
            axes.axhline(
                study.estimate(cells, part).value, color=color, linestyle=style, label=f"{NAMES[method]} ({k:.0f})"
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 64], ["1", "2", "4", "8", "16", "64"])
    axes.set_xlabel("number of features k")
    axes.set_title(
        {"report": "kinds of the search, other words", "unseen": "a kind that was left out"}[part], fontsize=10
    )


def draw_points(axes: Axes, points: Sequence[tuple[float, Estimate]], color: str, label: str) -> None:
    """Draw estimates with their intervals as a line."""
    x, y = [k for k, _ in points], [e.value for _, e in points]
    axes.fill_between(
        x, [e.interval[0] for _, e in points], [e.interval[1] for _, e in points], color=color, alpha=0.15
    )
    axes.plot(x, y, "o-", color=color, label=label)


def picture(study: Study, path: Path) -> None:
    """Draw the accuracies by the number of features, for both kinds of held-out pairs."""
    figure, both = pyplot.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
    for axes, part in zip(both, ("report", "unseen"), strict=True):
        curve(study, axes, part)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(True, alpha=0.25)
    both[0].set_ylabel(f"accuracy after block {MAIN[1]}, at the last token")
    both[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def summary(study: Study) -> str:
    """Return the number of prompts, pairs and words."""
    asked = sum(n for fold in study.folds.values() for n, _ in fold["prompts"].values())
    right = sum(n for fold in study.folds.values() for _, n in fold["prompts"].values())
    cells = study.of("full-vector", *MAIN)
    counts = {part: len(study.clusters(cells, part)) for part in ("choose", "report", "unseen", "same")}
    labels = {part: len(set(study.clusters(cells, part))) for part in counts}
    left_out = ", ".join(fold["left_out"] for fold in study.folds.values())
    return (
        f"{len(study.folds)} folds, left out: {left_out}. The model answers {right} of {asked} prompts correctly. "
        "Pairs of all folds (words that are their labels): "
        + ", ".join(f"`{part}` {counts[part]} ({labels[part]})" for part in counts)
        + "."
    )


SECTIONS: Final[dict[str, Callable[[Study], str]]] = {
    "summary": summary,
    "methods": main_table,
    "tests": tests_table,
    "clusters": clusters_table,
    "places": places_table,
    "rates": rates_table,
}


def filled(page: str, study: Study) -> str:
    """Return the page with each block between ``<!-- study: NAME -->`` and ``<!-- end -->`` made anew."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- study: {name} -->\n", "<!-- end -->"
        if begin in page:
            before, _, rest = page.partition(begin)
            page = f"{before}{begin}{make(study)}\n{end}{rest.partition(end)[2]}"
    return page


def main(
    results: Annotated[Path, typer.Option(help="File that study.py wrote.")] = RESULTS,
    show: Annotated[bool, typer.Option(help="Print the tables; write nothing but the picture, here.")] = False,
) -> None:
    """Write the tables into the page, and draw the picture."""
    study = Study.read(results)
    if show:
        for name, make in SECTIONS.items():
            print(f"{name}\n{make(study)}\n")
        picture(study, Path("training-study.png"))
        return
    if sum(bool(study.of("das", *MAIN, k=k)) for k in COUNTS) < 2:
        print("there is no curve yet: too few numbers of features were searched in all folds")
    else:
        picture(study, PICTURE)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), study), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
