"""Files of other libraries as data for a plugin's reader: names, JSON and tensors, never code."""

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
        path: the file.
        where: name of its folder in errors.
        specs: dtype and shape of each tensor, from the header.
    """

    path: Path
    where: str
    specs: Mapping[str, Spec]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: spec.shape for name, spec in self.specs.items()}

    def read(
        self, name: str, rows: Tensor | None = None, columns: Tensor | None = None, *, plane: int | None = None
    ) -> Tensor:
        """Read a tensor, or some of its rows or columns. A whole tensor is memory-mapped if its data is aligned.

        Args:
            name: name of the tensor.
            rows: int64 ``(k,)``, the rows to read; no others are read.
            columns: int64 ``(k,)``, the columns to keep of a matrix, which is read in blocks of 256 rows.
            plane: a number on the first axis, to read the tensor of the other axes there; rows and columns are its own.

        Raises:
            WeightsError: the file has no such tensor, or it cannot be read.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        if name not in self.specs:
            raise WeightsError(
                self.where, f"{self.path.name} lacks the tensor {name!r}; it has {shown_names(self.specs)}"
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                stored: Any = file.get_slice(name) if plane is None else _Plane(file.get_slice(name), plane)
                if rows is not None:
                    tensor = take_rows(stored, rows)
                elif columns is not None:
                    starts = range(0, self.specs[name].shape[0 if plane is None else 1], 256)
                    tensor = torch.cat([stored[start : start + 256][:, columns] for start in starts])
                elif plane is not None:
                    tensor = stored[:].clone()
                else:
                    tensor = aligned(file.get_tensor(name))
        except (SafetensorError, OSError, ValueError, RuntimeError, IndexError) as error:
            raise WeightsError(self.where, f"{self.path.name}: {name!r} cannot be read: {one_line(error)}") from error
        return tensor


@dataclass(frozen=True)
class _Plane:
    """Slice object of safetensors at a number on its first axis."""

    stored: Any
    number: int

    def __getitem__(self, rows: slice) -> Tensor:
        plane: Tensor = self.stored[self.number, rows]
        return plane


@dataclass(frozen=True)
class ExternalFiles:
    """Files that another library wrote: a folder, or a folder of a repository at one commit.

    Attributes:
        where: name of the folder in errors.
        names: names of its files, ``/`` between folders.
        indices: int64 ``(k,)``, the features to load; None for all.
        revision: commit of the repository, None for a folder.
        fetch: returns the local path of a file, given its name and its largest size in bytes.
        allow_nonfinite: True if tensors may hold NaN and infinity.
        group_indices: of a map with several groups, the features to load by group, None for all of a group; in place of
            ``indices``.
    """

    where: str
    names: tuple[str, ...]
    fetch: Callable[[str, int | None], Path] = field(repr=False)
    indices: Tensor | None = None
    revision: str | None = None
    allow_nonfinite: bool = False
    group_indices: Mapping[str, Tensor | None] | None = None

    def path(self, name: str, most: int | None = None) -> Path:
        """Return the local path of a file; download it first if necessary.

        Args:
            name: name of the file.
            most: largest size in bytes; a larger file is not downloaded.

        Raises:
            ManifestError: there is no such file, or it is larger.
            HubError: the file cannot be downloaded.
        """
        if name not in self.names:
            raise ManifestError(self.where, f"there is no file {shown(name, 200)}")
        return self.fetch(name, most)

    def json(self, name: str) -> dict[str, Any]:
        """Read a JSON object, as strictly as the ``config.json`` of an artefact.

        Raises:
            ManifestError: the file is too large, not JSON, or not an object.
        """
        raw = read_bytes(self.path(name, MAX_CONFIG_BYTES), self.where, ManifestError, MAX_CONFIG_BYTES, name)
        data = parse_json(raw, self.where, name)
        if not isinstance(data, dict):
            raise ManifestError(self.where, f"{name} holds a {type(data).__name__}, not an object")
        return data

    def safetensors(self, name: str) -> TensorFile:
        """Read the header of a safetensors file.

        Raises:
            WeightsError: the file is not a complete safetensors file.
        """
        path = self.path(name)
        return TensorFile(path, self.where, read_header(path, self.where, name))

    def torch(self, name: str) -> Any:
        """Load tensors, numbers, strings, tuples, lists and dicts from a `torch.save` file.

        The tensors are memory-mapped on the CPU, whatever device they were saved on.

        Raises:
            WeightsError: the file has another format, or holds objects of other classes.
        """
        return load_torch(self.path(name), self.where)

    def npz(self, name: str) -> dict[str, Tensor]:
        """Read the arrays of a `numpy.savez` file, compressed or not, as tensors.

        Raises:
            WeightsError: the file has another format, or holds anything but arrays of numbers.
        """
        return load_npz(self.path(name), self.where)
