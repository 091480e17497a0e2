"""How interp-engine holds a model: its eager models have one of transformers, which is called and hooked."""

from __future__ import annotations

import sys

from featurizers import Site, hookimpl
from featurizers.errors import UsageError
from featurizers.models import Backend, NativeBackend


class EagerBackend(NativeBackend):
    """The model of transformers inside an ``EagerModel``, with the names of interp-engine's points for sites."""

    def parse(self, text: str) -> Site | None:
        """Return the site of a point of interp-engine; None for any other text."""
        from featurizers_interp_engine.points import site_of

        return site_of(text)


@hookimpl
def featurizers_backend(model: object) -> Backend | None:
    """Return how a model of interp-engine holds its model; ``None`` for any other object.

    Raises:
        UsageError: the model runs in another process, as those of vLLM do.
    """
    module = sys.modules.get("interp_engine.model")
    if module is not None and isinstance(model, module.EagerModel):
        return EagerBackend(model.hf_model)
    if type(model).__module__.partition(".")[0] == "interp_engine":
        raise UsageError(
            f"{type(model).__name__} runs its model where no hook of this process is called; give it a fixed edit: "
            "featurizers_interp_engine.to_specs(operation), or load the model with backend='eager'"
        )
    return None
