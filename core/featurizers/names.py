"""Grammar of the names of plugins and kinds, and the distributions that own this project's kinds."""

from __future__ import annotations

import re

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
KIND = re.compile(rf"{NAME.pattern}(\.{NAME.pattern})?")

# A pip command is printed only for this project's own distributions, never for a name from a file.
FIRST_PARTY = {
    "autoencoder": "featurizers-autoencoder",
    "causal-basis": "featurizers-causal-basis",
    "causalab": "featurizers-causalab",
    "derived-scalars": "featurizers-derived-scalars",
    "dictionary-learning": "featurizers-dictionary-learning",
    "identity": "featurizers-identity",
    "pyvene": "featurizers-pyvene",
    "sae-lens": "featurizers-sae-lens",
    "sparsify": "featurizers-sparsify",
    "standardize": "featurizers-subspace",
    "subspace": "featurizers-subspace",
    "training": "featurizers-training",
    "transcoder": "featurizers-transcoder",
    "transformer-debugger": "featurizers-transformer-debugger",
}
# Commands of this project's plugins: the plugin that adds each, and what to install for it.
COMMANDS = {
    "demo": ("training", "featurizers[demo]"),
    "evaluate": ("training", "featurizers-training"),
    "scalars": ("derived-scalars", "featurizers-derived-scalars"),
    "sweep": ("training", "featurizers-training"),
    "train": ("training", "featurizers-training"),
}
# No other distribution may provide these.
OWNERS = {**FIRST_PARTY, "composition": "featurizers", "dictionary": "featurizers"}


def install_command(kind: str) -> str | None:
    """Return the pip command for a first-party kind, None for any other."""
    distribution = FIRST_PARTY.get(kind.partition(".")[0])
    return distribution and f"pip install {distribution}"


def install_hint(kind: str) -> str:
    """Return a sentence that says how to install the plugin of a kind."""
    command = install_command(kind)
    return f"Install it with: {command}." if command else "Install the package of its author."
