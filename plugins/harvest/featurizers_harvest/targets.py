"""`Target`: what is harvested under one name: features of a featurizer or of a group of a map, or activations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import featurizers
import torch
from featurizers import Anatomy, FeatureSpace, Featurizer, Site, SiteMap
from featurizers.errors import UsageError, shown
from featurizers.features import Active, nonzero, without_autocast
from featurizers.format import fingerprint
from featurizers.models import site_of
from featurizers_evaluate import Batch
from torch import Tensor, nn

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CHUNK: Final = 2**26
"""Features that are computed at once, fewer tokens at a time where there are more of them."""


@dataclass(frozen=True)
class Target:
    """What is harvested under one name.

    Attributes:
        name: of the folder ``site=NAME``.
        space: featurizer or map; None for activations.
        group: of a map.
        reads: sites by the names under which the space reads them; ``site`` of a featurizer and of activations.
    """

    name: str
    space: Featurizer[Any] | SiteMap[Any] | None
    group: str | None
    reads: Mapping[str, Site]

    @property
    def folder(self) -> str:
        """Name of the folder with its files."""
        return f"site={self.name}"

    @property
    def is_sparse(self) -> bool:
        """Whether it is features, and not activations."""
        return self.space is not None

    @property
    def special_tokens(self) -> tuple[int, ...]:
        """Token ids that the space leaves out."""
        return () if self.space is None else self.space.special_tokens

    def describe(self, checksums: Mapping[FeatureSpace[Any], str]) -> dict[str, Any]:
        """Return what the rows depend on, as JSON data."""
        sites = {name: str(site) for name, site in self.reads.items()}
        if self.space is None:
            return {"kind": "activations", "sites": sites}
        return {
            "kind": self.space.kind,
            "sites": sites,
            "group": self.group,
            "n_features": None if self._n_features() is None else self.space.numbering()[self.group].whole,
            "checksum": checksums[self.space],
            "special_tokens": sorted(self.special_tokens),
        }

    def _n_features(self) -> int | None:
        """Return the number of features that are encoded at once; None if it is the width of the activations."""
        if isinstance(self.space, SiteMap):
            return self.space.groups[str(self.group)].n_features
        return None if self.space is None else self.space.n_features

    def _numbers(self) -> Tensor | None:
        """Return the numbers that the columns of a slice have in the whole; None if they are the columns."""
        if self.space is None:
            return None
        numbers = self.space.numbering()[self.group].numbers
        return None if isinstance(numbers, range) and numbers.start == 0 else torch.tensor(list(numbers))

    def kept(self, batch: Batch) -> Tensor:
        """Return ``(rows, width)``, on the CPU: True for the tokens that have a row."""
        kept = batch.is_measured
        if self.special_tokens:
            kept = kept & ~torch.isin(batch.ids, torch.tensor(self.special_tokens, device=batch.ids.device))
        return kept.cpu()

    def activations(self, x: Mapping[Site, Tensor], kept: Tensor) -> Tensor:
        """Return the activations at the site, ``(kept tokens, d)``."""
        (site,) = self.reads.values()
        value = x[site].flatten(2)
        return value[kept.to(value.device)]

    def features(self, x: Mapping[Site, Tensor], batch: Batch, kept: Tensor) -> Active:
        """Return the features that are not 0 of the tokens kept, in their order; padding is never encoded.

        Columns are the numbers of features in the whole, ascending within a token.

        Args:
            x: activations by site, ``(rows, width, …)``.
            batch: of the model's tokens.
            kept: as `kept` returns it.
        """
        parts = list(self._parts(x, batch, kept))
        rows, start = [], 0
        for active, n in parts:
            rows.append(active.rows + start)
            start += n
        found = Active(
            torch.cat(rows),
            torch.cat([part.columns for part, _ in parts]),
            torch.cat([part.values for part, _ in parts]),
        )
        numbers = self._numbers()
        if numbers is None:
            return found
        columns = numbers.to(found.columns.device)[found.columns]
        order = (found.rows * (int(numbers.max()) + 1) + columns).argsort()
        return Active(found.rows[order], columns[order], found.values[order])

    def _parts(self, x: Mapping[Site, Tensor], batch: Batch, kept: Tensor) -> Iterator[tuple[Active, int]]:
        space = self.space
        if space is None:
            raise ValueError("activations have no features")
        device = next((t.device for t in (*space.parameters(), *space.buffers())), batch.ids.device)
        read = {name: x[site].to(device) for name, site in self.reads.items()}
        kept = kept.to(device)
        if isinstance(space, SiteMap) and space.encodes_sequences:
            yield from self._of_sequences(space, read, batch, kept)
            return
        tokens = {name: value[kept] for name, value in read.items()}
        n = int(kept.sum())
        step = max(1, CHUNK // max(1, self._n_features() or next(iter(tokens.values()))[:1].numel()))
        encode: Callable[[dict[str, Tensor]], Active]
        if isinstance(space, SiteMap):
            group = str(self.group)
            encode = lambda part: space.encode_active(group, part)  # noqa: E731
        else:
            encode = lambda part: space.encode_active(part["site"])  # noqa: E731
        for start in range(0, max(n, 1), step):
            part = {name: value[start : start + step] for name, value in tokens.items()}
            first = next(iter(part.values()))
            with without_autocast(first):
                yield encode(part), len(first)

    def _of_sequences(
        self, space: SiteMap[Any], read: Mapping[str, Tensor], batch: Batch, kept: Tensor
    ) -> Iterator[tuple[Active, int]]:
        is_token = batch.is_token.to(kept.device)
        whole = bool(is_token.all())
        for row in range(len(kept)):
            one = {name: value[row : row + 1] for name, value in read.items()}
            with without_autocast(next(iter(one.values()))):
                mask = None if whole else is_token[row : row + 1]
                features = space.encode_sequences(str(self.group), one, mask)
            yield nonzero(features[0][kept[row]]), int(kept[row].sum())


def by_name(wanted: Any) -> dict[str, Any]:
    """Return what is to be harvested by name; of a list, by the sites.

    Raises:
        UsageError: it is neither a mapping nor a list, or two have one name.
    """
    if isinstance(wanted, Mapping):
        return dict(wanted)
    if not isinstance(wanted, list | tuple):
        raise UsageError("give what is to be harvested by name, such as {'layer-8': f}, or in a list")
    named = [(_own_name(each), each) for each in wanted]
    if len(dict(named)) != len(named):
        raise UsageError(f"two have one name: {shown([name for name, _ in named])}; give them by name, {{'name': f}}")
    return dict(named)


def targets_of(wanted: Any) -> list[Target]:
    """Return the targets of what is to be harvested.

    Args:
        wanted: by name, featurizers, maps between sites and sites; or a list of these, which are named by their sites.

    Raises:
        UsageError: one is none of these, does not know its site, or two have one name.
    """
    targets = [target for name, each in by_name(wanted).items() for target in _targets(name, each)]
    names = [target.name for target in targets]
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UsageError(f"a name is letters, digits, '.', '_' and '-', as it becomes a folder, not {shown(name)}")
    if not targets or len({name.lower() for name in names}) != len(names):
        raise UsageError(f"give one or more featurizers or sites by different names, not {shown(names)}")
    return targets


def _own_name(each: Any) -> str:
    sites = each.sites_text if isinstance(each, FeatureSpace) else str(each)
    return re.sub(r"[^A-Za-z0-9._-]+", ".", sites or "site")


def _targets(name: str, each: Any) -> list[Target]:
    if isinstance(each, Featurizer):
        return [Target(name, each, None, {"site": site_of(each)})]
    if isinstance(each, SiteMap):
        if not each.reads:
            raise UsageError(f"{each.id!r} does not say where it belongs; set its reads")
        many = len(each.groups) > 1
        return [
            Target(f"{name}.{group}" if many else name, each, group, {read: each.reads[read] for read in own.reads})
            for group, own in each.groups.items()
        ]
    if isinstance(each, str | Site):
        return [Target(name, None, None, {"site": Site.parse(each)})]
    raise UsageError(f"a harvest is of featurizers, maps between sites and sites, not {type(each).__name__}")


def checksums_of(targets: list[Target]) -> dict[FeatureSpace[Any], str]:
    """Return a checksum of each featurizer's kind, config and tensors."""
    spaces = dict.fromkeys(target.space for target in targets if target.space is not None)
    return {space: checksum_of(space) for space in spaces}


def checksum_of(space: FeatureSpace[Any]) -> str:
    """Return a checksum of a featurizer's kind, config and tensors.

    Raises:
        UsageError: it is divided over several processes, and no process can read it whole.
    """
    return fingerprint(space.stored_tensors(), f"{space.kind} {space.config.model_dump_json()}")


def check_model(targets: list[Target], model: object) -> None:
    """Raise a FeaturizerError unless the model is the one that the featurizers name."""
    spaces = dict.fromkeys(target.space for target in targets if target.space is not None)
    if spaces:
        featurizers.attach(model, list(spaces))


def checksum_of_model(anatomy: Anatomy) -> str:
    """Return a checksum of the parameters and buffers of a model.

    Raises:
        UsageError: some are not in memory, as those of offloaded models.
    """
    model = anatomy.backend.model if isinstance(anatomy.backend.model, nn.Module) else anatomy.model
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    if missing := [name for name, tensor in state.items() if tensor.is_meta]:
        raise UsageError(f"{missing[0]} is not in memory, so that the model has no checksum: load it whole")
    return fingerprint(state)
