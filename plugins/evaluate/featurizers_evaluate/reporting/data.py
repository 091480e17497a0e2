"""`ReportData`: what a reading of the data showed of each feature; and `FeatureReport`, one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from featurizers import Label
from featurizers.errors import FeatureIndexError, MissingDependencyError, UsageError, shown
from torch import Tensor

from featurizers_evaluate.reporting.effects import Effects
from featurizers_evaluate.reporting.neighbours import Neighbours
from featurizers_evaluate.result import Evaluation

MOST_CONTEXTS: Final = 20
NEURONPEDIA: Final = "https://www.neuronpedia.org"


@dataclass(frozen=True)
class Context:
    """A place in the data where a feature is large.

    Attributes:
        value: of the feature at the token in the middle.
        tokens: texts of the tokens around it.
        values: of the feature at these tokens; 0 where they were not measured.
    """

    value: float
    tokens: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Contexts:
    """Contexts of all features at one end; see `reporting.contexts`.

    Attributes:
        values: ``(n, k)``, NaN where there are fewer.
        ids: token ids, ``(n, k, 21)`` int32, -1 beyond the row.
        strengths: features at these tokens, likewise.
    """

    values: Tensor
    ids: Tensor
    strengths: Tensor


@dataclass(frozen=True)
class FeatureReport:
    """Record of one feature.

    Attributes:
        name: its number, after the group and a slash in a map with several groups.
        density: share of the tokens measured at which it is not 0.
        mean: over all tokens measured.
        std: likewise.
        least: smallest value; None for a feature that is always 0, as for ``most``. Of a sparse feature, of the values
            that are not 0.
        most: largest value.
        histogram: edges and counts of the values that are not 0; of a dense feature, of all.
        high: contexts of the largest values.
        low: contexts of the smallest values; of a sparse feature, of those below 0.
        promoted: tokens whose logits it raises most, with the logits.
        suppressed: tokens whose logits it lowers most.
        neighbours: names of the features with the most similar directions, with the cosines.
        norms: length of its direction at each write.
        energy: see `ReportData.energies`; None where there is none.
        labels: what people or programs say that it means.
        link: address of its page on Neuronpedia; None if the artefact does not say that there is one.
    """

    name: str
    density: float
    mean: float
    std: float
    least: float | None
    most: float | None
    histogram: tuple[tuple[float, ...], tuple[int, ...]]
    high: tuple[Context, ...]
    low: tuple[Context, ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    neighbours: tuple[tuple[str, float], ...]
    norms: Mapping[str, float]
    energy: float | None
    labels: tuple[Label, ...]
    link: str | None


@dataclass(frozen=True, repr=False)
class ReportData:
    """Data of a report. All tensors have a row for each feature of the report.

    Attributes:
        about: what was measured on what; JSON data.
        evaluation: reconstruction and sparsity on the same data.
        effect: effect on the model, on fewer tokens; None if it was not measured.
        names: of the features.
        numbers: of the features within their group, ``(n,)`` int64.
        groups: number of the group of each, ``(n,)`` int64.
        count: measured tokens at which each is not 0, ``(n,)`` int64.
        mean: ``(n,)`` float64, as for ``std``.
        std: standard deviation over all tokens measured.
        least: ``(n,)``, infinity where a feature is always 0.
        most: ``(n,)``, minus infinity likewise.
        bars: counts of the histograms, ``(n, 64)`` int64.
        centre: of the histograms, ``(n,)``: where bar 32 begins.
        exponent: of the histograms, ``(n,)`` int64: bars are ``2 ** exponent`` wide.
        high: contexts of the largest values.
        low: contexts of the smallest values; None if no feature is below 0.
        effects: on the logits, or why they are not defined.
        neighbours: by direction, or why they are not defined.
        norms: lengths of the directions at each write, ``(n, writes)``; None if they are not defined.
        note: what is to be known of the directions; empty if nothing is.
        energies: energy of ablating each direction of a causal basis, nats per token; None for other kinds.
        labels: of features, by place.
        texts: of all tokens in it, by id.
    """

    about: Mapping[str, Any]
    evaluation: Evaluation
    effect: Evaluation | None
    names: Sequence[str]
    numbers: Tensor
    groups: Tensor
    count: Tensor
    mean: Tensor
    std: Tensor
    least: Tensor
    most: Tensor
    bars: Tensor
    centre: Tensor
    exponent: Tensor
    high: Contexts
    low: Contexts | None
    effects: Effects | str
    neighbours: Neighbours | str
    norms: Tensor | None
    note: str
    energies: Tensor | None
    texts: Mapping[int, str]
    labels: Mapping[int, Sequence[Label]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of features."""
        return len(self.names)

    def __repr__(self) -> str:
        """Return one line."""
        about = self.about
        return f"Report({about['featurizer']!r}, {len(self)} features, {about['tokens']} tokens of {about['model']})"

    def __iter__(self) -> Iterator[FeatureReport]:
        """Iterate over the features."""
        return (self._at(place) for place in range(len(self)))

    def __getitem__(self, feature: int | str) -> FeatureReport:
        """Return one feature by its number, or by its name.

        Raises:
            FeatureIndexError: it is not in the report.
        """
        name = str(feature)
        if name not in self.names:
            where = f"{self.names[0]} to {self.names[-1]}" if len(self) else "none"
            raise FeatureIndexError(f"the report has no feature {shown(feature)}; it has {len(self)}: {where}")
        return self._at(self.names.index(name))

    def to_pandas(self) -> Any:
        """Return a data frame with a row for each feature.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError("a data frame", "pandas", "pip install pandas") from error
        names = ("name", "density", "mean", "std", "least", "most", "energy")
        rows = [{name: getattr(each, name) for name in names} for each in self]
        for row, each in zip(rows, self, strict=True):
            row["top"] = "".join(each.high[0].tokens) if each.high else None
            row["promoted"] = [text for text, _ in each.promoted]
            row["label"] = each.labels[0].text if each.labels else None
        return pandas.DataFrame(rows)

    @property
    def is_dense(self) -> bool:
        """True if most features of a token are not 0, as in a subspace."""
        return bool(self.about["dense"])

    @property
    def writes(self) -> list[str]:
        """Names of the writes."""
        return list(self.about["writes"])

    def _at(self, place: int) -> FeatureReport:
        low, high, tokens = float(self.least[place]), float(self.most[place]), int(self.about["tokens"])
        effects, near = self.effects, self.neighbours
        return FeatureReport(
            name=self.names[place],
            density=int(self.count[place]) / tokens,
            mean=float(self.mean[place]),
            std=float(self.std[place]),
            least=None if low > high else low,
            most=None if low > high else high,
            histogram=self._histogram(place),
            high=self._contexts(self.high, place),
            low=() if self.low is None else self._contexts(self.low, place),
            promoted=() if isinstance(effects, str) else self._tokens(effects.high, effects.high_values, place),
            suppressed=() if isinstance(effects, str) else self._tokens(effects.low, effects.low_values, place),
            neighbours=()
            if isinstance(near, str)
            else tuple(
                (self.names[row], cosine)
                for row, cosine in zip(near.rows[place].tolist(), near.cosines[place].tolist(), strict=True)
                if row >= 0
            ),
            norms={} if self.norms is None else dict(zip(self.writes, self.norms[place].tolist(), strict=True)),
            energy=None if self.energies is None else float(self.energies[place]),
            labels=tuple(self.labels.get(place, ())),
            link=None if not self.about["neuronpedia"] else f"{self.about['neuronpedia']}/{int(self.numbers[place])}",
        )

    def _histogram(self, place: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Return the bars from the first to the last with a value."""
        counts, width = self.bars[place].tolist(), 2.0 ** int(self.exponent[place])
        used = [number for number, count in enumerate(counts) if count]
        if not used:
            return (), ()
        first, last, middle = used[0], used[-1], len(counts) // 2
        edges = tuple(float(self.centre[place]) + (bar - middle) * width for bar in range(first, last + 2))
        return edges, tuple(counts[first : last + 1])

    def _contexts(self, contexts: Contexts, place: int) -> tuple[Context, ...]:
        found = []
        for value, ids, strengths in zip(
            contexts.values[place].tolist(),
            contexts.ids[place].tolist(),
            contexts.strengths[place].tolist(),
            strict=True,
        ):
            if math.isnan(value):  # there are no more
                break
            inside = [(number, strength) for number, strength in zip(ids, strengths, strict=True) if number >= 0]
            texts = tuple(self.texts[number] for number, _ in inside)
            found.append(Context(value, texts, tuple(strength for _, strength in inside)))
        return tuple(found)

    def _tokens(self, ids: Tensor, values: Tensor, place: int) -> tuple[tuple[str, float], ...]:
        return tuple(
            (self.texts[i], value) for i, value in zip(ids[place].tolist(), values[place].tolist(), strict=True)
        )


def check_contexts(number: int) -> None:
    """Raise UsageError for a number of contexts that no report shows."""
    if type(number) is not int or not 1 <= number <= MOST_CONTEXTS:
        raise UsageError(f"contexts is a number from 1 to {MOST_CONTEXTS}, not {shown(number)}")
