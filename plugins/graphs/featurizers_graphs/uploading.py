"""Upload of a graph to Neuronpedia: its server signs an address, the file goes there, and the server takes it in."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from featurizers.errors import ArtefactError, UsageError, one_line, printable, shown

SERVER: Final = "https://www.neuronpedia.org"
KEY: Final = "NEURONPEDIA_API_KEY"
"""Environment variable that holds a key."""
LEAST, MOST = 1024, 100 * 2**20
"""Bytes that Neuronpedia takes at least and at most."""
MAX_ANSWER: Final = 2**20
SECONDS: Final = 60.0
SLOWEST: Final = 50_000
"""Lowest rate of the upload, in bytes per second."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would carry the key to another server."""

    def redirect_request(self, *args: Any) -> None:
        """Return None, so that the redirect is raised as an error."""


def upload(data: Mapping[str, Any], *, key: str | None = None, server: str = SERVER) -> str:
    """Upload what `to_neuronpedia` returns, and return the address of its page.

    Args:
        data: the graph.
        key: of the account on Neuronpedia; if None, the environment variable ``NEURONPEDIA_API_KEY``.
        server: address of the server.

    Raises:
        UsageError: there is no key, or the graph is too large, or the address of the server is not ``https``.
        ArtefactError: the server refused or did not answer.
    """
    key = key if key is not None else os.environ.get(KEY, "")
    if not key or not (key.isascii() and key.isprintable()):
        raise UsageError(f"an upload needs the key of an account on Neuronpedia: set {KEY}, or give key=")
    _check_address(server, server)
    raw = json.dumps(data, allow_nan=False, separators=(",", ":")).encode().ljust(LEAST)
    if len(raw) > MOST:
        text = f"the graph has {len(raw) / 2**20:.0f} MiB, and Neuronpedia takes {MOST // 2**20}; prune it further"
        raise UsageError(text)
    name = f"{data['metadata']['slug']}.json"
    size = {"filename": name, "contentLength": len(raw), "contentType": "application/json"}
    signed = _post(server, "/api/graph/signed-put", size, key)
    address, request = signed.get("url"), signed.get("putRequestId")
    if not isinstance(address, str) or not isinstance(request, str):
        raise ArtefactError(server, "its answer has no url and putRequestId; was the address right?")
    _check_address(address, server)
    _send(urllib.request.Request(address, raw, {"Content-Type": "application/json"}, method="PUT"), server, len(raw))
    saved = _post(server, "/api/graph/save-to-db", {"putRequestId": request}, key)
    page = saved.get("url")
    if not isinstance(page, str):
        raise ArtefactError(server, f"it took the graph, but named no page of it: {shown(saved.get('error'))}")
    return printable(page, 500)


def _check_address(address: str, server: str) -> None:
    """Raise unless what is sent to an address is encrypted, or stays on this machine."""
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
    except ValueError:
        parts, host = urlsplit(""), ""
    if not host or (parts.scheme != "https" and not (parts.scheme == "http" and host in ("localhost", "127.0.0.1"))):
        raise ArtefactError(server, f"nothing is sent to {shown(address)}, which is no https address")


def _post(server: str, path: str, body: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Send JSON with the key, and return the JSON of the answer."""
    headers = {"Content-Type": "application/json", "x-api-key": key}
    raw = _send(urllib.request.Request(server.rstrip("/") + path, json.dumps(body).encode(), headers), server)
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise ArtefactError(server, f"its answer to {path} is no JSON object")
    return answer


def _send(request: urllib.request.Request, server: str, size: int = 0) -> bytes:
    """Send a request and return the body of the answer.

    Raises:
        ArtefactError: the server refused or did not answer.
    """
    opener = urllib.request.build_opener(_NoRedirects)
    path = urlsplit(request.full_url).path
    try:
        with opener.open(request, timeout=SECONDS + size / SLOWEST) as response:
            raw: bytes = response.read(MAX_ANSWER)
            return raw
    except urllib.error.HTTPError as error:
        with error:
            said = one_line(error.read(2000).decode(errors="replace"), 200)
        reasons = {
            401: "it refused the key",
            403: "it refused the key",
            413: "the graph is too large; prune it further",
            429: "too many uploads today; try again tomorrow",
        }
        reason = reasons.get(error.code, "it refused")
        raise ArtefactError(server, f"{reason} ({error.code}, {printable(path, 100)}): {said}") from None
    except (OSError, ValueError) as error:
        raise ArtefactError(server, f"it cannot be reached: {one_line(getattr(error, 'reason', error))}") from None
