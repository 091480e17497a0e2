"""Hooks of the plugin ``transcoder``."""

from __future__ import annotations

from typing import Any

from featurizers.registry import hookimpl

from featurizers_transcoder.kinds import Crosscoder, CrossLayerTranscoder, Transcoder


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kinds."""
    for cls in (Transcoder, CrossLayerTranscoder, Crosscoder):
        register(cls)
