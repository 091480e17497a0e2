"""Errors of the library. Each class has one cause; each message says what was given, what is allowed and what to do.

Everything that the library raises on purpose is a `FeaturizerError`. The offending values are fields, so that a program
can act on them. Strings from a file or a repository are shown with `repr`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from pydantic import ValidationError

MOST: Final = 1000
"""Largest number of characters of a message, or of a folder's name in it."""


def shown(value: object, most: int = 80) -> str:
    """Return the `repr` of an untrusted value for an error, cut to ``most`` characters.

    Control characters are escaped, so that none reaches a terminal.
    """
    if isinstance(value, str):  # first, so that the repr of an enormous string is never built
        value = value[:most]
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**most else "an enormous number"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def one_line(message: object, most: int = 300) -> str:
    """Return another library's error message on one line, with unprintable characters escaped."""
    return printable(" ".join(str(message)[: 10 * most].split()), most)


def printable(text: str, most: int) -> str:
    """Escape unprintable characters in a text and cut it to ``most`` characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """Return a sentence with the names that are most like an unknown one, at most three.

    Args:
        name: the unknown name.
        known: the names that are allowed.
        otherwise: what to return if none is like it; if empty, a sentence that lists all of them.
    """
    from difflib import get_close_matches

    names = sorted(known)
    by_case = {each.lower(): each for each in names}
    near = get_close_matches(str(name)[:200].lower(), by_case, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(by_case[each]) for each in near)}?"
    return otherwise or f"Known are: {', '.join(names) or 'none'}."


def explain(error: ValidationError) -> str:
    """Return the first five problems that pydantic found, on one line."""
    lines = []
    for detail in error.errors()[:5]:
        path = ".".join(str(part) for part in detail["loc"]) or "it"
        lines.append(f"{shown(path)}: {one_line(detail['msg'])}, got {shown(detail['input'])}")
    return "; ".join(lines)


class FeaturizerError(Exception):
    """Base of every error that this library raises on purpose; its message is printable."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message).replace("\n", " "), 3 * MOST))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle needs: the message and the fields, because most constructors take other arguments."""
        return _unpickled, (type(self), self.args, self.__dict__)


def _unpickled(cls: type[FeaturizerError], args: tuple[Any, ...], fields: dict[str, Any]) -> FeaturizerError:
    error = cls.__new__(cls)
    FeaturizerError.__init__(error, *args)
    error.__dict__.update(fields)
    return error


class CachedCopyWarning(UserWarning):
    """Warning that the Hub could not be reached and a cached copy was used."""


class UsageError(FeaturizerError, ValueError):
    """An argument that has the wrong form."""


class ShapeError(FeaturizerError, ValueError):
    """Tensors, widths or stages that do not fit each other."""


class FeatureIndexError(FeaturizerError, IndexError):
    """A feature index that is out of range, repeated or of the wrong type."""


class PositionError(FeaturizerError, IndexError):
    """A token position that a prompt does not have."""


class BasisError(FeaturizerError, ValueError):
    """A matrix that is not the orthonormal basis it should be."""


class SiteError(FeaturizerError, LookupError):
    """A site that is misspelt or that a model does not have."""


class LoweringError(FeaturizerError, ValueError):
    """An operation is not the same function of each activation vector, so that it has no fixed form."""


class OtherRankError(FeaturizerError):
    """Another of several processes that work together failed, so that this one cannot go on.

    Attributes:
        rank: its number.
    """

    def __init__(self, rank: int, problem: str) -> None:
        self.rank = rank
        super().__init__(f"rank {rank} of the processes failed, so that this one stops too: {problem}")


class ConfigError(FeaturizerError, ValueError):
    """A configuration that a kind refuses."""


class MissingDependencyError(FeaturizerError, ImportError):
    """An optional package that an operation needs.

    Attributes:
        package: name of the missing package.
        command: command that installs it.
    """

    def __init__(self, purpose: str, package: str, command: str) -> None:
        super().__init__(f"{purpose} needs {package}, which cannot be imported. Install it with: {command}")
        self.package: str = package
        self.command: str = command


class PluginError(FeaturizerError):
    """A plugin that cannot be used."""


class UnknownKindError(PluginError, LookupError):
    """A kind of featurizer or of intervention that no installed plugin registers.

    Attributes:
        kind: the requested kind.
        known: the installed kinds.
    """

    def __init__(self, kind: str, known: Iterable[str], hint: str, *, what: str = "featurizer kind") -> None:
        self.kind: str = kind
        self.known: list[str] = sorted(known)
        listed = f"Installed kinds: {', '.join(self.known) or 'none'}."
        near = did_you_mean(kind, self.known, otherwise=listed)
        rest = f"{hint} {near}" if near == listed else f"{near} If not: {hint[:1].lower()}{hint[1:]}"
        super().__init__(f"no installed plugin provides the {what} {shown(kind, 130)}. {rest}")


class PluginConflictError(PluginError):
    """Two distributions that claim one plugin name.

    Attributes:
        name: name of the entry point.
        distributions: distributions that claim it.
    """

    def __init__(self, name: str, distributions: Iterable[str]) -> None:
        self.name: str = name
        self.distributions: list[str] = sorted(distributions)
        super().__init__(
            f"the plugin name {name!r} is claimed by {' and by '.join(self.distributions)}. "
            "Uninstall all but one of them."
        )


class PluginLoadError(PluginError):
    """A plugin that fails while it is imported or registered.

    Attributes:
        name: name of the entry point.
        distribution: the distribution and its version.
    """

    def __init__(self, name: str, distribution: str, reason: str) -> None:
        self.name: str = name
        self.distribution: str = distribution
        super().__init__(
            f"the plugin {name!r} of {distribution} cannot be used: {reason}. "
            "Upgrade or uninstall that distribution; the other plugins still work."
        )


class SourceError(FeaturizerError, ValueError):
    """A source that names neither a folder, nor a repository, nor a catalogue entry, or names two of them."""


class ArtefactError(FeaturizerError):
    """An artefact that cannot be read or written.

    The message is one printable line, whatever the arguments hold.

    Attributes:
        where: the folder, or the repository and its revision.
        problem: description of the problem.
    """

    def __init__(self, where: str, problem: str) -> None:
        self.where: str = printable(where, MOST)
        self.problem: str = one_line(problem, MOST)
        super().__init__(f"{self.where}: {self.problem}")


class ManifestError(ArtefactError, ValueError):
    """A ``config.json`` that does not describe an artefact that this version can read."""


class NotOursError(ManifestError):
    """A ``config.json`` that another library wrote."""


class WeightsError(ArtefactError, ValueError):
    """A ``model.safetensors`` that is damaged or disagrees with the ``config.json`` beside it."""


class ConversionError(ArtefactError, ValueError):
    """A featurizer that the requested format cannot hold."""


class HubError(ArtefactError):
    """A request that the Hugging Face Hub refused or did not answer; ``__cause__`` is the client's own error."""


class HubNotFoundError(HubError, LookupError):
    """A repository, revision or file that does not exist, or that this token may not see.

    Attributes:
        what: which of the three is missing.
    """

    what: Literal["repository", "revision", "file"] = "repository"


class HubAccessError(HubError, PermissionError):
    """A repository that is gated, or a token that lacks the right."""


class HubConflictError(HubError):
    """A push that failed because another push came first."""


class HubOfflineError(HubError, ConnectionError):
    """A file that is not cached while the Hub cannot be reached."""
