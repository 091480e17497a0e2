"""Questions to the Hub: each has an end, and what huggingface_hub raises becomes one of our errors."""

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
"""Seconds that a question to the Hub may take."""
DEADLINE: Final = 60.0
"""Seconds that a call may take that asks several, or that the client repeats."""
LONGEST: Final = 7 * 86_400.0
"""Seconds that any transfer may take."""
SLOWEST: Final = 50_000
"""Bytes a second that a transfer may not stay below."""

Result = TypeVar("Result")


def transfer_time(size: int | None) -> float:
    """Seconds that a transfer of so many bytes may take."""
    return min(DEADLINE + (size or 0) / SLOWEST, LONGEST)


def within(seconds: float, where: str, call: Callable[[], Result], late: str = "") -> Result:
    """What a call gives, if it comes back in time.

    The client has calls without a limit, waits as long as a server bids it to, and takes a byte every nine seconds for
    progress. The call goes on in a thread that nothing waits for, because nothing can end it.

    Args:
        seconds: that it may take.
        where: what to call the repository in an error.
        call: of huggingface_hub.
        late: what to do when it does not come back.

    Raises:
        HubOfflineError: it did not.
        HubError: as `translated`.
    """
    results: list[Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised again below, where somebody waits for it
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
    """Turn what huggingface_hub raises into one of our errors, with the original as its cause."""
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
    if any(base.__name__ == "TransportError" for base in type(cause).__mro__):  # of the client's own HTTP library
        return HubOfflineError(where, f"the Hub cannot be reached: {type(cause).__name__}: {_said(cause)}")
    if isinstance(cause, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        return HubOfflineError(
            where,
            f"the Hub cannot be reached or may not be asked, and the file is not cached: {_said(cause)}",
        )
    if isinstance(cause, hub.EntryNotFoundError):
        missing = HubNotFoundError(where, f"a file is not in the repository: {_said(cause)}")
        missing.what = "file"
        return missing
    if status == 412:
        return HubConflictError(where, "someone else pushed meanwhile; nothing was changed, so try again")
    if status in (401, 403):
        return HubAccessError(where, f"the Hub refused this token ({status}): {_said(cause)}")
    if status == 429:
        wait = getattr(cause, "response").headers.get("Retry-After")  # noqa: B009  # of the client's own HTTP library
        when = f"in {one_line(wait, 40)} seconds" if wait else "later"
        return HubError(where, f"the Hub is asked too often (429); try again {when}, or log in: hf auth login")
    if isinstance(cause, hub.HFValidationError):
        return HubError(where, f"not a valid repository or file name: {_said(cause)}")
    return HubError(where, f"the Hub could not be used: {type(cause).__name__}: {_said(cause)}")


def _said(error: Exception) -> str:
    """What the client says, without the signatures in its addresses and without its advice to read about HTTP."""
    text = re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", str(error))
    return one_line(re.sub(r"For more information check: \S+", "", text))
