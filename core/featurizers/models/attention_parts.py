"""Finds queries, keys and values in the outputs of an attention module's projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from featurizers.errors import SiteError
from featurizers.models.detection import LINEAR_ATTENTION, first_child, module_names
from featurizers.models.projections import output_width

PARTS: Final = ("attn.q", "attn.k", "attn.v")
"""Kinds of site that are found here."""
SEPARATE: Final = {"attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj"}
LATENT: Final = ("kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj")
"""Projections of multi-head latent attention (DeepSeek)."""
GATED_QUERIES: Final = ("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention")
"""Classes whose ``q_proj`` returns for each head its query and then a gate of the same width."""


@dataclass(frozen=True)
class Part:
    """Queries, keys or values in the output of a projection.

    The last axis of the output consists of equal groups, and each group has these columns.

    Attributes:
        projection: path of the projection within the attention module.
        groups: number of groups.
        stride: width of a group.
        start: first column within a group.
        heads: number of heads.
        head_width: width of a head; a head is contiguous, and a group has whole heads.
    """

    projection: str
    groups: int
    stride: int
    start: int
    heads: int
    head_width: int

    @property
    def columns(self) -> slice:
        """Columns of each group."""
        return slice(self.start, self.start + self.heads // self.groups * self.head_width)

    def of_head(self, head: int) -> slice:
        """Return the columns of a head in the whole output."""
        group, number = divmod(head, self.heads // self.groups)
        start = group * self.stride + self.start + number * self.head_width
        return slice(start, start + self.head_width)


@dataclass(frozen=True)
class _Heads:
    """Numbers of heads of an attention module: of queries, of keys and values; and their width."""

    queries: int
    keys: int
    width: int

    def number(self, kind: str) -> int:
        return self.queries if kind == "attn.q" else self.keys


@dataclass(frozen=True)
class _Fused:
    """One projection that returns queries, keys and values.

    Attributes:
        projection: its name.
        groups: number of groups that its output consists of, by the attention module and its heads.
        order: kinds in the order in which they are in each group.
    """

    projection: str
    groups: Callable[[Any, _Heads], int]
    order: tuple[str, ...] = PARTS


def _by_head(_: Any, heads: _Heads) -> int:
    return heads.queries


def _of_falcon(attention: Any, heads: _Heads) -> int:
    if attention.new_decoder_architecture:
        return heads.keys
    return 1 if attention.multi_query else heads.queries


_FUSED: Final = {
    "GPT2Attention": _Fused("c_attn", lambda *_: 1),
    "GPTBigCodeAttention": _Fused("c_attn", lambda attention, heads: 1 if attention.multi_query else heads.queries),
    "GPTNeoXAttention": _Fused("query_key_value", _by_head),
    "BloomAttention": _Fused("query_key_value", _by_head),
    "PersimmonAttention": _Fused("query_key_value", _by_head),
    "FalconAttention": _Fused("query_key_value", _of_falcon),
    "Phi3Attention": _Fused("qkv_proj", lambda *_: 1),
    "MptAttention": _Fused("Wqkv", lambda *_: 1),
    "CodeGenAttention": _Fused("qkv_proj", lambda *_: 4, ("attn.q", "attn.v", "attn.k")),
}
"""Layouts by the class of the attention module, as the ``forward`` of each splits the output."""


def find_part(attention: nn.Module, name: str, kind: str, config: Any) -> Part:
    """Return where queries, keys or values are.

    Args:
        attention: the part of a block that is its attention.
        name: its name in the block.
        kind: one of `PARTS`.
        config: of the model's text part; gives numbers that the module itself does not have.

    Raises:
        SiteError: they are not known to be in the output of one module; the message says why, and what the module has.
    """
    if name in LINEAR_ATTENTION:
        raise SiteError(f"{name!r} is no attention with queries, keys and values of its own")
    attention, path = _innermost(attention)
    known = [each.__name__ for each in type(attention).__mro__]
    has = f"{type(attention).__name__} has {module_names(attention)}"
    if first_child(attention, LATENT) is not None:
        raise SiteError(
            "its attention is latent: keys and values come from one compressed vector, and heads share the rotated "
            f"part of the keys, so that no module returns queries, keys or values as such; {has}"
        )
    if (fused := next((_FUSED[each] for each in known if each in _FUSED), None)) is not None:
        part = _in_fused(attention, fused, kind, config)
    elif first_child(attention, SEPARATE.values()) is not None:
        part = _in_separate(attention, kind, config, has, gated=not set(known).isdisjoint(GATED_QUERIES))
    else:
        raise SiteError(f"it is not known which outputs of its modules are queries, keys and values; {has}")
    projection = ".".join(filter(None, (path, part.projection)))
    return Part(projection, part.groups, part.stride, part.start, part.heads, part.head_width)


def _innermost(attention: nn.Module) -> tuple[nn.Module, str]:
    """Return the module inside modules with one child, such as wrappers, and its path."""
    path: list[str] = []
    while len(attention._modules) == 1:
        (name, child), *_ = attention._modules.items()
        if child is None:
            break
        attention = child
        path.append(name)
    return attention, ".".join(path)


def _in_fused(attention: nn.Module, fused: _Fused, kind: str, config: Any) -> Part:
    heads = _heads(attention, config)
    module = attention._modules.get(fused.projection)
    if module is None:
        has = module_names(attention)
        raise SiteError(f"its {type(attention).__name__} has no {fused.projection!r}; it has {has}")
    groups = fused.groups(attention, heads)
    if heads.queries % groups or heads.keys % groups:
        raise SiteError(f"its {heads.queries} heads are split between {groups} groups")
    widths = [heads.number(each) // groups * heads.width for each in fused.order]
    _check_width(attention, fused.projection, module, groups * sum(widths))
    before = sum(widths[: fused.order.index(kind)])
    return Part(fused.projection, groups, sum(widths), before, heads.number(kind), heads.width)


def _in_separate(attention: nn.Module, kind: str, config: Any, has: str, *, gated: bool) -> Part:
    if kind != "attn.q" and getattr(attention, "is_kv_shared_layer", False):
        raise SiteError("the keys and values of this block are those of an earlier one")
    # without a v_proj, values are what k_proj returns, as in Gemma 4
    needed = ["q_proj"] if kind == "attn.q" else ["k_proj", "v_proj"]
    if missing := [name for name in needed if attention._modules.get(name) is None]:
        raise SiteError(f"it has no {' and no '.join(map(repr, missing))}; {has}")
    name, heads = SEPARATE[kind], _heads(attention, config)
    module, number = attention._modules[name], heads.number(kind)
    width = getattr(attention, "v_head_dim", heads.width) if kind == "attn.v" else heads.width
    if gated and kind == "attn.q":
        _check_width(attention, name, module, number * 2 * width)
        return Part(name, number, 2 * width, 0, number, width)
    _check_width(attention, name, module, number * width)
    return Part(name, 1, number * width, 0, number, width)


def _check_width(attention: nn.Module, name: str, module: nn.Module | None, width: int) -> None:
    found = None if module is None else output_width(module)
    if found != width:
        raise SiteError(
            f"{name!r} of its {type(attention).__name__} returns {'?' if found is None else found} numbers and not "
            f"{width}, so that its heads cannot be told apart"
        )


def _heads(attention: nn.Module, config: Any) -> _Heads:
    """Return the numbers of heads: those that the module itself has come first, since blocks may differ."""
    queries = _number(attention, "num_heads", "num_attention_heads") or _number(config, "num_attention_heads")
    if queries is None:
        raise SiteError(f"neither its {type(attention).__name__} nor the config says how many heads there are")
    keys = _number(attention, "num_key_value_heads", "num_kv_heads")
    if keys is None and (repeated := _number(attention, "num_key_value_groups")) is not None:
        keys = queries // repeated
    if keys is None and getattr(attention, "multi_query", False):
        keys = 1
    keys = keys or _number(config, "num_key_value_heads") or queries
    width = _number(attention, "head_dim", "head_size") or _number(config, "head_dim")
    if width is None:
        width = (_number(config, "hidden_size") or 0) // queries
    return _Heads(queries, keys, width)


def _number(owner: Any, *names: str) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
