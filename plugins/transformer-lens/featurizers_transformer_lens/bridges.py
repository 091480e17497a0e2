"""`BridgeBackend`: a TransformerBridge, whose hook points take our hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from featurizers import Site
from featurizers.errors import SiteError
from featurizers.models import Backend, NativeBackend, Place
from torch import nn

from featurizers_transformer_lens.coordinates import what_differs
from featurizers_transformer_lens.filling import refusing_empty_caches
from featurizers_transformer_lens.points import place_of, site_named

PACKAGE = "transformer_lens"


def backend(model: object, part: nn.Module | None) -> Backend | None:
    """Return the backend of a model of TransformerLens; None for other objects.

    Raises:
        SiteError: TransformerLens does not run the model as a torch module, or holds it in a bridge that was not given.
    """
    if part is not None:
        if not isinstance(model, nn.Module) or not _is_of_lens(part):
            return None
        raise SiteError(
            f"the blocks of this {type(model).__name__} belong to a bridge of TransformerLens, which may have "
            "processed its weights; pass the bridge itself, or load the model again with transformers"
        )
    if not isinstance(model, nn.Module) or not _is_of_lens(model):
        return None
    inner: Any = getattr(model, "original_model", None)
    if isinstance(inner, nn.Module):
        return BridgeBackend(model, inner)
    if hasattr(type(model), "original_model"):
        raise SiteError(
            f"this {type(model).__name__} runs its model outside of torch, where hooks do not reach; load it with "
            "TransformerBridge.boot_transformers, or use featurizers-vllm for edits in vLLM"
        )
    return HookedBackend(model)


def _is_of_lens(module: nn.Module) -> bool:
    return any(base.__module__.partition(".")[0] == PACKAGE for base in type(module).__mro__)


class BridgeBackend(NativeBackend):
    """A TransformerBridge and the model of `transformers` that it calls."""

    argument_names: Mapping[str, str] = {"input_ids": "input"}

    def parse(self, text: str) -> Site | None:
        """Return the site that TransformerLens calls by a name, as ``blocks.8.hook_resid_post``.

        Raises:
            SiteError: the bridge has no such hook point.
        """
        return site_named(self.module, text)

    def place(self, site: Site) -> Place | None:
        """Return the hook point of a site.

        Raises:
            SiteError: the bridge does not have it.
        """
        return place_of(self.module, site)

    def other_coordinates(self, site: Site) -> str | None:
        """Return what TransformerLens did to the activations at a site; None if they are the model's own."""
        return what_differs(self.module, site)

    def watched(self) -> Sequence[nn.Module]:
        """Return the bridge, the model that it calls, and the modules in it down to the decoder."""
        return [self.module, *_down_to_decoder(self.model)]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Refuse passes that go on from a cache which TransformerLens did not fill, while the context lasts."""
        with refusing_empty_caches(self.watched()[-1]):
            yield


class HookedBackend(NativeBackend):
    """A HookedTransformer of TransformerLens 3: it holds no model of `transformers`, and changes weights on loading."""

    def other_coordinates(self, site: Site) -> str | None:
        """Return that the activations are not known to be the model's own."""
        return (
            f"{type(self.module).__name__} of TransformerLens folds norms and centres weights when it is loaded, so "
            "that its activations may be in other coordinates than those of the original model; use the model of "
            "transformers, or a TransformerBridge without compatibility mode"
        )


def _down_to_decoder(model: nn.Module) -> list[nn.Module]:
    """Return the modules from a model of `transformers` down to its decoder, both included."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    paths: list[list[nn.Module]] = [[model]]
    for path in paths:
        if path[-1] is decoder:
            return path
        if len(path) < 4:
            paths += [[*path, child] for child in path[-1].children()]
    return [model]
