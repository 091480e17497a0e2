"""What is particular to the kind ``flow``."""

import math

import torch
from featurizers_flow import FlowConfig, FlowFeaturizer


def random_flow(d_in: int) -> FlowFeaturizer:
    f = FlowFeaturizer(FlowConfig(d_in=d_in, layers=3, hidden=5)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in f.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return f


def test_a_new_flow_is_the_identity() -> None:
    x = torch.randn(5, 6)
    assert torch.equal(FlowFeaturizer(FlowConfig(d_in=6)).encode(x), x)


def test_the_log_determinant_is_that_of_the_jacobian() -> None:
    f, x = random_flow(5), torch.randn(5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: f.featurize(v)[0], x)
    expected = 0.5 * f.encode(x).square().sum() - torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(f.negative_log_likelihood(x[None]), expected)


def test_the_features_are_not_linear_in_the_activations() -> None:
    f = random_flow(6)
    x, y = torch.randn(2, 6, dtype=torch.float64)
    assert (f.encode(x + y) - f.encode(x) - f.encode(y) + f.encode(0 * x)).abs().max() > 1e-2


def test_a_fit_makes_a_curved_cloud_round() -> None:
    """A banana, y = x²/2 + noise, is uncorrelated and not independent; its features are nearly independent normals."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 400, generator=generator)
    cloud = torch.stack((x, x.square() / 2 + noise / 4 - 0.5), dim=-1)
    f = FlowFeaturizer.fit(cloud, steps=150)
    with torch.no_grad():
        likelihood = float(f.negative_log_likelihood(cloud))
    entropy = 1 + math.log(0.25)  # of the cloud, in nats, without log 2π: that of x, and of the noise at a quarter
    gaussian = 1 + 0.5 * float(torch.logdet(torch.cov(cloud.mT)))  # of the best linear map
    assert likelihood < (entropy + gaussian) / 2
