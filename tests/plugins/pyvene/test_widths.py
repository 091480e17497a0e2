"""Which of pyvene's places are known to be as wide as the residual stream."""

import pytest
from featurizers import Anatomy
from featurizers_pyvene.widths import residual_width

from tests.core.models.test_blocks import WIDTH, build


@pytest.mark.parametrize("name", ["Qwen3Next", "Bamba"])
def test_residual_width_knows_the_parts_of_each_block(name):
    anatomy = Anatomy(build(name))
    part = "linear_attn" if name == "Qwen3Next" else "mamba"
    assert residual_width(anatomy, f"model.layers[0].{part}.output") == WIDTH
    assert residual_width(anatomy, "model.layers[1].self_attn.output") == WIDTH
    assert residual_width(anatomy, "model.layers[1].output") == WIDTH
    for other in (f"model.layers[1].{part}.output", "model.layers[0].self_attn.output", "model.layers[2].output"):
        assert residual_width(anatomy, other) is None
