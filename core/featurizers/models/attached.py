"""`attach`: binds featurizers to the sites of a model at which they were found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, TypeAlias

from torch import Tensor, nn

from featurizers.errors import ShapeError, UsageError
from featurizers.features.featurizer import Featurizer
from featurizers.features.indices import select
from featurizers.format.sites import Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.backend import collect, intervene
from featurizers.models.calling import as_named
from featurizers.models.operations import Interchange, Mask, Operation
from featurizers.models.positions import Inputs, Positions

SELECTED: Final = "selected"
"""Feature set of the features that a search found: their indices, or a gate between 0 and 1 for each feature."""
GATE_LOGITS: Final = "gate_logits"
"""Feature set of the logits of a search's gate, ``(n_features,)``, from which a search may go on."""

Source: TypeAlias = "Inputs | Sequence[Inputs]"


class Attached:
    """Featurizers at their sites of one model; what `attach` returns.

    Each featurizer acts on the features of its feature set ``selected`` (on all without such a set), at the tokens of
    its ``site.position`` (at all if that is None).
    """

    def __init__(self, model: nn.Module, featurizers: Sequence[Featurizer[Any]]) -> None:
        self.model = model
        self.featurizers = tuple(featurizers)

    def __repr__(self) -> str:
        """Name the model's class and the sites."""
        sites = ", ".join(str(featurizer.site) for featurizer in self.featurizers)
        return f"{type(self).__name__}({type(self.model).__name__}, {sites})"

    def interchange(
        self, source: Source, *, positions: Positions = None, source_positions: Positions = None
    ) -> AbstractContextManager[dict[Site, Tensor]]:
        """Return a context in which the model runs with the selected features of a source.

        Args:
            source: inputs of the model, or a sequence of inputs with an item for each featurizer.
            positions: tokens of the base; None for those of each site.
            source_positions: tokens of the source; None for ``positions``.

        Raises:
            UsageError: there is neither a single source nor a source for each featurizer.
            SiteError, PositionError, ShapeError: as in `featurizers.intervene`.
        """
        sources = [source] * len(self.featurizers) if isinstance(source, Mapping) else list(source)
        if len(sources) != len(self.featurizers):
            raise UsageError(f"give one source, or one for each of the {len(self.featurizers)} sites")
        operations: dict[Site, list[Operation]] = {}
        for featurizer, own in zip(self.featurizers, sources, strict=True):
            of_site = _positions(featurizer) if positions is None else positions
            operation = interchange(featurizer, own, positions=of_site, source_positions=source_positions)
            operations.setdefault(site_of(featurizer), []).append(operation)
        return intervene(self.model, operations)

    def __call__(
        self, base: Inputs, source: Source, *, positions: Positions = None, source_positions: Positions = None
    ) -> Any:
        """Run the model on the base with the selected features of the source; arguments as in `interchange`."""
        with self.interchange(source, positions=positions, source_positions=source_positions):
            return self.model(**as_named(self.model, base))

    def collect(self, inputs: Inputs, *, positions: Positions = None) -> list[Tensor]:
        """Return the selected features of inputs, ``(batch, n_positions, k)`` for each featurizer."""
        collected = []
        for featurizer in self.featurizers:
            site, of_site = site_of(featurizer), _positions(featurizer) if positions is None else positions
            features = collect(self.model, inputs, {site: featurizer}, positions=of_site)[site]
            chosen = selected(featurizer)
            by_index = chosen is not None and not chosen.is_floating_point()
            collected.append(features[..., chosen] if by_index else features)
        return collected


def attach(
    model: nn.Module, featurizers: Featurizer[Any] | Iterable[Featurizer[Any]], *, any_model: bool = False
) -> Attached:
    """Bind featurizers to the sites of a model that their artefacts name, ready for interventions.

    Args:
        model: a decoder, as in `featurizers.intervene`.
        featurizers: a featurizer or several, each with a ``site``.
        any_model: accept another model than the one that an artefact names.

    Raises:
        UsageError: a featurizer has no site, or was found in another model of the Hub.
        SiteError: the model does not have a site.
        ShapeError, FeatureIndexError: the featurizer does not have the selected features.

    Example:
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
    attached = [featurizers] if isinstance(featurizers, Featurizer) else list(featurizers)
    if not attached:
        raise UsageError("there is no featurizer to attach")
    anatomy = Anatomy(model)
    for featurizer in attached:
        anatomy.place(site_of(featurizer))
        selected(featurizer)
        if not any_model:
            _check_model(model, featurizer)
    return Attached(model, attached)


def interchange(
    featurizer: Featurizer[Any],
    source: Tensor | Inputs,
    *,
    positions: Positions = None,
    source_positions: Positions = None,
) -> Operation:
    """Return the operation that interchanges the features which a featurizer's artefact selects.

    Args:
        featurizer: with or without a feature set ``selected``.
        source: as in `Interchange`.
        positions: as in `Interchange`.
        source_positions: as in `Interchange`.

    Returns:
        A `Mask` if the artefact holds a gate, else an `Interchange`.

    Raises:
        ShapeError, FeatureIndexError: the featurizer does not have the selected features.
    """
    chosen = selected(featurizer)
    if chosen is not None and chosen.is_floating_point():
        return Mask(featurizer, source=source, gate=chosen, positions=positions, source_positions=source_positions)
    return Interchange(
        featurizer, source=source, indices=chosen, positions=positions, source_positions=source_positions
    )


def selected(featurizer: Featurizer[Any]) -> Tensor | None:
    """Return the features that a search found: int64 indices or a floating-point gate; None for all features.

    Raises:
        ShapeError: a gate has another number of features.
        FeatureIndexError: an index is out of range or repeated.
    """
    chosen = featurizer.feature_sets.get(SELECTED)
    if chosen is None or featurizer.n_features is None:
        return chosen
    if chosen.is_floating_point():
        if chosen.shape != (featurizer.n_features,):
            raise ShapeError(
                f"{featurizer.id!r}: the gate {SELECTED!r} has shape {tuple(chosen.shape)}, but there are "
                f"{featurizer.n_features} features"
            )
        return chosen
    return select(chosen, featurizer.n_features, chosen.device).as_columns()


def site_of(featurizer: Featurizer[Any]) -> Site:
    """Return the site of a featurizer.

    Raises:
        UsageError: the featurizer has none.
    """
    if featurizer.site is None:
        raise UsageError(
            f"{featurizer.id!r} does not say where it belongs; set its site: f.site = featurizers.Site('resid.post', 8)"
        )
    return featurizer.site


def _positions(featurizer: Featurizer[Any]) -> Positions:
    position = site_of(featurizer).position
    return None if position is None else list(position)


def _check_model(model: nn.Module, featurizer: Featurizer[Any]) -> None:
    """Raise UsageError if both models are named by Hub ids and the ids differ."""
    loaded_from = getattr(getattr(model, "config", None), "_name_or_path", None)
    found_in = site_of(featurizer).model
    if found_in and loaded_from and found_in != loaded_from and all(n.count("/") == 1 for n in (found_in, loaded_from)):
        if Path(loaded_from).exists():  # a folder
            return
        raise UsageError(
            f"{featurizer.id!r} was found in the model {found_in!r}, and this one is {loaded_from!r}; "
            "attach it with any_model=True if that is what you want"
        )
