"""`attach`: binds featurizers to the sites of a model at which they were found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from featurizers.errors import ShapeError, UsageError, shown
from featurizers.features.feature_space import FeatureSpace
from featurizers.features.featurizer import Featurizer
from featurizers.features.indices import columns_of, select
from featurizers.features.site_map import SiteMap
from featurizers.models.anatomy import Anatomy
from featurizers.models.backend import collect, intervene
from featurizers.models.operations import Collect, Interchange, Mask, Operation, Writes
from featurizers.models.passport import KEY, check_passport, dtype_of
from featurizers.models.positions import Inputs, Positions
from featurizers.models.prepared import site_of
from featurizers.models.site_maps import places_of
from featurizers.models.widths import width_of

SELECTED: Final = "selected"
"""Feature set of the features that a search found: their indices, or a gate between 0 and 1 for each feature."""
GATE_LOGITS: Final = "gate_logits"
"""Feature set of the logits of a search's gate, ``(n_features,)``, from which a search may go on."""

Source: TypeAlias = "Inputs | Sequence[Inputs]"


class Attached:
    """Featurizers at their sites of one model; what `attach` returns.

    Each featurizer acts on the features of its feature set ``selected`` (on all without such a set), at the tokens of
    its ``site.position`` (at all if that is None). Edits that an artefact holds say these things themselves.
    """

    def __init__(self, model: object, featurizers: Sequence[FeatureSpace[Any]]) -> None:
        self.model = model
        self.featurizers: tuple[FeatureSpace[Any], ...] = tuple(featurizers)

    def __repr__(self) -> str:
        """Name the model's class and the sites."""
        sites = ", ".join(str(featurizer.sites_text) for featurizer in self.featurizers)
        return f"{type(self).__name__}({type(self.model).__name__}, {sites})"

    def interchange(
        self,
        source: Source,
        *,
        positions: Positions = None,
        source_positions: Positions = None,
        later: Literal["recomputed", "frozen"] = "recomputed",
        writes: Writes | None = None,
    ) -> AbstractContextManager[dict[Any, Any]]:
        """Return a context in which the model runs with the selected features of a source.

        Args:
            source: inputs of the model, or a sequence of inputs with an item for each featurizer.
            positions: tokens of the base; None for those of each site.
            source_positions: tokens of the source; None for ``positions``.
            later: for maps between sites; see `Operation`.
            writes: for maps that write several sites; see `Operation`.

        Raises:
            UsageError: there is neither a single source nor a source for each featurizer.
            SiteError, PositionError, ShapeError: as in `featurizers.intervene`.
        """
        sources = [source] * len(self.featurizers) if isinstance(source, Mapping) else list(source)
        if len(sources) != len(self.featurizers):
            raise UsageError(f"give one source, or one for each of the {len(self.featurizers)} sites")
        operations: list[Operation] = []
        for featurizer, own in zip(self.featurizers, sources, strict=True):
            of_site = _positions(featurizer) if positions is None else positions
            through_map = isinstance(featurizer, SiteMap)
            operations.append(
                interchange(
                    featurizer,
                    own,
                    positions=of_site,
                    source_positions=source_positions,
                    later=later if through_map else "recomputed",
                    writes=writes if through_map else None,
                )
            )
        return intervene(self.model, operations)

    def edited(self) -> AbstractContextManager[dict[Any, Any]]:
        """Return a context in which the model runs with the edits that the artefacts hold.

        Raises:
            UsageError: they hold none.
            SiteError, PositionError, ShapeError: as in `featurizers.intervene`.
        """
        edits = [edit for featurizer in self.featurizers for edit in featurizer.edits]
        if not edits:
            raise UsageError("there are no edits in the artefact; give a source to take features from")
        return intervene(self.model, edits)

    def __call__(
        self,
        base: Inputs,
        source: Source | None = None,
        *,
        positions: Positions = None,
        source_positions: Positions = None,
    ) -> Any:
        """Run the model on the base, with the edits that the artefacts hold or with selected features of a source.

        Args:
            base: inputs of the model.
            source: as in `interchange`; None for the edits of the artefacts.
            positions: as in `interchange`.
            source_positions: as in `interchange`.

        Raises:
            UsageError: there is neither a source nor an edit, or there are both.
        """
        if source is not None and any(featurizer.edits for featurizer in self.featurizers):
            raise UsageError(
                "the artefact says which edits to make: call it without a source; "
                "for the features of a source, use its interchange(source)"
            )
        if source is None and (positions is not None or source_positions is not None):
            raise UsageError("positions go with a source; the edits of an artefact have their own")
        with (
            self.edited()
            if source is None
            else self.interchange(source, positions=positions, source_positions=source_positions)
        ):
            return _run(self.model, base)

    def collect(self, inputs: Inputs, *, positions: Positions = None) -> list[Any]:
        """Return the selected features of inputs, ``(batch, n_positions, k)`` for each featurizer.

        Those of a map with several groups are a mapping by group.
        """
        collected: list[Any] = []
        for featurizer in self.featurizers:
            of_site = _positions(featurizer) if positions is None else positions
            chosen = selected(featurizer)
            if not isinstance(featurizer, Featurizer):
                collected.append(_collected_of_map(self.model, inputs, featurizer, chosen, of_site))
                continue
            site = site_of(featurizer)
            features = collect(self.model, inputs, {site: featurizer}, positions=of_site)[site]
            by_index = chosen is not None and not chosen.is_floating_point()
            collected.append(features[..., chosen] if by_index else features)
        return collected


def attach(
    model: object, featurizers: FeatureSpace[Any] | Iterable[FeatureSpace[Any]], *, any_model: bool = False
) -> Attached:
    """Bind featurizers to the sites of a model that their artefacts name, ready for interventions.

    Args:
        model: a decoder, as in `featurizers.intervene`.
        featurizers: a featurizer or several, each with a ``site``, or with ``reads`` and ``writes``.
        any_model: accept another model than the one that an artefact names, or whose activations are those of its
            passport (`featurizers.save` with ``model``); else a featurizer with a passport costs a pass of six tokens.

    Raises:
        UsageError: a featurizer has no site, or was found in another model of the Hub, or in other activations.
        SiteError: the model does not have a site.
        ShapeError, FeatureIndexError: the featurizer does not have the selected features.

    Examples:
        >>> import torch, featurizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20)).eval()
        >>> f = featurizers.create("subspace", d_in=8, n_features=3)
        >>> f.site = featurizers.Site("resid.post", 0).at(position=(-1,))
        >>> f.feature_sets["selected"] = torch.tensor([0, 2])
        >>> base, source = ({"input_ids": torch.tensor([ids])} for ids in ([1, 2, 3], [4, 5]))
        >>> featurizers.attach(model, f)(base, source).logits.shape
        torch.Size([1, 3, 20])
    """
    attached = [featurizers] if isinstance(featurizers, FeatureSpace) else list(featurizers)
    if not attached:
        raise UsageError("there is no featurizer to attach")
    anatomy = Anatomy(model)
    for featurizer in attached:
        if isinstance(featurizer, SiteMap):
            places_of(anatomy, featurizer)
            _check_widths(anatomy, featurizer)
        elif isinstance(featurizer, Featurizer):
            anatomy.place(site_of(featurizer))
        selected(featurizer)
        if not any_model:
            _check_model(anatomy, featurizer)
            check_passport(model, featurizer)
    return Attached(model, attached)


def fit_in_words(model: object, featurizer: FeatureSpace[Any]) -> str:
    """Attach a featurizer to a model, and say whether its activations were compared.

    Raises:
        FeaturizerError: as `attach`.
    """
    attach(model, featurizer)
    record = featurizer.metadata.get(KEY)
    if record is None:
        return "its sites are in the model; it has no passport, so that activations were not compared"
    stored, given = shown(record["dtype"]), shown(dtype_of(Anatomy(model).backend.model))
    return f"its passport fits the model{'' if stored == given else f', which is {given} and was {stored}'}"


def interchange(
    featurizer: FeatureSpace[Any],
    source: Tensor | Inputs,
    *,
    positions: Positions = None,
    source_positions: Positions = None,
    later: Literal["recomputed", "frozen"] = "recomputed",
    writes: Writes | None = None,
) -> Operation:
    """Return the operation that interchanges the features which a featurizer's artefact selects.

    Args:
        featurizer: with or without a feature set ``selected``.
        source: as in `Interchange`.
        positions: as in `Interchange`.
        source_positions: as in `Interchange`.
        later: as in `Interchange`.
        writes: as in `Interchange`.

    Returns:
        A `Mask` if the artefact holds a gate, else an `Interchange`.

    Raises:
        ShapeError, FeatureIndexError: the featurizer does not have the selected features.
    """
    if not isinstance(featurizer, Featurizer | SiteMap):
        raise UsageError(f"interchange takes a Featurizer or a SiteMap, not {type(featurizer).__name__}")
    chosen = selected(featurizer)
    options: dict[str, Any] = {
        "source": source,
        "positions": positions,
        "source_positions": source_positions,
        "later": later,
        "writes": writes,
    }
    if chosen is not None and chosen.is_floating_point():
        return Mask(featurizer, gate=chosen, **options)
    return Interchange(featurizer, indices=chosen, **options)


def selected(featurizer: FeatureSpace[Any]) -> Tensor | None:
    """Return the features that a search found: int64 indices or a floating-point gate; None for all features.

    The indices are those that operations take: of a slice, the numbers in the whole.

    Raises:
        ShapeError: a gate has another number of features.
        FeatureIndexError: an index is out of range or repeated.
        UsageError: the featurizer is a map with several groups.
    """
    chosen = featurizer.feature_sets.get(SELECTED)
    if chosen is None or featurizer.n_features is None:
        return chosen
    if isinstance(featurizer, SiteMap) and len(featurizer.groups) > 1:
        raise UsageError(
            f"{featurizer.id!r} has several groups, so that the feature set {SELECTED!r} names none of them"
        )
    if chosen.is_floating_point():
        if chosen.shape != (featurizer.n_features,):
            raise ShapeError(
                f"{featurizer.id!r}: the gate {SELECTED!r} has shape {tuple(chosen.shape)}, but there are "
                f"{featurizer.n_features} features"
            )
        return chosen
    (own,) = featurizer.numbering().values()
    if own.whole == featurizer.n_features:
        return select(chosen, featurizer.n_features, chosen.device).as_columns()
    numbers = torch.tensor(own.numbers, device=chosen.device)  # of a slice, which operations take by these
    if chosen.dtype == torch.bool and chosen.shape == (own.whole,):
        chosen = chosen.nonzero().flatten()  # so that a feature which was not loaded is noticed
    columns = select(columns_of(chosen, numbers, own.whole), len(numbers), chosen.device).as_columns()
    return None if columns is None else numbers[columns]


def _positions(featurizer: FeatureSpace[Any]) -> Positions:
    position = next((site.position for site in featurizer.sites.values()), None)
    return None if position is None else list(position)


def _collected_of_map(
    model: object, inputs: Inputs, site_map: FeatureSpace[Any], chosen: Tensor | None, positions: Positions
) -> Any:
    """Return the features of a map."""
    operation = Collect(site_map, indices=chosen, positions=positions)  # type: ignore[arg-type]  # checked there
    with torch.no_grad(), intervene(model, [operation]) as collected:
        _run(model, inputs)
    return collected[operation]


def _run(model: object, inputs: Inputs) -> Any:
    """Call a model with inputs by their names in `transformers`."""
    anatomy = Anatomy(model)
    return anatomy.model(**anatomy.arguments(inputs))


def _check_widths(anatomy: Anatomy, site_map: SiteMap[Any]) -> None:
    """Raise ShapeError if a site of a map is known to have another width in the model."""
    for sites, widths in ((site_map.reads, site_map.read_widths), (site_map.writes, site_map.write_widths)):
        for name, site in sites.items():
            width = width_of(anatomy, site)
            if width is not None and width != widths[name]:
                raise ShapeError(
                    f"{site_map.id!r} has width {widths[name]} at {site}, where {type(anatomy.model).__name__} has "
                    f"{width}"
                )


def _check_model(anatomy: Anatomy, featurizer: FeatureSpace[Any]) -> None:
    """Raise UsageError if the sites name several models, or another model of the Hub than the one given."""
    named = {site.model for site in featurizer.sites.values() if site.model is not None}
    if len(named) > 1:
        raise UsageError(f"{featurizer.id!r} has sites in several models: {', '.join(sorted(map(shown, named)))}")
    loaded_from = getattr(getattr(anatomy.backend.model, "config", None), "_name_or_path", None)
    found_in = next(iter(named), None)
    if found_in and loaded_from and found_in != loaded_from and all(n.count("/") == 1 for n in (found_in, loaded_from)):
        if Path(loaded_from).exists():  # a folder
            return
        raise UsageError(
            f"{featurizer.id!r} was found in the model {found_in!r}, and this one is {loaded_from!r}; "
            "attach it with any_model=True if that is what you want"
        )
