"""`Norm`: the formula of a LayerNorm or RMSNorm, compared with the module itself."""

import copy

import pytest
import torch
from featurizers.models import Anatomy, Norm
from torch import Tensor, nn

from tests.support.decoders import DECODERS, WIDTH, shared_decoder
from tests.support.models import ARCHITECTURES, tiny_model
from tests.support.models import WIDTH as TINY_WIDTH


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(first: Tensor, second: Tensor, tolerance: float) -> None:
    assert first.shape == second.shape
    assert float(second.norm()) > 0
    assert float((first - second).norm()) <= tolerance * float(second.norm())


class Fixed(nn.Module):
    """RMSNorm with its gain under another name, as a square, and an epsilon that no attribute tells."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Parameter(1 + 0.3 * noise(WIDTH).float())

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 3e-5).rsqrt() * self.root.square()


class Tanh(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Absolute(nn.Module):
    """Divides by the mean absolute value, not by the root of the mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().mean(-1, keepdim=True)


class Pair(nn.LayerNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


def norms() -> dict[str, tuple[nn.Module, bool, float]]:
    def like(name: str, *arguments, **options) -> nn.Module:
        return type(shared_decoder(name).model.norm)(*arguments, **options)

    return {
        "layer norm": (nn.LayerNorm(WIDTH, eps=1e-3), True, 1e-3),
        "layer norm without bias": (nn.LayerNorm(WIDTH, bias=False), True, 1e-5),
        "bare layer norm": (nn.LayerNorm(WIDTH, elementwise_affine=False), True, 1e-5),
        "rms norm": (nn.RMSNorm(WIDTH, eps=1e-2), False, 1e-2),
        "rms norm of the dtype's epsilon": (nn.RMSNorm(WIDTH), False, torch.finfo(torch.float32).eps),
        "no epsilon": (nn.RMSNorm(WIDTH, eps=0.0), False, 0.0),
        "llama": (like("llama", WIDTH, eps=1e-4), False, 1e-4),
        "gemma": (like("gemma", WIDTH), False, 1e-6),
        "cohere": (like("cohere", WIDTH), True, 1e-5),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", norms())
def test_a_norm_is_recognised_with_its_own_parameters(name, dtype):
    module, centred, epsilon = norms()[name]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(noise(WIDTH, seed=2).float() * 0.5)
    module = module.to(dtype)
    norm = Norm.of(module, WIDTH)
    assert norm is not None
    assert norm.centred == centred
    if dtype == torch.float64 and name == "rms norm of the dtype's epsilon":
        epsilon = torch.finfo(dtype).eps
    assert norm.epsilon == epsilon
    weight = next(module.parameters(), None)
    if weight is None:
        assert norm.gain is None
    else:
        assert torch.equal(norm.gain, weight.detach().double() + (1 if name == "gemma" else 0))
    exact = copy.deepcopy(module).double()
    if isinstance(exact, nn.RMSNorm):
        exact.eps = epsilon  # else a copy in float64 adds the epsilon of float64
    for size in (1e-3, 0.1, 1.0, 50.0):
        x = size * (noise(5, WIDTH, seed=8) + 0.3)
        close(norm(x), exact(x).detach(), 1e-6)
        close(norm.frozen(x, norm.scale(x)), exact(x).detach(), 1e-6)


def test_what_the_parameters_do_not_explain_is_measured():
    module = Fixed()
    assert Norm.of(module, WIDTH, measured=False) is None
    norm = Norm.of(module, WIDTH)
    assert norm.epsilon == pytest.approx(3e-5, rel=1e-3)
    close(norm.gain, module.root.detach().double().square(), 1e-6)
    x = noise(5, WIDTH, seed=8)
    close(norm(x), module.double()(x).detach(), 1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_final_norm_of_each_architecture_is_recognised(architecture):
    module = Anatomy(tiny_model(architecture)).place("norm.out").module
    norm = Norm.of(module, TINY_WIDTH)
    x = noise(5, TINY_WIDTH).float()
    assert norm(x).dtype == torch.float32
    close(norm(x), module(x).detach(), 1e-6)


@pytest.mark.parametrize("name", DECODERS)
def test_every_norm_as_wide_as_the_stream_is_recognised(name):
    modules = [m for m in shared_decoder(name).modules() if "Norm" in type(m).__name__]
    as_wide = [m for m in modules if getattr(m, "weight", torch.zeros(WIDTH)).shape == (WIDTH,)]
    assert as_wide
    for module in as_wide:
        x = noise(5, WIDTH)
        close(Norm.of(module, WIDTH)(x), module(x).detach(), 1e-6)


@pytest.mark.parametrize(
    "module",
    [
        Absolute(),
        Tanh(WIDTH),
        Pair(WIDTH),
        nn.Identity(),
        nn.GELU(),
        nn.Softmax(-1),
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH + 1, WIDTH),
        nn.Embedding(3, WIDTH),
        nn.LayerNorm(WIDTH + 1),
    ],
)
def test_what_is_no_norm_is_none(module):
    assert Norm.of(module, WIDTH) is None


def test_a_gain_of_zeros_is_recognised():
    norm = Norm.of(nn.RMSNorm(WIDTH, eps=1e-5).requires_grad_(False), WIDTH)
    assert torch.equal(norm.gain, torch.ones(WIDTH).double())
    module = nn.RMSNorm(WIDTH, eps=1e-5)
    nn.init.zeros_(module.weight)
    assert torch.equal(Norm.of(module, WIDTH)(noise(2, WIDTH)), torch.zeros(2, WIDTH).double())


def test_the_module_and_the_random_state_stay_as_they_were():
    module = nn.LayerNorm(WIDTH).bfloat16().train()
    before, state = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    Norm.of(module, WIDTH)
    assert module.training
    assert module.weight.dtype == torch.bfloat16
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_with_its_scale_held_a_norm_is_affine_and_pullback_is_the_adjoint(centred, affine):
    gain, bias = (noise(WIDTH, seed=1), noise(WIDTH, seed=2)) if affine else (None, None)
    norm = Norm(gain, bias, 1e-5, centred)
    x, direction = noise(5, WIDTH), noise(5, WIDTH, seed=9)
    scale = norm.scale(x)
    [back] = torch.autograd.grad(norm.frozen(x.requires_grad_(), scale), x, direction)
    close(norm.pullback(direction) / scale, back, 1e-12)
    x = x.detach()
    assert float((norm.linear(x) * direction).sum()) == pytest.approx(float((x * norm.pullback(direction)).sum()))
    known = nn.functional.layer_norm(x, (WIDTH,), gain, bias, 1e-5)
    if not centred:
        known = nn.functional.rms_norm(x, (WIDTH,), gain, 1e-5) + (0 if bias is None else bias)
    close(norm(x), known, 1e-12)


@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_dtype_is_that_of_the_input_but_float32_at_least(given, computed):
    norm = Norm.of(nn.LayerNorm(WIDTH), WIDTH)
    x = noise(2, WIDTH).to(given)
    for result in (norm(x), norm.scale(x), norm.linear(x), norm.pullback(x), norm.frozen(x, norm.scale(x))):
        assert result.dtype == computed
    assert norm.to("cpu", torch.float32).gain.dtype == torch.float32
    assert norm.to().bias.dtype == torch.float64
    assert Norm(None, None, 0.0, False).to("cpu", torch.float32).gain is None
