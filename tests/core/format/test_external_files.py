"""Parts of tensors in files of other libraries, compared with indexing the whole tensor."""

from __future__ import annotations

import pytest
import torch
from featurizers.errors import WeightsError
from featurizers.store import of_folder
from safetensors.torch import save_file


def test_parts_of_a_tensor_are_what_indexing_gives(tmp_path):
    stack = torch.randn(3, 600, 5)
    save_file({"stack": stack}, tmp_path / "it.safetensors")
    file, rows = of_folder(tmp_path, None).safetensors("it.safetensors"), torch.tensor([599, 7, 8, 0])
    assert torch.equal(file.read("stack"), stack)
    assert torch.equal(file.read("stack", rows=torch.tensor([2, 0])), stack[[2, 0]])
    assert torch.equal(file.read("stack", plane=1), stack[1])
    assert torch.equal(file.read("stack", rows=rows, plane=2), stack[2][rows])
    assert torch.equal(file.read("stack", columns=torch.tensor([4, 1]), plane=2), stack[2][:, [4, 1]])
    with pytest.raises(WeightsError, match="'stack' cannot be read"):
        file.read("stack", plane=3)
