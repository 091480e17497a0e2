"""Starts a server, and compares what the OpenAI client gets with `featurizers.intervene` on transformers.

    PYTHONPATH=. /tmp/vllm-env/bin/python plugins/vllm/checks/over_http.py FOLDER

FOLDER is that of ``serving.py``, which makes what is served. The exit code is 1 if an answer is wrong.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from featurizers_vllm import extra_args
from openai import BadRequestError, OpenAI
from serving import ENVIRONMENT, Reference, cases, make, prompts

from tests.support.serving import request

SECONDS = 600


def started(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Return a server, once it answers."""
    settings = {"FEATURIZERS_VLLM": str(folder / "settings.json"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    words = [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder / "model"),
        "--served-model-name",
        "tiny",
    ]
    words += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--port", str(port)]
    words += ["--enforce-eager", "--kv-cache-memory-bytes", str(2**28), "--seed", "0", "--return-tokens-as-token-ids"]
    server = subprocess.Popen([sys.executable, *words], env={**os.environ, **ENVIRONMENT, **settings})
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5):
                return server
        except OSError:
            time.sleep(1)
    server.terminate()
    raise SystemExit("the server did not start")


def answer(client: OpenAI, ids: list[int], arguments: dict[str, str], **options: Any) -> list[int]:
    """Return the tokens of a completion."""
    body = (
        {"ignore_eos": True, "vllm_xargs": arguments, **options.pop("body", {})} if arguments else {"ignore_eos": True}
    )
    found = client.completions.create(
        model="tiny", prompt=ids, max_tokens=24, temperature=0, logprobs=1, extra_body=body, **options
    )
    logprobs = found.choices[0].logprobs
    if logprobs is None:
        raise SystemExit("the server returned no log probabilities")
    return [int(token.removeprefix("token_id:")) for token in logprobs.tokens or []]


def compared(client: OpenAI, folder: Path) -> list[bool]:
    """Ask for all cases at once and twice, and compare the answers."""
    reference, asked = Reference(folder), cases(folder)
    names = list(asked) * 2
    ids = prompts(len(asked)) * 2
    arguments = {name: extra_args(operations) if operations else {} for name, operations in asked.items()}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda each: answer(client, each[1], arguments[each[0]]), zip(names, ids, strict=True)))
    right = []
    for name, prompt, found in zip(names, ids, answers, strict=True):
        right.append(found == reference(prompt, asked[name], 24)[0])
        print(f"{'right' if right[-1] else 'WRONG'}: {name}: the tokens of intervene")
    return right


def refused(client: OpenAI) -> list[bool]:
    """Ask for what cannot be served."""
    ids = prompts(1)[0]
    steer = {"featurizer": "owner/relu", "do": "steer", "indices": [1], "delta": 1.0}
    bad: dict[str, tuple[str, dict[str, Any]]] = {
        "no JSON": ("{", {}),
        "no such featurizer": (request({**steer, "featurizer": "owner/other"}), {}),
        "no such position": (request({**steer, "positions": [99]}), {}),
        "a beam search": (request(steer), {"use_beam_search": True, "n": 2}),
    }
    right = []
    for name, (raw, body) in bad.items():
        try:
            answer(client, ids, {"featurizers": raw}, body=body)
            right.append(False)
            print(f"WRONG: {name} is answered")
        except BadRequestError as error:
            right.append(True)
            print(f"right: {name}: {error.status_code} {json.dumps(error.body)}"[:200])
    return right


def main() -> int:
    """Return the exit code."""
    folder = Path(sys.argv[1]).resolve()
    if not (folder / "settings.json").exists():
        make(folder, "LlamaForCausalLM")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = started(folder, port)
    try:
        client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        right = [*compared(client, folder), *refused(client), *compared(client, folder)]
    finally:
        server.terminate()
        server.wait(60)
    print("all right" if all(right) else "FAILED")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
