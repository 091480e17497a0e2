"""Errors of the plugin: a server that must not start, a request that it refuses."""

from __future__ import annotations

from featurizers.errors import FeaturizerError


class ServerError(FeaturizerError, ValueError):
    """A configuration, or a version of vLLM, with which edits would not be right; the server does not start."""


class RequestError(FeaturizerError, ValueError):
    """A request whose edits this server cannot make; it answers 400 and goes on."""
