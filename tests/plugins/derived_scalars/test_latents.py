"""Features of any featurizer as the basis: they, the error and the bias are the activations, in every scalar."""

from __future__ import annotations

import copy

import featurizers
import pytest
import torch
from featurizers.errors import ConfigError, FeatureIndexError, ShapeError, SiteError, UsageError
from featurizers.testing import FeaturizerContract
from featurizers_derived_scalars.api import direct_total, scalars
from featurizers_derived_scalars.capturing import capture
from featurizers_derived_scalars.circuit import Circuit, Need, Place
from featurizers_derived_scalars.featurize import DiagonalFeaturizer
from featurizers_derived_scalars.nodes import Basis, Node
from featurizers_derived_scalars.quantities import (
    Fixed,
    MetricGrad,
    NodeGrad,
    act_times_grad,
    activation_from,
    direction,
    edge_from,
    grad,
    latent_direction,
    norm,
    pair_attribution,
    pre_activations,
    sum_heads,
    sum_keys,
    sum_nodes,
    token_write_to_latent,
    token_write_to_latents,
    value,
    weighted_value,
    write,
    write_norm,
    write_to,
    write_to_latent,
)
from featurizers_derived_scalars.quantities import latents as of_latents
from pydantic import BaseModel, ConfigDict
from torch import nn

from tests.support.decoders import shared_decoder, tokens
from tests.support.derived_scalars import METRIC, backward, captured, close, dictionary, forward

NAMES = ("gpt2", "llama", "qwen3", "gpt_neox", "gemma2", "olmo2", "opt", "gptj", "granite")

MLPS = {
    "gpt2": "transformer.h.1.mlp",
    "llama": "model.layers.1.mlp",
    "gemma2": "model.layers.1.post_feedforward_layernorm",
}


def bases(name: str) -> dict[str, Basis]:
    """A basis of every sort of featurizer, at a place of every sort."""
    circuit = captured(name).circuit
    d, n = circuit.d_model, circuit.n_neurons
    heads = circuit.n_heads * circuit.d_value
    subspace = featurizers.create("subspace", d_in=d, n_features=3, seed=1).double()
    standardize = featurizers.create("standardize", d_in=d).double()
    standardize.mean.normal_(generator=torch.Generator().manual_seed(2))
    standardize.std.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
    return {
        "relu": Basis("mlp.delta", dictionary(d)),
        "pre-bias": Basis("attn.delta", {1: dictionary(d, pre_bias=True)}),
        "topk": Basis("mlp.neurons", {1: dictionary(n, "topk")}),
        "jumprelu": Basis("resid.post", {1: dictionary(d, "jumprelu")}),
        "layer-norm": Basis("mlp.out", {1: dictionary(d, normalize="layer-norm")}),
        "constant-norm": Basis("attn.delta", {1: dictionary(d, "topk", normalize="constant-norm")}),
        "heads": Basis("attn.z", {1: dictionary(heads, n_heads=circuit.n_heads)}),
        "subspace": Basis("resid.pre", {1: subspace}),
        "two stages": Basis("attn.out", {1: standardize >> subspace}),
        "stage and dictionary": Basis("mlp.delta", {1: standardize >> dictionary(d)}),
        "identity": Basis("mlp.neurons", {1: featurizers.create("identity", d_in=n)}),
        "bent": Basis("mlp.delta", {1: Bent(BentConfig(d_in=d))}),
    }


SORTS = (
    "relu",
    "pre-bias",
    "topk",
    "jumprelu",
    "layer-norm",
    "constant-norm",
    "heads",
    "subspace",
    "two stages",
    "stage and dictionary",
    "identity",
    "bent",
)


class BentConfig(BaseModel):
    """Width and seed."""

    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: int


class Bent(featurizers.Featurizer[BentConfig]):
    """A featurizer whose decoder is not linear: x̂ = W tanh(f) + b."""

    kind = "derived-scalars-test.bent"
    Config = BentConfig

    def __init__(self, config):
        super().__init__(config)
        self.d_in, self.n_features = config.d_in, 6
        generator, d = torch.Generator().manual_seed(4), config.d_in
        shapes = ((d, 6), (6, d), (d,))
        parts = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.encoder, self.decoder, self.offset = parts

    def featurize(self, x):
        features = (x @ self.encoder).sin() + 0.5
        return features, x - self._decoded(features)

    def inverse_featurize(self, features, error):
        return self._decoded(features) + error

    def _decoded(self, features):
        return features.tanh() @ self.decoder + self.offset


@pytest.fixture(params=NAMES, scope="module")
def name(request):
    return request.param


@pytest.fixture(params=SORTS)
def basis(name, request):
    return bases(name)[request.param]


def test_parts_are_the_activations_and_every_linear_scalar_of_them(name, basis):
    """Identity 11: features, error and bias sum to the place's own write, attribution and direct effect."""
    raw, plain = captured(name), Basis(basis.kind)
    for quantity in (act_times_grad, write_to):
        whole = quantity(plain).tensor(raw, 1)
        parts = [quantity(part).tensor(raw, 1) for part in basis.parts]
        close(sum(part.flatten(1).sum(1) for part in parts), whole.flatten(1).sum(1), 1e-6)
        assert all(part.dim() == len(quantity(each).axes) for part, each in zip(parts, basis.parts, strict=True))
    vectors = [_written(part, raw) for part in basis.parts]
    close(sum(vectors), raw.write(plain_place(basis), forward(raw, basis.kind, 1)), 1e-6)


def plain_place(basis):
    return Place(basis.kind, 1)


def _written(basis, raw):
    """What a part writes at each token, heads together."""
    if basis.part == "features":
        return sum_nodes(write(basis)).tensor(raw, 1)
    vectors = write(Basis(basis.kind, basis.featurizer, basis.part, whole=True)).tensor(raw, 1)
    return vectors.sum(1) if vectors.dim() == 3 else vectors


def test_writes_lengths_and_effects_of_features_agree(name, basis):
    """What is contracted against what is materialised, and a whole vector against its sum."""
    raw = captured(name)
    written = write(basis).tensor(raw, 1)
    close(write_norm(basis).tensor(raw, 1), written.norm(dim=-1), 1e-5)
    close(write_to(basis).tensor(raw, 1), torch.einsum("tfd,td->tf", written, backward(raw, "resid.final")))
    together = Basis(basis.kind, basis.featurizer, whole=True)
    close(write(together).tensor(raw, 1), written.sum(1))
    close(write_norm(together).tensor(raw, 1)[:, 0], written.sum(1).norm(dim=-1))
    close(write_to(together).tensor(raw, 1), sum_nodes(write_to(basis)).tensor(raw, 1))
    signed = write_norm(basis, signed=True).tensor(raw, 1)
    assert torch.equal(signed.sign(), value(basis).tensor(raw, 1).sign() * (signed != 0))


@pytest.mark.parametrize("rule", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize(("model", "path"), MLPS.items())
def test_gradients_of_features_are_those_of_a_spliced_model(model, path, rule):
    """Identities 10, 12 and 13, against autograd through transformers with the dictionary put in."""
    decoder, sae = shared_decoder(model), dictionary(32, rule)
    seen: list[torch.Tensor] = []

    def tap(features):
        features.retain_grad()
        seen.append(features)

    def splice(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return sae.splice(output, tap)

    before = decoder(tokens()[None]).logits
    handle = decoder.get_submodule(path).register_forward_hook(splice)
    try:
        logits = decoder(tokens()[None]).logits
        METRIC.of(logits[0]).backward()
    finally:
        handle.remove()
        decoder.zero_grad()
    close(logits, before, 1e-10)
    raw = captured(model, ())
    basis = Basis("mlp.delta", {1: sae})
    close(value(basis).tensor(raw, 1), seen[0][0].detach())
    close(grad(basis).tensor(raw, 1), seen[0].grad[0])
    close(act_times_grad(basis).tensor(raw, 1), (seen[0] * seen[0].grad)[0].detach())
    error = Basis("mlp.delta", {1: sae}, part="error")
    close(grad(error).tensor(raw, 1), backward(raw, "mlp.delta", 1))
    close(value(error).tensor(raw, 1), (forward(raw, "mlp.delta", 1) - sae.decode(seen[0][0])).detach())


def test_a_featurized_layer_completes_the_direct_effects(name):
    """Identity 8 with dictionaries in place of neurons and of heads at some layers."""
    circuit = captured(name).circuit
    places = {
        "mlp.delta:0": dictionary(circuit.d_model),
        "mlp.neurons:1": dictionary(circuit.n_neurons, "topk"),
        "attn.delta:2": dictionary(circuit.d_model, "jumprelu"),
        "attn.z:1": dictionary(circuit.n_heads * circuit.d_value, n_heads=0),
    }
    found = scalars(circuit, tokens(), "write_to", metric=METRIC, featurizers=places)
    found.check_complete(direct_total(captured(name)), rtol=1e-6)
    assert ("write_to:mlp.neurons", 0) not in found
    assert ("write_to:mlp.neurons", 2) in found
    assert ("write_to:attn.probs", 1) not in found
    assert ("write_to:attn.bias whole", 1) in found
    assert ("write_to:attn.bias whole", 2) not in found


@pytest.mark.parametrize("rule", ["relu", "topk", "jumprelu"])
def test_pairs_attributed_to_latents(name, rule):
    """Identity 14: over heads and keys they are what fires, less the encoder's bias and the heads' bias through it."""
    raw = captured(name)
    sae = dictionary(raw.circuit.d_model, rule, pre_bias=rule == "relu")
    basis = Basis("attn.delta", {1: sae})
    pairs = pair_attribution(basis).tensor(raw, 1)
    latents, bias = value(basis).tensor(raw, 1), forward(raw, "attn.bias", 1).double()
    fires = (latents != 0).double()
    pre_bias = sae.b_dec if rule == "relu" else 0
    expected = fires * (latents - sae.get_parameter("b_enc") - (bias - pre_bias) @ sae.W_enc.T)
    close(pairs.sum(1), expected, 1e-5)
    assert not pairs[0, 1:].any()
    latent = int(latents[6].argmax())
    along = (fires[:, latent, None] * sae.W_enc[latent]).detach()
    heads = sum_heads(write(Basis("attn.probs"))).tensor(raw, 1)
    close(pairs[..., latent], torch.einsum("qkd,qd->qk", heads, along))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("rule", ["topk", "jumprelu"])
def test_pairs_need_one_encoding_of_the_prompt(rule, batched, monkeypatch):
    """Beside torch's JVP of the encoder for each key, along what the heads write for it."""
    raw, sae = captured("olmo2_biased"), dictionary(32, rule, normalize="layer-norm")
    encode, encoded = sae.encode, []
    x, probs, v = (forward(raw, kind, 1) for kind in ("attn.delta", "attn.probs", "attn.v"))
    rows = torch.einsum("qkh,khe->kqhe", probs, v)
    written = raw.write(Place("attn.z", 1), rows)
    expected = torch.stack([torch.func.jvp(encode, (x.double(),), (row.double(),))[1] for row in written], dim=1)

    def counting(x, *rest):
        encoded.append(tuple(x.shape))
        if not batched:  # vmap refuses random numbers
            x = x + 0 * torch.rand(x.shape, dtype=x.dtype)
        return encode(x, *rest)

    monkeypatch.setattr(sae, "encode", counting)
    pairs = pair_attribution(Basis("attn.delta", {1: sae})).tensor(raw, 1)
    close(pairs, expected, 1e-5)
    assert float(pairs.abs().max()) > 0
    assert encoded == ([tuple(x.shape)] if batched else [tuple(x.shape)] * (1 + len(x)))
    encoded.clear()
    monkeypatch.setattr(of_latents, "PAIR_ENTRIES", 3 * len(x) * sae.n_features)
    close(pair_attribution(Basis("attn.delta", {1: sae})).tensor(raw, 1), pairs, 1e-6)
    assert len(encoded) == (3 if batched else 3 + len(x))


def test_pairs_are_of_heads_that_write_there():
    with pytest.raises(UsageError, match="take attn"):
        pair_attribution(Basis("attn.out", {1: dictionary(32)})).tensor(captured("gemma2"), 1)
    same = pair_attribution(Basis("attn.out", {1: dictionary(32)})).tensor(captured("gpt2"), 1)
    close(same, pair_attribution(Basis("attn.delta", {1: dictionary(32)})).tensor(captured("gpt2"), 1))
    with pytest.raises(UsageError, match="features of a featurizer"):
        pair_attribution(Basis("attn.delta"))


@pytest.mark.parametrize("latent", [0, 11, 23])
def test_what_heads_write_to_one_latent_is_torchs_gradient_times_their_output(latent):
    raw, sae = captured("llama"), dictionary(32, pre_bias=True)
    basis = Basis("attn.delta", {1: sae})
    x = forward(raw, "attn.delta", 1).double().clone().requires_grad_()
    torch.relu((x - sae.b_dec) @ sae.W_enc[latent] + sae.get_parameter("b_enc")[latent]).sum().backward()
    close(latent_direction(basis, latent).tensor(raw, 1), x.grad)
    values, probabilities = forward(raw, "attn.v", 1).double(), forward(raw, "attn.probs", 1).double()
    output = shared_decoder("llama").model.layers[1].self_attn.o_proj.weight.double().detach()
    by_head = torch.einsum("qe,ehd->qhd", x.grad, output.reshape(len(output), *values.shape[1:]))
    pairs = torch.einsum("qkh,khd,qhd->qkh", probabilities, values, by_head)
    close(write_to_latent(basis, latent).tensor(raw, 1), pairs, 1e-5)
    close(token_write_to_latent(basis, latent).tensor(raw, 1), pairs.sum(1), 1e-5)
    close(token_write_to_latents(basis).tensor(raw, 1)[..., latent], pairs.sum(1), 1e-5)


@pytest.mark.parametrize("quantity", [latent_direction, write_to_latent, token_write_to_latent])
def test_a_latent_that_there_is_not_is_refused(quantity):
    basis = Basis("attn.delta", {1: dictionary(32)})
    for latent in (-1, 24):
        with pytest.raises(FeatureIndexError, match=f"no latent {latent}.*there are 24"):
            quantity(basis, latent)
    with pytest.raises(UsageError, match="has none" if quantity is latent_direction else "heads write"):
        quantity(Basis("attn.delta"), 0)


def test_heads_write_to_features_at_attn_delta_only():
    elsewhere = Basis("mlp.delta", {1: dictionary(32)})
    with pytest.raises(UsageError, match="heads write to features of a featurizer"):
        write_to_latent(elsewhere, 0)
    with pytest.raises(UsageError, match="heads write to features of a featurizer"):
        token_write_to_latent(elsewhere, 0)
    with pytest.raises(UsageError, match="heads write to features of a featurizer"):
        token_write_to_latents(elsewhere)


def test_pre_activations_of_latents_are_traced():
    raw = captured("llama")
    sae = dictionary(32, "topk", pre_bias=True, normalize="layer-norm")
    node = Node(Basis("mlp.delta", {1: sae}), 1, (6, 3), pre_activation=True)
    by_node = direction(node).tensor(raw)
    block = shared_decoder("llama").model.layers[1]
    resid = forward(raw, "resid.mid", 1).clone().requires_grad_()
    scale, gain = raw.scale("mlp", 1), block.post_attention_layernorm.weight
    delta = block.mlp(resid / scale * gain)
    normal = (delta - delta.mean(-1, keepdim=True)) / (delta.std(-1, keepdim=True) + 1e-5)
    ((normal[6] - sae.b_dec) @ sae.W_enc[3] + sae.get_parameter("b_enc")[3]).backward()
    close(by_node, resid.grad, 1e-4)
    relu = dictionary(32, pre_bias=True, normalize="layer-norm")
    x = forward(raw, "mlp.delta", 1)
    close(pre_activations(relu, x).relu(), relu.encode(x), 1e-12)
    subspace = Basis("mlp.delta", featurizers.create("subspace", d_in=32, n_features=2).double())
    with pytest.raises(UsageError, match="no known pre-activation"):
        direction(Node(subspace, 1, (6, 1), pre_activation=True)).tensor(raw)
    with pytest.raises(UsageError, match="take the latent itself"):
        direction(NodeGrad(node, times_metric=True)).tensor(raw)


def test_edges_into_parts_of_a_place_sum_to_those_into_the_place():
    """The JVP into features, lifted, the error and the bias are the JVP into the place."""
    raw, source = captured("qwen3"), Node(Basis("mlp.neurons"), 0, (6, 3))
    for sort in ("relu", "topk", "layer-norm", "two stages", "subspace"):
        basis = bases("qwen3")[sort]
        place = f"edge_from:{basis.kind}"
        total = edge_from(source, Basis(basis.kind)).derive(raw, [1])[place, 1].sum()
        parts = sum(edge_from(source, part).derive(raw, [1])[f"edge_from:{part}", 1].sum() for part in basis.parts)
        assert float(parts) == pytest.approx(float(total), rel=1e-6)
        change = activation_from(source, basis).tensor(raw, 1)
        assert change.shape == value(basis).tensor(raw, 1).shape


def test_bfloat16_models_are_contracted_in_float32():
    model = copy.deepcopy(shared_decoder("llama")).bfloat16()
    needs = [Need("mlp.neurons"), Need("resid.final", "backward")]
    low = capture(Circuit(model), tokens(), needs, metric=METRIC)[0]
    assert low[Place("mlp.neurons", 1), "forward"].dtype == torch.bfloat16
    effect = write_to(Basis("mlp.neurons", {1: dictionary(40).bfloat16()})).tensor(low, 1)
    assert effect.dtype == torch.float32
    exact = write_to(Basis("mlp.neurons", {1: dictionary(40)})).tensor(captured("llama"), 1)
    assert float((effect - exact).norm()) < 0.15 * float(exact.norm())
    assert write_to(Basis("mlp.neurons")).tensor(low, 1).dtype == torch.float32


# ---- featurizers of scalars


class TestDiagonal(FeaturizerContract):
    @pytest.fixture
    def featurizer(self):
        return DiagonalFeaturizer.from_gain(torch.tensor([0.5, -2.0, 3.0, 0.0, 1.0, -0.25, 4.0, 0.7]))

    @pytest.fixture
    def activations(self):
        return torch.randn(12, 8, generator=torch.Generator().manual_seed(0))


def test_gains_are_a_finite_vector():
    with pytest.raises(ShapeError, match="vector of real numbers"):
        DiagonalFeaturizer.from_gain(torch.zeros(2, 2))
    with pytest.raises(ConfigError, match="finite"):
        DiagonalFeaturizer.from_gain(torch.tensor([1.0, float("inf")]))
    with pytest.raises(ShapeError, match="is a tensor"):
        DiagonalFeaturizer.from_gain(torch.ones(2)).inverse_featurize(torch.ones(2), None)


@pytest.mark.parametrize("kind", ["mlp.neurons", "attn.z", "mlp.out"])
def test_a_scalar_that_weighs_nodes_is_a_featurizer(kind):
    """Its features are the scalar, and it gives the activations back."""
    raw = captured("gpt2")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = forward(raw, kind, 1).reshape(7, -1)
    for deriver in (write_norm(Basis(kind), signed=True), write_to(Basis(kind), Fixed(vector))):
        f = deriver.as_featurizer(raw, 1)
        assert f.kind == "derived-scalars.diagonal"
        features, error = f.featurize(x)
        close(features, deriver.tensor(raw, 1).reshape(7, -1))
        close(f.inverse_featurize(features, error), x, 1e-12)
        assert str(f.site).startswith({"mlp.neurons": "mlp.act:1", "attn.z": "attn.z:1", "mlp.out": "mlp.out:1"}[kind])
    at_last = write_to(Basis(kind)).as_featurizer(raw, 1, token=6)
    close(at_last.encode(x)[6], write_to(Basis(kind)).tensor(raw, 1).reshape(7, -1)[6])
    with pytest.raises(UsageError, match="differs from token to token; choose a token"):
        write_to(Basis(kind)).as_featurizer(raw, 1)


def test_a_scalar_of_features_is_a_featurizer_of_two_stages():
    raw, sae = captured("gemma2"), dictionary(32, "topk")
    deriver = write_to(Basis("mlp.delta", {1: sae}))
    f = deriver.as_featurizer(raw, 1, token=6)
    x = forward(raw, "mlp.delta", 1)
    close(f.encode(x)[6], deriver.tensor(raw, 1)[6])
    close(f.inverse_featurize(*f.featurize(x)), x, 1e-10)
    assert value(Basis("mlp.delta", {1: sae})).as_featurizer(raw, 1) is sae
    assert value(Basis("mlp.neurons")).as_featurizer(raw, 1).kind == "identity"


def test_a_direction_is_a_line():
    raw = captured("gpt2")
    f = direction(Node(Basis("mlp.neurons"), 1, (6, 3))).as_featurizer(raw, token=6)
    gradient = direction(Node(Basis("mlp.neurons"), 1, (6, 3))).tensor(raw)[6]
    assert (f.kind, f.n_features) == ("subspace", 1)
    close(f.basis[:, 0].detach(), gradient / gradient.norm())
    final = direction(MetricGrad()).as_featurizer(raw, token=-1)
    assert str(final.site) == "resid.post:2"


def test_what_is_no_featurizer_says_so():
    raw = captured("gpt2")
    for deriver in (
        grad(Basis("mlp.neurons")),
        write_norm(Basis("mlp.neurons")),
        norm(Basis("resid.pre")),
        write_to(Basis("attn.probs")),
        write_to(Basis("mlp.delta", whole=True)),
        sum_keys(act_times_grad(Basis("attn.probs"))),
    ):
        with pytest.raises(UsageError, match="is no featurizer"):
            deriver.as_featurizer(raw, 1)


# ---- what a basis refuses


def test_bases_refuse_what_fits_no_place():
    sae = dictionary(32)
    for fault, error, match in (
        (lambda: Basis("mlp.act"), SiteError, "there is no place"),
        (lambda: Basis("attn.probs", sae), SiteError, "holds no vectors"),
        (lambda: Basis("mlp.delta", "sae"), UsageError, "not 'sae'"),
        (lambda: Basis("mlp.delta", sae, part="rest"), UsageError, "'features', 'error' or 'bias'"),
        (lambda: Basis("mlp.delta", part="error"), UsageError, "was given none"),
        (lambda: Basis("mlp.delta", via="q"), UsageError, "via belongs to"),
        (lambda: Basis("attn.probs", via="x"), UsageError, "'q', 'k' or 'v'"),
        (lambda: Basis("attn.probs", whole=True), UsageError, "holds no vectors"),
        (lambda: Basis.of(sae), UsageError, "does not say where"),
        (lambda: write_to(Basis("attn.q")), UsageError, "does not write"),
        (lambda: write_norm(Basis("mlp.delta", whole=True), signed=True), UsageError, "has no sign"),
        (lambda: norm(Basis("attn.probs")), UsageError, "no vectors"),
        (lambda: weighted_value(Basis("mlp.neurons")), UsageError, "heads weight values, so the basis is attn.probs"),
    ):
        with pytest.raises(error, match=match):
            fault()
    with pytest.raises(SiteError, match="no result at layer 2"):
        value(Basis("mlp.delta", {1: sae})).derive(captured("gpt2"), [2])
    with pytest.raises(ShapeError, match=r"mlp.neurons:1: .* takes activations of width 32"):
        value(Basis("mlp.neurons", sae)).tensor(captured("gpt2"), 1)
    sae.site = featurizers.Site("mlp.out", 1)
    assert str(Basis.of(sae)) == "mlp.out features"
    found = scalars(shared_decoder("gpt2"), tokens(), "value", metric=METRIC, featurizers=[sae])
    assert ("value:mlp.out features", 1) in found


def test_a_featurizer_on_another_device_is_told():
    elsewhere = dictionary(32).to("meta")
    with pytest.raises(UsageError, match="is on meta, and what was captured on cpu"):
        value(Basis("mlp.delta", elsewhere)).tensor(captured("gpt2"), 1)
