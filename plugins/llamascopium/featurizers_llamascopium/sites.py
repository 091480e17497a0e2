"""Sites of llamascopium's hooks, which are TransformerLens' hooks of a model whose weights it has processed."""

from __future__ import annotations

import re
from typing import Any

from featurizers import Site
from featurizers.format import ExternalFiles
from featurizers_transcoder.hooks import HOOK, NORMS, Read, read_of, site_of

RMS = re.compile(r"gemma|llama|qwen|mistral|deepseek|olmo-?2|phi-?3", re.IGNORECASE)
"""Parts of names of models that normalise by the root mean square."""
CENTRED = (
    "llamascopium reads hooks of TransformerLens, which centres what the blocks of a model with LayerNorm write. If "
    "this model has LayerNorm, as GPT-2 and Pythia have, its own activations differ from these by their mean over the "
    "width, unless the hook is after a norm."
)
VALUE_BIASES = (
    "TransformerLens adds the biases of attention's values to what attention writes, so that its hook_z lacks them: in "
    "a model with such biases, the activations at attn.z differ from these by a constant."
)


class Places:
    """Sites of hooks in the model of a folder.

    Attributes:
        lm_config: contents of ``lm_config.json``, empty without it.
        model: name of the model, None if it is not known.
    """

    def __init__(self, source: ExternalFiles) -> None:
        self.lm_config: dict[str, Any] = source.json("lm_config.json") if "lm_config.json" in source.names else {}
        name = self.lm_config.get("model_name")
        self.model = name if isinstance(name, str) and name else None

    def read(self, hook: str) -> Read:
        """Return what is read at a hook; a read without a site if it is not known."""
        return Read(None) if self._depends_on_model(hook) else read_of(hook, self.model)

    def write(self, hook: str) -> Site | None:
        """Return the site of a hook that is written, None if it is not known."""
        return None if self._depends_on_model(hook) else site_of(hook, self.model)

    def notes(self, hooks: list[str]) -> list[str]:
        """Return notes on hooks whose activations may differ from those of the model."""
        centred = [] if self.model is not None and RMS.search(self.model) else [CENTRED]
        return [*centred, *([VALUE_BIASES] if any(hook.endswith("attn.hook_z") for hook in hooks) else [])]

    def _depends_on_model(self, hook: str) -> bool:
        """Return whether a hook is after a norm in some models, and the model is not known."""
        match = HOOK.fullmatch(hook)
        return self.model is None and match is not None and match[2] in NORMS
