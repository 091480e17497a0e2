"""`Ranks`: the processes that share a featurizer, and what they tell each other before each call.

Collectives of different shapes hang or mix numbers. So each call begins with one gather of a short record from each
process: what is called, with what, or what failed. A record has one length, so that records of different calls meet;
if one is longer, all are gathered once more.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TypeVar

import torch
import torch.distributed as dist
from featurizers.errors import OtherRankError, UsageError, one_line, shown
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

AXIS: Final = "features"
"""Axis of a mesh with several axes over which features are divided."""

RECORD_BYTES: Final = 2048
MOST_PROBLEM: Final = 400
"""Characters of an error that other processes get to see."""

_SETTLED: Final = "featurizers_settled"
"""Attribute of errors that are not to be told to the other processes."""

Method = TypeVar("Method", bound=Callable[..., Any])


class Ranks:
    """Processes of one axis of a mesh.

    Args:
        mesh: with one axis, or with one named ``features``.

    Attributes:
        group: the process group of the axis.
        rank: number of this process in it.
        size: number of processes.
        device_type: of the mesh, such as ``cuda``.
        tell: tells the other processes of a call that they are to make too, given the object, the name of its method
            and the arguments; None where each process makes its calls by itself.

    Raises:
        UsageError: it is no mesh, or has several axes and none named ``features``.
    """

    def __init__(self, mesh: Any) -> None:
        if not isinstance(mesh, DeviceMesh):
            how = "torch.distributed.device_mesh.init_device_mesh('cuda', (8,), mesh_dim_names=('features',))"
            raise UsageError(f"mesh is a DeviceMesh, such as {how}, not {shown(mesh)}")
        if mesh.ndim > 1:
            names = mesh.mesh_dim_names or ()
            if AXIS not in names:
                raise UsageError(
                    f"the mesh has {mesh.ndim} axes, {', '.join(map(repr, names)) or 'without names'}; name the one to "
                    f"divide the features over {AXIS!r}, or give mesh[name]"
                )
            mesh = mesh[AXIS]
        if mesh.get_coordinate() is None:
            raise UsageError("this process is not in the mesh; load the featurizer in the processes of the mesh alone")
        self.group = mesh.get_group()
        self.rank, self.size, self.device_type = mesh.get_local_rank(), mesh.size(), mesh.device_type
        self.tell: Callable[[Any, str, tuple[Any, ...], Mapping[str, Any]], None] | None = None
        self._depth = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return the same processes."""
        return self

    def __reduce__(self) -> NoReturn:
        """Raise, because a process group belongs to this program."""
        raise UsageError("a featurizer on a mesh cannot be pickled; load it in each process")

    # ------------------------------------------------------------------ calls that begin together
    @contextmanager
    def together(self, call: str, *given: Any) -> Iterator[None]:
        """Begin a call in all processes; the block holds its collectives.

        Args:
            call: its name.
            given: tensors that must be the same in all processes; anything else is compared as JSON.

        Raises:
            OtherRankError: another process failed before.
            UsageError: the processes call different functions, or were given different tensors.
        """
        self._agree({"call": call, "given": [_described(each) for each in given]})
        try:
            yield
        except BaseException as error:
            setattr(error, _SETTLED, True)  # the others are in the middle of the call, and read no record
            raise

    def begin(self, owner: Any, name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Tell the other processes of a call, if they follow this one and are not in a call already."""
        if self.tell is not None and not self._depth:
            self.tell(owner, name, args, options)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the other processes if this one fails before its part of a call begins."""
        self._depth += 1
        try:
            yield
        except Exception as error:
            if self._depth == 1 and not hasattr(error, _SETTLED):
                self._agree({"error": f"{type(error).__name__}: {one_line(error, MOST_PROBLEM)}"}, own=error)
            raise
        finally:
            self._depth -= 1

    def _agree(self, record: dict[str, Any], own: BaseException | None = None) -> None:
        """Exchange records, and raise in every process if they do not fit each other; ``own`` is raised as it is."""
        try:
            records = self._exchange(record)
            if own is not None:
                return
            for rank, each in enumerate(records):
                if "error" in each:
                    raise OtherRankError(rank, each["error"])
            for rank, each in enumerate(records):
                if problem := _difference(records[0], each):
                    raise UsageError(
                        f"ranks 0 and {rank} of the mesh {problem}; a featurizer on a mesh is called in the same order "
                        "with the same tensors in every process"
                    )
        except Exception as error:
            setattr(error, _SETTLED, True)
            raise

    def _exchange(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        raw = json.dumps(record).encode()
        is_long = len(raw) > RECORD_BYTES
        found = self._gathered(json.dumps({"bytes": len(raw)}).encode() if is_long else raw, RECORD_BYTES)
        longest = max(each.get("bytes", 0) for each in found)
        return self._gathered(raw, longest) if longest else found

    def _gathered(self, raw: bytes, length: int) -> list[dict[str, Any]]:
        own = torch.zeros(length, dtype=torch.uint8)
        own[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        found = [bytes(each.tolist()).rstrip(b"\0") for each in self.gather_same(own.to(self.device_type))]
        return [json.loads(each) for each in found]

    # ------------------------------------------------------------------ collectives without gradient
    def gather_same(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensor of each process; all have one shape."""
        tensor = tensor.contiguous()
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor, group=self.group)
        return found

    def gather(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Return the tensors of all processes side by side along the last axis; their sizes may differ."""
        padding = max(sizes) - tensor.shape[-1]
        padded = torch.nn.functional.pad(tensor, (0, padding)) if padding else tensor
        found = self.gather_same(padded)
        return torch.cat([each[..., :size] for each, size in zip(found, sizes, strict=True)], dim=-1)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def settle(self, problem: str) -> str:
        """Exchange what failed in the first process at the end of a call; return it in all, empty if nothing did."""
        return str(self._exchange({"error": problem})[0]["error"])

    def counts(self, count: int) -> list[int]:
        """Return a number of each process."""
        return [int(each) for each in self.gather_same(torch.tensor(count, device=self.device_type))]


def reported(*names: str) -> Callable[[type[Any]], type[Any]]:
    """Wrap methods of a class, own and inherited ones, so that errors in one process reach the others.

    Args:
        names: of the methods; ``self.ranks`` are the processes.
    """

    def wrapped(name: str, method: Method) -> Method:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **options: Any) -> Any:
            self.ranks.begin(self, name, args, options)
            with self.ranks.reporting():
                return method(self, *args, **options)

        return call  # type: ignore[return-value]

    def decorate(cls: type[Any]) -> type[Any]:
        for name in names:
            setattr(cls, name, wrapped(name, getattr(cls, name)))
        return cls

    return decorate


# ---------------------------------------------------------------------- records
def _described(value: Any) -> Any:
    """Return JSON data by which the processes see whether they were given the same."""
    if not isinstance(value, Tensor):
        return value
    x = value.detach()
    needs_gradient = torch.is_grad_enabled() and value.requires_grad
    described = {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), "gradient": needs_gradient}
    if not x.numel():
        return described
    exact = not x.is_floating_point()
    flat = (x.double() if exact else x).reshape(-1, x.shape[-1] if x.dim() else 1)
    rows, columns = (_waves(size, flat) for size in flat.shape)
    projected = [*(rows.T @ (flat @ columns)).flatten().tolist(), float(torch.linalg.vector_norm(flat))]
    return {**described, "numbers": projected, "tolerance": 1e-9 if exact else math.sqrt(torch.finfo(x.dtype).eps)}


@functools.lru_cache(maxsize=32)
def _waves_of(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    steps = torch.arange(1, size + 1, dtype=torch.float64)
    return torch.stack([(steps * 1.1).cos(), (steps * 2.3).cos()], dim=-1).to(device, dtype)


def _waves(size: int, like: Tensor) -> Tensor:
    """Return two vectors ``(size, 2)`` to project on."""
    return _waves_of(size, like.dtype, like.device)


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Return how the records of two processes differ, or an empty string."""
    if one["call"] != other["call"]:
        return f"called {one['call']} and {other['call']}"
    if len(one["given"]) != len(other["given"]):
        return f"gave {one['call']} other arguments"
    for first, second in zip(one["given"], other["given"], strict=True):
        if not (isinstance(first, dict) and isinstance(second, dict) and "shape" in first and "shape" in second):
            if first != second:
                return f"gave {one['call']} {shown(first)} and {shown(second)}"
            continue
        for name in ("shape", "dtype", "gradient"):
            if first[name] != second[name]:
                return f"gave {one['call']} tensors with the {name} {first[name]} and {second[name]}"
        if not _close(first, second):
            return f"gave {one['call']} tensors of one shape with other numbers"
    return ""


def _close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether the projections of two tensors are equal up to rounding."""
    pairs = list(zip(one.get("numbers", []), other.get("numbers", []), strict=True))
    if not all(math.isfinite(number) for pair in pairs for number in pair):
        return all(math.isfinite(first) == math.isfinite(second) for first, second in pairs)
    return all(abs(first - second) <= one["tolerance"] * max(pairs[-1]) for first, second in pairs)
