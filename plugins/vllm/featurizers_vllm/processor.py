"""The entry point ``vllm.logits_processors``: it changes no logits, but is how vLLM tells of requests.

vLLM calls it when a request arrives, which it then refuses with HTTP 400, and, on the V1 model runner, when the batch
changes. One class serves both model runners, which call different methods of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from featurizers_vllm import server, v1

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor
except ImportError:  # another version of vLLM, which this package leaves alone unless the operator arms sites
    from vllm.v1.sample.logits_processor import LogitsProcessor


class RequestEdits(LogitsProcessor):  # type: ignore[misc]
    """Tells this package of requests."""

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self._server, self._config = server.of_process(), vllm_config
        if self._server is not None:
            self._server.join(vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise a `RequestError`, which is a ValueError, if a request cannot be served."""
        server.admit(sampling_params.extra_args)

    def update_state(self, batch_update: Any) -> None:
        """Follow a change of the V1 runner's batch."""
        if self._server is not None:
            v1.update(self._server.rows(self._config), self._server.admission, batch_update)

    def is_argmax_invariant(self) -> bool:
        """Return True: no logit changes."""
        return True

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Return False: no logit of the V2 runner's request changes."""
        return False

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Return the logits."""
        return logits
