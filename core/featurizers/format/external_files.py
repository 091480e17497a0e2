"""Files that other libraries wrote, as a plugin's reader sees them: names, JSON and tensors, and no code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import ManifestError, WeightsError, one_line, shown
from featurizers.files.numpy_files import load_npz
from featurizers.files.regular import read_bytes
from featurizers.files.torch_files import load_torch
from featurizers.format.manifest import MAX_CONFIG_BYTES, parse_json
from featurizers.format.weights import Spec, aligned, read_header, shown_names, take_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of another library.

    Attributes:
        path: of the file.
        where: what to call its folder in an error.
        specs: what its header says of each tensor.
    """

    path: Path
    where: str
    specs: Mapping[str, Spec]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: spec.shape for name, spec in self.specs.items()}

    def read(self, name: str, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """One tensor, or some of its rows or columns; one that is whole is mapped where it lies aligned in the file.

        Args:
            name: of the tensor.
            rows: int64 ``(k,)``; no other rows are read.
            columns: int64 ``(k,)``, of a tensor of two axes; the whole is read, a block of rows at a time, and the
                columns are kept.

        Raises:
            WeightsError: there is no such tensor, or it cannot be read.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        if name not in self.specs:
            raise WeightsError(
                self.where, f"{self.path.name} lacks the tensor {name!r}; it has {shown_names(self.specs)}"
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                if rows is not None:
                    tensor = take_rows(file.get_slice(name), rows)
                elif columns is not None:
                    stored, step = file.get_slice(name), 256
                    count = self.specs[name].shape[0]
                    tensor = torch.cat([stored[start : start + step][:, columns] for start in range(0, count, step)])
                else:
                    tensor = aligned(file.get_tensor(name))
        except (SafetensorError, OSError, ValueError, RuntimeError, IndexError) as error:
            raise WeightsError(self.where, f"{self.path.name}: {name!r} cannot be read: {one_line(error)}") from error
        return tensor


@dataclass(frozen=True)
class ExternalFiles:
    """A folder, or a folder of a repository at one commit, that has no ``config.json`` of ours.

    Attributes:
        where: what to call it in an error.
        names: its files, ``/`` between folders.
        indices: int64 ``(k,)``, which features are wanted; None for all.
        revision: the commit of a repository.
        fetch: the local path of a file of so many bytes at most.
        allow_nonfinite: whether tensors may hold NaN and infinity.
    """

    where: str
    names: tuple[str, ...]
    fetch: Callable[[str, int | None], Path] = field(repr=False)
    indices: Tensor | None = None
    revision: str | None = None
    allow_nonfinite: bool = False

    def path(self, name: str, most: int | None = None) -> Path:
        """The local path of a file, which is downloaded if need be.

        Args:
            name: of the file.
            most: how many bytes it may have; a larger one is not downloaded.

        Raises:
            ManifestError: there is no such file, or it is larger.
            HubError: it cannot be had.
        """
        if name not in self.names:
            raise ManifestError(self.where, f"there is no file {shown(name, 200)}")
        return self.fetch(name, most)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object, read as strictly as our own.

        Raises:
            ManifestError: it is too large, not JSON, or no object.
        """
        raw = read_bytes(self.path(name, MAX_CONFIG_BYTES), self.where, ManifestError, MAX_CONFIG_BYTES, name)
        data = parse_json(raw, self.where, name)
        if not isinstance(data, dict):
            raise ManifestError(self.where, f"{name} holds a {type(data).__name__}, not an object")
        return data

    def safetensors(self, name: str) -> TensorFile:
        """A file of tensors, of which only the header is read.

        Raises:
            WeightsError: it is not a whole safetensors file.
        """
        path = self.path(name)
        return TensorFile(path, self.where, read_header(path, self.where, name))

    def torch(self, name: str) -> Any:
        """What ``torch.save`` wrote: tensors, numbers, strings, lists and dicts, and nothing else.

        The tensors are mapped from the file, on the CPU, whatever device they were saved on.

        Raises:
            WeightsError: it is not such a file, or it holds objects of other classes.
        """
        return load_torch(self.path(name), self.where)

    def npz(self, name: str) -> dict[str, Tensor]:
        """The arrays that ``numpy.savez`` wrote, compressed or not, as tensors in memory of their own.

        Raises:
            WeightsError: it is not such a file, or it holds anything else than arrays of numbers.
        """
        return load_npz(self.path(name), self.where)
