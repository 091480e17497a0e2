"""Evaluation mode and frozen parameters, and the model as it was afterwards."""

import pytest
from featurizers.models import evaluating, frozen, without_parameter_gradients
from torch import nn


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("context", "quiet", "gradless"),
    [(evaluating, True, False), (without_parameter_gradients, False, True), (frozen, True, True)],
)
def test_a_model_is_as_it_was_afterwards(context, quiet, gradless, fails):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2).eval().requires_grad_(False)).train()
    model[2].eval()

    def state():
        modes = [module.training for module in model.modules()]
        return modes, [parameter.requires_grad for parameter in model.parameters()]

    before = state()
    try:
        with context(model):
            modes, learning = state()
            assert any(modes) is not quiet
            assert any(learning) is not gradless
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert state() == before
