"""Finds the blocks of a decoder by the names of its modules.

Each call walks the model again, which takes some ten microseconds, so that the result is right after blocks were added,
removed, replaced or wrapped. Only that the modules of a list are blocks is not looked up again while they are the same
modules. For this speed the code reads ``_modules`` directly, which is ten times as fast as ``named_children()``.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Iterator

from torch import nn

from featurizers.format.sites import Blocks
from featurizers.models.projections import input_width

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
LINEAR_ATTENTION = ("linear_attn", "mamba")
"""What blocks of hybrid decoders have in the place of attention; their heads are not those of the config."""
MLP = ("mlp", "feed_forward", "ffn", "ff")
OUT_PROJECTION = ("o_proj", "c_proj", "out_proj", "dense", "wo")
DOWN_PROJECTION = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
NORM_BEFORE_ATTENTION = (
    "input_layernorm",
    "ln_1",
    "ln1",
    "norm1",
    "attention_norm",
    "attn_norm",
    "self_attn_layer_norm",
)
NORM_BEFORE_MLP = ("post_attention_layernorm", "ln_2", "ln2", "norm2", "ffn_norm", "mlp_norm", "final_layer_norm")
"""Names of the norm before the MLP in blocks that have no norms after attention and MLP."""
ROUTER = ("gate", "router")
"""Names of the router of an MLP that has experts."""
EMBEDDING = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
MIXER = ("mixer",)
"""Part of a block that may be anything, as in Mamba: it marks a block and is no site."""
BESIDE_MLP = ("experts", "router", "moe", "block_sparse_moe")
"""Parts of a block that share the work with its MLP (Gemma 4): neither is the whole."""
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where torch's own wrappers keep the module: `torch.compile` and ``checkpoint_wrapper``."""
_OF_BLOCKS, _WRAPPED = frozenset((*ATTENTION, *LINEAR_ATTENTION, *MLP, *MIXER)), frozenset(WRAPPED)
"""The names of which a block has one, and those of `WRAPPED`, to look up many at once."""


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


def blocks_at(model: nn.Module, layers: str, layer: int = 0) -> Blocks:
    """Return where a list of blocks is, and the parts of one of its blocks."""
    block, wrapped = unwrapped(submodule(model, f"{layers}.{layer}"))
    attention, mlp = first_child(block, (*ATTENTION, *LINEAR_ATTENTION)), first_child(block, MLP)
    if first_child(block, BESIDE_MLP) is not None:
        mlp = None
    reader, added, middle = _around_attention(block, attention, mlp)
    out_projection = _projection_in(block, attention, OUT_PROJECTION)
    down_projection = _projection_in(block, mlp, DOWN_PROJECTION)
    router, experts = _routing_in(block, mlp)
    return Blocks(
        decoder=layers.rpartition(".")[0],
        layers=layers,
        attention=attention and join(wrapped, attention),
        mlp=mlp and join(wrapped, mlp),
        out_projection=out_projection and join(wrapped, out_projection),
        down_projection=down_projection and join(wrapped, down_projection),
        stream_reader=reader and join(wrapped, reader),
        attention_added=added and join(wrapped, added),
        middle_reader=middle and join(wrapped, middle),
        router=router and join(wrapped, router),
        experts=experts and join(wrapped, experts),
    )


def _routing_in(block: nn.Module, mlp: str | None) -> tuple[str | None, str | None]:
    """Return the router of an MLP with experts, and the experts."""
    if mlp is None:
        return None, None
    inside, wrapped = unwrapped(submodule(block, mlp))
    router, experts = first_child(inside, ROUTER), first_child(inside, ("experts",))
    if router is None or experts is None:
        return None, None
    return join(mlp, wrapped, router), join(mlp, wrapped, experts)


def _around_attention(
    block: nn.Module, attention: str | None, mlp: str | None
) -> tuple[str | None, str | None, str | None]:
    """Return the modules that read the stream before and after attention, and the one that attention's part leaves.

    ``post_attention_layernorm`` is the norm before the MLP in Llama and kin, and one after attention in Gemma 2 and 3
    and OLMo 2, which also have norms around the MLP.
    """
    first = first_child(block, NORM_BEFORE_ATTENTION) or attention
    before, after = "pre_feedforward_layernorm", "post_feedforward_layernorm"
    if first_child(block, (before, after)) is None:
        return first, attention, first_child(block, NORM_BEFORE_MLP)
    added = first_child(block, ("post_attention_layernorm",)) or attention
    return first, added, first_child(block, (before,)) or mlp


def unwrapped(module: nn.Module) -> tuple[nn.Module, str]:
    """Return the module inside torch's own wrappers, and its path in the outermost; ``""`` without a wrapper."""
    path: list[str] = []
    while (name := first_child(module, WRAPPED)) is not None:
        module = module._modules[name]  # type: ignore[assignment]
        path.append(name)
    return module, ".".join(path)


def why_missing(model: nn.Module, layers: str, layer: int, kind: str) -> str:
    """Return why a block has no module for a kind of site, as the second half of a sentence."""
    block, _ = unwrapped(submodule(model, f"{layers}.{layer}"))
    parts = (*ATTENTION, *LINEAR_ATTENTION) if kind.startswith("attn") else MLP
    part = first_child(block, parts)
    if kind.startswith("mlp") and part is not None and (beside := first_child(block, BESIDE_MLP)) is not None:
        return f"it has {part!r} and beside it {beside!r}, and neither is the whole MLP"
    if part is None or kind.endswith(".out"):
        return f"it has {module_names(block)}"
    inside, _ = unwrapped(block._modules[part])  # type: ignore[arg-type]
    if kind == "mlp.router":
        return f"its {type(inside).__name__} has {module_names(inside)}, and no router beside experts"
    wanted = "output projection of attention" if kind.startswith("attn") else "down projection of an MLP"
    routed = ", so that each token goes through experts" if first_child(inside, ("experts",)) else ""
    return f"its {type(inside).__name__} has {module_names(inside)}{routed}, and none is the one {wanted}"


def module_names(module: nn.Module) -> str:
    """Return the names of the children of a module, for people."""
    return ", ".join(map(repr, module._modules)) or "no modules"


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
    if len(children) != n_layers:
        return False
    known = _known_blocks.get(modules, ())
    if len(known) == n_layers and all(map(operator.is_, children, [block() for block in known])):
        return True
    if not all(child is not None and _is_block(child) for child in children):
        return False
    _known_blocks[modules] = [weakref.ref(child) for child in children if child is not None]
    return True


_known_blocks: weakref.WeakKeyDictionary[nn.ModuleList, list[weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()
"""Blocks that were found, by the list that holds them."""


def _is_block(module: nn.Module) -> bool:
    found = False
    for name, child in module._modules.items():
        if child is not None and name in _WRAPPED:
            return _is_block(unwrapped(module)[0])
        found = found or (child is not None and name in _OF_BLOCKS)
    return found


def _projection_in(block: nn.Module, part: str | None, names: tuple[str, ...]) -> str | None:
    """Return the path within the block of the first projection of these names that is a direct child of a part.

    Modules with one child, such as wrappers, are looked through. Among several children a projection further down
    belongs to one of them, such as an expert, and is not the part's.
    """
    if part is None:
        return None
    module, path = submodule(block, part), part
    while True:
        children = module._modules
        for name in names:
            child = children.get(name)
            if child is not None and input_width(child) is not None:
                return f"{path}.{name}"
        if len(children) != 1:
            return None
        (name, child), *_ = children.items()
        if child is None:
            return None
        module, path = child, f"{path}.{name}"
