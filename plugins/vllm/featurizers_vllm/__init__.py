"""Edits of features inside vLLM: for each request, in a batch.

A server is told by its operator which sites can be edited and which featurizers a request may name. A request carries
its edits as JSON, which `extra_args` makes of ordinary operations.
"""

from __future__ import annotations

from featurizers_vllm.errors import RequestError, ServerError
from featurizers_vllm.making import extra_args
from featurizers_vllm.settings import Settings

__all__ = ["RequestError", "ServerError", "Settings", "extra_args"]
