"""A headless Chromium that tests drive through a pipe, without any other package."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Final

import pytest

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
    "--window-size=1400,900",
)
START: Final = """
import os, sys
r, w = map(int, sys.argv[1:3])
os.dup2(r, 3)
os.dup2(w, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
PATIENCE: Final = 120.0
"""Seconds after which an answer is given up."""


class Tab:
    """One page, open in the browser.

    Attributes:
        problems: what the page complained of: exceptions, and violations of its policy.
        requests: addresses that it asked for.
    """

    def __init__(self, to: int, answers: Queue[dict[str, Any]]) -> None:
        self._to, self._answers, self._count, self._session = to, answers, 0, ""
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol, and note events until it answers."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            try:
                answer = self._answers.get(timeout=PATIENCE)
            except Empty:
                raise TimeoutError(f"the browser did not answer {method}") from None
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if event == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        if event == "Log.entryAdded":
            self.problems.append(params["entry"]["text"])

    def open(self, path: Path) -> None:
        """Open a file, and wait until its script has run."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.until("document.documentElement && document.documentElement.dataset.ready")

    def until(self, condition: str) -> None:
        """Wait until an expression of JavaScript is true; fail if it is not within the time of `PATIENCE`."""
        end = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < end, f"this did not come about: {condition}; problems: {self.problems}"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """Return the value of an expression of JavaScript, which may be a promise."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, selector: str) -> None:
        """Scroll to the first element that a selector finds, let the page react to that, and click into its middle."""
        find = f"document.querySelector({json.dumps(selector)})"
        scroll = f'{find}.scrollIntoView({{block: "center", inline: "center"}})'
        settled = "await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        middle = f"const r = {find}.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
        script = f"(async () => {{ {scroll}; {settled}; {middle}; }})()"
        x, y = self.run(script)
        for event in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", clickCount=1)

    def press(self, *keys: str) -> None:
        """Press keys by their names, such as ``Enter``, ``ArrowDown`` or ``p``."""
        texts = {"Enter": "\r", " ": " "}
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for key in keys:
            text = texts.get(key, key if len(key) == 1 else "")
            code = codes.get(key, ord(key.upper()) if len(key) == 1 else 0)
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def write(self, text: str) -> None:
        """Type a text where the focus is."""
        self.call("Input.insertText", text=text)


def _high(descriptor: int) -> int:
    """Move a descriptor out of the way of 3 and 4, which the browser uses."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20)
    os.close(descriptor)
    return moved


@contextmanager
def browser() -> Iterator[Tab]:
    """Start a browser and yield its page; skip the test where none is installed."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no Chromium on this machine")
    ends = [_high(end) for pair in (os.pipe(), os.pipe()) for end in pair]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [sys.executable, "-c", START, str(ends[0]), str(ends[3]), found, *OPTIONS, f"--user-data-dir={profile}"]
        log = subprocess.DEVNULL
        process = subprocess.Popen([*words, "about:blank"], pass_fds=(ends[0], ends[3]), stdout=log, stderr=log)
        os.close(ends[0])
        os.close(ends[3])
        answers: Queue[dict[str, Any]] = Queue()
        threading.Thread(target=_listen, args=(ends[2], answers), daemon=True).start()
        try:
            yield Tab(ends[1], answers)
        finally:
            process.kill()
            process.wait()
            os.close(ends[1])


def _listen(descriptor: int, answers: Queue[dict[str, Any]]) -> None:
    with open(descriptor, "rb", buffering=0) as file:
        rest = b""
        while piece := file.read(2**16):
            *whole, rest = (rest + piece).split(b"\0")
            for message in whole:
                answers.put(json.loads(message))
