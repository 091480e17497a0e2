"""How nnsight holds a model, for `featurizers.intervene` and its like: its envoy has a torch module, which takes hooks.

A trace inside such a context sees the edits, but for one place: a value that is read at the output of an edited module
itself is what the module returned, before the edit. `featurizers_nnsight.edit` has no such exception.
"""

from __future__ import annotations

import sys

from featurizers import hookimpl
from featurizers.errors import UsageError
from featurizers.models import Backend, NativeBackend
from torch import nn

from featurizers_nnsight.weights import are_missing


@hookimpl
def featurizers_backend(model: object) -> Backend | None:
    """Return how an envoy of nnsight holds its model; ``None`` for any other object.

    Raises:
        UsageError: the weights are not loaded.
    """
    envoys = sys.modules.get("nnsight.intervention.envoy")
    if envoys is None or not isinstance(model, envoys.Envoy):
        return None
    module: nn.Module = model._module
    if are_missing(module):
        raise UsageError(
            f"the weights of this {type(model).__name__} are not loaded: call its dispatch() first, or make it with "
            "dispatch=True"
        )
    return NativeBackend(module)
