"""`Anatomy`: where a decoder of `transformers` keeps the modules that sites name, found by looking at it."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from featurizers.errors import PluginError, SiteError
from featurizers.format.sites import Blocks, Side, Site
from featurizers.models.projections import input_width
from featurizers.registry.plugin_host import host

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "ff")
OUT_PROJECTION = ("o_proj", "c_proj", "out_proj", "dense", "wo")
DOWN_PROJECTION = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
EMBEDDING = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
RESIDUAL = {"block_input", "block_output", "attention_input", "attention_output", "mlp_input", "mlp_output"}
"""What pyvene calls places that are as wide as the residual stream."""


@dataclass(frozen=True)
class Place:
    """A site in one model.

    Attributes:
        path: the module's name in ``model.named_modules()``.
        module: the module.
        side: whether the activations are its first input or its (first) output.
        columns: the part of the last axis that is the site, for a head.
    """

    path: str
    module: nn.Module
    side: Side
    columns: slice | None = None


class Anatomy:
    """The sites of one model.

    Args:
        model: a decoder of `transformers`, with or without its language-model head, or a module that a plugin's
            ``featurizers_anatomy`` hook knows.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> Anatomy(GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=5))).place("attn.z:1:0").path
        'h.1.attn.c_proj'
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._config = _text_config(model)

    @functools.cached_property
    def blocks(self) -> Blocks:
        """Where the model keeps its blocks.

        Raises:
            SiteError: they cannot be found.
        """
        return self._find_blocks()

    @property
    def layers(self) -> nn.Module:
        """The list of blocks."""
        return self.model.get_submodule(self.blocks.layers)

    @property
    def decoder(self) -> nn.Module:
        """The module that owns the blocks and is called with the attention mask; the model if none are found."""
        try:
            return self.model.get_submodule(self.blocks.decoder)
        except SiteError:  # module sites need no blocks
            return self.model

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)  # type: ignore[arg-type]

    def place(self, site: Site | str) -> Place:
        """The module, side and columns that a site means in this model.

        Raises:
            SiteError: the model does not have it; the message names what is missing.
        """
        site = Site.parse(site)
        path, side = self._path(site)
        try:
            module = self.model.get_submodule(path)
        except AttributeError as error:
            raise SiteError(f"{site}: {type(self.model).__name__} has no module {path!r}") from error
        return Place(path, module, side, None if site.head is None else self._head(site, site.head, module))

    def pyvene_component(self, site: Site | str) -> str:
        """The site as pyvene writes a module path: ``model.layers[8].output``."""
        place = self.place(site)
        if place.columns is not None:
            raise SiteError(f"{site}: pyvene selects a head by its unit 'h', not by a module path")
        parts = place.path.split(".")
        indexed = "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in parts).lstrip(".")
        return f"{indexed}.{place.side}"

    def residual_width(self, component: str) -> int | None:
        """Width of the residual stream, if a component of pyvene's is known to be as wide; None if it is not."""
        path = re.sub(r"\[(\d+)\]", r".\1", component.rpartition(".")[0])
        if component not in RESIDUAL:
            try:
                blocks = self.blocks
            except (SiteError, PluginError):
                return None
            parts = "".join(rf"|\.{re.escape(part)}" for part in (blocks.attention, blocks.mlp) if part)
            if not re.fullmatch(rf"{re.escape(blocks.layers)}\.\d+({parts})", path):
                return None
        width = getattr(self._config, "hidden_size", None)
        return width if isinstance(width, int) else None

    def _path(self, site: Site) -> tuple[str, Side]:
        if site.module is not None and site.side is not None:
            return site.module, site.side
        if site.layer is None:
            names = EMBEDDING if site.kind == "embed" else FINAL_NORM
            return _join(self.blocks.decoder, self._child(self.decoder, names, site.kind)), "output"
        if site.layer >= self.n_layers:
            raise SiteError(f"{site}: {type(self.model).__name__} has {self.n_layers} layers, 0 to {self.n_layers - 1}")
        within, side = {
            "resid.pre": ("", "input"),
            "resid.post": ("", "output"),
            "attn.out": (self.blocks.attention, "output"),
            "attn.z": (self.blocks.out_projection, "input"),
            "mlp.out": (self.blocks.mlp, "output"),
            "mlp.act": (self.blocks.down_projection, "input"),
        }[site.kind]
        if within is None:
            block = type(self.layers[site.layer]).__name__  # type: ignore[index]
            raise SiteError(f"{site}: no such part was found in {block}. {_HELP}")
        return _join(self.blocks.layers, str(site.layer), within), side  # type: ignore[return-value]

    def _head(self, site: Site, head: int, projection: nn.Module) -> slice:
        width, heads = input_width(projection), getattr(self._config, "num_attention_heads", None)
        if width is None or not isinstance(heads, int) or width % heads:
            raise SiteError(f"{site}: the heads of {type(self.model).__name__} cannot be told apart. {_HELP}")
        if head >= heads:
            raise SiteError(f"{site}: {type(self.model).__name__} has {heads} heads, 0 to {heads - 1}")
        size = width // heads
        return slice(head * size, (head + 1) * size)

    # ---- finding the blocks

    def _find_blocks(self) -> Blocks:
        layers = self._layers_path()
        try:
            if (found := host().anatomy(self.model)) is not None:
                return found
        except PluginError as error:
            if layers is None:
                raise
            warnings.warn(f"{error} The blocks of the model were found without it.", stacklevel=2)
        if layers is None:
            host().load_all()
            if (found := host().anatomy(self.model)) is not None:
                return found
            self._refuse(f"no list of {getattr(self._config, 'num_hidden_layers', '?')} blocks was found")
        block = self.model.get_submodule(layers)[0]  # type: ignore[index]
        attention = _first_child(block, ATTENTION)
        out = _first_descendant(block, attention, OUT_PROJECTION)
        mlp = _first_child(block, MLP)
        return Blocks(
            decoder=layers.rpartition(".")[0],
            layers=layers,
            attention=attention,
            mlp=mlp,
            out_projection=out,
            down_projection=_first_descendant(block, mlp, DOWN_PROJECTION),
        )

    def _layers_path(self) -> str | None:
        count = getattr(self._config, "num_hidden_layers", None)
        found = [
            name
            for name, module in _lists(self.model)
            if len(module) == count
            and len({type(block) for block in module}) == 1
            and _first_child(module[0], (*ATTENTION, *MLP))
        ]
        # A model that sees as well has a second list; the words are in the one beside a token embedding.
        spoken = [name for name in found if _first_child(self._parent(name), EMBEDDING)]
        found = spoken or found
        if len(found) > 1:
            self._refuse(f"several lists look like its blocks: {', '.join(found)}")
        return found[0] if found else None

    def _parent(self, path: str) -> nn.Module:
        return self.model.get_submodule(path.rpartition(".")[0])

    def _child(self, module: nn.Module, names: Iterable[str], what: str) -> str:
        if (name := _first_child(module, names)) is None:
            raise SiteError(f"{what}: no such module was found in {type(module).__name__}. {_HELP}")
        return name

    def _refuse(self, problem: str) -> NoReturn:
        raise SiteError(f"{type(self.model).__name__}: {problem}. {_HELP}")


_HELP = "Name the module itself, as in 'module:PATH:output', or write a plugin with the hook featurizers_anatomy."


def _lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost module lists, which is where blocks are; walking through every block takes a while."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield _join(path, name), child
        else:
            yield from _lists(child, _join(path, name))


def first_tensor(output: Any) -> Tensor:
    """The activations in what a module takes or returns: a tensor, or the first of a tuple."""
    tensor = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(tensor, Tensor):
        raise SiteError(f"the site carries {type(output).__name__}, not a tensor of activations; choose another module")
    return tensor


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _first_child(module: nn.Module, names: Iterable[str]) -> str | None:
    children = dict(module.named_children())
    return next((name for name in names if name in children), None)


def _first_descendant(block: nn.Module, part: str | None, names: tuple[str, ...]) -> str | None:
    """Path within the block of the first projection of that name inside a part, at any depth."""
    if part is None:
        return None
    inside = block.get_submodule(part)
    for wanted in names:
        for name, module in inside.named_modules():
            if name.rpartition(".")[2] == wanted and input_width(module) is not None:
                return f"{part}.{name}"
    return None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
