"""Whether a model is what its layout says: attention and MLPs that add to a stream, through linear projections."""

from __future__ import annotations

from torch import nn

from featurizers_derived_scalars.layout import Layout, projection
from featurizers_derived_scalars.probing import Trace, agree, by_plain_attention, refuse, same


def check_layout(model: nn.Module, layout: Layout, trace: Trace) -> None:
    """Refuse a layout that what was traced contradicts.

    Raises:
        SiteError: heads, neurons and biases do not add up to what a block adds, it says where; or the model computes
            something else with its own plain attention than while it is looked into.
    """
    last = layout.blocks[-1].block
    seen = by_plain_attention(model, last)
    if (given := trace.given(last)) is None or seen is None:
        refuse(model, f"{last} was not called with the residual stream")
    agree(model, given, seen, "its attention gives something else while it is looked into, perhaps for want of a mask")
    for block in layout.blocks:
        heard = trace.attention(block.attention)
        if set(heard) < {"q", "k", "v", "probs", "z"}:
            kind = type(model.get_submodule(block.attention)).__name__
            refuse(model, f"{kind} does not compute attention by the AttentionInterface of transformers")
        z, written = heard["z"], trace.taken(block.out_projection)
        if written is None or not same(z.flatten(2), written.view(*z.shape[:2], -1)):
            refuse(model, f"something stands between the heads and the output projection of {block.attention}")
        agree(model, heard["probs"] @ heard["v"], z.transpose(1, 2), f"the heads of {block.attention} are not Σ A·v")
        _linear(model, trace, block.out_projection, block.attention)
        _linear(model, trace, block.down_projection, block.mlp or block.down_projection)
        parts = (block.attention, block.attn_post_norm), (block.mlp or block.down_projection, block.mlp_post_norm)
        attention, mlp = (trace.given(norm or module) for module, norm in parts)
        before, after = trace.taken(block.block), trace.given(block.block)
        if attention is None or mlp is None or before is None or after is None:
            refuse(model, f"a module of {block.block} was not called with the residual stream")
        total = before + block.attn_factor * attention + block.mlp_factor * mlp
        agree(model, total, after, f"{block.block} is not its input and what attention and MLP add")


def _linear(model: nn.Module, trace: Trace, path: str, owner: str) -> None:
    taken, given, whole = trace.taken(path), trace.given(path), trace.given(owner)
    if taken is None or given is None or whole is None:
        refuse(model, f"{path} was not called (a mixture of experts has no one down projection)")
    if not same(given, whole.view(given.shape) if given.numel() == whole.numel() else whole):
        refuse(model, f"what {owner} gives is not what its projection {path} gives")
    weight, bias = projection(model.get_submodule(path))
    total = taken.to(weight.dtype) @ weight if bias is None else taken.to(weight.dtype) @ weight + bias
    agree(model, total, given, f"{path} is not x · weight + bias")
