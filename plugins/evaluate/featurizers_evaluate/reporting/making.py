"""`report`: what each feature of a featurizer is active on and writes, in one reading of the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import featurizers
import numpy as np
import torch
from featurizers import FeatureSpace, Featurizer, Label, Site, SiteMap
from featurizers.cli import progress_bar
from featurizers.errors import FeaturizerError, UsageError, one_line, shown
from featurizers.models import evaluating
from torch import Tensor

from featurizers_evaluate.documents import Batch
from featurizers_evaluate.evaluating import evaluate, measured
from featurizers_evaluate.harvests import NO_MODEL, check_of_model, harvest_of
from featurizers_evaluate.options import Options
from featurizers_evaluate.reporting.data import NEURONPEDIA, Contexts, check_contexts
from featurizers_evaluate.reporting.directions import directions_of
from featurizers_evaluate.reporting.effects import Effects, logit_effects
from featurizers_evaluate.reporting.neighbours import nearest
from featurizers_evaluate.reporting.result import Report
from featurizers_evaluate.reporting.tallies import Tally
from featurizers_evaluate.reporting.texts import token_texts
from featurizers_evaluate.result import Evaluation
from featurizers_evaluate.subjects import Subject

MOST_FEATURES: Final = 2**15
"""Features of a report."""
PROBE: Final = 8
"""Tokens of the data whose activations are kept to try what features write."""
NEURONPEDIA_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,99}/[A-Za-z0-9][\w.-]{0,199}", re.ASCII)


def report(
    featurizer: FeatureSpace[Any],
    model: object = None,
    tokens: Any = None,
    *,
    harvest: Any = None,
    site: Site | str | None = None,
    features: Any = None,
    contexts: int = 5,
    effect_tokens: int = 256,
    tokenizer: Any = None,
    exclude_special_tokens: bool | Iterable[int] = False,
    mask_first: int = 0,
    context: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    data: str | None = None,
    any_model: bool = False,
    progress: bool = True,
) -> Report:
    """Read documents once, and report what each feature is active on, what it writes, and which features are alike.

    Of each feature: density, histogram, the contexts in which it is largest (and smallest), its direct effects on the
    logits, the features with the nearest directions. Memory does not grow with the number of tokens.

    Args:
        featurizer: of any kind; of a map between sites all groups.
        model: a decoder with its head, as in `featurizers.evaluate`.
        tokens: documents, as there.
        harvest: in the place of the tokens, as there. The model is then needed for the effects on the logits alone, and
            may be left out; the effect of the reconstruction is not measured.
        site: place to measure at; None for the featurizer's own.
        features: numbers of the features to report; of a map with several groups, such numbers by group. None for all,
            or of more than 32,768 those that are active most often.
        contexts: of each end of each feature.
        effect_tokens: number of tokens on which the effect of the reconstruction on the model is measured; 0 for none.
        tokenizer: of the model; without one, tokens are shown as their numbers.
        exclude_special_tokens: as in `featurizers.evaluate`.
        mask_first: as there. A context shows tokens that are left out, but none begins there.
        context: as there.
        max_tokens: as there.
        batch_size: as there; it changes numbers by rounding alone.
        seed: of the bootstrap of the metrics.
        data: name of the data.
        any_model: accept another model than the one that the artefact names.
        progress: whether to show a bar on a terminal.

    Raises:
        UsageError: an argument is invalid, a document does not fit the model, or no token is left.
        SiteError, ShapeError: the featurizer does not fit the model.

    Examples:
        >>> import torch, featurizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).eval()
        >>> f = featurizers.DictionaryFeaturizer.from_tensors(torch.eye(16, 8), torch.eye(16, 8))
        >>> found = featurizers.report(f, model, torch.arange(20).reshape(2, 10), site="resid.post:0", progress=False)
        >>> len(found), found[15].density
        (16, 0.0)
        >>> len(found[0].promoted)
        10
    """
    check_contexts(contexts)
    if type(effect_tokens) is not int or effect_tokens < 0:
        raise UsageError(f"effect_tokens is a whole number of at least 0, not {shown(effect_tokens)}")
    options = Options(
        metrics=("reconstruction", "sparsity") if harvest is None else None,
        ablations=(),
        tokenizer=tokenizer,
        exclude_special_tokens=exclude_special_tokens,
        mask_first=mask_first,
        context=context,
        max_tokens=max_tokens,
        batch_size=batch_size,
        seed=seed,
        data=data,
        progress=progress,
        harvest=None if harvest is None else harvest_of(harvest),
    )
    if options.harvest is not None and model is not None and not any_model:
        check_of_model(options.harvest, model)
    subject = Subject.of(featurizer, site)
    chosen = None if features is None else _columns(featurizer, features)
    checked = [] if any_model or site is not None else [featurizer]
    tally, first = Tally(contexts), _First(max(effect_tokens, PROBE))

    def observe(found: Tensor, batch: Batch) -> None:
        tally.add(found, batch)
        first.add(batch)

    given = model if harvest is None else None
    evaluation = measured([subject], given, tokens, options, checked, observe)[0]
    effect, no_effect = None, "" if harvest is None else NO_MODEL
    if effect_tokens and harvest is None:
        common = {name: getattr(options, name) for name in ("mask_first", "context", "batch_size", "seed", "progress")}
        excluded = evaluation.about["excluded_tokens"]
        few = {**common, "exclude_special_tokens": excluded, "max_tokens": effect_tokens, "data": data}
        try:
            effect = evaluate(
                featurizer, model, first.documents(), site=site, metrics=["effect"], any_model=True, **few
            )
        except FeaturizerError as error:  # the rest was measured, and need not be lost
            no_effect = str(error)
    columns = _chosen(tally) if chosen is None else chosen
    found = _Report(subject, model, tally, columns, evaluation, effect, no_effect, tokenizer)
    if model is None:
        return found.made(_tried(subject), lambda _: None)
    with (
        evaluating(featurizers.Anatomy(model).model),
        progress_bar(len(columns), "effects on the logits", shown=progress) as bar,
    ):
        return found.made(_probe(subject, model, first), bar.reach)


class _First:
    """The first tokens of the data, as documents."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._rows: list[tuple[int, list[int]]] = []

    def add(self, batch: Batch) -> None:
        """Keep the rows of a batch until there are enough tokens."""
        for number, ids, is_token in zip(batch.documents, batch.ids, batch.is_token, strict=True):
            if self._left <= 0:
                return
            row = ids[is_token].tolist()
            self._rows.append((number, row))
            self._left -= len(row)

    def documents(self) -> list[list[int]]:
        """Return the documents, as far as they were kept; those of several rows are whole again."""
        found: dict[int, list[int]] = {}
        for number, row in self._rows:
            found.setdefault(number, []).extend(row)
        return list(found.values())

    def row(self) -> list[int]:
        """Return the first row that has tokens."""
        return next(row for _, row in self._rows if row)


def _probe(subject: Subject, model: object, first: _First) -> Tensor | None:
    """Return two activations ``(2, d)`` at the site of a featurizer; None for a map."""
    if isinstance(subject.space, SiteMap):
        return None
    site = subject.reads["site"]
    ids = torch.tensor([first.row()[:PROBE]], device=next(featurizers.Anatomy(model).model.parameters()).device)
    x = featurizers.collect(model, {"input_ids": ids}, [site])[site][0].flatten(1).float()
    return torch.stack([x[0], x[-1] if len(x) > 1 else 1.5 * x[0]])


def _tried(subject: Subject) -> Tensor | None:
    """Return two random activations ``(2, d)`` to try what features write without a model; None for a map."""
    width = None if isinstance(subject.space, SiteMap) else subject.space.d_in
    return None if width is None else torch.randn(2, width, generator=torch.Generator().manual_seed(0))


def _columns(space: FeatureSpace[Any], features: Any) -> Tensor:
    """Return the places of chosen features among all, ascending.

    Raises:
        UsageError: they are no numbers, or none.
    """
    if isinstance(space, SiteMap):
        parts, start = [], 0
        by_group = space.by_group(features)
        for name, group in space.groups.items():
            if name in by_group:
                own = space.select(name, by_group[name], torch.zeros(1)).as_columns()
                parts.append(start + (torch.arange(group.n_features) if own is None else own.cpu()))
            start += group.n_features
        columns = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
    elif isinstance(space, Featurizer):
        device = next((t.device for t in (*space.parameters(), *space.buffers())), torch.device("cpu"))
        width = space.n_features or space.d_in or 0
        own = space.select(features, torch.zeros(1, width, device=device)).as_columns()
        columns = torch.arange(width) if own is None else own.cpu()
    if not len(columns) or len(columns) > MOST_FEATURES:
        raise UsageError(f"a report has 1 to {MOST_FEATURES} features, and {len(columns)} are chosen")
    return columns.sort().values


def _chosen(tally: Tally) -> Tensor:
    """Return all features, or those that are active most often, ascending."""
    count = tally.count.cpu()
    if len(count) <= MOST_FEATURES:
        return torch.arange(len(count))
    return count.sort(descending=True, stable=True).indices[:MOST_FEATURES].sort().values


class _Report:
    """Makes a report of what was tallied."""

    def __init__(
        self,
        subject: Subject,
        model: object,
        tally: Tally,
        columns: Tensor,
        evaluation: Evaluation,
        effect: Evaluation | None,
        no_effect: str,
        tokenizer: Any,
    ) -> None:
        self._subject, self._model, self._tally, self._columns = subject, model, tally, columns
        self._evaluation, self._effect, self._tokenizer = evaluation, effect, tokenizer
        self._no_effect = no_effect
        self._space = subject.space

    def made(self, probe: Tensor | None, reach: Callable[[int], None]) -> Report:
        """Return the report; ``reach`` is called with the number of features whose effects are known."""
        tally, columns = self._tally, self._columns
        tokens = tally.tokens
        mean = tally.total.cpu() / tokens
        variance = tally.squares.cpu() / tokens - mean.square()
        high, low = _some(tally.high(), columns), tally.low()
        directions = directions_of(self._space, probe)
        effects: Effects | str = NO_MODEL
        if self._model is not None:
            effects = logit_effects(directions, self._subject.writes, self._model, columns, reach)
        some_low = None if low is None else _some(low, columns)
        shown = [each.ids for each in (high, some_low) if each is not None]
        shown += [effects.high, effects.low] if isinstance(effects, Effects) else []
        ids = np.unique(np.concatenate([each.numpy().reshape(-1) for each in shown])).tolist()
        groups, numbers, names = self._named()
        neighbours, norms = nearest(directions, columns)
        return Report(
            about=self._about(),
            evaluation=self._evaluation,
            effect=self._effect,
            names=names,
            numbers=numbers,
            groups=groups,
            count=tally.count.cpu()[columns],
            mean=mean[columns],
            std=variance.clamp(min=0).sqrt()[columns],
            least=tally.least.cpu()[columns],
            most=tally.most.cpu()[columns],
            bars=tally.histograms.counts.cpu()[columns],
            centre=tally.histograms.centre.cpu()[columns],
            exponent=tally.histograms.exponent.cpu()[columns],
            high=high,
            low=some_low,
            effects=effects,
            neighbours=neighbours,
            norms=norms,
            note=directions.why if directions.writes else "",
            energies=self._energies(),
            labels=self._labels(groups, numbers),
            texts=token_texts(self._tokenizer, [number for number in ids if number >= 0]),
        )

    def _groups(self) -> dict[str | None, Tensor]:
        """Return the numbers of the features of each group; under None those of a featurizer of one site."""
        numbering = self._space.numbering()
        if None in numbering:
            return {None: torch.tensor(numbering[None].numbers[: len(self._tally.count)])}
        return {name: torch.tensor(own.numbers) for name, own in numbering.items()}

    def _labels(self, groups: Tensor, numbers: Tensor) -> dict[int, tuple[Label, ...]]:
        """Return the labels of each place that has some."""
        labels = self._space.labels
        if labels is None:
            return {}
        known = list(self._groups())
        found = {}
        for place, (group, number) in enumerate(zip(groups.tolist(), numbers.tolist(), strict=True)):
            if own := labels.of(number, known[group]):
                found[place] = own
        return found

    def _named(self) -> tuple[Tensor, Tensor, list[str]]:
        """Return the group, the number within the group, and the name of each feature."""
        known, parts = list(self._groups()), list(self._groups().values())
        sizes = torch.tensor([len(part) for part in parts])
        groups = torch.arange(len(known)).repeat_interleave(sizes)[self._columns]
        numbers = torch.cat(parts)[self._columns]
        several = len(known) > 1
        pairs = zip(groups.tolist(), numbers.tolist(), strict=True)
        return groups, numbers, [f"{known[group]}/{number}" if several else str(number) for group, number in pairs]

    def _energies(self) -> Tensor | None:
        """Return the energies of a causal basis, or of another kind that has one for each feature."""
        found = dict(self._space.named_buffers()).get("energies")
        return None if found is None or found.shape != self._tally.count.shape else found.cpu()[self._columns]

    def _about(self) -> dict[str, Any]:
        space = self._space
        return {
            **self._evaluation.about,
            "no_effect": self._no_effect,
            "effect_tokens": None if self._effect is None else self._effect.about["tokens"],
            "dense": self._tally.is_dense,
            "features": len(self._columns),
            "n_features": len(self._tally.count),
            "d": [*space.read_widths.values()] if isinstance(space, SiteMap) else space.d_in,
            "reads": {name: str(site) for name, site in self._subject.reads.items()},
            "writes": {name: str(site) for name, site in self._subject.writes.items()},
            "groups": [*space.groups] if isinstance(space, SiteMap) else ["features"],
            "config": dict(_settings(space.config.model_dump(mode="json"))),
            "stored": _stored(space.metadata),
            "neuronpedia": _neuronpedia(space.metadata),
        }


def _some(found: tuple[Tensor, Tensor, Tensor], columns: Tensor) -> Contexts:
    return Contexts(*(each[columns] for each in found))


def _settings(config: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a config that are one number or a short text."""
    for name, value in config.items():
        if isinstance(value, Mapping) and not within:
            yield from _settings(value, f"{name}.")
        elif isinstance(value, bool | int | float) or (isinstance(value, str) and value):
            yield one_line(f"{within}{name}", 60), one_line(value, 100) if isinstance(value, str) else value


def _stored(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the metrics that the artefact has: names with values, and what they were measured on."""
    found = metadata.get("evaluation")
    metrics = found.get("metrics") if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(metrics, Mapping):
        return None
    about = found.get("about")
    values = {name: each.get("value") for name, each in metrics.items() if isinstance(each, Mapping)}
    return {
        "metrics": {one_line(name, 60): value for name, value in values.items() if isinstance(value, int | float)},
        "about": {
            name: one_line(str(about[name]), 200)
            for name in ("model", "data", "tokens", "site")
            if isinstance(about, Mapping) and about.get(name) is not None
        },
    }


def _neuronpedia(metadata: Mapping[str, Any]) -> str | None:
    """Return the address of the features on Neuronpedia, if the artefact names them there."""
    cfg = metadata.get("sae_lens")
    own = cfg.get("metadata") if isinstance(cfg, Mapping) else None
    name = own.get("neuronpedia_id") if isinstance(own, Mapping) else None
    return f"{NEURONPEDIA}/{name}" if isinstance(name, str) and NEURONPEDIA_ID.fullmatch(name) else None
