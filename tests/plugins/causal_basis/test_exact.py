"""Energy in closed form compared with autograd, and the readouts compared with their models."""

import json
from dataclasses import replace

import pytest
import torch
from featurizers.errors import ConfigError, ShapeError, UsageError, WeightsError
from featurizers_causal_basis import AffineNorm, Decoder, LogitLens, TunedLens
from featurizers_causal_basis.solve.differentiated import DifferentiatedEnergy
from featurizers_causal_basis.solve.energy import Tokens
from featurizers_causal_basis.solve.exact import ExactEnergy
from featurizers_causal_basis.solve.processes import Processes
from torch import Tensor, nn

from tests.support.models import ARCHITECTURES, LAYERS, WIDTH, fresh_model, module_of, prompts, read, tiny_model

D, VOCABULARY, N = 12, 40, 30


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decoder(norm: str, bias: bool) -> nn.Sequential:
    made = {"layer": nn.LayerNorm(D, eps=1e-3), "rms": nn.RMSNorm(D, eps=1e-3)}[norm]
    made = nn.Sequential(made, nn.Linear(D, VOCABULARY, bias=bias)).double()
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number) + (number == 0))
    return made


@pytest.mark.parametrize("mode", ["mean", "zero", "resample"])
@pytest.mark.parametrize("translated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_closed_form_agrees_with_autograd(norm, bias, translated, mode):
    run = decoder(norm, bias)
    form = Decoder(run).affine_norm(0)
    assert form is not None
    matrix, offset = torch.eye(D).double(), torch.zeros(D).double()
    if translated:
        matrix, offset = randn(D, D, seed=8), randn(D, seed=9)
        form = replace(form, translator=matrix, offset=offset)
    tokens = Tokens.of(randn(N, D, seed=3) * 2 + 1, mode, Processes(), 0)
    v = randn(D, seed=4)
    v = (v / v.norm()).requires_grad_()

    def log_probs(h: Tensor) -> Tensor:
        return run(h @ matrix.mT + offset).log_softmax(-1)

    p, q = log_probs(tokens.h), log_probs(tokens.h - torch.outer(tokens.deviation @ v, v))
    energy = (p.exp() * (p - q)).sum(-1).mean()
    (grad,) = torch.autograd.grad(energy, v)
    value, gradient = ExactEnergy(tokens, form).value_and_grad(v.detach())
    assert value == pytest.approx(energy.item(), abs=1e-12)
    assert torch.allclose(gradient, grad, atol=1e-12, rtol=0)
    assert ExactEnergy(tokens, form).direct(v.detach().unsqueeze(-1)) == pytest.approx(energy.item(), abs=1e-12)


def test_the_size_of_the_chunks_does_not_matter(monkeypatch):
    tokens = Tokens.of(randn(N, D), "mean", Processes(), 0)
    form = Decoder(decoder("layer", True)).affine_norm(0)
    v = torch.eye(D).double()[0]
    whole, whole_grad = ExactEnergy(tokens, form).value_and_grad(v)
    monkeypatch.setattr("featurizers_causal_basis.solve.exact.CHUNK", {"cpu": 7 * VOCABULARY})
    value, grad = ExactEnergy(tokens, form).value_and_grad(v)
    assert value == pytest.approx(whole, abs=1e-14)
    assert torch.allclose(grad, whole_grad, atol=1e-14, rtol=0)


def test_energies_through_a_readout_without_a_closed_form_are_the_same():
    run = decoder("layer", True)
    tokens = Tokens.of(randn(N, D), "mean", Processes(), 0)
    exact = ExactEnergy(tokens, Decoder(run).affine_norm(0))
    parts = [slice(0, 11), slice(11, N)]
    general = DifferentiatedEnergy(tokens, parts, lambda h, _: run(h).log_softmax(-1))
    v = randn(D, seed=5)
    v /= v.norm()
    for closed, autograd in zip(exact.value_and_grad(v), general.value_and_grad(v), strict=True):
        assert torch.allclose(torch.as_tensor(closed), torch.as_tensor(autograd), atol=1e-12, rtol=0)
    two = torch.linalg.qr(randn(D, 2)).Q
    assert exact.direct(two) == pytest.approx(general.direct(two), abs=1e-12)
    uniform = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(exact.scores(uniform), general.scores(uniform), atol=1e-12, rtol=0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in run.parameters())


def test_the_mean_outer_product_of_scores_is_the_curvature():
    # E log p(y)' log p(y)'ᵀ = F and E(v) -> ½ (x·v)² vᵀ F v, if y is drawn from p itself
    run = decoder("rms", False)
    h = randn(1, D).expand(20000, D).contiguous()
    tokens = Tokens.of(h, "zero", Processes(), 0)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g = ExactEnergy(tokens, Decoder(run).affine_norm(0)).scores(uniform)
    p = run(h[:1]).softmax(-1)[0].detach()
    jacobian = torch.autograd.functional.jacobian(lambda x: run(x).log_softmax(-1), h[0])
    fisher = jacobian.mT @ (p.unsqueeze(-1) * jacobian)
    assert float((g.mT @ g / len(g) - fisher).norm() / fisher.norm()) < 0.05


def test_float16_and_bfloat16_activations_are_computed_in_float32():
    form = Decoder(decoder("rms", True)).affine_norm(0)
    v = torch.eye(D).double()[0]
    for dtype in (torch.float16, torch.bfloat16):
        h = randn(N, D).to(dtype)
        low = ExactEnergy(Tokens.of(h, "mean", Processes(), 0), form)
        assert low.tokens.h.dtype == torch.float32
        high = ExactEnergy(Tokens.of(h.double(), "mean", Processes(), 0), form)
        assert low.value_and_grad(v)[0] == pytest.approx(high.value_and_grad(v)[0], rel=1e-5)


def test_very_unlikely_tokens_leave_the_energy_finite():
    form = AffineNorm(randn(VOCABULARY, D, dtype=torch.float32) * 300, None, 1e-6, False)
    energy = ExactEnergy(Tokens.of(randn(N, D, dtype=torch.float32), "mean", Processes(), 0), form)
    v = torch.eye(D).double()[0]
    value, grad = energy.value_and_grad(v)
    assert grad.isfinite().all()
    assert value == pytest.approx(energy.direct(v.unsqueeze(-1)), rel=1e-4)


# ---------------------------------------------------------------------- readouts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_logit_lens_at_the_last_block_is_the_model(architecture):
    model = tiny_model(architecture)
    ids = prompts(2, 6)
    module, side = module_of(model, architecture, "resid.post", LAYERS - 1)
    h = read(model, module, side, input_ids=ids).reshape(-1, WIDTH)
    lens = LogitLens(model)
    expected = model(input_ids=ids).logits.log_softmax(-1).reshape(len(h), -1)
    assert torch.allclose(lens.log_probs(h, LAYERS), expected, atol=1e-5)
    form = lens.affine_norm(LAYERS)
    if architecture == "gemma2":
        assert form is None, "its logits are capped"
    else:
        assert torch.allclose(form.log_probs(h), expected, atol=1e-5)


def test_a_factor_on_the_logits_is_found_and_folded_in():
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CohereConfig(
        vocab_size=30, logit_scale=0.25, pad_token_id=None, bos_token_id=None, eos_token_id=None, **sizes
    )
    model = CohereForCausalLM(config).eval()
    ids = torch.arange(5).unsqueeze(0)
    h = read(model, model.model.layers[0], "output", input_ids=ids)[0]
    form = LogitLens(model).affine_norm(1)
    assert torch.allclose(form.log_probs(h), model(input_ids=ids).logits[0].log_softmax(-1), atol=1e-5)


def test_a_model_with_other_logits_than_its_head_gives_is_refused():
    model = fresh_model("llama")
    head = model.get_output_embeddings()
    model.get_output_embeddings = lambda: nn.Linear(head.in_features, head.out_features, bias=False)
    with pytest.raises(UsageError, match="are not those of its final norm and its head"):
        LogitLens(model)
    with pytest.raises(UsageError, match="has no head"):
        LogitLens(fresh_model("llama").model)


def test_norms_are_recognised_by_what_they_compute():
    class Gemma(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(randn(D, dtype=torch.float32)), 1e-5

        def forward(self, x: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)

    class Other(Gemma):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    def form_of(norm: nn.Module) -> AffineNorm | None:
        return Decoder(nn.Sequential(norm, nn.Linear(D, VOCABULARY))).affine_norm(0)

    gemma = Gemma()
    form = form_of(gemma)
    assert form is not None
    assert not form.centred
    assert torch.allclose(form.gain, 1 + gemma.weight)
    assert form_of(Other()) is None
    assert form_of(nn.Identity()) is None
    layer = form_of(nn.LayerNorm(D, eps=1e-2))
    assert layer.centred
    assert layer.eps == 1e-2


def tuned(folder, weights, biases, **config):
    """Write the files of tuned-lens 0.2.0, the translators' state dict and the config, and return the folder."""
    state = nn.ModuleList([nn.Linear(len(w), len(w), bias=biases is not None) for w in weights]).state_dict()
    for i, weight in enumerate(weights):
        state[f"{i}.weight"] = weight
        if biases is not None:
            state[f"{i}.bias"] = biases[i]
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "params.pt")
    about = {"base_model_name_or_path": "m", "d_model": len(weights[0]), "num_hidden_layers": len(weights)}
    about |= {"bias": biases is not None, "unembed_hash": "x", "lens_type": "linear_tuned_lens"} | config
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("bias", [True, False])
def test_a_tuned_lens_is_read_from_its_files(tmp_path, bias):
    model = tiny_model("gpt_neox")
    weights = [randn(WIDTH, WIDTH, seed=i, dtype=torch.float32) for i in range(LAYERS)]
    biases = [randn(WIDTH, seed=9 + i, dtype=torch.float32) for i in range(LAYERS)] if bias else None
    lens = TunedLens.load(model, tuned(tmp_path / "lens", weights, biases))
    h = randn(7, WIDTH, dtype=torch.float32)
    for depth in range(LAYERS + 1):
        moved = h if depth == LAYERS else h + h @ weights[depth].mT + (biases[depth] if bias else 0)
        expected = model.get_output_embeddings()(model.gpt_neox.final_layer_norm(moved)).log_softmax(-1)
        assert torch.allclose(lens.log_probs(h, depth), expected, atol=1e-4)
        assert torch.allclose(lens.affine_norm(depth).log_probs(h), expected, atol=1e-4)
    assert lens.sha256 != LogitLens(model).sha256


def test_files_that_do_not_fit_the_model_are_refused(tmp_path):
    model = tiny_model("llama")
    weights = [torch.eye(WIDTH)] * LAYERS
    with pytest.raises(ConfigError, match="gated"):
        TunedLens.load(model, tuned(tmp_path, weights, None, lens_type="gated"))
    with pytest.raises(WeightsError, match="finite floating-point tensor of shape"):
        TunedLens.load(model, tuned(tmp_path, weights, None, d_model=WIDTH + 1))
    with pytest.raises(WeightsError, match="does not hold exactly"):
        TunedLens.load(model, tuned(tmp_path, weights, None, num_hidden_layers=LAYERS + 1))
    with pytest.raises(ShapeError, match=f"has {LAYERS} blocks"):
        TunedLens.load(model, tuned(tmp_path, weights[:2], None))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="d_model"):
        TunedLens.load(model, tmp_path)
