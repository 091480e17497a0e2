"""`Layout`: which modules of a decoder read and write its residual stream, found by following one short prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from featurizers.errors import SiteError
from featurizers.models import Anatomy
from featurizers.models.anatomy import _first_child
from torch import Tensor, nn

from featurizers_derived_scalars.probing import HELP, Trace, refuse, same
from featurizers_derived_scalars.running import Point

ACTIVATIONS: Final = ("act_fn", "act", "activation_fn", "activation", "activation_func")
CHAINS: Final = (("fc1", "fc2"), ("up_proj", "down_proj"))
"""Up and down projections that some blocks hold themselves, without an MLP module."""


@dataclass(frozen=True)
class BlockLayout:
    """The modules of one block, by their paths in the model.

    Attributes:
        block: the block.
        attention: its attention module.
        out_projection: attention's output projection.
        down_projection: the MLP's down projection.
        mlp: its MLP; None if the block runs ``up_projection``, ``activation`` and ``down_projection`` itself.
        up_projection: in that case only.
        activation: what makes neurons of ``mlp.pre``; None if it is no module.
        attn_norm: the norm before attention; None if attention reads the residual stream itself.
        mlp_norm: the norm before the MLP, likewise.
        attn_post_norm: the norm of what attention writes.
        mlp_post_norm: the norm of what the MLP writes.
        parallel: whether the MLP reads what attention reads, and not what attention has written to.
        attn_factor: number that attention's output is multiplied by before it is added.
        mlp_factor: likewise for the MLP.
    """

    block: str
    attention: str
    out_projection: str
    down_projection: str
    mlp: str | None = None
    up_projection: str | None = None
    activation: str | None = None
    attn_norm: str | None = None
    mlp_norm: str | None = None
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    parallel: bool = False
    attn_factor: float = 1.0
    mlp_factor: float = 1.0


@dataclass(frozen=True)
class Layout:
    """The modules of one model: what a plugin's ``featurizers_circuits`` returns.

    Attributes:
        blocks: in order.
        final_norm: path of the norm after the last block; None if there is none.
        head: path of the unembedding; None for a model without one.
    """

    blocks: tuple[BlockLayout, ...]
    final_norm: str | None = None
    head: str | None = None


def find_layout(model: nn.Module) -> Layout:
    """The layout of a model, by what flows between the parts of each block.

    Raises:
        SiteError: a block is not attention and an MLP that each add to the residual stream; it says what is missing.
    """
    anatomy = Anatomy(model)
    blocks, decoder = anatomy.blocks, anatomy.blocks.decoder
    if blocks.attention is None or blocks.out_projection is None:
        refuse(model, "no attention module with an output projection was found in its blocks")
    first = anatomy.layers[0]  # type: ignore[index]
    chain = next((pair for pair in CHAINS if all(_has(first, name) for name in pair)), None)
    if blocks.down_projection is None and chain is None:
        refuse(model, "no MLP with one down projection was found in its blocks (a mixture of experts has none)")
    modules = dict(model.named_modules())
    found = []
    for number in range(anatomy.n_layers):
        path = f"{blocks.layers}.{number}"
        layout = BlockLayout(
            block=path,
            attention=f"{path}.{blocks.attention}",
            out_projection=f"{path}.{blocks.out_projection}",
            down_projection=f"{path}.{blocks.down_projection or (chain or ('', ''))[1]}",
            mlp=None if blocks.down_projection is None else f"{path}.{blocks.mlp}",
            up_projection=None if blocks.down_projection or chain is None else f"{path}.{chain[0]}",
        )
        inside = modules.get(layout.mlp or path)
        name = None if inside is None else _first_child(inside, ACTIVATIONS)
        found.append(replace(layout, activation=None if name is None else f"{layout.mlp or path}.{name}"))
    head = _name_of(model, model.get_output_embeddings())  # type: ignore[operator]
    points = {point for layout in found for point in _points(model, layout)}
    around = _children(model, decoder)
    trace = Trace(model, points | {(path, side) for path in (*around, *([head] if head else [])) for side in _SIDES})
    last = trace.given(found[-1].block)
    final = next((path for path in around if last is not None and same(trace.taken(path), last)), None)
    return Layout(tuple(_follow(model, trace, layout) for layout in found), final, head)


def trace_layout(model: nn.Module, layout: Layout) -> Trace:
    """A prompt followed through a layout that was given."""
    points = {point for block in layout.blocks for point in _points(model, block)}
    more = [path for path in (layout.final_norm, layout.head) if path is not None]
    return Trace(model, points | {(path, side) for path in more for side in _SIDES})


_SIDES: Final = ("input", "output")


def _follow(model: nn.Module, trace: Trace, layout: BlockLayout) -> BlockLayout:
    """The norms of a block, whether it is parallel, and its factors."""
    before, after = trace.taken(layout.block), trace.given(layout.block)
    attention_reads, attention_gives = trace.taken(layout.attention), trace.given(layout.attention)
    mlp_reads = trace.taken(layout.mlp or layout.up_projection or "")
    mlp_gives = trace.given(layout.mlp or layout.down_projection)
    if before is None or after is None or attention_reads is None or attention_gives is None:
        refuse(model, f"{layout.block} or its attention was not called with the residual stream")
    if mlp_reads is None or mlp_gives is None:
        refuse(model, f"the MLP of {layout.block} was not called with the residual stream")
    norms = [path for path in _children(model, layout.block) if path not in (layout.attention, layout.mlp)]

    def norm_into(reads: Tensor) -> str | None:
        return next((path for path in norms if same(trace.given(path), reads)), None)

    def norm_of(gives: Tensor) -> str | None:
        return next((path for path in norms if same(trace.taken(path), gives)), None)

    attn_norm = None if same(before, attention_reads) else norm_into(attention_reads)
    if attn_norm is not None and not same(trace.taken(attn_norm), before):
        refuse(model, f"the norm before attention in {layout.block} does not read the residual stream")
    if attn_norm is None and not same(before, attention_reads):
        refuse(model, f"attention in {layout.block} reads neither the residual stream nor a norm of it")
    mlp_norm = norm_into(mlp_reads)
    middle = mlp_reads if mlp_norm is None else trace.taken(mlp_norm)
    attn_post, mlp_post = norm_of(attention_gives), norm_of(mlp_gives)
    attn_adds = attention_gives if attn_post is None else trace.given(attn_post)
    mlp_adds = mlp_gives if mlp_post is None else trace.given(mlp_post)
    if middle is None or attn_adds is None or mlp_adds is None:
        refuse(model, f"a norm of {layout.block} was not called with a tensor")
    parallel = same(middle, before)
    layout = replace(
        layout,
        attn_norm=attn_norm,
        mlp_norm=mlp_norm,
        attn_post_norm=attn_post,
        mlp_post_norm=mlp_post,
        parallel=parallel,
    )
    given = [float(value) for value in vars(model.get_submodule(layout.block)).values() if isinstance(value, float)]
    if parallel:
        factors = _solve(after - before, (attn_adds, mlp_adds))
    else:
        factors = (*_solve(middle - before, (attn_adds,)), *_solve(after - middle, (mlp_adds,)))
    close = 1e-3 if before.dtype in (torch.float32, torch.float64) else 2e-2
    exact = [_explained(factor, (1.0, *given), close) for factor in factors]
    return replace(layout, attn_factor=exact[0], mlp_factor=exact[1])


def projection(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``(inputs, outputs)`` and bias of a projection, in float32 or better.

    Raises:
        SiteError: it has no such weight.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise SiteError(f"{type(module).__name__} has no weight of two axes in floating point. {HELP}")
    # transformers' Conv1D keeps (in, out), nn.Linear (out, in)
    weight = weight.detach() if type(module).__name__ == "Conv1D" else weight.detach().T
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype), bias.detach().to(dtype) if isinstance(bias, Tensor) else None


def _points(model: nn.Module, layout: BlockLayout) -> set[Point]:
    parts = (layout.block, layout.attention, layout.mlp, layout.out_projection, layout.down_projection)
    more = (layout.up_projection, layout.attn_norm, layout.mlp_norm, layout.attn_post_norm, layout.mlp_post_norm)
    paths = {path for path in (*parts, *more) if path is not None}
    known = {name for name, _ in model.get_submodule(layout.block).named_modules(prefix=layout.block)}
    if missing := sorted(paths - known):
        other = "blocks differ, as where some are a mixture of experts"
        refuse(model, f"{missing[0]} does not exist in {layout.block} ({other})")
    paths |= set(_children(model, layout.block))
    return {(path, side) for path in paths for side in _SIDES}


def _children(model: nn.Module, path: str) -> list[str]:
    """Paths of the modules in a module that may compute something of the residual stream."""
    idle = (nn.Dropout, nn.Identity, nn.ModuleList, nn.Embedding)
    named = model.get_submodule(path).named_children()
    return [f"{path}.{name}".lstrip(".") for name, child in named if not isinstance(child, idle) and _takes(child)]


def _takes(module: nn.Module) -> bool:
    return "Rotary" not in type(module).__name__


def _has(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_children())


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return next((name for name, each in model.named_modules() if each is module), None) if module is not None else None


def _solve(total: Tensor, parts: tuple[Tensor, ...]) -> tuple[float, ...]:
    """The numbers by which the parts make up the total, by least squares."""
    columns = torch.stack([part.double().flatten() for part in parts], dim=-1)
    return tuple(torch.linalg.lstsq(columns.cpu(), total.double().flatten().cpu()[:, None]).solution[:, 0].tolist())


def _explained(factor: float, known: tuple[float, ...], close: float) -> float:
    """The number that the block holds and that a measured factor is, or else the factor as it was measured."""
    nearest = min(known, key=lambda number: abs(number - factor))
    return nearest if abs(nearest - factor) <= close * abs(factor) else factor
