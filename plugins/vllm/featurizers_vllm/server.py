"""`Server`: the one of this process, with the operator's settings, the admission of requests and the worker's rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from featurizers.format import Site

from featurizers_vllm import spec
from featurizers_vllm.admission import Admission
from featurizers_vllm.bank import Bank
from featurizers_vllm.checks import check_engine
from featurizers_vllm.errors import RequestError, ServerError
from featurizers_vllm.rows import Rows
from featurizers_vllm.settings import VARIABLE, Settings

_running: list[Server] = []


@dataclass
class _Engine:
    """An engine in this process.

    Attributes:
        config: kept, so that its identity stays its own.
        is_joined: whether it made a processor of this package.
        rows: of its model, once that is made.
    """

    config: Any
    is_joined: bool = False
    rows: Rows | None = None


class Server:
    """State of one process of vLLM.

    Args:
        settings: of the operator.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._engines: dict[int, _Engine] = {}

    @cached_property
    def admission(self) -> Admission:
        """The featurizers, loaded when they are first needed: a process that only looks at the model needs none."""
        return Admission(self.settings)

    def rows(self, vllm_config: Any) -> Rows:
        """Return the edited requests of an engine.

        Raises:
            RuntimeError: vLLM did not make the model that this package registered.
        """
        engine = self._engines.get(id(vllm_config))
        if engine is None or engine.rows is None:
            raise RuntimeError("vLLM runs another class of model than the one that this package registered")
        return engine.rows

    def join(self, vllm_config: Any) -> None:
        """Check an engine that makes a processor of this package.

        Raises:
            ServerError: edits would not be right there, or it makes a second one.
        """
        check_engine(vllm_config, self.settings)
        engine = self._engines.setdefault(id(vllm_config), _Engine(vllm_config))
        if engine.is_joined:
            raise ServerError(
                "the processor of featurizers-vllm was named twice: vLLM finds it by its entry point; leave it out of "
                "logits_processors"
            )
        engine.is_joined = True

    def build(self, vllm_config: Any) -> Rows:
        """Return the rows of a new model, with a bank for each armed site.

        Raises:
            ServerError: edits would not be right in this engine, or a featurizer does not fit the model.
        """
        check_engine(vllm_config, self.settings)
        width = vllm_config.model_config.get_hidden_size()
        self.admission.check_width(width)
        requests = vllm_config.scheduler_config.max_num_seqs
        banks: dict[Site, Bank] = {}
        for site in self.settings.armed:
            banks[site] = Bank(
                width,
                features=self.settings.features,
                requests=requests,
                tokens=vllm_config.scheduler_config.max_num_batched_tokens,
                stages=self.settings.operations,
                device=torch.device(vllm_config.device_config.device),
            ).eval()
        vllm_config.additional_config["featurizers_vllm"] = self.settings.summary()  # in the key of compiled code
        engine = self._engines.setdefault(id(vllm_config), _Engine(vllm_config))
        engine.rows = Rows(banks, requests)
        return engine.rows


def start(settings: Settings) -> Server:
    """Make the server of this process, or return the one that there is: vLLM may load its plugins several times."""
    if not _running:
        _running.append(Server(settings))
    return _running[0]


def of_process() -> Server | None:
    """Return the server of this process; None if the operator armed nothing.

    Raises:
        ServerError: settings are given, but vLLM did not load the plugin that reads them.
    """
    if not _running and VARIABLE in os.environ:
        raise ServerError(
            f"{VARIABLE} is set, but vLLM did not load the plugin 'featurizers'; name it in VLLM_PLUGINS, or unset one"
        )
    return _running[0] if _running else None


def admit(arguments: Mapping[str, Any] | None) -> None:
    """Check the extra arguments of a request.

    Raises:
        RequestError: its edits cannot be served.
    """
    if spec.given(arguments) is None:
        return
    running = of_process()
    if running is None:
        raise RequestError(f"this server edits no activations: it was started without {VARIABLE}")
    running.admission.of(arguments)
