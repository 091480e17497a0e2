"""Models of vLLM whose decoder layers pass through the banks of the armed sites.

``EditedLlamaForCausalLM`` and its like are made when vLLM asks for them, because only then is vLLM imported.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, Final

from featurizers.format import Site
from torch import Tensor, nn

from featurizers_vllm import server, v1, v2
from featurizers_vllm.architectures import ARCHITECTURES, Architecture
from featurizers_vllm.bank import Bank
from featurizers_vllm.errors import ServerError

PREFIX: Final = "Edited"


def edited(base: type[Any], architecture: Architecture) -> type[Any]:
    """Return a subclass of a model of vLLM whose activations are edited at the armed sites.

    The hooks are there before vLLM compiles the model: a hook that comes later is never called.

    Args:
        base: vLLM's class.
        architecture: where its layers are.
    """

    class Edited(base):  # type: ignore[misc]
        """Model of vLLM whose activations are edited."""

        def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
            running = server.of_process()
            if running is None:
                raise ServerError("vLLM made a model of featurizers-vllm without its plugin")
            self._featurizers_rows = running.build(vllm_config)
            self._featurizers_admission = running.admission
            self._featurizers_by_v1 = not vllm_config.use_v2_model_runner
            for site, bank in self._featurizers_rows.banks.items():
                place(self, site, architecture).register_forward_hook(partial(hook, bank))

        def forward(self, input_ids: Any, positions: Any, *arguments: Any, **options: Any) -> Any:
            """Note which tokens are whose, outside of what is compiled, and run the model."""
            if self._featurizers_by_v1:
                from vllm.forward_context import get_forward_context

                v1.fill(self._featurizers_rows, get_forward_context().attn_metadata, positions, input_ids)
            return super().forward(input_ids, positions, *arguments, **options)

        def get_model_state_cls(self) -> type[Any]:
            """Return the class of state that the V2 model runner makes."""
            from vllm.v1.worker.gpu.model_states.default import DefaultModelState

            return v2.state_class(DefaultModelState, self._featurizers_rows, self._featurizers_admission)

    Edited.__name__ = Edited.__qualname__ = f"{PREFIX}{base.__name__}"
    Edited.__module__ = __name__
    return Edited


def place(model: nn.Module, site: Site, architecture: Architecture) -> nn.Module:
    """Return the module whose output is a site."""
    parts = {"resid.post": "", "attn.out": architecture.attention, "mlp.out": architecture.mlp}
    path = ".".join(filter(None, (architecture.layers, str(site.layer), parts[site.kind])))
    return model.get_submodule(path)


def hook(bank: Bank, _module: nn.Module, _arguments: Any, output: Any) -> Any:
    """Return the edited output of a module: a tensor, or what a layer adds and the stream that it is added to."""
    if isinstance(output, Tensor):
        return bank(output, None)
    hidden, residual = output
    return bank(hidden, residual), residual


def __getattr__(name: str) -> Any:
    architecture = ARCHITECTURES.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if architecture is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(importlib.import_module(architecture.module), name.removeprefix(PREFIX))
    globals()[name] = edited(base, architecture)
    return globals()[name]
