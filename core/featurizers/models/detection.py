"""Finds the blocks of a decoder by the names of its modules.

Nothing is cached: each call walks the model again, which takes some ten microseconds, so that the result is right after
blocks were added, removed, replaced or wrapped. For this speed the code reads ``_modules`` directly, which is ten times
as fast as ``named_children()``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from featurizers.format.sites import Blocks
from featurizers.models.projections import input_width

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "ff")
OUT_PROJECTION = ("o_proj", "c_proj", "out_proj", "dense", "wo")
DOWN_PROJECTION = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
EMBEDDING = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module of a path; as ``model.get_submodule``, and faster.

    Raises:
        AttributeError: there is no such module.
    """
    module = model
    for name in path.split(".") if path else ():
        if (child := module._modules.get(name)) is None:
            return model.get_submodule(path)  # some wrappers, such as peft's, forward attributes
        module = child
    return module


def first_child(module: nn.Module, names: Iterable[str]) -> str | None:
    """Return the first of several names that a direct child of a module has, or None."""
    children = module._modules
    for name in names:
        if children.get(name) is not None:
            return name
    return None


def block_lists(model: nn.Module, n_layers: int | None) -> list[str]:
    """Return the paths of the module lists that look like the blocks of a decoder; more than one is ambiguous.

    They are as long as the config says, hold modules of one class with attention or an MLP, and are in no other list.

    Args:
        model: to look at.
        n_layers: number of blocks that its config names.
    """
    lists = [path for path, modules in _outer_lists(model, "") if _are_blocks(modules, n_layers)]
    # a model that sees as well has a second list; the words are in the one beside a token embedding
    beside_words = [path for path in lists if first_child(submodule(model, path.rpartition(".")[0]), EMBEDDING)]
    return beside_words or lists


def blocks_at(model: nn.Module, layers: str) -> Blocks:
    """Return where a list of blocks is, and the parts of its first block."""
    block = submodule(model, f"{layers}.0")
    attention, mlp = first_child(block, ATTENTION), first_child(block, MLP)
    return Blocks(
        decoder=layers.rpartition(".")[0],
        layers=layers,
        attention=attention,
        mlp=mlp,
        out_projection=_projection_in(block, attention, OUT_PROJECTION),
        down_projection=_projection_in(block, mlp, DOWN_PROJECTION),
    )


def join(*parts: str) -> str:
    """Join paths of modules; empty ones are left out."""
    return ".".join(part for part in parts if part)


def _outer_lists(module: nn.Module, path: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the module lists that are in no other list; walking through every block would take long."""
    for name, child in module._modules.items():
        if isinstance(child, nn.ModuleList):
            yield join(path, name), child
        elif child is not None and child._modules:
            yield from _outer_lists(child, join(path, name))


def _are_blocks(modules: nn.ModuleList, n_layers: int | None) -> bool:
    children = modules._modules.values()
    if len(children) != n_layers or len(set(map(type, children))) != 1:
        return False
    first = next(iter(children))
    return first is not None and first_child(first, (*ATTENTION, *MLP)) is not None


def _projection_in(block: nn.Module, part: str | None, names: tuple[str, ...]) -> str | None:
    """Return the path within the block of the first projection inside a part, at any depth, by order of the names."""
    if part is None:
        return None
    paths: dict[str, str] = {}
    _find_projections(submodule(block, part), part, names, paths)
    return next((paths[name] for name in names if name in paths), None)


def _find_projections(module: nn.Module, path: str, names: tuple[str, ...], paths: dict[str, str]) -> None:
    """Add the path of the first projection of each name inside a module; stop at the first of the names."""
    for name, child in module._modules.items():
        if child is None:
            continue
        inside = f"{path}.{name}"
        if name in names and name not in paths and input_width(child) is not None:
            paths[name] = inside
        if child._modules:
            _find_projections(child, inside, names, paths)
        if names[0] in paths:
            return
