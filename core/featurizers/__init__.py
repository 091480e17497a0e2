"""Portable feature spaces for mechanistic interpretability.

A featurizer maps a model's activations into a feature space and back,
``x → (features, error) → x̂``. This package loads one by its id, whoever made it, and
intervenes through it:

    f = featurizers.load("owner/name")
    with featurizers.intervene(model, {f.site: featurizers.Interchange(f, source=other_prompt)}):
        model(**prompt)

Names are imported when they are first used, so that ``import featurizers`` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from featurizers import errors
from featurizers.plugins import PluginInfo, check_plugins, kinds, plugins  # `plugins` is the function, not its module

from featurizers.version import __version__ as __version__

if TYPE_CHECKING:
    from featurizers.composition import compose as compose
    from featurizers.artefact import save as save
    from featurizers.pushing import push_featurizer as push_featurizer
    from featurizers import pyvene as pyvene
    from featurizers.anatomy import Anatomy as Anatomy
    from featurizers.artefact import save_collection as save_collection
    from featurizers.attached import Attached as Attached
    from featurizers.attached import attach as attach
    from featurizers.backend import collect as collect
    from featurizers.backend import intervene as intervene
    from featurizers.converting import convert as convert
    from featurizers.derivatives import Error as Error
    from featurizers.dictionary import DictionaryFeaturizer as DictionaryFeaturizer
    from featurizers.featurizer import Featurizer as Featurizer
    from featurizers.gates import SigmoidGate as SigmoidGate
    from featurizers.hookspecs import hookimpl as hookimpl
    from featurizers.intervenables import load_intervenable as load_intervenable
    from featurizers.intervenables import push_intervenable as push_intervenable
    from featurizers.intervenables import save_intervenable as save_intervenable
    from featurizers.interventions import SavedIntervention as SavedIntervention
    from featurizers.loading import create as create
    from featurizers.loading import list_artefacts as list_artefacts
    from featurizers.loading import load as load
    from featurizers.operations import Ablate as Ablate
    from featurizers.operations import Collect as Collect
    from featurizers.operations import Interchange as Interchange
    from featurizers.operations import Mask as Mask
    from featurizers.operations import Steer as Steer
    from featurizers.pushing import push as push
    from featurizers.rules import activation_rule as activation_rule
    from featurizers.sites import Site as Site



_HOME = {
    "Ablate": "operations",
    "Anatomy": "anatomy",
    "Attached": "attached",
    "Collect": "operations",
    "DictionaryFeaturizer": "dictionary",
    "Error": "derivatives",
    "Featurizer": "featurizer",
    "Interchange": "operations",
    "Mask": "operations",
    "SavedIntervention": "interventions",
    "SigmoidGate": "gates",
    "Site": "sites",
    "Steer": "operations",
    "activation_rule": "rules",
    "attach": "attached",
    "collect": "backend",
    "compose": "composition",
    "convert": "converting",
    "create": "loading",
    "hookimpl": "hookspecs",
    "intervene": "backend",
    "list_artefacts": "loading",
    "load": "loading",
    "load_intervenable": "intervenables",
    "push": "pushing",
    "push_featurizer": "pushing",
    "push_intervenable": "intervenables",
    "save": "artefact",
    "save_collection": "artefact",
    "save_intervenable": "intervenables",
}

__all__ = ["PluginInfo", "__version__", "check_plugins", "errors", "kinds", "plugins", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "pyvene":  # a submodule; needs pyvene
        return importlib.import_module("featurizers.pyvene")
    if name not in _HOME:
        raise AttributeError(f"module 'featurizers' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"featurizers.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
