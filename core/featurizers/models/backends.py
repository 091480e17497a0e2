"""`Backend`: what the core must know of the way in which a library holds a model.

A model of torch is called and hooked as it is. Other libraries wrap a model in an object of their own, call it with
other arguments, or name its parts otherwise. The plugin of such a library returns a `Backend` from its hook
``featurizers_backend``; `backend_of` finds it by the class of the object that the user gives. `Anatomy` asks the
backend first and the model's own modules after it, so that every function that takes a model takes such an object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol, runtime_checkable

from torch import nn

from featurizers.errors import PluginError, UsageError, shown
from featurizers.format.sites import Site
from featurizers.models.compilation import refuse_compiled_caller
from featurizers.models.places import Place
from featurizers.registry.plugin_host import host


@runtime_checkable
class Backend(Protocol):
    """Holder of one model, as its library makes it. Derive from `NativeBackend`, and replace what differs.

    Attributes:
        module: the module that the user's calls run, and whose modules take the hooks.
        model: the model of `transformers` inside it, or ``module`` itself: its config, its weights and its name on the
            Hub are those that artefacts and passports are compared with.
        argument_names: names that arguments of `transformers` have in ``module.forward``, where they have others:
            ``{"input_ids": "input"}``.
    """

    module: nn.Module
    model: nn.Module
    argument_names: Mapping[str, str]

    def parse(self, text: str) -> Site | None:
        """Return the site that the library calls by this name; None for any other text.

        Raises:
            SiteError: the library has the name, and none of our sites is the same.
        """

    def place(self, site: Site) -> Place | None:
        """Return where a site is; None to look for it among the modules of ``module``, as in any model.

        Raises:
            SiteError: the model does not have the site.
        """

    def other_coordinates(self, site: Site) -> str | None:
        """Return how the activations at a site differ from those of the original model, and what to do instead.

        None if they are the same. The text follows "SITE: " in a `SiteError`. Sites of the kind ``module`` are not
        asked about: they name a module of this very object.
        """

    def watched(self) -> Sequence[nn.Module] | None:
        """Return the modules from ``module`` down to the one that is called with the cache, both included.

        They are watched for token ids, masks and caches. None to find them as in any model.
        """

    def prepared(self) -> AbstractContextManager[Any]:
        """Return a context that lasts as long as hooks are on the model.

        For checks and hooks of the library's own: it may raise a `FeaturizerError` when it is entered.
        """


class NativeBackend:
    """A torch module that is called and hooked as it is: the backend of models of `transformers`.

    Args:
        module: that is called.
        model: the model of `transformers` inside it; None for the module itself.
    """

    argument_names: Mapping[str, str] = {}

    def __init__(self, module: nn.Module, model: nn.Module | None = None) -> None:
        self.module = module
        self.model: nn.Module = module if model is None else model

    def parse(self, text: str) -> Site | None:
        """Return None: there are no other names of sites."""
        return None

    def place(self, site: Site) -> Place | None:
        """Return None: sites are found among the modules."""
        return None

    def other_coordinates(self, site: Site) -> str | None:
        """Return None: the activations are the model's own."""
        return None

    def watched(self) -> Sequence[nn.Module] | None:
        """Return None: the decoder is found among the modules."""
        return None

    def prepared(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing."""
        return nullcontext()


def backend_of(model: object) -> Backend:
    """Return the backend of a model.

    Args:
        model: a torch module, or an object of a library whose plugin knows it.

    Raises:
        UsageError: it is no torch module, and no plugin knows it; it runs copies of a model; or the caller is compiled.
        MissingDependencyError: it belongs to a library whose plugin is not installed.
        PluginError: the plugin fails, or returns something else.
        FeaturizerError: the plugin refuses the model.
    """
    refuse_compiled_caller()
    found = host().backend(model)
    if found is not None:
        return _checked(found, model)
    if not isinstance(model, nn.Module):
        raise UsageError(_no_module(model))
    if isinstance(model, nn.DataParallel):
        raise UsageError(
            "DataParallel runs copies of the model at once, each on a part of the batch, so that positions and sources "
            "are not known; pass model.module, which runs whole batches"
        )
    return NativeBackend(model)


def check_part(model: nn.Module, part: nn.Module) -> None:
    """Let the library that a part of a model belongs to refuse the model.

    Some libraries replace modules inside a model, and the user may have kept the model itself.

    Args:
        model: whose own class belongs to no plugin.
        part: one of its modules.

    Raises:
        FeaturizerError: as `backend_of`.
    """
    host().backend(model, part)


def _checked(found: object, model: object) -> Backend:
    if not isinstance(found, Backend):
        raise PluginError(
            f"a featurizers_backend returns {shown(found)} for {type(model).__name__}, which is no "
            "featurizers.models.Backend; upgrade or uninstall that plugin"
        )
    if not isinstance(found.module, nn.Module) or not isinstance(found.model, nn.Module):
        raise PluginError(
            f"a featurizers_backend returns a backend of {type(model).__name__} whose module or model is no torch "
            "module; upgrade or uninstall that plugin"
        )
    return found


_HELD_AS: Final = ("_module", "hf_model", "original_model", "model", "module")
"""Attributes under which other libraries keep the model that they hold."""


def _no_module(model: object) -> str:
    """Return that an object is no torch module, and the name of the module that it holds."""
    name = type(model).__name__
    for attribute in _HELD_AS:
        held = getattr(model, attribute, None)
        if isinstance(held, nn.Module):
            return (
                f"the model is a torch module, not {name}, which holds one: pass that {type(held).__name__}, "
                f"model.{attribute}, with its weights loaded"
            )
    return f"the model is a torch module, such as a model of transformers, not {name}"
