"""Passports: a few numbers of a model's activations at a site, to tell whether another model has the same ones there.

A featurizer is right only in the coordinates that it was found in. A passport holds, for a few tokens, the mean, the
root mean square and eight projections of the activations, in about a thousand bytes of an artefact's metadata. When
another model has others, `compare` says what the difference looks like.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from featurizers.errors import FeaturizerError, ManifestError, SiteError, UsageError, explain, one_line
from featurizers.features.feature_space import FeatureSpace
from featurizers.format.sites import BLOCK_KINDS, Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.contexts import unedited
from featurizers.models.modes import evaluating
from featurizers.models.reading import read

KEY: Final = "passport"
"""Key of the metadata that holds the passport."""
N_TOKENS: Final = 6
N_PROJECTIONS: Final = 8
TOLERANCE: Final = {"float64": 1e-3, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative difference of the same model's activations in another dtype or on another machine."""
QUANTIZED: Final = 0.15
"""The same for a model with quantized weights."""

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Row = Annotated[list[_Number], Field(min_length=1, max_length=256)]


class SiteNumbers(BaseModel):
    """Numbers of the activations at one site, a list entry for each token.

    Attributes:
        mean: over the width.
        rms: root mean square over the width.
        projections: on fixed directions, each divided by the square root of the width.
    """

    model_config = ConfigDict(extra="forbid")
    mean: _Row
    rms: _Row
    projections: Annotated[list[_Row], Field(min_length=1, max_length=256)]


class Passport(BaseModel):
    """Passport of the sites of a featurizer, as the metadata of an artefact holds it.

    Attributes:
        version: of the form.
        tokens: ids that were given to the model, as one prompt.
        dtype: of the model's weights, such as ``float32``; ``quantized`` for other dtypes.
        sites: numbers by the name of the site.
    """

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=256)]
    dtype: Annotated[str, Field(max_length=32)]
    sites: Annotated[dict[str, SiteNumbers], Field(min_length=1, max_length=1024)]

    @model_validator(mode="after")
    def _fits(self) -> Passport:
        for numbers in self.sites.values():
            rows = (numbers.mean, numbers.rms, *zip(*numbers.projections, strict=True))
            if any(len(row) != len(self.tokens) for row in rows):
                raise ValueError(f"there are {len(self.tokens)} tokens, and numbers of another count")
        return self


def passport_of(model: object, featurizer: FeatureSpace[Any]) -> Passport:
    """Return the passport of a featurizer's sites in a model; costs one forward pass of six tokens.

    Raises:
        UsageError: the featurizer has no site, or the model's vocabulary is not known.
        SiteError: the model does not have the site.
    """
    if not featurizer.sites:
        raise UsageError(f"{featurizer.id!r} does not say where it belongs, so that it cannot have a passport")
    anatomy = Anatomy(model)
    size = _vocabulary(anatomy.backend.model)
    if size is None:
        raise UsageError(f"the vocabulary of {type(model).__name__} is not known, so that it cannot have a passport")
    tokens = [(number + 1) * 2_654_435_761 % size for number in range(N_TOKENS)]
    activations = _read(anatomy, dict(featurizer.sites), tokens)
    sites = {name: _numbers(values) for name, values in activations.items()}
    return Passport(tokens=tokens, dtype=dtype_of(anatomy.backend.model), sites=sites)


def check_passport(model: object, featurizer: FeatureSpace[Any]) -> None:
    """Compare the passport in a featurizer's metadata, if there is one, with a model.

    Raises:
        ManifestError: the passport is damaged.
        UsageError: the activations of the model are others; the message says what the difference looks like.
    """
    given = featurizer.metadata.get(KEY)
    if given is None:
        return
    try:
        stored = Passport.model_validate(given)
    except ValidationError as error:
        raise ManifestError(str(featurizer.id), f"its passport is damaged: {explain(error)}") from error
    problem = compare(model, featurizer, stored)
    if problem is not None:
        raise UsageError(
            f"the activations of this {type(model).__name__} are not those in which {featurizer.id!r} was found: "
            f"{problem}. Attach it with any_model=True if that is what you want"
        )


def compare(model: object, featurizer: FeatureSpace[Any], stored: Passport) -> str | None:
    """Return what differs between a passport and a model, None if nothing does; one forward pass if nothing does.

    Args:
        model: to compare with.
        featurizer: whose sites to read.
        stored: passport of the model in which it was found.
    """
    anatomy = Anatomy(model)
    size = _vocabulary(anatomy.backend.model)
    if size is not None and max(stored.tokens) >= size:
        return f"its vocabulary has {size} tokens, and the passport has token {max(stored.tokens)}: another model"
    names = [name for name in featurizer.sites if name in stored.sites]
    try:
        found = _read(anatomy, {name: featurizer.sites[name] for name in names}, stored.tokens)
    except FeaturizerError:
        raise
    except Exception as error:
        raise UsageError(
            f"the passport of {featurizer.id!r} cannot be compared, because {type(model).__name__} does not run on "
            f"token ids alone ({type(error).__name__}: {one_line(error)}); attach it with any_model=True"
        ) from error
    allowed = max(TOLERANCE.get(dtype, QUANTIZED) for dtype in (stored.dtype, dtype_of(anatomy.backend.model)))
    for name in names:
        numbers = stored.sites[name]
        if _difference(numbers, _numbers(found[name])) > allowed:
            return _diagnosis(anatomy, featurizer.sites[name], found[name], numbers, stored.tokens, allowed)
    return None


def _diagnosis(
    anatomy: Anatomy, site: Site, found: Tensor, stored: SiteNumbers, tokens: Sequence[int], allowed: float
) -> str:
    """Return what the difference between the activations at a site and a passport looks like."""
    difference = f"at {site} they differ by {_difference(stored, _numbers(found)):.1%}"
    width = found.shape[-1]
    centred, given = _numbers(found - found.mean(-1, keepdim=True)), _centred(stored, width)
    if _difference(given, _numbers(found)) <= allowed:
        return f"{difference}, and are the same less their mean: the weights of this model were centred"
    if _difference(stored, centred) <= allowed:
        return f"{difference}, and are the same plus a mean: the featurizer was found in a model with centred weights"
    if _difference(_scaled(stored), _scaled(_numbers(found))) <= allowed:
        return (
            f"{difference}, and are the same but for one factor a token: one of the two is before a norm and the other "
            "after it, or a scale was folded into the weights"
        )
    for other, activations in _elsewhere(anatomy, site, tokens):
        if activations.shape[-1] == width and _difference(stored, _numbers(activations)) <= allowed:
            return f"{difference}, and those of the passport are here at {other}"
    return f"{difference}, and are found nowhere near: another model, or another revision of it"


def _elsewhere(anatomy: Anatomy, site: Site, tokens: Sequence[int]) -> Iterator[tuple[Site, Tensor]]:
    """Yield the activations at the other sites of a model: of the same block first, with its modules."""
    layers = sorted(range(anatomy.n_layers), key=lambda layer: abs(layer - (site.layer or 0)))
    sites = [Site(kind, layer) for layer in layers for kind in BLOCK_KINDS if kind != "attn.z"]
    path = f"{anatomy.place(site).path}."
    blocks = (anatomy.place(Site("resid.post", layer)).path for layer in layers)
    block = next((each for each in blocks if path.startswith(f"{each}.")), None)
    parts = [name for name, _ in anatomy.model.get_submodule(block).named_children()] if block is not None else []
    of_block = [Site(f"module:{block}.{part}:{side}") for part in parts for side in ("output", "input")]
    for other in (*sites, *of_block):
        try:
            yield other, _read(anatomy, {"site": other}, tokens)["site"]
        except Exception:  # a module that is no site, or does not run here, is no candidate
            continue


def _read(anatomy: Anatomy, sites: Mapping[str, Site], tokens: Sequence[int]) -> dict[str, Tensor]:
    """Return the activations ``(n_tokens, width)`` of each site in float64."""
    model = anatomy.model
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    ids = torch.tensor([list(tokens)], device=device)
    distinct = list(dict.fromkeys(sites.values()))
    with torch.no_grad(), unedited(), evaluating(model):
        values = read(anatomy, {"input_ids": ids}, dict.fromkeys(distinct), None)
    if wrong := [site for site in distinct if values[site].dim() != 3]:
        raise SiteError(f"{wrong[0]} has no axis of positions, so that it cannot have a passport")
    return {name: values[site][0].double().cpu() for name, site in sites.items()}


def _numbers(values: Tensor) -> SiteNumbers:
    """Return the numbers of activations ``(n_tokens, width)``, rounded to six digits."""

    def rounded(row: Tensor) -> list[float]:
        return [float(f"{number:.6g}") for number in row.tolist()]

    width = values.shape[-1]
    projections = values @ _directions(width) / math.sqrt(width)
    return SiteNumbers(
        mean=rounded(values.mean(-1)),
        rms=rounded(values.square().mean(-1).sqrt()),
        projections=[rounded(row) for row in projections],
    )


def _directions(width: int) -> Tensor:
    """Return fixed directions ``(width, N_PROJECTIONS)``: cosines whose frequencies are not multiples of each other."""
    roots = torch.tensor([2.0, 3, 5, 7, 11, 13, 17, 19], dtype=torch.float64).sqrt()
    return math.sqrt(2) * torch.cos(2 * math.pi * torch.arange(1, width + 1, dtype=torch.float64)[:, None] * roots)


def _difference(one: SiteNumbers, other: SiteNumbers) -> float:
    """Return the root mean square over tokens of the relative difference of the projections and of the rms."""
    a, b = _matrix(one), _matrix(other)
    if a.shape != b.shape:
        return math.inf
    share = (a - b).norm(dim=-1) / torch.maximum(a.norm(dim=-1), b.norm(dim=-1)).clamp(min=1e-12)
    return float(share.square().mean().sqrt())


def _matrix(numbers: SiteNumbers) -> Tensor:
    rms = torch.tensor(numbers.rms, dtype=torch.float64)[:, None]
    return torch.cat([torch.tensor(numbers.projections, dtype=torch.float64), rms], dim=1)


def _centred(numbers: SiteNumbers, width: int) -> SiteNumbers:
    """Return the numbers of the same activations without their mean."""
    mean = torch.tensor(numbers.mean, dtype=torch.float64)[:, None]
    rms = torch.tensor(numbers.rms, dtype=torch.float64)[:, None]
    projections = torch.tensor(numbers.projections, dtype=torch.float64)
    projections = projections - mean * _directions(width).sum(0) / math.sqrt(width)
    return SiteNumbers(
        mean=[0.0] * len(numbers.mean),
        rms=(rms.square() - mean.square()).clamp(min=0).sqrt()[:, 0].tolist(),
        projections=projections.tolist(),
    )


def _scaled(numbers: SiteNumbers) -> SiteNumbers:
    """Return the numbers of the same activations with an rms of 1."""
    rms = torch.tensor(numbers.rms, dtype=torch.float64).clamp(min=1e-12)[:, None]
    return SiteNumbers(
        mean=(torch.tensor(numbers.mean, dtype=torch.float64)[:, None] / rms)[:, 0].tolist(),
        rms=[1.0] * len(numbers.rms),
        projections=(torch.tensor(numbers.projections, dtype=torch.float64) / rms).tolist(),
    )


def dtype_of(model: nn.Module) -> str:
    """Return the name of the dtype of a model's weights; ``quantized`` if some are not floating-point numbers."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if not all(dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16) for dtype in dtypes):
        return "quantized"
    return str(min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)).removeprefix("torch.")


def _vocabulary(model: nn.Module) -> int | None:
    """Return the number of tokens of a model, None if it is not known."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None) or getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None
