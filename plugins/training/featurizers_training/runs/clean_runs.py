"""`CleanRuns`: clean runs of a frozen model, and runs with edits that compute only what an edit can reach."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import featurizers
import torch
from featurizers import Featurizer, Site
from featurizers.errors import ShapeError, UsageError
from featurizers.models import (
    Anatomy,
    SourcedOperation,
    eager,
    gather,
    given,
    head_of,
    hook,
    intervene,
    last_clean_block,
    scatter,
)
from torch import Tensor, nn

from featurizers_training.pairs import Pairs, check_fit, check_vocabulary
from featurizers_training.records import Pair
from featurizers_training.runs.activations import chunks, distinct, each_token_once, padded, read_activations
from featurizers_training.runs.kept_states import KeptStates

Edit = Callable[[Tensor, Tensor], Tensor]
"""Maps activations of base and source at one site, ``(batch, n_positions, d)``, to the new activations of the base."""


@dataclass(frozen=True)
class SiteEdit:
    """An edit at a site.

    Attributes:
        site: the number of the site among those of the clean runs.
        featurizer: that the edit goes through; its special tokens are left alone.
        edit: the function.
    """

    site: int
    featurizer: Featurizer[Any]
    edit: Edit


@dataclass(frozen=True, eq=False)
class _EditOperation(SourcedOperation):
    """An edit as an operation of `featurizers.intervene`."""

    edit: Edit = field(kw_only=True)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return what the edit makes of base and source."""
        return self.edit(base, given(source))


class CleanRuns:
    """Clean runs of a model on the prompts of pairs, and runs with edits that begin where these end.

    Activations of the sources are collected once. Of each base there are kept the output of the block before the first
    site, at the tokens from the first edited one on, and the keys and values of the tokens before that in all later
    blocks. A run with edits then computes the later blocks for the later tokens alone, and logits for the tokens of the
    answer alone. That is exact, because no edit reaches what is left out. Each distinct prompt is run once.

    Args:
        model: a decoder of `transformers` in evaluation mode.
        pairs: base and source prompts to run it on.
        sites: where edits may be.
        batch_size: prompts in a clean run.
        cache_bytes: how much may be kept; with less memory more is computed again.
        plain: keep only the sources, and run the whole model each time.

    Attributes:
        answers: tokens that the model gives without edits, after the base and the label's tokens before,
            ``(n_pairs, n_label)``.

    Raises:
        UsageError: the model is in training mode, or the pairs do not fit the sites.
        SiteError: the model does not have a site.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Pairs,
        sites: Sequence[Site | str],
        *,
        batch_size: int = 32,
        cache_bytes: int = 2**31,
        plain: bool = False,
    ) -> None:
        if model.training:
            raise UsageError("the model is in training mode, so that its runs differ; call model.eval()")
        self.model, self.pairs = model, pairs
        self.sites = [Site.parse(site) for site in sites]
        self.anatomy = Anatomy(model)
        self.places = [self.anatomy.place(site) for site in self.sites]
        self.device = next(model.parameters()).device
        check_fit(pairs, len(self.sites))
        check_vocabulary(pairs, getattr(model.get_input_embeddings(), "num_embeddings", None))  # type: ignore[operator]
        self._batch_size, self._head = batch_size, head_of(model)
        self._base_tokens = [[pair.base_at(j) for pair in pairs] for j in range(len(self.sites))]
        self._base_positions = [torch.tensor([positions for _, positions in of_site]) for of_site in self._base_tokens]
        self._n_label = _label_lengths(pairs)
        self._label_start = torch.tensor([len(pair.base) - 1 for pair in pairs])
        self._source_tokens = [[pair.source_at(j) for pair in pairs] for j in range(len(self.sites))]
        self._sources = read_activations(model, self.sites, self._source_tokens, batch_size)
        first_edited = torch.stack([positions.amin(dim=-1) for positions in self._base_positions]).amin(dim=0)
        runs, self._run_of = distinct([(pair.run, int(p)) for pair, p in zip(pairs, first_edited, strict=True)])
        starts = sorted({last_clean_block(self.anatomy, site) for site in self.sites})
        self._states = KeptStates(self.anatomy, runs, starts, 0 if plain else cache_bytes)
        self.answers = self._run_bases()
        if self.kept:
            self._verify()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def serves(self, model: nn.Module, pairs: Pairs) -> bool:
        """Return whether these are clean runs of pairs too, whatever their labels say."""
        return model is self.model and same_runs(pairs, self.pairs)

    def with_labels(self, pairs: Pairs) -> CleanRuns:
        """Return the same runs for pairs with other labels, which they serve."""
        relabelled = copy.copy(self)
        relabelled.pairs, relabelled._n_label = pairs, _label_lengths(pairs)
        return relabelled

    @property
    def kept(self) -> tuple[str, ...]:
        """Parts that a run with edits leaves out: ``tokens`` before the first edited one, ``layers``, or nothing."""
        return self._states.kept

    def numbers(self, sites: Sequence[Site]) -> list[int]:
        """Return the numbers of sites: of all, in their order, or of some if the pairs have one position for all sites.

        Raises:
            UsageError: the clean runs are not at these sites, or their positions are ambiguous.
        """
        if list(sites) == self.sites:
            return list(range(len(sites)))
        if missing := [str(site) for site in sites if site not in self.sites]:
            raise UsageError(f"the clean runs are at {', '.join(map(str, self.sites))}, and not at {missing[0]}")
        check_fit(self.pairs, 1)
        return [self.sites.index(site) for site in sites]

    def activations(self, site: int) -> Tensor:
        """Return the activations ``(n, d)`` of sources and bases at a site, each token of a prompt once."""
        sides = (self._source_tokens[site], self._sources[site]), (self._base_tokens[site], self._bases[site])
        return each_token_once((distinct(prompts)[0], tensor) for prompts, (tensor, _) in sides)

    @functools.cached_property
    def _bases(self) -> list[tuple[Tensor, Tensor]]:
        return read_activations(self.model, self.sites, self._base_tokens, self._batch_size)

    def width(self, site: int) -> int:
        """Return the width of the activations at a site."""
        return self._sources[site][0].shape[-1]

    def sources(self, site: int, rows: Sequence[int]) -> Tensor:
        """Return the activations ``(rows, n_positions, d)`` of the sources at a site."""
        tensor, row_of = self._sources[site]
        return tensor[row_of[list(rows)].to(tensor.device)]

    def labels(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the labels ``(rows, n_label)``, padded on the right, and a mask that is true for tokens."""
        return padded([self.pairs[row].label for row in rows], self.device)

    def base_labels(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the answers to the bases without an intervention, in the form of `labels`.

        Raises:
            UsageError: a pair has no ``base_label``.
        """
        labels = [self.pairs[row].base_label for row in rows]
        if any(label is None for label in labels):
            raise UsageError("the objective needs what the model answers without an intervention: a base_label a pair")
        return padded([label or () for label in labels], self.device)

    # ------------------------------------------------------------------ runs with edits

    def logits(self, rows: Sequence[int], edits: Sequence[SiteEdit]) -> Tensor:
        """Return logits ``(rows, n_label, vocabulary)`` after edits, for the tokens of the longest label of these rows.

        The k-th logits predict the label's k-th token, given the base and the label's tokens before it.
        """
        if not self.kept:
            return self.plain_logits(rows, edits)
        rows = list(rows)
        clean = [last_clean_block(self.anatomy, self.sites[each.site]) for each in edits]
        last_clean = min(clean, default=self._states.starts[0])
        resumed = self._states.resumed(self._run_of[rows], last_clean)
        with eager(), resumed as (inputs, prefix), ExitStack() as hooks:
            for each in edits:
                columns = (self._base_positions[each.site][rows] - prefix.unsqueeze(-1)).to(self.device)
                edit = self._hooked(columns, each, rows, inputs["input_ids"])
                hooks.callback(hook(self.places[each.site], edit).remove)
            return self._answer_logits(inputs, self._answer_columns(rows, prefix))

    def plain_logits(self, rows: Sequence[int], edits: Sequence[SiteEdit]) -> Tensor:
        """Return the same as `logits`, by whole runs of the model through `featurizers.intervene`."""
        rows = list(rows)
        ids, mask = padded([self.pairs[row].run for row in rows], self.device)
        operations: dict[Site, list[_EditOperation]] = {}
        for each in edits:
            operation = _EditOperation(
                each.featurizer,
                source=self.sources(each.site, rows),
                positions=self._base_positions[each.site][rows],
                edit=functools.partial(self._edited, each),
            )
            operations.setdefault(self.sites[each.site], []).append(operation)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        with intervene(self.model, operations):
            return self._answer_logits(inputs, self._answer_columns(rows))

    def _hooked(self, columns: Tensor, site_edit: SiteEdit, rows: list[int], ids: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(hidden: Tensor) -> Tensor:
            base = gather(hidden, columns)
            edited = self._edited(site_edit, base, self.sources(site_edit.site, rows))
            if special := site_edit.featurizer.special_tokens:
                alone = torch.isin(ids.gather(1, columns), torch.tensor(special, device=ids.device))
                edited = torch.where(alone.unsqueeze(-1), base, edited)
            return scatter(hidden, columns, edited)

        return edit

    def _edited(self, site_edit: SiteEdit, base: Tensor, source: Tensor) -> Tensor:
        edited = site_edit.edit(base, source)
        if edited.shape != base.shape:
            shapes = f"the edit of {tuple(base.shape)} gives {tuple(edited.shape)}"
            raise ShapeError(f"{self.sites[site_edit.site]}: {shapes}")
        return edited

    def _answer_columns(self, rows: Sequence[int], prefix: Tensor | None = None) -> Tensor:
        """Return the columns of a run that predict the answer, ``(rows, n_label)``; a shorter one repeats its last."""
        n_label = self._n_label[list(rows)].unsqueeze(-1)
        steps = torch.minimum(torch.arange(int(n_label.max())).unsqueeze(0), n_label - 1)
        start = self._label_start[list(rows)]
        return (start if prefix is None else start - prefix).unsqueeze(-1) + steps

    def _answer_logits(self, inputs: dict[str, Any], columns: Tensor) -> Tensor:
        """Run the model and return its logits at some columns alone, ``(batch, n, vocabulary)``."""
        columns = columns.to(self.device)
        if self._head is None:
            return gather(self.model(**inputs).logits, columns)

        def narrow(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (gather(args[0], columns), *args[1:])

        with eager():
            handle = self._head.register_forward_pre_hook(narrow)
            try:
                logits: Tensor = self.model(**inputs).logits
            finally:
                handle.remove()
        return logits

    # ------------------------------------------------------------------ clean runs

    @torch.no_grad()
    def _run_bases(self) -> Tensor:
        """Run each distinct base once, keep states of it, and return the model's own answers."""
        runs = [tokens for tokens, _ in self._states.runs]
        row_of = {int(run): row for row, run in enumerate(self._run_of)}  # any pair of a run: they share its answer
        answers: dict[int, Tensor] = {}
        order = sorted(range(len(runs)), key=lambda i: len(runs[i]))
        for chunk in chunks(order, self._batch_size):
            ids, mask = padded([runs[i] for i in chunk], self.device)
            columns = self._answer_columns([row_of[i] for i in chunk])
            with self._states.recording(chunk) as more:
                logits = self._answer_logits({"input_ids": ids, "attention_mask": mask.long(), **more}, columns)
            answers.update(zip(chunk, logits.argmax(-1).cpu(), strict=True))
        width = int(self._n_label.max())
        rows = [nn.functional.pad(answers[i], (0, width - len(answers[i]))) for i in range(len(answers))]
        return torch.stack(rows)[self._run_of].to(self.device)

    @torch.no_grad()
    def _verify(self) -> None:
        """Compare a run from the kept states with the whole run; if they differ, keep nothing, and warn."""
        order = sorted(range(len(self)), key=lambda row: len(self.pairs[row].run))
        rows = [order[i * (len(order) - 1) // 3] for i in range(4)] if len(order) > 3 else order
        identity = featurizers.create("identity")
        edits = [SiteEdit(j, identity, lambda base, source: (base + source) / 2) for j in range(len(self.sites))]
        try:
            resumed, whole = self.logits(rows, edits).float(), self.plain_logits(rows, edits).float()
            difference = float((resumed - whole).abs().max() / whole.std().clamp_min(1e-12))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            precise = next(self.model.parameters()).dtype in (torch.float32, torch.float64)
            if difference <= (1e-2 if precise else 0.2):
                return
            reason = f"its logits differ by {difference:.2g} of their standard deviation"
        self._states.clear()
        warnings.warn(
            f"a {type(self.model).__name__} cannot be run from the middle ({reason}); it is run whole, which is slower",
            stacklevel=3,
        )


def _label_lengths(pairs: Pairs) -> Tensor:
    return torch.tensor([len(pair.label) for pair in pairs])


def same_runs(pairs: Pairs, others: Pairs) -> bool:
    """Return whether pairs differ at most in the tokens of their labels that no run reads."""
    return [_run_of(pair) for pair in pairs] == [_run_of(pair) for pair in others]


def _run_of(pair: Pair) -> tuple[object, ...]:
    """Return all of a pair but what the tokens of its label are."""
    return pair.run, len(pair.label), pair.sources, pair.base_positions, pair.source_positions
