"""transformer-debugger's formulas in einsum, on a GPT-2's own weights and the raw tensors of one prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, einsum


@dataclass
class Layer:
    """The raw tensors of one layer, the weights that read and write them, and dictionaries of relu features.

    Attributes:
        model: a ``GPT2LMHeadModel``.
        raw: ``raw(kind, pass, layer)``.
        at: number of the layer.
        n_layers: how many there are.
        dictionaries: by kind of place, one for each layer.
        node: an MLP neuron ``(layer, token, neuron)`` that others are traced to.
        source: an MLP neuron before it that others are traced from.
        latent: number of a feature.
    """

    model: Any
    raw: Callable[..., Tensor]
    at: int
    n_layers: int
    dictionaries: dict[str, dict[int, Any]]
    node: tuple[int, int, int]
    source: tuple[int, int, int]
    latent: int

    def __getattr__(self, name: str) -> Tensor:
        """``a`` is the activations of a kind, ``d_a`` the gradient in them."""
        kinds = {
            "embed": "resid.embed",
            "pre": "resid.pre",
            "mid": "resid.mid",
            "post": "resid.post",
            "q": "attn.q",
            "k": "attn.k",
            "v": "attn.v",
            "logits_qk": "attn.logits",
            "A": "attn.probs",
            "z": "attn.z",
            "delta_attn": "attn.delta",
            "hidden": "mlp.pre",
            "a": "mlp.neurons",
            "delta_mlp": "mlp.delta",
            "logits": "logits",
        }
        pass_, _, kind = name.rpartition("d_")
        if kind not in kinds:
            raise AttributeError(name)
        once = kinds[kind] in ("resid.embed", "logits")
        return self.raw(
            kinds[kind], "backward" if pass_ or name.startswith("d_") else "forward", None if once else self.at
        )

    @cached_property
    def block(self) -> Any:
        return self.model.transformer.h[self.at]

    @cached_property
    def W_O(self) -> Tensor:
        return self.block.attn.c_proj.weight.detach().unflatten(0, self.v.shape[1:])

    @cached_property
    def W_out(self) -> Tensor:
        return self.block.mlp.c_proj.weight.detach()

    @cached_property
    def G(self) -> Tensor:
        return self.raw("resid.final", "backward", None)

    @cached_property
    def vW(self) -> Tensor:
        return einsum("khe,hed->khd", self.v, self.W_O)

    def flat(self, x: Tensor) -> Tensor:
        """Pairs of a token and a key that is not after it."""
        return torch.stack([x[q, k] for q in range(len(x)) for k in range(q + 1)])

    # ---- dictionaries

    def sae(self, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Activations of the place, features, features' decoder rows, and the error."""
        f = self.dictionaries[kind][self.at]
        x = {"mlp.neurons": "a", "mlp.delta": "delta_mlp", "attn.delta": "delta_attn"}[kind]
        x = getattr(self, x)
        z = torch.relu((x - f.b_dec) @ f.W_enc.T + f.b_enc).detach()
        return x, z, f.W_dec.detach(), (x - z @ f.W_dec - f.b_dec).detach()

    def look(self, kind: str) -> Tensor:
        """The gradient of the one latent in the place."""
        z = self.sae(kind)[1]
        f = self.dictionaries[kind][self.at]
        return (z[:, self.latent] > 0)[:, None] * f.W_enc[self.latent].detach()

    # ---- nodes

    def frozen(self, layer: int, norm: str, x: Tensor) -> Tensor:
        """A change of the residual stream through a LayerNorm whose scale is held."""
        block = self.model.transformer.h[layer]
        module, kind = (block.ln_1, "norm.attn.scale") if norm == "attn" else (block.ln_2, "norm.mlp.scale")
        return (x - x.mean(-1, keepdim=True)) * module.weight.detach() / self.raw(kind, "forward", layer)

    def slope(self, layer: int) -> Tensor:
        """The derivative of the activation function at each neuron."""
        hidden = self.raw("mlp.pre", "forward", layer).clone().requires_grad_()
        return torch.autograd.grad(self.model.transformer.h[layer].mlp.act(hidden).sum(), hidden)[0]

    @cached_property
    def G_node(self) -> Tensor:
        """The gradient of the node in the residual stream before it."""
        layer, token, neuron = self.node
        mlp, norm = self.model.transformer.h[layer].mlp, self.model.transformer.h[layer].ln_2
        weight = norm.weight.detach() * mlp.c_fc.weight.detach()[:, neuron]
        weight = (weight - weight.mean()) / self.raw("norm.mlp.scale", "forward", layer)[token]
        found = torch.zeros_like(self.embed)
        found[token] = weight * self.slope(layer)[token, neuron]
        return found

    @cached_property
    def G_edge(self) -> Tensor:
        """That of the node's attribution, activation times gradient."""
        layer, token, neuron = self.node
        return self.G_node * self.raw("mlp.neurons", "backward", layer)[token, neuron]

    @cached_property
    def w(self) -> Tensor:
        """What the source writes."""
        layer, token, neuron = self.source
        found = torch.zeros_like(self.embed)
        weight = self.model.transformer.h[layer].mlp.c_proj.weight.detach()[neuron]
        found[token] = self.raw("mlp.neurons", "forward", layer)[token, neuron] * weight
        return found

    @cached_property
    def moved(self) -> Tensor:
        """How the source's write moves the neurons."""
        return self.frozen(self.at, "mlp", self.w) @ self.block.mlp.c_fc.weight.detach() * self.slope(self.at)

    def through(self, which: str) -> Tensor:
        """How it moves probabilities through queries or keys alone, or probabilities times values through values."""
        part = {"q": 0, "k": 1, "v": 2}[which]
        width = self.embed.shape[-1]
        weight = self.block.attn.c_attn.weight.detach()[:, part * width : (part + 1) * width]
        change = (self.frozen(self.at, "attn", self.w) @ weight).unflatten(-1, self.q.shape[1:])
        if which == "v":
            return einsum("qkh,khe->qkhe", self.A, change)
        q, k = (change, self.k) if which == "q" else (self.q, change)
        scores = einsum("qhe,khe->qkh", q, k) / self.q.shape[-1] ** 0.5
        return self.A * (scores - (self.A * scores).sum(1, keepdim=True))


def _row(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def _upstream(layer: Layer, place: str, x: Tensor) -> Tensor | None:
    """A tensor where the node is after its place; nothing elsewhere."""
    before = layer.at < layer.node[0] or (layer.at == layer.node[0] and place == "attn")
    return x if before else None


def _sae_rows(prefix: str, kind: str) -> dict[str, Callable[[Layer], Tensor | None]]:
    """The rows of one kind of autoencoder; those that are decoded through the MLP's own weights too."""

    def written(s: Layer) -> Tensor:
        rows = s.sae(kind)[2]
        return rows @ s.W_out if kind == "mlp.neurons" else rows

    def gradient(s: Layer) -> Tensor:
        name = {"mlp.neurons": "d_a", "mlp.delta": "d_delta_mlp", "attn.delta": "d_delta_attn"}[kind]
        return getattr(s, name) @ s.sae(kind)[2].T

    part = "attn" if kind == "attn.delta" else "mlp"
    return {
        f"{prefix}_latent": lambda s: s.sae(kind)[1],
        f"{prefix}_write_norm": lambda s: s.sae(kind)[1] * written(s).norm(dim=-1),
        f"online_{prefix}_latent": lambda s: s.sae(kind)[1],
        f"online_{prefix}_write": lambda s: einsum("tz,zd->tzd", s.sae(kind)[1], written(s)),
        f"online_{prefix}_write_norm": lambda s: s.sae(kind)[1] * written(s).norm(dim=-1),
        f"online_{prefix}_act_times_grad": lambda s: s.sae(kind)[1] * gradient(s),
        f"online_{prefix}_write_to_final_residual_grad": lambda s: s.sae(kind)[1] * (s.G @ written(s).T),
        f"online_{prefix}_write_to_final_activation_residual_grad": lambda s: _upstream(
            s, part, s.sae(kind)[1] * (s.G_node @ written(s).T)
        ),
        f"online_{prefix}_out_edge_attribution": lambda s: _upstream(
            s, part, s.sae(kind)[1] * (s.G_edge @ written(s).T)
        ),
    }


def _pairs_to(s: Layer, direction: Tensor) -> Tensor:
    return s.A * einsum("khd,qd->qkh", s.vW, direction)


def _all_latents(s: Layer) -> Tensor:
    f = s.dictionaries["attn.delta"][s.at]
    return (s.sae("attn.delta")[1] > 0) * 1.0, f.W_enc.detach()


def _vocabulary(s: Layer) -> Tensor:
    layer, _, neuron = s.node
    block = s.model.transformer.h[layer]
    hidden = block.ln_2(s.model.transformer.wte.weight) @ block.mlp.c_fc.weight[:, neuron] + block.mlp.c_fc.bias[neuron]
    return hidden.expand(len(s.embed), -1).detach()


def _latents_moved(s: Layer) -> Tensor:
    f = s.dictionaries["mlp.delta"][s.at]
    return (s.sae("mlp.delta")[1] > 0) * (s.moved @ s.W_out @ f.W_enc.detach().T)


FORMULAS: dict[str, Callable[[Layer], Tensor | None]] = {
    "logits": lambda s: s.logits,
    "resid_post_embedding": lambda s: s.embed,
    "mlp_pre_act": lambda s: s.block.ln_2(s.mid) @ s.block.mlp.c_fc.weight + s.block.mlp.c_fc.bias,
    "mlp_post_act": lambda s: s.block.mlp.act(s.hidden),
    "resid_delta_mlp": lambda s: s.post - s.mid,
    "resid_post_mlp": lambda s: s.mid + s.delta_mlp,
    "attn_query": lambda s: s.q * s.q.shape[-1] ** -0.25,
    "attn_key": lambda s: s.k * s.k.shape[-1] ** -0.25,
    "attn_value": lambda s: s.v,
    "attn_qk_logits": lambda s: (
        einsum("qhe,khe->qkh", s.q, s.k) / s.q.shape[-1] ** 0.5
        + torch.full((len(s.q), len(s.q)), -torch.inf).triu(1)[..., None]
    ),
    "attn_qk_probs": lambda s: s.logits_qk.softmax(1),
    "attn_weighted_sum_of_values": lambda s: einsum("qkh,khe->qhe", s.A, s.v),
    "resid_delta_attn": lambda s: s.mid - s.pre,
    "resid_post_attn": lambda s: s.pre + s.delta_attn,
    "resid_final_layer_norm_scale": lambda s: (
        s.raw("resid.final", "forward", None).var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt(),
    "attn_input_layer_norm_scale": lambda s: (s.pre.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    "mlp_input_layer_norm_scale": lambda s: (s.mid.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    "attn_write_norm": lambda s: s.flat(s.A * s.vW.norm(dim=-1)),
    "flattened_attn_post_softmax": lambda s: s.flat(s.A),
    "attn_act_times_grad": lambda s: s.flat(s.A * s.d_A),
    "resid_delta_mlp_from_mlp_post_act": lambda s: s.a @ s.W_out,
    "mlp_write_norm": lambda s: s.a * s.W_out.norm(dim=-1),
    "mlp_act_times_grad": lambda s: s.a * s.d_a,
    "mlp_write_to_final_residual_grad": lambda s: s.a * (s.G @ s.W_out.T),
    "attn_write_norm_per_sequence_token": lambda s: einsum("qhe,hed->qhd", s.z, s.W_O).norm(dim=-1),
    "attn_write_to_final_residual_grad_per_sequence_token": lambda s: einsum("qhe,hed,qd->qh", s.z, s.W_O, s.G),
    "attn_act_times_grad_per_sequence_token": lambda s: (s.A * s.d_A).sum(1),
    "resid_post_embedding_norm": lambda s: s.embed.norm(dim=-1, keepdim=True),
    "resid_post_mlp_norm": lambda s: s.post.norm(dim=-1, keepdim=True),
    "mlp_layer_write_norm": lambda s: s.delta_mlp.norm(dim=-1, keepdim=True),
    "resid_post_attn_norm": lambda s: s.mid.norm(dim=-1, keepdim=True),
    "attn_layer_write_norm": lambda s: s.delta_attn.norm(dim=-1, keepdim=True),
    "resid_post_embedding_proj_to_final_residual_grad": lambda s: _row(s.embed * s.G),
    "resid_post_mlp_proj_to_final_residual_grad": lambda s: _row(s.post * s.G) * (s.at < s.n_layers - 1),
    "mlp_layer_write_to_final_residual_grad": lambda s: _row(s.delta_mlp * s.G),
    "resid_post_attn_proj_to_final_residual_grad": lambda s: _row(s.mid * s.G),
    "attn_layer_write_to_final_residual_grad": lambda s: _row(s.delta_attn * s.G),
    "unflattened_attn_act_times_grad": lambda s: s.A * s.d_A,
    "unflattened_attn_write_norm": lambda s: s.A * s.vW.norm(dim=-1),
    "unflattened_attn_write_to_final_residual_grad": lambda s: _pairs_to(s, s.G),
    "attn_write_to_final_residual_grad": lambda s: s.flat(_pairs_to(s, s.G)),
    "online_mlp_autoencoder_error": lambda s: s.sae("mlp.neurons")[3],
    "online_residual_mlp_autoencoder_error": lambda s: s.sae("mlp.delta")[3],
    "online_residual_attention_autoencoder_error": lambda s: s.sae("attn.delta")[3],
    "online_mlp_autoencoder_error_act_times_grad": lambda s: s.sae("mlp.neurons")[3] * s.d_a,
    "online_mlp_autoencoder_error_write_norm": lambda s: s.sae("mlp.neurons")[3] * s.W_out.norm(dim=-1),
    "online_mlp_autoencoder_error_write_to_final_residual_grad": lambda s: s.sae("mlp.neurons")[3] * (s.G @ s.W_out.T),
    "attn_write": lambda s: einsum("qkh,khd->qkhd", s.A, s.vW),
    "attn_write_sum_heads": lambda s: einsum("qkh,khd->qkd", s.A, s.vW),
    "mlp_write": lambda s: einsum("tn,nd->tnd", s.a, s.W_out),
    "attn_weighted_value": lambda s: einsum("qkh,khe->qkhe", s.A, s.v),
    "previous_layer_resid_post_mlp": lambda s: s.embed if s.at == 0 else s.raw("resid.post", "forward", s.at - 1),
    "mlp_write_to_final_activation_residual_grad": lambda s: _upstream(s, "mlp", s.a * (s.G_node @ s.W_out.T)),
    "unflattened_attn_write_to_final_activation_residual_grad": lambda s: _upstream(s, "attn", _pairs_to(s, s.G_node)),
    "resid_post_embedding_proj_to_final_activation_residual_grad": lambda s: _row(s.embed * s.G_node),
    "autoencoder_latent_grad_wrt_residual_input": lambda s: s.look("mlp.delta"),
    "autoencoder_latent_grad_wrt_mlp_post_act_input": lambda s: s.look("mlp.neurons"),
    "attn_write_to_latent": lambda s: _pairs_to(s, s.look("attn.delta")),
    "attn_write_to_latent_summed_over_heads": lambda s: _row(_pairs_to(s, s.look("attn.delta"))),
    "flattened_attn_write_to_latent_summed_over_heads": lambda s: s.flat(_row(_pairs_to(s, s.look("attn.delta")))),
    "flattened_attn_write_to_latent_summed_over_heads_batched": lambda s: s.flat(
        einsum("qkh,khd,qz,zd->qkz", s.A, s.vW, *_all_latents(s))
    ),
    "attn_write_to_latent_per_sequence_token": lambda s: einsum("qhe,hed,qd->qh", s.z, s.W_O, s.look("attn.delta")),
    "attn_write_to_latent_per_sequence_token_batched": lambda s: einsum(
        "qhe,hed,qz,zd->qhz", s.z, s.W_O, *_all_latents(s)
    ),
    "token_attribution": lambda s: _row(s.embed * s.d_embed),
    "single_node_write": lambda s: s.w,
    "grad_of_single_subnode_attribution": lambda s: s.G_edge,
    "attn_out_edge_attribution": lambda s: _upstream(s, "attn", _pairs_to(s, s.G_edge)),
    "mlp_out_edge_attribution": lambda s: _upstream(s, "mlp", s.a * (s.G_edge @ s.W_out.T)),
    "attn_query_in_edge_attribution": lambda s: s.through("q") * s.d_A,
    "attn_key_in_edge_attribution": lambda s: s.through("k") * s.d_A,
    "attn_value_in_edge_attribution": lambda s: einsum("qkhe,qhe->qkh", s.through("v"), s.d_z),
    "mlp_in_edge_attribution": lambda s: s.moved * s.d_a,
    "token_out_edge_attribution": lambda s: _row(s.embed * s.G_edge),
    "single_node_write_to_final_residual_grad": lambda s: _row(s.w * s.G),
    "vocab_token_write_to_input_direction": _vocabulary,
    "always_one": lambda s: torch.ones(len(s.embed), 1),
    "attn_query_in_edge_activation": lambda s: s.through("q"),
    "attn_key_in_edge_activation": lambda s: s.through("k"),
    "mlp_in_edge_activation": lambda s: s.moved,
    "online_autoencoder_in_edge_activation": _latents_moved,
    "online_autoencoder_in_edge_attribution": lambda s: (
        _latents_moved(s) * (s.d_delta_mlp @ s.dictionaries["mlp.delta"][s.at].W_dec.detach().T)
    ),
    **_sae_rows("autoencoder", "mlp.delta"),
    **_sae_rows("mlp_autoencoder", "mlp.neurons"),
    **_sae_rows("attention_autoencoder", "attn.delta"),
}
"""The tensor of each scalar at one layer; None where it has none. Edges into autoencoders are of those names only
that transformer-debugger has."""
