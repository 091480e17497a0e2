"""`Layout`: which modules of a decoder read and write its residual stream, found by following one short prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from featurizers.errors import UsageError
from featurizers.models import Anatomy
from torch import Tensor, nn

from featurizers_derived_scalars.circuit.probing import Trace, refuse, same
from featurizers_derived_scalars.circuit.running import Point

ACTIVATIONS: Final = ("act_fn", "act", "activation_fn", "activation", "activation_func")
CHAINS: Final = (("fc1", "fc2"), ("up_proj", "down_proj"))
"""Up and down projections of blocks that have no MLP module."""
_SIDES: Final = ("input", "output")


@dataclass(frozen=True)
class BlockLayout:
    """Modules of one block, by their paths in the model.

    Attributes:
        block: the block.
        attention: its attention module.
        out_projection: attention's output projection.
        down_projection: the MLP's down projection.
        mlp: its MLP; None if the block runs ``up_projection``, ``activation`` and ``down_projection`` itself.
        up_projection: set only in that case.
        activation: the module that maps ``mlp.pre`` to the neurons' activations; None if no module does.
        attn_norm: the norm before attention; None if attention reads the residual stream itself.
        mlp_norm: the norm before the MLP, likewise.
        attn_post_norm: the norm of attention's output.
        mlp_post_norm: the norm of the MLP's output.
        parallel: True if the MLP reads the same residual stream as attention, without what attention adds.
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

    @property
    def mlp_output(self) -> str:
        """Path of the module whose output is the MLP's."""
        return self.mlp or self.down_projection


@dataclass(frozen=True)
class Layout:
    """Modules of one model: what a plugin's ``featurizers_circuits`` returns.

    Attributes:
        blocks: in order.
        final_norm: path of the norm after the last block; None if there is none.
        head: path of the unembedding; None for a model without a language-model head.
    """

    blocks: tuple[BlockLayout, ...]
    final_norm: str | None = None
    head: str | None = None


def find_layout(model: nn.Module) -> Layout:
    """Find the layout of a model by following what flows between the parts of each block.

    Raises:
        SiteError: a block is not attention and an MLP that each add to the residual stream; the message says what is
            missing.
    """
    anatomy = Anatomy(model)
    blocks, decoder = anatomy.blocks, anatomy.blocks.decoder
    if blocks.attention is None or blocks.out_projection is None:
        refuse(model, "no attention module with an output projection was found in its blocks")
    first = anatomy.layers[0]  # type: ignore[index]
    children = {name for name, _ in first.named_children()}
    chain = next((pair for pair in CHAINS if children.issuperset(pair)), None)
    if blocks.down_projection is None and chain is None:
        refuse(model, "no MLP with one down projection was found in its blocks (a mixture of experts has none)")
    modules = dict(model.named_modules())
    layouts = []
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
        parent = layout.mlp or path
        inside = {name for name, _ in modules[parent].named_children()} if parent in modules else set()
        activation = next((f"{parent}.{name}" for name in ACTIVATIONS if name in inside), None)
        layouts.append(replace(layout, activation=activation))
    embeddings = model.get_output_embeddings()  # type: ignore[operator]
    head = next((name for name, module in modules.items() if module is embeddings), None)
    around = _children(model, decoder)
    points = {point for layout in layouts for point in _points(model, layout)}
    trace = Trace(model, points | _both_sides(around) | _both_sides([head]))
    last = trace.output(layouts[-1].block)
    final = next((path for path in around if last is not None and same(trace.input(path), last)), None)
    return Layout(tuple(_follow(model, trace, layout) for layout in layouts), final, head)


def trace_layout(model: nn.Module, layout: Layout) -> Trace:
    """Follow a prompt through the modules of a known layout."""
    points = {point for block in layout.blocks for point in _points(model, block)}
    return Trace(model, points | _both_sides([layout.final_norm, layout.head]))


def _follow(model: nn.Module, trace: Trace, layout: BlockLayout) -> BlockLayout:
    """Add the norms of a block, whether it is parallel, and its factors."""
    before, after = trace.input(layout.block), trace.output(layout.block)
    attn_input, attn_output = trace.input(layout.attention), trace.output(layout.attention)
    mlp_input, mlp_output = trace.input(layout.mlp or layout.up_projection or ""), trace.output(layout.mlp_output)
    if before is None or after is None or attn_input is None or attn_output is None:
        refuse(model, f"{layout.block} or its attention was not called with the residual stream")
    if mlp_input is None or mlp_output is None:
        refuse(model, f"the MLP of {layout.block} was not called with the residual stream")
    if not bool(before.isfinite().all() and after.isfinite().all()):
        raise UsageError(
            f"{type(model).__name__}: {layout.block} computes NaN or infinity; load the model again, in float32 or "
            "bfloat16 if it is in float16"
        )
    norms = [path for path in _children(model, layout.block) if path not in (layout.attention, layout.mlp)]

    def norm_into(tensor: Tensor) -> str | None:
        return next((path for path in norms if same(trace.output(path), tensor)), None)

    def norm_of(tensor: Tensor) -> str | None:
        return next((path for path in norms if same(trace.input(path), tensor)), None)

    attn_norm = None if same(before, attn_input) else norm_into(attn_input)
    if attn_norm is not None and not same(trace.input(attn_norm), before):
        refuse(model, f"the norm before attention in {layout.block} does not read the residual stream")
    if attn_norm is None and not same(before, attn_input):
        refuse(model, f"attention in {layout.block} reads neither the residual stream nor a norm of it")
    mlp_norm = norm_into(mlp_input)
    middle = mlp_input if mlp_norm is None else trace.input(mlp_norm)
    attn_post, mlp_post = norm_of(attn_output), norm_of(mlp_output)
    attn_adds = attn_output if attn_post is None else trace.output(attn_post)
    mlp_adds = mlp_output if mlp_post is None else trace.output(mlp_post)
    if middle is None or attn_adds is None or mlp_adds is None:
        refuse(model, f"a norm of {layout.block} was not called with a tensor")
    parallel = same(middle, before)
    if parallel:
        measured = _solve(after - before, (attn_adds, mlp_adds))
    else:
        measured = (*_solve(middle - before, (attn_adds,)), *_solve(after - middle, (mlp_adds,)))
    numbers = [float(value) for value in vars(model.get_submodule(layout.block)).values() if isinstance(value, float)]
    close = 1e-3 if before.dtype in (torch.float32, torch.float64) else 2e-2
    attn_factor, mlp_factor = (_exact(factor, (1.0, *numbers), close) for factor in measured)
    return replace(
        layout,
        attn_norm=attn_norm,
        mlp_norm=mlp_norm,
        attn_post_norm=attn_post,
        mlp_post_norm=mlp_post,
        parallel=parallel,
        attn_factor=attn_factor,
        mlp_factor=mlp_factor,
    )


def _points(model: nn.Module, layout: BlockLayout) -> set[Point]:
    parts = (layout.block, layout.attention, layout.mlp, layout.out_projection, layout.down_projection)
    more = (layout.up_projection, layout.attn_norm, layout.mlp_norm, layout.attn_post_norm, layout.mlp_post_norm)
    paths = {path for path in (*parts, *more) if path is not None}
    known = {name for name, _ in model.get_submodule(layout.block).named_modules(prefix=layout.block)}
    if missing := sorted(paths - known):
        other = "blocks differ, as where some are a mixture of experts"
        refuse(model, f"{missing[0]} does not exist in {layout.block} ({other})")
    return _both_sides([*paths, *_children(model, layout.block)])


def _both_sides(paths: list[str] | list[str | None]) -> set[Point]:
    return {(path, side) for path in paths if path is not None for side in _SIDES}


def _children(model: nn.Module, path: str) -> list[str]:
    """Return paths of the child modules that may compute something from the residual stream."""
    idle = (nn.Dropout, nn.Identity, nn.ModuleList, nn.Embedding)
    return [
        f"{path}.{name}".lstrip(".")
        for name, child in model.get_submodule(path).named_children()
        if not isinstance(child, idle) and "Rotary" not in type(child).__name__
    ]


def _solve(total: Tensor, parts: tuple[Tensor, ...]) -> tuple[float, ...]:
    """Return the factors of the parts that sum to the total, by least squares."""
    columns = torch.stack([part.double().flatten() for part in parts], dim=-1)
    return tuple(torch.linalg.lstsq(columns.cpu(), total.double().flatten().cpu()[:, None]).solution[:, 0].tolist())


def _exact(measured: float, numbers: tuple[float, ...], close: float) -> float:
    """Return the number of the block that a measured factor is close to, else the factor as measured."""
    nearest = min(numbers, key=lambda number: abs(number - measured))
    return nearest if abs(nearest - measured) <= close * abs(measured) else measured
