"""``config.yaml`` of circuit-tracer: read strictly within bounds, and written."""

from __future__ import annotations

from typing import Any, Literal

import yaml
from featurizers.errors import ManifestError, explain, one_line
from featurizers.files import read_bytes
from featurizers.format import ExternalFiles
from pydantic import BaseModel, ConfigDict, Field, ValidationError

CONFIG = "config.yaml"
MAX_CONFIG_BYTES = 256_000
"""Largest ``config.yaml``: one line of text for each layer is far smaller, and YAML is read slowly."""


class CircuitTracerConfig(BaseModel):
    """Contents of ``config.yaml``; keys that are not listed are kept and not used, as by circuit-tracer.

    Attributes:
        model_kind: ``transcoder_set``, in which each layer has a transcoder of its own, or ``cross_layer_transcoder``.
        feature_input_hook: TransformerLens' name of what features are encoded from, within a block.
        feature_output_hook: name of what they are decoded to.
        model_name: name of the model, on the Hub or of TransformerLens.
        transcoders: files of a set, by layer; None for ``layer_0.safetensors`` and so on.
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())
    model_kind: Literal["transcoder_set", "cross_layer_transcoder"]
    feature_input_hook: str = Field(min_length=1, max_length=200)
    feature_output_hook: str = Field(min_length=1, max_length=200)
    model_name: str | None = Field(None, max_length=500)
    transcoders: list[str] | None = Field(None, min_length=1, max_length=10_000)


class _Loader(yaml.BaseLoader):  # type: ignore[misc]  # PyYAML has no types
    """Loader that makes strings, lists and dicts alone, each as large as its text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node; refuse an alias, with which a short text can stand for an enormous object."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def read_config(source: ExternalFiles) -> tuple[CircuitTracerConfig, dict[str, Any]] | None:
    """Read the config of a folder, checked and as it is; None if it is no config of circuit-tracer.

    Raises:
        ManifestError: the file is too large, not YAML, or not valid.
    """
    raw = read_bytes(source.path(CONFIG, MAX_CONFIG_BYTES), source.where, ManifestError, MAX_CONFIG_BYTES, CONFIG)
    try:
        data = yaml.load(raw.decode("utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ManifestError(source.where, f"{CONFIG} cannot be read: {one_line(error) or 'too deep'}") from error
    if not isinstance(data, dict) or "model_kind" not in data:
        return None
    try:
        return CircuitTracerConfig.model_validate(data), data
    except ValidationError as error:
        raise ManifestError(source.where, f"{CONFIG}: {explain(error)}") from error


def config_text(config: CircuitTracerConfig, others: dict[str, Any]) -> str:
    """Return the text of a ``config.yaml``, with keys that circuit-tracer does not use."""
    text: str = yaml.safe_dump({**others, **config.model_dump(exclude_none=True)}, sort_keys=False)
    return text
