"""What the options of several commands say, and a model as it is while something is measured."""

import pytest
import torch
from featurizers.cli.options import dtype_named, layer_numbers
from featurizers.errors import UsageError
from featurizers.models.modes import evaluating, frozen, without_parameter_gradients
from torch import nn


def test_layers_are_numbers_and_ranges_each_once_in_the_order_given():
    assert layer_numbers("3, 0-2,1", 4) == [3, 0, 1, 2]
    assert layer_numbers("7") == [7]


@pytest.mark.parametrize(
    ("text", "n_layers", "words"),
    [
        ("x", 4, "such as 4,8,12 or 0-11, not 'x'"),
        ("", None, "not ''"),
        ("1,,2", 4, "not '1,,2'"),
        ("-1", 4, "not '-1'"),
        ("2-4", 4, "the layers '2-4' are not in the model, which has those from 0 to 3"),
        ("3-1", None, "the layers '3-1' end before they begin"),
    ],
)
def test_what_is_no_layer_is_refused(text, n_layers, words):
    with pytest.raises(UsageError) as caught:
        layer_numbers(text, n_layers)
    assert words in str(caught.value)


def test_dtypes_by_name():
    assert [dtype_named(name) for name in ("auto", "bfloat16")] == [None, torch.bfloat16]
    with pytest.raises(UsageError, match="one of auto, float32, bfloat16, float16, not 'int8'"):
        dtype_named("int8")


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
