"""Options that several commands share: layers and dtypes."""

import pytest
import torch
from featurizers.cli.options import dtype_named, layer_numbers
from featurizers.errors import UsageError


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
