"""Speed of distributed alignment search: a training step, and an interchange without training."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from featurizers_subspace import SubspaceFeaturizer, stiefel
from peers import ParametrizedSubspace
from timing import Benchmark, Case, Settings, Unequal, same, tolerance
from torch import Tensor, nn

BATCH = 32
LEARNING_RATE = 1e-2
"""Large enough for every step to leave the manifold, so that every step includes the retraction."""
BATCHES = 8
"""Number of batches used in turn, so that the gradient does not vanish in a long training."""
PEER = "rotation under torch's orthogonal parametrization"

Interchange = Callable[[Tensor, Tensor], Tensor]


def training_step(module: nn.Module, interchange: Interchange, settings: Settings, d_in: int) -> Callable[[], None]:
    """Return a function that makes one training step: interchange, loss, gradients and SGD."""
    batches = [[settings.randn(BATCH, d_in, seed=3 * i + j) for j in range(3)] for i in range(BATCHES)]
    turns = itertools.cycle(batches)
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        base, source, target = next(turns)
        optimizer.zero_grad()
        loss = (interchange(base, source) - target).float().square().sum() / BATCH
        loss.backward()
        optimizer.step()

    return step


def subspace(settings: Settings, d_in: int, n_features: int) -> SubspaceFeaturizer:
    """Build this library's featurizer from a random basis."""
    weight = settings.randn(d_in, n_features).float()
    return SubspaceFeaturizer.from_basis(weight, orthonormalize=True).to(settings.device)


def parametrized(settings: Settings, d_in: int, n_features: int) -> ParametrizedSubspace:
    """Build the peer from a random basis."""
    torch.manual_seed(0)
    return ParametrizedSubspace(d_in, n_features).to(settings.device)


def _sides(settings: Settings, d_in: int, n_features: int) -> tuple[SubspaceFeaturizer, ParametrizedSubspace]:
    theirs = parametrized(settings, d_in, n_features)
    ours = SubspaceFeaturizer.from_basis(theirs.rotate.weight.detach(), orthonormalize=True)
    return ours, theirs


def _check(settings: Settings, ours: SubspaceFeaturizer, theirs: ParametrizedSubspace, d_in: int) -> list[str]:
    """Compare the interchange and its gradient in the activations; that in the basis depends on the parametrization."""
    base, source, target = (settings.randn(BATCH, d_in, seed=seed) for seed in range(3))
    base.requires_grad_()
    results = []
    for side in (ours, theirs):
        edited = side.interchange(base, source)
        loss = (edited - target).float().square().sum()
        results.append((edited, torch.autograd.grad(loss, base)[0]))
    (a, a_grad), (b, b_grad) = results
    allowed = max(1e-4, tolerance(settings.dtype))
    return [same(a, b, allowed, "interchange"), same(a_grad, b_grad, allowed, "gradient")]


def _training(settings: Settings, d_in: int, n_features: int) -> Case:
    ours, theirs = _sides(settings, d_in, n_features)
    our_step = training_step(ours, ours.interchange, settings, d_in)

    def check() -> str:
        checked = _check(settings, ours, theirs, d_in)
        our_step()
        if stiefel.deviation(ours.basis) <= stiefel.tolerance(ours.basis.dtype):
            raise Unequal("the step stayed on the manifold, so the retraction would not be timed")
        return "; ".join(checked)

    return Case(
        f"DAS training step, d={d_in}, k={n_features}, batch {BATCH}",
        PEER,
        our_step,
        training_step(theirs, theirs.interchange, settings, d_in),
        check,
    )


def step_4096(settings: Settings) -> Case:
    """Compare training steps at the width of a 7B model."""
    return _training(settings, settings.size(4096, 256), settings.size(64, 16))


def step_768(settings: Settings) -> Case:
    """Compare training steps at the width of GPT-2."""
    return _training(settings, settings.size(768, 128), settings.size(64, 16))


def step_768_cached(settings: Settings) -> Case:
    """Compare as `step_768`, with torch's cache of parametrizations, an option, enabled for the peer."""
    case = _training(settings, settings.size(768, 128), settings.size(64, 16))

    def theirs() -> None:
        with torch.nn.utils.parametrize.cached():
            case.theirs()

    return Case(case.what, f"{PEER}, inside parametrize.cached()", case.ours, theirs, case.check)


def interchange_2304(settings: Settings) -> Case:
    """Compare interchanges without gradients at the width of Gemma 2 2B."""
    d_in, n_features = settings.size(2304, 256), settings.size(128, 32)
    ours, theirs = _sides(settings, d_in, n_features)
    base, source = (settings.randn(BATCH, d_in, seed=seed) for seed in range(2))

    def call(interchange: Interchange) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: interchange(base, source))

    return Case(
        f"interchange without training, d={d_in}, k={n_features}, batch {BATCH}",
        PEER,
        call(ours.interchange),
        call(theirs.interchange),
        lambda: "; ".join(_check(settings, ours, theirs, d_in)),
    )


BENCHMARKS = (
    Benchmark("das-4096", step_4096, required=1000),
    Benchmark("das-768", step_768, required=100),
    Benchmark("das-768-cached", step_768_cached),
    Benchmark("interchange-2304", interchange_2304, required=80),
)
