"""`model.safetensors` as it is written, read back by the safetensors library."""

from __future__ import annotations

from pathlib import Path

import featurizers
import pytest
import safetensors.torch
import torch
from featurizers.format import Pieces, weights
from safetensors import safe_open

TENSORS = {
    "bias": torch.randn(7, generator=torch.Generator().manual_seed(0)),
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False]),
    "half": torch.linspace(-1, 1, 15).reshape(3, 5).bfloat16(),
    "number": torch.tensor(3.0),
    "numbers": torch.arange(5),
    "transposed": torch.arange(128.0).reshape(8, 16).T,
    "weight": torch.arange(2048.0).reshape(64, 32),
}


def test_the_safetensors_library_reads_the_same_bits(tmp_path: Path) -> None:
    weights.save_tensors(TENSORS, path := tmp_path / "some.safetensors", "here", {"word": "Größe"})
    found = safetensors.torch.load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"word": "Größe"}
    assert weights.read_header(path, "here").keys() == TENSORS.keys()


@pytest.mark.parametrize("d_in", [64, 48])
def test_the_weights_of_a_featurizer_are_mapped_and_not_copied(d_in: int, tmp_path: Path) -> None:
    f = featurizers.DictionaryFeaturizer.from_tensors(torch.ones(128, d_in), torch.ones(128, d_in))
    f.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert [file.get_tensor(name).data_ptr() % weights.ALIGNMENT for name in ("W_enc", "W_dec")] == [0, 0]


def test_views_and_tensors_that_share_memory_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    weights.save_tensors({"base": base, "view": base[1:, ::2], "again": base}, path := tmp_path / "some", "here")
    found = safetensors.torch.load_file(path)
    assert torch.equal(found["view"], base[1:, ::2])
    assert torch.equal(found["again"], base)


def test_a_tensor_of_one_number_is_written_whatever_its_stride(tmp_path: Path) -> None:
    one = torch.tensor(3.5).expand(1)  # its stride is 0, and torch takes it for contiguous
    weights.save_tensors({"one": one}, tmp_path / "model.safetensors", "here")
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")["one"].tolist() == [3.5]


def test_pieces_are_written_as_the_tensor_that_they_make(tmp_path: Path) -> None:
    whole, other = torch.randn(70, 3), torch.arange(5)
    weights.save_tensors({"whole": whole, "other": other}, tmp_path / "whole", "here")
    pieces = Pieces(whole.dtype, tuple(whole.shape), lambda: iter(whole.split(32)))
    digest = weights.write_tensors({"whole": pieces, "other": other}, tmp_path / "pieces", "here")
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert digest == weights.sha256(tmp_path / "whole", "here")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "pieces")["whole"], whole)


def test_a_slice_of_the_rows_is_read_alone(tmp_path: Path) -> None:
    whole, other = torch.randn(70, 3), torch.arange(5)
    safetensors.torch.save_file({"whole": whole, "other": other}, tmp_path / "weights")
    found = weights.read_tensors(tmp_path / "weights", None, "here", {"whole": slice(20, 50)})
    assert torch.equal(found["whole"], whole[20:50])
    assert torch.equal(found["other"], other)
    assert found["whole"].untyped_storage().nbytes() == found["whole"].nbytes
