"""Requests to the Hub with a time limit, and the errors of huggingface_hub as errors of this library."""

from __future__ import annotations

import contextvars
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from featurizers.errors import (
    FeaturizerError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubOfflineError,
    one_line,
)

TIMEOUT: Final = 10.0
"""Seconds that a single request to the Hub may take."""
DEADLINE: Final = 60.0
"""Seconds that a call may take that makes several requests, or that the client retries."""
LONGEST: Final = 7 * 86_400.0
"""Seconds that a transfer of any size may take."""
SLOWEST: Final = 50_000
"""Lowest rate of a transfer, in bytes per second."""

MOST_SAID: Final = 4000
"""Characters of an error of huggingface_hub that are looked at; a Hub may send any number."""

Result = TypeVar("Result")


def transfer_time(size: int | None) -> float:
    """Return the seconds that a transfer may take, from its size in bytes."""
    return min(DEADLINE + (size or 0) / SLOWEST, LONGEST)


def within(seconds: float, where: str, call: Callable[[], Result], late: str = "") -> Result:
    """Run a call in a daemon thread and return its result; raise if it takes longer than ``seconds``.

    The client itself has no limit: some of its calls have no timeout, it waits as long as a server tells it to, and a
    byte every nine seconds counts as progress. The thread cannot be cancelled and is abandoned.

    Args:
        seconds: time limit.
        where: name of the repository in errors.
        call: function to run, which uses huggingface_hub.
        late: advice for the error when the time is over.

    Raises:
        HubOfflineError: the time is over.
        HubError: as `translated`.
    """
    results: list[Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised again below, in the calling thread
            failures.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), name="featurizers-hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if not results and not failures:
        raise HubOfflineError(where, f"the Hub took longer than {seconds:.0f} seconds; {late or 'try again later'}")
    with translated(where):
        if failures:
            raise failures[0]
    return results[0]


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn an exception of huggingface_hub into a `HubError`, with the original as its cause."""
    try:
        yield
    except FeaturizerError:
        raise
    except Exception as error:
        raise _translate(error, where) from error


def _translate(error: Exception, where: str) -> FeaturizerError:
    from huggingface_hub import errors as hub

    cause = error
    while isinstance(cause.__cause__, Exception) and (
        type(cause) is ValueError  # a forced download that failed
        or (isinstance(cause, hub.LocalEntryNotFoundError) and hasattr(cause.__cause__, "response"))
    ):
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, hub.GatedRepoError):
        return HubAccessError(where, "the repository is gated; ask for access on its page and log in: hf auth login")
    if isinstance(cause, hub.RepositoryNotFoundError):
        return HubNotFoundError(
            where, "no such repository, or it is private and this token may not see it; log in: hf auth login"
        )
    if isinstance(cause, hub.RevisionNotFoundError):
        unknown = HubNotFoundError(where, "the repository has no such branch, tag or commit")
        unknown.what = "revision"
        return unknown
    if any(base.__name__ == "TransportError" for base in type(cause).__mro__):  # raised by the client's HTTP library
        return HubOfflineError(where, f"the Hub cannot be reached: {type(cause).__name__}: {_message(cause)}")
    if isinstance(cause, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        return HubOfflineError(
            where,
            f"the Hub cannot be reached or may not be asked, and the file is not cached: {_message(cause)}",
        )
    if isinstance(cause, hub.EntryNotFoundError):
        missing = HubNotFoundError(where, f"a file is not in the repository: {_message(cause)}")
        missing.what = "file"
        return missing
    if isinstance(cause, OSError) and cause.filename is not None and status is None:
        return HubError(
            where,
            f"a file cannot be written or read on this machine: {_message(cause)}; set HF_HOME to a folder that this "
            "user may write to, if it is in the Hub's cache",
        )
    if status == 412:
        return HubConflictError(where, "someone else pushed meanwhile; nothing was changed, so try again")
    if status in (401, 403):
        got = ", or got none" if status == 401 else ""
        return HubAccessError(
            where,
            f"the Hub refused this token{got} ({status}): {_message(cause)}; log in with a token that may do this: hf "
            "auth login",
        )
    if status == 429:
        wait = getattr(cause, "response").headers.get("Retry-After")  # noqa: B009  # mypy knows no response
        when = f"in {one_line(wait, 40)} seconds" if wait else "later"
        return HubError(where, f"the Hub is asked too often (429); try again {when}, or log in: hf auth login")
    if isinstance(cause, hub.HFValidationError):
        return HubError(where, f"not a valid repository or file name: {_message(cause)}")
    return HubError(where, f"the Hub could not be used: {type(cause).__name__}: {_message(cause)}")


def _message(error: Exception) -> str:
    """Return the client's message, without signatures in URLs and without its link to a page about HTTP."""
    text = re.sub(r"[^\s']+", lambda word: _without_query(word[0]), str(error)[:MOST_SAID])
    return one_line(re.sub(r"For more information check: \S+", "", text))


def _without_query(word: str) -> str:
    """Return a URL up to its question mark, and any other word unchanged."""
    return word.partition("?")[0] if "://" in word.partition("?")[0] else word
