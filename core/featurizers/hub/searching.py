"""`search`: repositories of the Hub with featurizers, by what their cards say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from featurizers.errors import SiteError, UsageError, shown
from featurizers.format.card import SITE_TAG, TOPIC
from featurizers.format.manifest import LIBRARY_NAME
from featurizers.format.sites import BLOCK_KINDS, Site
from featurizers.hub.sources import REPO_ID
from featurizers.hub.transport import DEADLINE, within
from featurizers.names import KIND

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

MOST: Final = 1000
"""Most repositories that one search looks at."""
MOST_TAGS: Final = 1000
"""Tags of a repository that are looked at; a Hub may send any number."""


@dataclass(frozen=True)
class FoundRepository:
    """Repository with one or more featurizers, as the Hub describes it.

    Texts are as the Hub sends them, and not fit to print.

    Attributes:
        repo_id: ``owner/name``.
        kinds: of its featurizers, by the tags of its card after its topic.
        models: for which they were made.
        sites: where they belong.
        revision: its newest commit.
        downloads: in the last 30 days.
        likes: of people.
        updated: time of that commit, ISO 8601.
        private: whether only its owner sees it.
        gated: whether its author must be asked.
    """

    repo_id: str
    kinds: tuple[str, ...]
    models: tuple[str, ...]
    sites: tuple[str, ...]
    revision: str | None
    downloads: int | None
    likes: int | None
    updated: str | None
    private: bool
    gated: bool


def search(
    text: str | None = None,
    *,
    kind: str | None = None,
    model: str | None = None,
    site: str | None = None,
    author: str | None = None,
    limit: int = 50,
    token: str | bool | None = None,
) -> list[FoundRepository]:
    """Search the Hub for featurizers, the most downloaded first.

    Cards that this library did not write are not found, nor are repositories that the token may not see.

    Args:
        text: in the name of the repository.
        kind: of a featurizer, such as ``subspace``.
        model: Hub id of the model that it was made for.
        site: such as ``resid.post:8``, or ``resid.post`` for any layer.
        author: user or organization.
        limit: most repositories to return, at most `MOST`.
        token: of the Hub; None for that of huggingface_hub, False for none.

    Raises:
        UsageError: the kind, the model or the limit can be none.
        SiteError: there is no such site.
        HubError: the Hub refused or did not answer.
    """
    if not 1 <= limit <= MOST:
        raise UsageError(f"a limit is a number from 1 to {MOST}, not {limit}")
    if kind is not None and not KIND.fullmatch(kind):
        raise UsageError(f"a kind is lower-case words joined by '-', such as subspace, not {shown(kind)}")
    if model is not None and not REPO_ID.fullmatch(model):
        raise UsageError(f"a model is its Hub id, owner/name, not {shown(model)}")
    whole = None if site is None or site in BLOCK_KINDS else str(Site.parse(site))
    tags = [LIBRARY_NAME, *([kind] if kind else []), *([f"base_model:{model}"] if model else [])]
    tags += [f"{SITE_TAG}{whole}"] if whole else []

    def call() -> list[FoundRepository]:
        from huggingface_hub import HfApi

        listed = HfApi().list_models(
            filter=tags, search=text, author=author, sort="downloads", limit=MOST, full=True, cardData=True, token=token
        )
        found: list[FoundRepository] = []
        for info in listed:
            if REPO_ID.fullmatch(info.id) and set(tags) <= set(_texts(info.tags)):
                each = _found(info)
                if whole is not None or site is None or any(name.startswith(f"{site}:") for name in each.sites):
                    found.append(each)
            if len(found) == limit:
                break
        return found

    return within(DEADLINE, "the Hub", call)


def _found(info: ModelInfo) -> FoundRepository:
    data = info.card_data
    models: Any = getattr(data, "base_model", None)
    of_card = list(_texts(getattr(data, "tags", None)))
    return FoundRepository(
        repo_id=info.id,
        kinds=tuple(_kinds(of_card)),
        models=tuple(_texts([models] if isinstance(models, str) else models)),
        sites=tuple(_sites(of_card)),
        revision=info.sha if isinstance(info.sha, str) else None,
        downloads=info.downloads if isinstance(info.downloads, int) else None,
        likes=info.likes if isinstance(info.likes, int) else None,
        updated=None if info.last_modified is None else info.last_modified.isoformat(),
        private=bool(info.private),
        gated=bool(info.gated),
    )


def _texts(values: Any) -> Iterator[str]:
    """Iterate over the texts in what should be a list of them."""
    yield from (value for value in (values if isinstance(values, list) else [])[:MOST_TAGS] if isinstance(value, str))


def _kinds(tags: list[str]) -> Iterator[str]:
    """Iterate over the kinds among the tags of a card, which follow its topic."""
    for tag in tags[tags.index(TOPIC) + 1 :] if TOPIC in tags else []:
        if not KIND.fullmatch(tag):
            return
        yield tag


def _sites(tags: list[str]) -> Iterator[str]:
    """Iterate over the sites among the tags of a card."""
    for tag in tags:
        if tag.startswith(SITE_TAG):
            try:
                yield str(Site.parse(tag.removeprefix(SITE_TAG)))
            except SiteError:
                continue
