"""`Anatomy`: finds the module that a site means in a model, by looking at the model."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn

from featurizers.errors import FeaturizerError, PluginError, SiteError, did_you_mean
from featurizers.format.sites import BLOCK_KINDS, HEAD_KINDS, MODEL_KINDS, Blocks, Side, Site
from featurizers.models.attention_parts import PARTS, Part, find_part
from featurizers.models.backends import Backend, NativeBackend, backend_of, check_part
from featurizers.models.detection import (
    EMBEDDING,
    FINAL_NORM,
    LINEAR_ATTENTION,
    block_lists,
    blocks_at,
    first_child,
    join,
    submodule,
    unwrapped,
    why_missing,
)
from featurizers.models.places import Place
from featurizers.models.projections import input_width
from featurizers.registry.plugin_host import host


class Anatomy:
    """Sites of one model.

    The blocks are found when they are first asked for. Make a new `Anatomy` after the model has changed: that takes
    some microseconds.

    Args:
        model: a decoder of `transformers`, with or without its language-model head; a module that a plugin's
            ``featurizers_anatomy`` hook knows; or an object of another library that holds a model, which a plugin's
            ``featurizers_backend`` hook knows.

    Attributes:
        backend: how the model is held.
        model: the module that is called and takes hooks: ``backend.module``.

    Raises:
        UsageError: the model is no torch module, and no plugin knows it.
        FeaturizerError: the plugin of its library refuses it, fails, or is not installed.

    Examples:
        >>> from transformers import GPT2Config, GPT2Model
        >>> Anatomy(GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=5))).place("attn.z:1:0").path
        'h.1.attn.c_proj'
        >>> Anatomy(GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=5)))  # doctest: +ELLIPSIS
        Anatomy(GPT2Model, 2 layers with resid.pre, resid.post, attn.out, attn.q (2 heads), ...; embed, norm.out)
    """

    def __init__(self, model: object) -> None:
        self.backend: Backend = backend_of(model)
        self.model: nn.Module = self.backend.module
        self._parts: dict[int, Blocks] = {}

    def __repr__(self) -> str:
        """Name the sites of the model, and in how many layers a site is that is not in all of them."""
        name = type(self.model).__name__
        try:
            n_layers = self.n_layers
        except FeaturizerError:
            return f"{type(self).__name__}({name}, no blocks were found; its sites are 'module:PATH:output')"
        sites = []
        for kind in BLOCK_KINDS:
            layers = [layer for layer in range(n_layers) if self._has(Site(kind, layer))]
            details = [] if len(layers) == n_layers else [f"in {len(layers)} of them"]
            if kind in HEAD_KINDS and layers and (heads := self.n_heads(Site(kind, layers[0]))) is not None:
                details.append(f"{heads} heads")
            sites += [f"{kind} ({', '.join(details)})" if details else kind] if layers else []
        once = "".join(f"{'; ' if not number else ', '}{kind}" for number, kind in enumerate(self._once()))
        return f"{type(self).__name__}({name}, {n_layers} layers with {', '.join(sites)}{once})"

    def _once(self) -> list[str]:
        return [kind for kind in MODEL_KINDS if self._has(Site(kind))]

    def _has(self, site: Site) -> bool:
        """Return whether the model has a site."""
        try:
            self.place(site)
        except FeaturizerError:
            return False
        return True

    @functools.cached_property
    def _config(self) -> Any:
        return _text_config(self.backend.model)

    @property
    def width(self) -> int | None:
        """Width of the residual stream, None if the config does not say."""
        width = getattr(self._config, "hidden_size", None)
        return width if isinstance(width, int) else None

    @property
    def blocks(self) -> Blocks:
        """Paths of the blocks and of the parts of the first block; `parts` are those of any block.

        Raises:
            SiteError: no blocks were found.
        """
        return self.parts(0)

    def parts(self, layer: int) -> Blocks:
        """Return paths of the parts of one block. Blocks of a decoder may differ: some are attention, some are not.

        Raises:
            SiteError: no blocks were found.
        """
        found = self._found
        if not isinstance(found, str):
            return found
        if layer not in self._parts:
            self._parts[layer] = blocks_at(self.model, found, layer)
        return self._parts[layer]

    @functools.cached_property
    def _found(self) -> str | Blocks:
        """Path of the blocks; or where a plugin says that they and the parts of all of them are."""
        return self._find_blocks()

    @property
    def _layers_path(self) -> str:
        return self._found if isinstance(self._found, str) else self._found.layers

    @property
    def _decoder_path(self) -> str:
        return self._found.rpartition(".")[0] if isinstance(self._found, str) else self._found.decoder

    @property
    def layers(self) -> nn.Module:
        """List of blocks."""
        return submodule(self.model, self._layers_path)

    @property
    def decoder(self) -> nn.Module:
        """Module that owns the blocks and is called with the attention mask; the model if it has no blocks."""
        return self.watched[-1]

    @property
    def watched(self) -> Sequence[nn.Module]:
        """Modules from the model down to the decoder, both included."""
        if (watched := self.backend.watched()) is not None:
            return watched
        try:
            names = self._decoder_path.split(".") if self._decoder_path else []
        except SiteError:  # module sites need no blocks
            names = []
        return [submodule(self.model, ".".join(names[:depth])) for depth in range(len(names) + 1)]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)  # type: ignore[arg-type]

    def place(self, site: Site | str | None) -> Place:
        """Return the module, side and columns that a site means in this model.

        Args:
            site: a `Site`, its string, or the name that the library of the model has for it.

        Raises:
            SiteError: the model does not have the site, or the site is None; the message names what is missing.
        """
        site = self.site(site)
        if (place := self.backend.place(site)) is not None:
            return place
        if site.kind == "resid.mid":
            return self._middle(site)
        if site.kind in PARTS:
            return self._part(site)
        path, side = self._path(site)
        try:
            module = submodule(self.model, path)
        except AttributeError as error:
            near = did_you_mean(path, dict(self.model.named_modules()), "Its named_modules() lists all.")
            raise SiteError(f"{site}: {type(self.model).__name__} has no module {path!r}. {near}") from error
        self._is_called(site, path, module)
        if site.kind == "mlp.router":
            return self._router(site, path, module)
        return Place(path, module, side, None if site.head is None else self._head(site, site.head, module))

    def site(self, text: Site | str | None) -> Site:
        """Return the site that a text means, if its activations here are those of the original model.

        Raises:
            SiteError: it means none, or its activations are in other coordinates.
        """
        named = self.backend.parse(text) if isinstance(text, str) else None
        site = Site.parse(text) if named is None else named
        if site.kind != "module" and (why := self.backend.other_coordinates(site)) is not None:
            raise SiteError(
                f"{site}: {why}. For a featurizer that was found in this very model, name the module: "
                "'module:PATH:output'"
            )
        return site

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs by the names that the arguments of the model's ``forward`` have."""
        names = self.backend.argument_names
        return {names.get(name, name): value for name, value in inputs.items()}

    def _router(self, site: Site, path: str, module: nn.Module) -> Place:
        """Return the place of a router, with the experts that it chooses from."""
        parts = self.parts(site.layer or 0)
        experts = Site("module", module=join(parts.layers, str(site.layer), parts.experts or ""), side="input")
        tokens = self.place(Site("mlp.in", site.layer))
        return Place(path, module, "output", tokens=tokens, experts=self.place(experts))

    def _part(self, site: Site) -> Place:
        """Return the place of queries, keys or values, or of a head of them."""
        part, attention = self._attention_part(site)
        module = submodule(self.model, path := join(attention, part.projection))
        self._is_called(site, path, module)
        if site.head is not None:
            if site.head >= part.heads:
                raise SiteError(f"{site}: block {site.layer} has {part.heads} such heads, 0 to {part.heads - 1}")
            return Place(path, module, "output", part.of_head(site.head))
        whole = part.groups == 1 and part.columns == slice(0, part.stride)
        return Place(path, module, "output", None if whole else part.columns, part.groups)

    def _attention_part(self, site: Site) -> tuple[Part, str]:
        """Return where queries, keys or values are in the attention of a block, and the path of this attention."""
        path, _ = self._path(site)
        inside, wrapped = unwrapped(submodule(self.model, path))
        try:
            name = (self.parts(site.layer or 0).attention or "").rpartition(".")[2]
            return find_part(inside, name, site.kind, self._config), join(path, wrapped)
        except SiteError as error:
            raise SiteError(f"{site}: {error}. {_HELP}") from None

    def _middle(self, site: Site) -> Place:
        """Return the place of the stream between attention and MLP: what attention adds, and what it is added to."""
        self._path(Site("resid.pre", site.layer))  # raises if there is no such block
        parts = self.parts(site.layer or 0)
        if not parts.stream_reader or not parts.attention_added or not parts.middle_reader:
            raise SiteError(
                f"{site}: the norms around attention were not found in block {site.layer} of "
                f"{type(self.model).__name__}, or attention and MLP are parallel. {_HELP}"
            )
        block = join(parts.layers, str(site.layer))
        added, stream, reader = (
            Site("module", module=join(block, name), side=side)  # type: ignore[arg-type]
            for name, side in (
                (parts.attention_added, "output"),
                (parts.stream_reader, "input"),
                (parts.middle_reader, "input"),
            )
        )
        return replace(self.place(added), stream=self.place(stream), sum_reader=self.place(reader))

    def pyvene_component(self, site: Site | str) -> str:
        """Return a site in the form of a module path of pyvene: ``model.layers[8].output``.

        Raises:
            SiteError: the model does not have the site, or it is a head or another part of what a module returns.
        """
        place = self.place(site := self.site(site))
        if place.stream is not None:
            raise SiteError(f"{site}: it is the sum of two places, which pyvene has no component for")
        if place.experts is not None:
            raise SiteError(f"{site}: the experts are chosen anew after an edit, which pyvene does not do")
        if place.columns is not None:
            what = "part of a module's output" if site.head is None else "a head"
            raise SiteError(f"{site}: it is {what}; pyvene selects heads by its unit 'h', not by a module path")
        parts = place.path.split(".")
        indexed = "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in parts).lstrip(".")
        return f"{indexed}.{place.side}"

    def _path(self, site: Site) -> tuple[str, Side]:
        if site.module is not None and site.side is not None:
            return site.module, site.side
        if site.layer is None:
            names = EMBEDDING if site.kind == "embed" else FINAL_NORM
            decoder = submodule(self.model, self._decoder_path)
            if (name := first_child(decoder, names)) is None:
                raise SiteError(f"{site}: no such module was found in {type(decoder).__name__}. {_HELP}")
            return join(self._decoder_path, name), "output"
        if site.layer >= (n_layers := self.n_layers):
            raise SiteError(f"{site}: {type(self.model).__name__} has {n_layers} layers, 0 to {n_layers - 1}")
        if site.kind.startswith("resid"):
            path = join(self._layers_path, str(site.layer))
            return path, "input" if site.kind == "resid.pre" else "output"
        parts = self.parts(site.layer)
        within, side = {
            "attn.out": (parts.attention, "output"),
            **dict.fromkeys(PARTS, (parts.attention, "output")),
            "attn.z": (parts.out_projection, "input"),
            "mlp.in": (parts.mlp, "input"),
            "mlp.out": (parts.mlp, "output"),
            "mlp.act": (parts.down_projection, "input"),
            "mlp.router": (parts.router if parts.experts else None, "output"),
        }[site.kind]
        if within is None:
            block = type(unwrapped(self.layers[site.layer])[0]).__name__  # type: ignore[index]
            why = why_missing(self.model, parts.layers, site.layer, site.kind)
            raise SiteError(f"{site}: no such part was found in {block}: {why}. {_HELP}")
        return join(parts.layers, str(site.layer), within), side  # type: ignore[return-value]

    def n_heads(self, site: Site) -> int | None:
        """Return the number of heads at a site, or None if they cannot be told apart."""
        try:
            if site.kind in PARTS:
                return self._attention_part(site)[0].heads
            self.place(replace(site, head=0))
        except SiteError:
            return None
        return int(self._config.num_attention_heads)

    def _head(self, site: Site, head: int, projection: nn.Module) -> slice:
        width, heads = input_width(projection), getattr(self._config, "num_attention_heads", None)
        if width is None or not isinstance(heads, int) or width % heads:
            raise SiteError(f"{site}: the heads of {type(self.model).__name__} cannot be told apart. {_HELP}")
        attention = self.parts(site.layer).attention  # type: ignore[arg-type]
        if attention is not None and attention.rpartition(".")[2] in LINEAR_ATTENTION:
            raise SiteError(
                f"{site}: block {site.layer} has {attention!r} in the place of attention, and the config does not "
                f"count its heads; take all of 'attn.z:{site.layer}'"
            )
        if head >= heads:
            raise SiteError(f"{site}: {type(self.model).__name__} has {heads} heads, 0 to {heads - 1}")
        size = width // heads
        return slice(head * size, (head + 1) * size)

    def _is_called(self, site: Site, path: str, module: nn.Module) -> None:
        """Raise an error for a module whose hooks never run."""
        if isinstance(module, torch.jit.ScriptModule):
            raise SiteError(
                f"{site}: {path!r} was compiled by torch.jit, which takes no hooks; "
                "use the model as it was before torch.jit"
            )
        if type(module).forward is nn.Module.forward and "forward" not in vars(module):
            parts = ", ".join(map(repr, module._modules)) or "no modules"
            raise SiteError(f"{site}: {type(module).__name__} {path!r} is never called; it holds {parts}. {_HELP}")

    def _find_blocks(self) -> str | Blocks:
        try:
            if (blocks := host().anatomy(self.model)) is not None:
                return blocks
        except PluginError as error:
            if not (lists := self._lists()):
                raise
            warnings.warn(f"{error} The blocks of the model were found without it.", stacklevel=2)
        else:
            lists = self._lists()
        if not lists:
            host().load_all()
            if (blocks := host().anatomy(self.model)) is not None:
                return blocks
            self._refuse(f"no list of {getattr(self._config, 'num_hidden_layers', '?')} blocks was found")
        if len(lists) > 1:
            self._refuse(f"several lists look like its blocks: {', '.join(lists)}")
        if type(self.backend) is NativeBackend:
            check_part(self.model, submodule(self.model, f"{lists[0]}.0"))
        return lists[0]

    def _lists(self) -> list[str]:
        return block_lists(self.model, getattr(self._config, "num_hidden_layers", None))

    def _refuse(self, problem: str) -> NoReturn:
        held = self.model._modules.get("module")  # as in wrappers of torch for several processes
        way_out = "" if held is None else f"Pass the {type(held).__name__} that it wraps, model.module. "
        raise SiteError(f"{type(self.model).__name__}: {problem}. {way_out}{_HELP}")


_text_configs: WeakKeyDictionary[nn.Module, tuple[Any, Any]] = WeakKeyDictionary()
"""By model, its config and the part of it that describes the decoder, which takes long to look for."""


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    whole, text = _text_configs.get(model, (None, None))
    if whole is not config or (text is not config and not any(each is text for each in vars(config).values())):
        text = config.get_text_config()
        _text_configs[model] = config, text
    return text


_HELP = "Name the module itself, as in 'module:PATH:output', or write a plugin with the hook featurizers_anatomy."
