"""What a frozen model computes without interventions, kept, so that a run with one begins where the first edit is."""

from __future__ import annotations

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
from featurizers.models import Anatomy, SourcedOperation, first_tensor, gather, given, hook, intervene, scatter
from torch import Tensor, nn

from featurizers_training.pairs import Pair, Pairs, Tokens
from featurizers_training.reading import chunks, distinct, read_activations
from featurizers_training.restarting import (
    Wrap,
    cache_argument,
    empty_cache,
    head_of,
    is_keys,
    last_clean_block,
    padded,
    restarted,
    takes,
    takes_cache,
    wrap_like,
)

Edit = Callable[[Tensor, Tensor], Tensor]
"""From activations of base and source at one site, ``(batch, n_positions, d)``, to those that the base shall have."""


@dataclass(frozen=True)
class Work:
    """An edit at a site, by the number of the site, and the featurizer that it goes through."""

    site: int
    featurizer: Featurizer[Any]
    edit: Edit


@dataclass(frozen=True, eq=False)
class _Edited(SourcedOperation):
    """An edit as an operation of `featurizers.intervene`."""

    edit: Edit = field(kw_only=True)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Whatever the edit makes of base and source."""
        return self.edit(base, given(source))


class CleanRuns:
    """The clean runs of a model on the prompts of pairs, and runs with edits that begin where these end.

    Activations of the sources are collected once. Of each base there are kept what the block before the first site
    gave for the tokens from the first edited one on, and the keys and values of the tokens before that in all later
    blocks. A run with edits then computes the later blocks for the later tokens alone, and logits of the answer's
    tokens alone, which is exact: what is left out is what no edit reaches. Each distinct prompt is run once.

    Args:
        model: a decoder of `transformers` in evaluation mode.
        pairs: what to run it on.
        sites: where edits may be.
        batch_size: prompts a clean run.
        cache_bytes: how much may be kept; beyond that less is kept and more computed again.
        plain: keep nothing but the sources, and run the whole model each time.

    Attributes:
        answers: what the model answers without edits, ``(n_pairs, n_label)`` tokens, given the label's tokens so far.
        kept: what a run with edits leaves out: ``tokens`` before the first edited one, ``layers``, or nothing.

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
        self._batch_size = batch_size
        self._base_tokens = [[pair.base_at(j) for pair in pairs] for j in range(len(self.sites))]
        self._base_positions = [torch.tensor([positions for _, positions in of_site]) for of_site in self._base_tokens]
        self._n_label = torch.tensor([len(pair.label) for pair in pairs])
        self._label_start = torch.tensor([len(pair.base) - 1 for pair in pairs])
        self._head = head_of(model)
        self._source_tokens = [[pair.source_at(j) for pair in pairs] for j in range(len(self.sites))]
        self._sources = read_activations(model, self.sites, self._source_tokens, batch_size)
        self._first = torch.stack([p.amin(dim=-1) for p in self._base_positions]).amin(dim=0)
        self._runs, self._run_of = distinct([(pair.run, int(p)) for pair, p in zip(pairs, self._first, strict=True)])
        self._starts = sorted({last_clean_block(self.anatomy, site) for site in self.sites})
        self._hidden: dict[int, Tensor] = {}
        self._wraps: dict[int, Wrap] = {}
        self._keys: dict[int, tuple[Tensor, Tensor]] = {}
        self.kept: tuple[str, ...] = ()
        self.answers = self._run_bases(0 if plain else cache_bytes)
        if self.kept:
            self._verify()

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def numbers(self, sites: Sequence[Site]) -> list[int]:
        """The numbers of some sites, all of these or, where the pairs say one position for all sites, some.

        Raises:
            UsageError: they are not among these, or which position is theirs is not clear.
        """
        if list(sites) == self.sites:
            return list(range(len(sites)))
        if missing := [str(site) for site in sites if site not in self.sites]:
            raise UsageError(f"the clean runs are at {', '.join(map(str, self.sites))}, and not at {missing[0]}")
        check_fit(self.pairs, 1)
        return [self.sites.index(site) for site in sites]

    def activations(self, site: int) -> Tensor:
        """Activations ``(n, d)`` of sources and bases at a site, by its number, each token of a prompt once."""
        found: dict[tuple[Tokens, int], Tensor] = {}
        read = (self._source_tokens[site], self._sources[site]), (self._base_tokens[site], self._bases[site])
        for wanted, (tensor, _) in read:
            for (prompt, positions), rows in zip(distinct(wanted)[0], tensor, strict=True):
                for position, row in zip(positions, rows, strict=True):
                    found.setdefault((prompt, position), row)
        return torch.stack(list(found.values()))

    def width(self, site: int) -> int:
        """Width of the activations at a site, by its number."""
        return self._sources[site][0].shape[-1]

    def sources(self, site: int, rows: Sequence[int]) -> Tensor:
        """Activations ``(rows, n_positions, d)`` of the sources at a site, by its number."""
        tensor, row_of = self._sources[site]
        return tensor[row_of[list(rows)].to(tensor.device)]

    def labels(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The labels ``(rows, n_label)`` and which of them are there, for labels of different lengths."""
        return padded([self.pairs[row].label for row in rows], self.device)

    def base_labels(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the base is answered with, likewise.

        Raises:
            UsageError: a pair does not say.
        """
        labels = [self.pairs[row].base_label for row in rows]
        if any(label is None for label in labels):
            raise UsageError("the objective needs what the model answers without an intervention: a base_label a pair")
        return padded([label or () for label in labels], self.device)

    def logits(self, rows: Sequence[int], work: Sequence[Work]) -> Tensor:
        """Logits ``(rows, n_label, vocabulary)`` of the tokens of the answer after edits; n_label is the largest.

        The k-th is of the label's k-th token, given the base and the label's tokens before it.
        """
        if not self.kept:
            return self.plain_logits(rows, work)
        rows = list(rows)
        start = min(last_clean_block(self.anatomy, self.sites[one.site]) for one in work) if work else self._starts[0]
        start = max(known for known in self._starts if known <= start)
        run_rows = self._run_of[rows]
        inputs, prefix = self._inputs(run_rows, start)
        with ExitStack() as hooks:
            if start >= 0:
                blocks: Any = self.anatomy.layers
                length = inputs["input_ids"].shape[1]
                hidden = self._hidden[start][run_rows][:, :length]
                hooks.enter_context(restarted(blocks, start, hidden, self._wraps[start]))
            for one in work:
                columns = (self._base_positions[one.site][rows] - prefix.unsqueeze(-1)).to(self.device)
                edit = self._at(columns, one, rows, inputs["input_ids"])
                hooks.callback(hook(self.places[one.site], edit).remove)
            return self._answer_logits(inputs, self._answer_columns(rows, prefix))

    def plain_logits(self, rows: Sequence[int], work: Sequence[Work]) -> Tensor:
        """As `logits`, by whole runs of the model through `featurizers.intervene`."""
        rows = list(rows)
        ids, mask = padded([self.pairs[row].run for row in rows], self.device)
        operations: dict[Site, list[_Edited]] = {}
        for one in work:
            operation = _Edited(
                one.featurizer,
                source=self.sources(one.site, rows),
                positions=self._base_positions[one.site][rows],
                edit=functools.partial(self._edit, one),
            )
            operations.setdefault(self.sites[one.site], []).append(operation)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        with intervene(self.model, operations):
            return self._answer_logits(inputs, self._answer_columns(rows, torch.zeros(len(rows), dtype=torch.long)))

    # ------------------------------------------------------------------ clean runs

    @torch.no_grad()
    def _run_bases(self, cache_bytes: int) -> Tensor:
        """Run each distinct base once, keep what runs with edits begin from, and return the model's own answers."""
        blocks: Any = self.anatomy.layers if cache_bytes else []
        keeping = cache_bytes > 0
        caching = keeping and takes_cache(self.model)
        of_run = {int(run): row for row, run in enumerate(self._run_of)}  # any pair of it: their answers are one place
        answers: dict[int, Tensor] = {}
        order = sorted(range(len(self._runs)), key=lambda i: len(self._runs[i][0]))
        for chunk in chunks(order, self._batch_size):
            ids, mask = padded([self._runs[i][0] for i in chunk], self.device)
            inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": caching}
            cache = empty_cache() if caching else None
            seen: dict[int, Tensor] = {}
            with ExitStack() as hooks:
                for start in [start for start in self._starts if start >= 0 and keeping]:
                    hooks.callback(blocks[start].register_forward_hook(self._note(start, seen)).remove)
                pairs = [of_run[i] for i in chunk]
                columns = self._answer_columns(pairs, torch.zeros(len(pairs), dtype=torch.long))
                logits = self._answer_logits({**inputs, **cache_argument(self.model, cache)}, columns)
            answers.update(zip(chunk, logits.argmax(-1).cpu(), strict=True))
            if keeping:
                keeping = self._keep(chunk, seen, cache, cache_bytes)
        width = int(self._n_label.max())
        rows = [nn.functional.pad(answers[i], (0, width - len(answers[i]))) for i in range(len(answers))]
        return torch.stack(rows)[self._run_of].to(self.device)

    @functools.cached_property
    def _bases(self) -> list[tuple[Tensor, Tensor]]:
        return read_activations(self.model, self.sites, self._base_tokens, self._batch_size)

    def _note(self, start: int, seen: dict[int, Tensor]) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            seen[start] = first_tensor(output)
            self._wraps[start] = wrap_like(output)

        return note

    def _keep(self, chunk: list[int], seen: dict[int, Tensor], cache: Any, budget: int) -> bool:
        """Store what one clean run gave, unless that is too much."""
        if not self.kept and not self._make_room(seen, getattr(cache, "layers", []), budget):
            return False
        for row, i in enumerate(chunk):
            run, first = self._runs[i]
            for start, x in seen.items():
                self._hidden[start][i, : len(run) - first] = x[row, first : len(run)]
            for layer, kept in self._keys.items():
                for room, x in zip(kept, (cache.layers[layer].keys, cache.layers[layer].values), strict=True):
                    # the tokens before end where the others begin, so that their padding is on the left
                    room[i, :, room.shape[2] - first :] = x[row, :, :first]
        return True

    def _make_room(self, seen: dict[int, Tensor], layers: Sequence[Any], budget: int) -> bool:
        """Make tensors for what is kept of all bases, whose sizes the first run tells; False if it is too much."""
        n, blocks = len(self._runs), range(self._starts[0] + 1, self.anatomy.n_layers)
        longest = max(first for _, first in self._runs)
        usable = longest > 0 and len(layers) == self.anatomy.n_layers and all(is_keys(layers[i]) for i in blocks)
        states = {i: (layers[i].keys, layers[i].values) for i in blocks} if usable else {}
        a_token = sum(x.shape[-1] * x.element_size() for x in seen.values())
        keys = sum(x[0, :, 0].numel() * x.element_size() * longest for pair in states.values() for x in pair)
        width = max(len(run) - first for run, first in self._runs)
        if not usable or n * (keys + a_token * width) > budget:
            states, width = {}, max(len(run) for run, _ in self._runs)
            self._runs = [(run, 0) for run, _ in self._runs]
            if not seen or n * a_token * width > budget:
                return False
        self._hidden = {start: x.new_zeros(n, width, x.shape[-1]) for start, x in seen.items()}
        for i, (k, v) in states.items():
            shapes = [(n, x.shape[1], longest, x.shape[3]) for x in (k, v)]
            self._keys[i] = k.new_zeros(shapes[0]), v.new_zeros(shapes[1])
        self.kept = ("tokens",) * bool(states) + ("layers",) * bool(seen)
        return True

    @torch.no_grad()
    def _verify(self) -> None:
        """Keep nothing if a run from what is kept is not the whole run: an architecture may do what is not foreseen."""
        order = sorted(range(len(self)), key=lambda row: len(self.pairs[row].run))
        rows = [order[i * (len(order) - 1) // 3] for i in range(4)] if len(order) > 3 else order
        identity = featurizers.create("identity")
        work = [Work(j, identity, lambda base, source: (base + source) / 2) for j in range(len(self.sites))]
        try:
            found, wanted = self.logits(rows, work).float(), self.plain_logits(rows, work).float()
            differ = float((found - wanted).abs().max() / wanted.std().clamp_min(1e-12))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            precise = next(self.model.parameters()).dtype in (torch.float32, torch.float64)
            if differ <= (1e-2 if precise else 0.2):
                return
            reason = f"its logits differ by {differ:.2g} of their standard deviation"
        self.kept = ()
        self._hidden, self._keys = {}, {}
        warnings.warn(
            f"a {type(self.model).__name__} cannot be run from the middle ({reason}); it is run whole, which is slower",
            stacklevel=3,
        )

    # ------------------------------------------------------------------ runs with edits

    def _inputs(self, run_rows: Tensor, start: int) -> tuple[dict[str, Any], Tensor]:
        """Arguments of the model for the tokens from the first edited one on, and how many there are before them."""
        runs = [self._runs[i] for i in run_rows.tolist()]
        prefix = torch.tensor([first for _, first in runs])
        ids, mask = padded([run[first:] for run, first in runs], self.device)
        longest = int(prefix.max())
        if not self._keys or not longest:
            return {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}, prefix
        before = torch.arange(longest) >= (longest - prefix).unsqueeze(-1)
        mask = torch.cat([before.to(self.device), mask], dim=1).long()
        positions = prefix.unsqueeze(-1).to(self.device) + torch.arange(ids.shape[1], device=self.device)
        cache = self._cache(run_rows, start, longest)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": True, **cache_argument(self.model, cache)}
        if takes(self.model, "position_ids"):
            inputs["position_ids"] = positions
        return inputs, prefix

    def _cache(self, run_rows: Tensor, start: int, longest: int) -> Any:
        """Keys and values of the tokens before the first edited one; blocks that do not run have a mere length."""
        from transformers import DynamicCache

        states = []
        for layer in range(self.anatomy.n_layers):
            if layer <= start:
                stand_in = torch.zeros(1, 1, 1, 1, device=self.device).expand(len(run_rows), 1, longest, 1)
                states.append((stand_in, stand_in))
            else:
                states.append(tuple(x[run_rows][:, :, x.shape[2] - longest :] for x in self._keys[layer]))  # type: ignore[arg-type]
        return DynamicCache(states)

    def _at(self, columns: Tensor, one: Work, rows: list[int], ids: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(hidden: Tensor) -> Tensor:
            base = gather(hidden, columns)
            edited = self._edit(one, base, self.sources(one.site, rows))
            if special := one.featurizer.special_tokens:
                alone = torch.isin(ids.gather(1, columns), torch.tensor(special, device=ids.device))
                edited = torch.where(alone.unsqueeze(-1), base, edited)
            return scatter(hidden, columns, edited)

        return edit

    def _edit(self, one: Work, base: Tensor, source: Tensor) -> Tensor:
        edited = one.edit(base, source)
        if edited.shape != base.shape:
            shapes = f"the edit of {tuple(base.shape)} gives {tuple(edited.shape)}"
            raise ShapeError(f"{self.sites[one.site]}: {shapes}")
        return edited

    def _answer_columns(self, rows: Sequence[int], prefix: Tensor) -> Tensor:
        """Which columns of a run predict the answer, ``(rows, n_label)``; the last again where it is shorter."""
        n_label = self._n_label[list(rows)].unsqueeze(-1)
        steps = torch.minimum(torch.arange(int(n_label.max())).unsqueeze(0), n_label - 1)
        return (self._label_start[list(rows)] - prefix).unsqueeze(-1) + steps

    def _answer_logits(self, inputs: dict[str, Any], columns: Tensor) -> Tensor:
        """The model's logits in some columns alone: ``(batch, n, vocabulary)``."""
        columns = columns.to(self.device)
        if self._head is None:
            return gather(self.model(**inputs).logits, columns)

        def narrow(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (gather(args[0], columns), *args[1:])

        handle = self._head.register_forward_pre_hook(narrow)
        try:
            logits: Tensor = self.model(**inputs).logits
        finally:
            handle.remove()
        return logits


def check_fit(pairs: Sequence[Pair], n_sites: int) -> None:
    """Raise `UsageError` unless pairs are for one site or for so many, and all have as many positions."""
    for i, pair in enumerate(pairs):
        for found in (pair.sources, pair.base_positions, pair.source_positions):
            if len(found) not in (1, n_sites):
                raise UsageError(f"pair {i} is for {len(found)} sites, and the search has {n_sites}")
        for j in range(n_sites):
            count, first = (len(p.base_at(j)[1]) for p in (pair, pairs[0]))
            if count != first:
                raise UsageError(f"pair {i} has {count} positions and pair 0 has {first}; give the same number to all")
