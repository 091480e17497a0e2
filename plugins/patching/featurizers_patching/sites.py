"""Rows of a grid: sites from kinds and patterns such as ``resid.pre`` and ``attn.z:*:*``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from featurizers import Anatomy, Featurizer, Site, SiteMap
from featurizers.errors import SiteError, UsageError, shown

HEADS: Final = ("attn.q", "attn.k", "attn.v", "attn.z")
"""Kinds that each head has."""
KINDS: Final = (
    "resid.pre", "resid.mid", "resid.post", *HEADS, "attn.out", "mlp.in", "mlp.router", "mlp.act", "mlp.out",
)  # fmt: skip
"""Kinds that each block has."""


RECEIVERS: Final = ("attn.q", "attn.k", "attn.v", "mlp.in", "resid.pre", "resid.post")
"""Kinds that may be the end of a path: what attention and MLPs read, and the residual stream."""


def receivers_of(anatomy: Anatomy, receivers: Any) -> tuple[Site, ...]:
    """Return the receivers of path patching.

    Args:
        anatomy: of the model.
        receivers: as the sites of `sites_of`; None for none.

    Raises:
        SiteError: the model does not have a site.
        UsageError: a site is no receiver.
    """
    if receivers is None:
        return ()
    found = tuple(site for site, _ in sites_of(anatomy, receivers, None))
    for site in found:
        if site.kind not in RECEIVERS:
            raise UsageError(
                f"{site} cannot be a receiver; take what a module reads: {', '.join(RECEIVERS)}. The direct effect on "
                "the logits is freeze=('attn.out', 'mlp.out') without receivers"
            )
    return found


def sites_of(anatomy: Anatomy, sites: Any, featurizer: Any) -> list[tuple[Site, Featurizer[Any] | None]]:
    """Return the sites of a grid, each with the featurizer to patch through; None for whole activations.

    Args:
        anatomy: of the model.
        sites: a site, a kind for all blocks, a pattern with ``*`` for all blocks or heads; a list of these; or a
            mapping from these to featurizers.
        featurizer: for all sites that do not come with their own.

    Raises:
        SiteError: the model does not have a site.
        UsageError: a featurizer is none.
    """
    if isinstance(sites, str | Site):
        sites = [sites]
    if isinstance(sites, Mapping):
        if featurizer is not None:
            raise UsageError("the sites come with their featurizers; leave the argument featurizer out")
        items: list[tuple[Any, Any]] = list(sites.items())
    elif isinstance(sites, Iterable):
        items = [(site, featurizer) for site in sites]
    else:
        raise UsageError(f"sites are a site, a list, or a mapping from sites to featurizers, not {shown(sites)}")
    found: dict[Site, Featurizer[Any] | None] = {}
    for pattern, through in items:
        _check_featurizer(through)
        for site in _expanded(anatomy, pattern):
            if site in found:
                raise UsageError(f"the site {site} is there twice")
            found[site] = through
    if not found:
        raise UsageError("there are no sites to patch; give one such as 'resid.pre'")
    return list(found.items())


def by_head(sites: Any, heads: str | Sequence[int]) -> Any:
    """Return sites with heads, from a site, a list or a mapping of sites without, such as ``attn.z`` or ``attn.z:3``.

    Raises:
        UsageError: a site has no heads, or names one; or heads are none.
    """
    if heads == "all":
        numbers: list[Any] = ["*"]
    elif isinstance(heads, Sequence) and heads and all(type(each) is int and each >= 0 for each in heads):
        numbers = list(heads)
    else:
        raise UsageError(f"heads are 'all' or a list of numbers from 0, not {shown(heads)}")

    def of(site: Any) -> list[str]:
        kind, *block = str(site).split(":")
        if kind not in HEADS or len(block) > 1:
            raise UsageError(f"heads= is for sites such as 'attn.z' and 'attn.q:3', of {', '.join(HEADS)}; not {site}")
        return [":".join((kind, *(block or ["*"]), str(number))) for number in numbers]

    if isinstance(sites, Mapping):
        return {pattern: through for site, through in sites.items() for pattern in of(site)}
    return [pattern for site in ([sites] if isinstance(sites, str | Site) else sites) for pattern in of(site)]


def _check_featurizer(featurizer: Any) -> None:
    if isinstance(featurizer, SiteMap):
        raise UsageError(f"{featurizer.id!r} maps between sites; patching takes a featurizer of one site")
    if featurizer is not None and not isinstance(featurizer, Featurizer):
        raise UsageError(f"expected a featurizer or None, not {shown(featurizer)}")


def _expanded(anatomy: Anatomy, pattern: Any) -> list[Site]:
    if not isinstance(pattern, str):
        return [_checked(anatomy, Site.parse(pattern))]
    kind, *numbers = pattern.split(":")
    if kind not in KINDS or ("*" not in numbers and numbers):
        return [_checked(anatomy, Site.parse(pattern))]
    block, head = [*numbers, "*", None][:2] if numbers else ("*", None)
    if len(numbers) > 2 or (head is not None and kind not in HEADS):
        raise SiteError(f"cannot read the sites {shown(pattern)}; write 'resid.pre', 'mlp.out:*' or 'attn.z:*:*'")
    blocks = range(anatomy.n_layers) if block == "*" else [Site.parse(f"{kind}:{block}").layer]
    head = numbers[1] if len(numbers) == 2 else None
    found: list[Site] = []
    missing: SiteError | None = None
    for number in blocks:
        try:
            found += _of_block(anatomy, kind, int(number or 0), head)
        except SiteError as error:  # blocks of a decoder may differ
            missing = missing or error
    if not found and missing is not None:
        raise missing
    return found


def _of_block(anatomy: Anatomy, kind: str, block: int, head: str | None) -> list[Site]:
    if head is None:
        return [_checked(anatomy, Site(kind, block))]
    if head != "*":
        return [_checked(anatomy, Site.parse(f"{kind}:{block}:{head}"))]
    heads = [_checked(anatomy, Site(kind, block, head=0))]
    while True:
        try:
            heads.append(_checked(anatomy, Site(kind, block, head=len(heads))))
        except SiteError:
            return heads


def _checked(anatomy: Anatomy, site: Site) -> Site:
    anatomy.place(site)
    return site
