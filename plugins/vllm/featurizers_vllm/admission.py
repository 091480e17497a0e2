"""`Admission`: from the JSON of a request to lowered edits, or the reason why this server refuses it.

Everything that can fail because of a request fails here, before the request reaches the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import featurizers
import torch
from featurizers import Ablate, Program, Steer
from featurizers.errors import FeaturizerError, did_you_mean, shown
from featurizers.features import FeatureRows, FeatureSpace, Gate
from featurizers.format import AblateSpec, EditSpec, InterchangeSpec, MaskSpec, Site, SteerSpec

from featurizers_vllm import spec
from featurizers_vllm.errors import RequestError, ServerError
from featurizers_vllm.settings import Settings

LARGEST: Final = 1e6
"""Largest number that an edit may write, far below what overflows in bfloat16 and far above activations."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One operation of a request, lowered.

    Attributes:
        site: armed site.
        stage: which operation of the request at this site.
        key: equal for edits that are the same.
        program: rows and numbers, in float32.
        positions: tokens of the prompt to edit, negative from its end; None for all.
        prompt_only: generated tokens are not edited.
        special_tokens: ids of tokens that are not edited.
    """

    site: Site
    stage: int
    key: str
    program: Program
    positions: tuple[int, ...] | None
    prompt_only: bool
    special_tokens: tuple[int, ...]

    @property
    def is_everywhere(self) -> bool:
        """True if every token of the request is edited."""
        return self.positions is None and not self.prompt_only and not self.special_tokens

    @property
    def depends_on_length(self) -> bool:
        """True if which tokens are edited depends on where the prompt ends."""
        return self.prompt_only or any(position < 0 for position in self.positions or ())

    def check_prompt(self, length: int) -> None:
        """Raise a RequestError if a prompt of ``length`` tokens lacks a position."""
        for position in self.positions or ():
            if not -length <= position < length:
                raise RequestError(f"{self.site}: the prompt has {length} tokens, and so no position {position}")


class Admission:
    """Featurizers that requests may name, and the checks of a request.

    Args:
        settings: of the operator.

    Raises:
        ServerError: a featurizer cannot be loaded.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._featurizers: dict[tuple[str, str | None], FeatureSpace[Any]] = {}
        for each in settings.featurizers:
            try:
                loaded = featurizers.load(Path(each.path), verify=True, device="cpu")
            except FeaturizerError as error:
                raise ServerError(f"featurizer {shown(each.name)}: {error}") from error
            self._featurizers[each.id, each.revision] = loaded.requires_grad_(False)
        self.edits = lru_cache(maxsize=256)(self._edits)

    def check_width(self, width: int) -> None:
        """Raise a ServerError if a featurizer does not fit activations of ``width`` numbers."""
        for (name, _), f in self._featurizers.items():
            d_in = getattr(f, "d_in", None)
            if d_in != width:
                found = "any width" if d_in is None else f"{d_in}"
                raise ServerError(f"featurizer {shown(name)} is for activations of {found}, the model's have {width}")

    def of(self, arguments: Mapping[str, Any] | None) -> tuple[Edit, ...]:
        """Return the edits in the extra arguments of a request; none if there are none.

        Raises:
            RequestError: they cannot be served.
        """
        raw = spec.given(arguments)
        return () if raw is None else self.edits(raw)

    def _edits(self, raw: str) -> tuple[Edit, ...]:
        """Return the lowered edits of a request's JSON.

        Raises:
            RequestError: a site is not armed, a featurizer not allowed, an operation has no fixed form, or a limit is
                passed.
        """
        counts: Counter[Site] = Counter()
        edits = []
        for each in spec.parse(raw).edits:
            site = self._site(each)
            program = self._program(each, site)
            if len(program.constant) > self.settings.features:
                raise RequestError(
                    f"{site}: {len(program.constant)} features are edited; this server allows "
                    f"{self.settings.features} an operation"
                )
            if counts[site] == self.settings.operations:
                raise RequestError(f"{site}: this server allows {self.settings.operations} operations at one site")
            edits.append(
                Edit(
                    site=site,
                    stage=counts[site],
                    key=each.model_dump_json(exclude={"site", "positions"}),
                    program=program,
                    positions=program.positions,
                    prompt_only=isinstance(each, InterchangeSpec | MaskSpec),
                    special_tokens=program.special_tokens,
                )
            )
            counts[site] += 1
        return tuple(edits)

    def _site(self, edit: EditSpec) -> Site:
        try:
            site = Site.parse(edit.site)
        except FeaturizerError as error:
            raise RequestError(str(error)) from error
        if site not in self.settings.armed:
            raise RequestError(
                f"site {shown(edit.site)} is not armed; this server has {', '.join(self.settings.sites)}"
            )
        return site

    def _featurizer(self, edit: EditSpec) -> Any:
        """Return the featurizer that a request names."""
        named = {revision: f for (name, revision), f in self._featurizers.items() if name == edit.featurizer}
        if not named:
            near = did_you_mean(edit.featurizer, {name for name, _ in self._featurizers})
            raise RequestError(f"this server has no featurizer {shown(edit.featurizer)}. {near}")
        if edit.revision is None and len(named) == 1:
            return next(iter(named.values()))
        if edit.revision not in named:
            known = ", ".join(shown(revision) for revision in named)
            raise RequestError(
                f"featurizer {shown(edit.featurizer)} is here at the revisions {known}, not {shown(edit.revision)}"
            )
        return named[edit.revision]

    def _program(self, edit: EditSpec, site: Site) -> Program:
        try:
            program = lowered(edit, self._featurizer(edit))
        except RequestError:
            raise
        except FeaturizerError as error:
            raise RequestError(f"{site}: {error}") from error
        program = in_single(program)
        rows = program.rows
        written = (program.constant.abs() @ rows.write.abs()).max()
        if not written <= LARGEST:  # not a number, too
            raise RequestError(
                f"{site}: the edit writes numbers up to {written:.2g}; at most {LARGEST:.0e} are allowed"
            )
        gate = (rows.gate.slope, rows.gate.offset) if rows.gate is not None else ()
        if not all(part.isfinite().all() for part in (rows.read, rows.bias, rows.write, program.factor, *gate)):
            raise RequestError(f"{site}: a feature of {shown(edit.featurizer)} has numbers that overflow float32")
        return program


def lowered(edit: EditSpec, f: Any) -> Program:
    """Return the program of one operation of a request.

    Raises:
        FeaturizerError: it has no fixed form, or its numbers do not fit the features.
    """
    indices, positions = edit.indices, edit.positions
    match edit:
        case SteerSpec(delta=delta):
            return featurizers.lower(Steer(f, delta=_tensor(delta), indices=indices, positions=positions))
        case AblateSpec() | InterchangeSpec() | MaskSpec():
            values = edit.value if isinstance(edit, AblateSpec) else edit.features
            if values is None:
                raise RequestError("a request gives its source by 'features', not by its activations")
            program = featurizers.lower(Ablate(f, value=_tensor(values), indices=indices, positions=positions))
            return program if not isinstance(edit, MaskSpec) else _in_part(program, edit)
        case _:
            raise RequestError(f"{type(edit).__name__} is not an operation of a request")


def _in_part(program: Program, edit: MaskSpec) -> Program:
    """Return the program that moves each feature by the gate towards what ``program`` sets it to."""
    share = _tensor(edit.gate).to(program.constant)
    if share.dim() and share.shape != program.constant.shape:
        raise RequestError(f"the gate has {len(share)} numbers for {len(program.constant)} features")
    return replace(program, constant=share * program.constant, factor=share * program.factor)


def in_single(program: Program) -> Program:
    """Return a program with its tensors in float32."""
    rows, gate = program.rows, program.rows.gate
    if gate is not None:
        gate = Gate(gate.threshold.float(), gate.slope.float(), gate.offset.float(), gate.floor.float())
    rows = FeatureRows(rows.read.float(), rows.bias.float(), gate, rows.write.float())
    return replace(program, rows=rows, constant=program.constant.float(), factor=program.factor.float())


def _tensor(numbers: float | list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
