"""Check that a model is what its layout says: attention and MLPs that add to a stream, through linear projections."""

from __future__ import annotations

from featurizers.models import projection
from torch import nn

from featurizers_derived_scalars.circuit.layout import Layout
from featurizers_derived_scalars.circuit.probing import HELP, Trace, agree, by_plain_attention, refuse, same


def check_layout(model: nn.Module, layout: Layout, trace: Trace) -> None:
    """Refuse a layout that a traced run contradicts.

    Raises:
        SiteError: heads, neurons and biases do not add up to what a block adds, and the message says where; or the
            model's output with its own eager attention differs from its output while it is traced.
    """
    last = layout.blocks[-1].block
    plain = by_plain_attention(model, last)
    if (traced := trace.output(last)) is None or plain is None:
        refuse(model, f"{last} was not called with the residual stream")
    agree(
        model, traced, plain, "its attention gives something else while it is looked into, perhaps for want of a mask"
    )
    for block in layout.blocks:
        parts = trace.attention(block.attention)
        if set(parts) < {"q", "k", "v", "probs", "z"}:
            kind = type(model.get_submodule(block.attention)).__name__
            refuse(model, f"{kind} does not compute attention by the AttentionInterface of transformers")
        z, written = parts["z"], trace.input(block.out_projection)
        if written is None or not same(z.flatten(2), written.view(*z.shape[:2], -1)):
            refuse(model, f"something stands between the heads and the output projection of {block.attention}")
        agree(model, parts["probs"] @ parts["v"], z.transpose(1, 2), f"the heads of {block.attention} are not Σ A·v")
        _check_linear(model, trace, block.out_projection, block.attention)
        _check_linear(model, trace, block.down_projection, block.mlp_output)
        attention = trace.output(block.attn_post_norm or block.attention)
        mlp = trace.output(block.mlp_post_norm or block.mlp_output)
        before, after = trace.input(block.block), trace.output(block.block)
        if attention is None or mlp is None or before is None or after is None:
            refuse(model, f"a module of {block.block} was not called with the residual stream")
        total = before + block.attn_factor * attention + block.mlp_factor * mlp
        agree(model, total, after, f"{block.block} is not its input and what attention and MLP add")


def _check_linear(model: nn.Module, trace: Trace, path: str, owner: str) -> None:
    """Check that a projection is linear, and that its output is the output of the module that owns it."""
    x, y, owned = trace.input(path), trace.output(path), trace.output(owner)
    if x is None or y is None or owned is None:
        refuse(model, f"{path} was not called (a mixture of experts has no one down projection)")
    if not same(y, owned.view(y.shape) if y.numel() == owned.numel() else owned):
        refuse(model, f"what {owner} gives is not what its projection {path} gives")
    weight, bias = projection(model.get_submodule(path), HELP)
    linear = x.to(weight.dtype) @ weight
    agree(model, linear if bias is None else linear + bias, y, f"{path} is not x · weight + bias")
