"""Grammar of the names of plugins and kinds, and the distributions that own this project's kinds."""

from __future__ import annotations

import re
from typing import NamedTuple

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
KIND = re.compile(rf"{NAME.pattern}(\.{NAME.pattern})?")
COMMAND = KIND
"""Name of an entry point of a command: ``train``, or with its group ``fit.causal-basis``."""

# A pip command is printed only for this project's own distributions, never for a name from a file.
FIRST_PARTY = {
    "autoencoder": "featurizers-autoencoder",
    "causal-basis": "featurizers-causal-basis",
    "causalab": "featurizers-causalab",
    "circuit-tracer": "featurizers-circuit-tracer",
    "control-vectors": "featurizers-control-vectors",
    "derived-scalars": "featurizers-derived-scalars",
    "dictionary-learning": "featurizers-dictionary-learning",
    "evaluate": "featurizers-evaluate",
    "graphs": "featurizers-graphs",
    "harvest": "featurizers-harvest",
    "identity": "featurizers-identity",
    "interp-engine": "featurizers-interp-engine",
    "llamascopium": "featurizers-llamascopium",
    "new-plugin": "featurizers-new-plugin",
    "nnsight": "featurizers-nnsight",
    "patching": "featurizers-patching",
    "pyvene": "featurizers-pyvene",
    "sae-lens": "featurizers-sae-lens",
    "sharded": "featurizers-sharded",
    "sparsify": "featurizers-sparsify",
    "standardize": "featurizers-subspace",
    "subspace": "featurizers-subspace",
    "training": "featurizers-training",
    "transcoder": "featurizers-transcoder",
    "transformer-debugger": "featurizers-transformer-debugger",
    "transformer-lens": "featurizers-transformer-lens",
    "vllm": "featurizers-vllm",
}
# Plugins of this project for a library that holds models: named after the package of that library.
HOLDERS = ("interp-engine", "nnsight", "transformer-lens")
# Kinds of this project's distributions, by plugin; a plugin that is not here provides none.
KINDS = {
    "causal-basis": ("causal-basis",),
    "composition": ("composition",),
    "derived-scalars": ("derived-scalars.diagonal",),
    "dictionary": ("dictionary",),
    "identity": ("identity",),
    "llamascopium": ("llamascopium.glu", "llamascopium.lorsa"),
    "sae-lens": ("sae-lens.matching-pursuit", "sae-lens.temporal"),
    "standardize": ("standardize",),
    "subspace": ("subspace",),
    "transcoder": ("transcoder", "transcoder.cross-layer", "transcoder.crosscoder"),
}


class Command(NamedTuple):
    """Command of one of this project's plugins, as it is listed without importing the plugin.

    Attributes:
        plugin: adds the command.
        requirement: what pip installs for it.
        help: first line of its help.
    """

    plugin: str
    requirement: str
    help: str


GROUPS = {"fit": "Fit featurizers to a model.", "harvested": "Read a harvest: index, contexts, exports."}
COMMANDS = {
    "fit.causal-basis": Command(
        "causal-basis",
        "featurizers-causal-basis",
        "Find the directions of some layers whose ablation moves the output most, and save them.",
    ),
    "scalars": Command(
        "derived-scalars",
        "featurizers-derived-scalars",
        "Show the largest scalars of a prompt: direct effects, attributions, norms, edges, of heads, neurons, "
        "features.",
    ),
    "graph": Command(
        "graphs",
        "featurizers-graphs",
        "Trace which features of transcoders bring about the next token of a prompt, and write a page of them.",
    ),
    "harvest": Command(
        "harvest",
        "featurizers-harvest",
        "Write the features of artefacts on a corpus, or activations, to Parquet files; called again it goes on.",
    ),
    "harvested.index": Command(
        "harvest",
        "featurizers-harvest",
        "Build the index by feature: where each feature is not 0, the largest values first.",
    ),
    "harvested.contexts": Command(
        "harvest",
        "featurizers-harvest",
        "Print the tokens at which a feature is largest, with those around; the index is built at the first call.",
    ),
    "harvested.export": Command("harvest", "featurizers-harvest", "Write a harvest as the files of SAELens or delphi."),
    "patch": Command(
        "patching",
        "featurizers-patching",
        "Patch activations of one prompt into another, site by site and token by token, and show where it matters.",
    ),
    "train": Command(
        "training",
        "featurizers-training",
        "Find the features of some sites whose interchange gives the counterfactual answers, and save them.",
    ),
    "evaluate": Command(
        "evaluate",
        "featurizers-evaluate",
        "Measure an artefact on documents: reconstruction, sparsity, effect on the model; or its accuracy on pairs.",
    ),
    "compare": Command(
        "evaluate",
        "featurizers-evaluate",
        "Measure several artefacts on the same documents: one table and one picture.",
    ),
    "labels": Command(
        "evaluate",
        "featurizers-evaluate",
        "Import what Neuronpedia or delphi says that features mean, and save it with the artefact.",
    ),
    "report": Command(
        "evaluate",
        "featurizers-evaluate",
        "Write one page that shows each feature: contexts, densities, effects on the logits, neighbours.",
    ),
    "sweep": Command(
        "training",
        "featurizers-training",
        "Search layers × positions by several methods, beside baselines and controls; write a table and a heat map.",
    ),
    "new-plugin": Command(
        "new-plugin",
        "featurizers-new-plugin",
        "Write the distribution of a new kind of featurizer: a class, tests and metadata, ready to install.",
    ),
    "demo": Command(
        "training",
        "featurizers[demo]",
        "Find a causal variable in a language model, layer by layer, and save it as a featurizer.",
    ),
}
# No other distribution may provide these.
OWNERS = {**FIRST_PARTY, "composition": "featurizers", "dictionary": "featurizers", "reference": "featurizers"}


def same_project(name: str, other: str) -> bool:
    """Return whether two names of distributions are of one project, as pip compares them."""
    first, second = (re.sub(r"[-_.]+", "-", each).lower() for each in (name, other))
    return first == second


def install_command(kind: str) -> str | None:
    """Return the pip command for a first-party kind, None for any other."""
    distribution = FIRST_PARTY.get(kind.partition(".")[0])
    return distribution and f"pip install {distribution}"


def install_hint(kind: str) -> str:
    """Return a sentence that says how to install the plugin of a kind."""
    command = install_command(kind)
    return f"Install it with: {command}." if command else "Install the package of its author."
