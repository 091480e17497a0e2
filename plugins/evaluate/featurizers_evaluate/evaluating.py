"""`evaluate`, `sweep` and `compare`: measure featurizers on documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import featurizers
from featurizers import Anatomy, FeatureSpace, Site
from featurizers.cli import progress_bar
from featurizers.errors import UsageError
from featurizers.models import evaluating

from featurizers_evaluate.comparison import Comparison
from featurizers_evaluate.definitions import ABLATIONS
from featurizers_evaluate.documents import Reading, longest_of, vocabulary_of
from featurizers_evaluate.harvests import NO_MODEL, HarvestRuns, check_named, harvest_of
from featurizers_evaluate.measuring import Measured, Observer, Plan, measure
from featurizers_evaluate.of_plugins import fidelity, interchange
from featurizers_evaluate.options import Options
from featurizers_evaluate.processes import Processes
from featurizers_evaluate.result import Evaluation, Metric
from featurizers_evaluate.runs import Runs
from featurizers_evaluate.subjects import Limit, Subject
from featurizers_evaluate.summary import density_of, histogram_of, metrics_of, writes_of


def evaluate(
    featurizer: FeatureSpace[Any],
    model: object = None,
    tokens: Any = None,
    *,
    harvest: Any = None,
    site: Site | str | None = None,
    metrics: Iterable[str] | None = None,
    ablations: Iterable[str] = ABLATIONS,
    pairs: Any = None,
    tokenizer: Any = None,
    exclude_special_tokens: bool | Iterable[int] = False,
    mask_first: int = 0,
    context: int | None = None,
    max_tokens: int | None = None,
    k: int | None = None,
    threshold: float | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    seed: int = 0,
    data: str | None = None,
    group: Any = None,
    any_model: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Measure how well features reconstruct activations, how sparse they are, and what the reconstruction does.

    The data is read once, and before that up to the site if activations are replaced by their mean. Sums are in
    float64, memory does not grow with the number of tokens, and the size of a batch changes numbers by rounding alone.
    Intervals are of a bootstrap that draws documents.

    Args:
        featurizer: of any kind. Of a map between sites the activations at its writes are those to reconstruct; several
            are taken side by side.
        model: a decoder with its head, as in `featurizers.intervene`. It is run in evaluation mode.
        tokens: documents: token ids ``(documents, tokens)``; inputs of a model with ``attention_mask``; or an iterable
            of texts, lists of token ids, or records with ``text`` or ``input_ids``, such as a data set.
        harvest: in the place of model and tokens: what `featurizers_harvest.open` returns, or its folder. Sparsity is
            that of the features in it, if those of this featurizer are; else they are computed from the activations in
            it. Reconstruction needs the activations. What needs the model is named in ``about["not_measured"]``.
        site: place to measure at; None for the featurizer's own.
        metrics: some of ``reconstruction``, ``sparsity`` and ``effect``, None for all three; and ``fidelity`` of causal
            bases, which takes 2 k + 1 more passes and holds all token ids at once.
        ablations: baselines of the effect, some of ``zero`` and ``mean``.
        pairs: counterfactual pairs, `featurizers_training.Pairs`, to measure interchange accuracy too; None for none.
        tokenizer: of the model, for texts and for ``exclude_special_tokens=True``.
        exclude_special_tokens: True leaves out the tokenizer's bos, eos, pad, sep and decoder start, as SAELens does;
            or token ids to leave out. Those of the featurizer are left out in any case. At a token that is left out the
            model keeps its own activation, but for ablations.
        mask_first: number of tokens at the start of each row to leave out too: many models have enormous activations
            at the first token, whatever it is.
        context: tokens of a row; longer documents are cut into several.
        max_tokens: number of tokens to read; None for all.
        k: keep the k largest features of each token alone.
        threshold: keep the features of larger magnitude alone.
        batch_size: rows that run together.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        data: name of the data, for the result and for cards.
        group: process group of torch.distributed whose processes share the data, such as
            ``torch.distributed.group.WORLD``; each runs every n-th batch, and all get the result of all. None for this
            process alone.
        any_model: accept another model than the one that the artefact names, as in `featurizers.attach`.
        progress: whether to show a bar on a terminal.

    Raises:
        UsageError: an argument is invalid, a document does not fit the model, or no token is left; or a metric is asked
            for that the harvest cannot give.
        SiteError, ShapeError: the featurizer does not fit the model.
        OtherRankError: another process of the group failed.
        MissingDependencyError: pairs are given, and featurizers-training is not installed.

    Examples:
        >>> import torch, featurizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).eval()
        >>> f = featurizers.create("identity", d_in=8)
        >>> result = featurizers.evaluate(f, model, torch.arange(20).reshape(2, 10), site="resid.post:0")
        >>> result["fvu"], round(result["ce_recovered_zero_ablation"], 6)
        (0.0, 1.0)
        >>> print(result.metrics["l0"])
        not defined, because no feature of any token was 0: those of the kind 'identity' are dense
    """
    options = Options(
        metrics=metrics,
        ablations=ablations,
        pairs=pairs,
        tokenizer=tokenizer,
        exclude_special_tokens=exclude_special_tokens,
        mask_first=mask_first,
        context=context,
        max_tokens=max_tokens,
        batch_size=batch_size,
        resamples=resamples,
        seed=seed,
        data=data,
        group=group,
        progress=progress,
        harvest=harvest,
    )
    subject = Subject.of(featurizer, site, Limit(k, threshold))
    checked = [] if any_model or site is not None else [featurizer]
    return measured([subject], model, tokens, options, checked)[0]


def sweep(
    featurizer: FeatureSpace[Any],
    model: object = None,
    tokens: Any = None,
    *,
    k: Sequence[int] = (),
    threshold: Sequence[float] = (),
    site: Site | str | None = None,
    **options: Any,
) -> Comparison:
    """Measure a featurizer with the k largest features of each token, for several k, or with features above thresholds.

    All are measured in one reading of the data, so that the model itself and its ablations run once.

    Args:
        featurizer: as in `evaluate`.
        model: as in `evaluate`.
        tokens: as in `evaluate`.
        k: numbers of features.
        threshold: magnitudes; give either these or ``k``.
        site: as in `evaluate`.
        options: other arguments of `evaluate`.

    Raises:
        UsageError: neither or both are given; else as `evaluate`.
    """
    if bool(k) == bool(threshold):
        raise UsageError("a sweep is over numbers of features, k=[1, 2, 4], or over thresholds=[0.1, 1.0]")
    limits = [Limit(k=each) for each in k] or [Limit(threshold=float(each)) for each in threshold]
    subjects = [Subject.of(featurizer, site, limit) for limit in limits]
    checked = [] if options.pop("any_model", False) or site is not None else [featurizer]
    found = measured(subjects, model, tokens, Options.of(options), checked)
    return Comparison(tuple(str(limit) for limit in limits), tuple(found))


def compare(
    several: Mapping[str, FeatureSpace[Any]] | Sequence[FeatureSpace[Any]],
    model: object = None,
    tokens: Any = None,
    **options: Any,
) -> Comparison:
    """Measure several featurizers on the same data, in one reading of it.

    Args:
        several: by label, or in a list, where the labels are their ids.
        model: as in `evaluate`.
        tokens: as in `evaluate`.
        options: other arguments of `evaluate` but ``site``.

    Raises:
        UsageError: there is none, or two have one label; else as `evaluate`.
    """
    labelled = dict(several) if isinstance(several, Mapping) else {each.id: each for each in several}
    if not labelled or len(labelled) != len(several):
        raise UsageError("give several featurizers with different ids, or a mapping from labels to featurizers")
    limit = Limit(options.pop("k", None), options.pop("threshold", None))
    subjects = [Subject.of(each, None, limit) for each in labelled.values()]
    checked = [] if options.pop("any_model", False) else list(labelled.values())
    found = measured(subjects, model, tokens, Options.of(options), checked)
    return Comparison(tuple(labelled), tuple(found))


def measured(
    subjects: Sequence[Subject],
    model: object,
    tokens: Any,
    options: Options,
    checked: Sequence[FeatureSpace[Any]],
    observe: Observer | None = None,
) -> list[Evaluation]:
    """Measure subjects on the same data; those to check are compared with the model first; see `measure`."""
    if options.harvest is not None:
        return _of_harvest(subjects, model, tokens, options, checked, observe)
    if model is None or tokens is None:
        raise UsageError("give a model and documents, or harvest=…")
    if checked:
        featurizers.attach(model, checked)
    own = (token for subject in subjects for token in subject.space.special_tokens)
    excluded = tuple(sorted({*options.special_tokens(), *own}))
    sites = list(dict.fromkeys(site for subject in subjects for site in subject.sites))
    anatomy = Anatomy(model)
    reading = Reading(
        tokenizer=options.tokenizer,
        context=options.context,
        max_tokens=options.max_tokens,
        vocabulary=vocabulary_of(anatomy.backend.model),
        most=longest_of(anatomy.backend.model),
        excluded=excluded,
        mask_first=options.mask_first,
    )
    processes = Processes(options.group)
    with evaluating(anatomy.model), _bar(options, shown=processes.rank == 0) as reach:
        plan = _plan(options, reach, processes)
        found = measure(Runs(model, sites), subjects, tokens, reading, plan, observe)
        others: list[dict[str, Metric]] = [{} for _ in subjects]
        for number, subject in enumerate(subjects):
            if options.pairs is not None:
                others[number] |= interchange(model, options.pairs, subject)
            if "fidelity" in plan.groups:
                others[number] |= fidelity(anatomy.model, tokens, reading, plan, subject)
    config, parameter = getattr(anatomy.backend.model, "config", None), next(anatomy.model.parameters(), None)
    about = {
        "model": getattr(config, "_name_or_path", None) or type(anatomy.model).__name__,
        "model_revision": getattr(config, "_commit_hash", None),
        "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "context": options.context,
    }
    return [
        _evaluation(each, plan, metrics, _about(each, about, options, excluded))
        for each, metrics in zip(found, others, strict=True)
    ]


def _of_harvest(
    subjects: Sequence[Subject],
    model: object,
    tokens: Any,
    options: Options,
    checked: Sequence[FeatureSpace[Any]],
    observe: Observer | None,
) -> list[Evaluation]:
    """Measure subjects on a harvest.

    Raises:
        UsageError: an option is for a run of the model, or the harvest lacks something; see `HarvestRuns`.
    """
    if model is not None or tokens is not None:
        raise UsageError("give a model and documents, or a harvest, which has documents of its own, but not both")
    harvest = harvest_of(options.harvest)
    if options.group is not None:
        raise UsageError("a harvest is read by one process: leave out group=")
    if options.pairs is not None:
        raise UsageError(f"pairs cannot be measured on a harvest: {NO_MODEL}")
    if options.context not in (None, harvest.context):
        raise UsageError(f"the rows of the harvest have context={harvest.context}, not {options.context}: leave it out")
    runs = HarvestRuns(harvest, subjects)
    for subject in subjects:
        for name, why in runs.why_not(subject).items():
            if name in options.asked:
                raise UsageError(f"the metrics {name!r} of {subject.space.id!r} cannot be measured on a harvest: {why}")
    for space in checked:
        check_named(space, harvest)
    own = (token for subject in subjects for token in subject.space.special_tokens)
    excluded = tuple(sorted({*options.special_tokens(), *harvest.excluded_tokens, *own}))
    reading = Reading(
        context=harvest.context, max_tokens=options.max_tokens, excluded=excluded, mask_first=options.mask_first
    )
    with _bar(options, shown=True) as reach:
        plan = _plan(options, reach, Processes())
        found = measure(runs, subjects, None, reading, plan, observe)
    about = {**harvest.about, "context": harvest.context}
    return [_evaluation(each, plan, {}, _about(each, about, options, excluded)) for each in found]


def _plan(options: Options, reach: Callable[[int], None], processes: Processes) -> Plan:
    return Plan(
        tuple(options.metrics or ()),
        tuple(options.ablations),
        options.batch_size,
        options.resamples,
        options.seed,
        reach,
        processes,
    )


def _evaluation(each: Measured, plan: Plan, others: dict[str, Metric], about: dict[str, Any]) -> Evaluation:
    metrics = metrics_of(each, plan) | others
    density = density_of(each)
    histogram = None if density is None else histogram_of(density)
    return Evaluation(metrics, about, histogram, density, writes_of(each, plan))


def _about(each: Measured, about: Mapping[str, Any], options: Options, excluded: Sequence[int]) -> dict[str, Any]:
    """Return what was measured on what, as JSON data.

    Args:
        each: what was measured.
        about: what is known of the model and of the rows.
        options: of the measurement.
        excluded: token ids that were not measured.
    """
    space = each.subject.space
    writes = [str(site) for site in each.subject.writes.values()]
    return {
        "featurizer": space.id,
        "kind": space.kind,
        "revision": space.revision,
        "n_features": space.n_features,
        "site": ", ".join(writes if len(writes) < 4 else [writes[0], "…", writes[-1]]),
        "limit": str(each.subject.limit) or None,
        **about,
        "data": options.data,
        "tokens": int(each.sums["tokens"][0]),
        "tokens_read": each.tokens,
        "documents": each.documents,
        "excluded_tokens": list(excluded),
        "mask_first": options.mask_first,
        "resamples": options.resamples,
        "seed": options.seed,
        "interval": "95 %, percentiles of a Poisson bootstrap of documents",
        "versions": {name: version(name) for name in ("featurizers", "featurizers-evaluate", "torch")},
        **({"not_measured": each.missing} if each.missing else {}),
    }


@contextmanager
def _bar(options: Options, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show the number of tokens read while the context lasts; yield a function that sets it."""
    with progress_bar(options.max_tokens, "evaluating", shown=options.progress and shown) as bar:
        yield bar.reach
