"""Walk the pickle in a `torch.save` file without executing it, to bound the memory that loading would take."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pickletools import genops
from typing import Any

from featurizers.errors import WeightsError, shown

MAX_OPERATIONS = 1_000_000
"""Largest number of instructions in the pickle."""
MAX_LENGTH = 10_000_000
"""Largest number of values and characters; a shared object counts once for each reference to it."""
MAX_DEPTH = 64
"""Largest nesting depth of dicts, lists and tuples."""
MAX_AXES = 64

ITEM_SIZES = {
    **{f"torch {name}Storage": 1 for name in ("Bool", "Byte", "Char")},
    **{f"torch {name}Storage": 2 for name in ("BFloat16", "Half", "Short")},
    **{f"torch {name}Storage": 4 for name in ("Float", "Int")},
    **{f"torch {name}Storage": 8 for name in ("ComplexFloat", "Double", "Long")},
    "torch ComplexDoubleStorage": 16,
    "torch.storage UntypedStorage": 1,
}
"""Storage classes of dense tensors, and the size of an item in bytes."""
FUNCTIONS = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
}
TENSORS_ALONE = "; save a dict of dense tensors, numbers and strings with torch.save"


@dataclass(frozen=True)
class _Global:
    """A function or storage class that the pickle would import."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Data that one or more tensors share."""

    nbytes: int
    item_size: int


@dataclass(frozen=True)
class _Leaf:
    """Stand-in for a tensor, dtype, shape or device.

    Attributes:
        item_size: size of an item in bytes if it stands for a dtype, else 0.
    """

    item_size: int = 0


class PickleReader:
    """Interpreter of a pickle that builds stand-ins instead of tensors and refuses what `torch.save` does not write.

    `torch.load` with ``weights_only`` runs no code either, but it has no limits: a few kilobytes can make it hash a
    tuple for years or copy a dict a million times.

    Args:
        where: name of the file's folder in errors.
        name: name of the file in errors.
        sizes: size in bytes of each entry of the archive.
    """

    def __init__(self, where: str, name: str, sizes: Mapping[str, int]) -> None:
        self.where, self.name, self.sizes = where, name, sizes
        self.left = 10 * sum(sizes.values()) + 2**20
        self.hooks: list[OrderedDict[Any, Any]] = []
        self.measured: dict[int, tuple[int, int]] = {}

    def refuse(self, problem: str) -> WeightsError:
        """Return an error about a pickle that is damaged or would cost too much."""
        return WeightsError(self.where, f"{self.name} cannot be read: {problem}{TENSORS_ALONE}")

    def refuse_more(self, what: str) -> WeightsError:
        """Return an error about a pickle that holds more than tensors and plain values."""
        reason = f"holds more than tensors, and nothing of it is run: {what}"
        return WeightsError(self.where, f"{self.name} {reason}{TENSORS_ALONE}")

    def check(self, pickle: bytes) -> None:
        """Raise an exception unless the pickle holds only tensors and plain values within the limits."""
        self.measure(self.walk(pickle))
        if any(self.hooks):  # filled after the tensor was built
            raise self.refuse_more("a tensor with hooks")

    def walk(self, pickle: bytes) -> Any:  # noqa: PLR0912 - one case an instruction
        """Return the object in the pickle, with stand-ins for tensors."""
        stack: list[Any] = []
        below: list[list[Any]] = []
        memo: dict[int, Any] = {}
        arg: Any
        for number, (operation, arg, _) in enumerate(genops(pickle)):
            if number >= MAX_OPERATIONS:
                raise self.refuse(f"its pickle has more than {MAX_OPERATIONS} instructions")
            match operation.name:
                case "PROTO" if arg == 2:
                    pass
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    stack.append(self.plain(arg))
                case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                    stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[operation.name]())
                case "GLOBAL":
                    stack.append(self.imported(arg))
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "MARK":
                    below.append(stack)
                    stack = []
                case "TUPLE" | "APPENDS" | "SETITEMS":
                    items, stack = stack, below.pop()
                    stack.append(tuple(items)) if operation.name == "TUPLE" else self.add(items, stack[-1])
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [stack.pop() for _ in range(int(operation.name[-1]))]
                    stack.append(tuple(items[::-1]))
                case "APPEND" | "SETITEM":
                    items = [stack.pop() for _ in range(1 if operation.name == "APPEND" else 2)]
                    self.add(items[::-1], stack[-1])
                case "BINPERSID":
                    stack.append(self.stored(stack.pop()))
                case "REDUCE":
                    args, function = stack.pop(), stack.pop()
                    stack.append(self.called(function, args))
                case "BUILD":
                    self.describe(stack.pop(), stack[-1])
                case "STOP":
                    return stack.pop()
                case other:
                    raise self.refuse(f"its pickle has the instruction {other}, which torch.save does not write")
        raise self.refuse("its pickle has no end")

    def plain(self, value: float | str) -> float | str:
        """Return a number or a string; refuse an integer of more than 64 bits."""
        if isinstance(value, str):
            value.encode()  # raises an exception for a lone surrogate
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise self.refuse("it holds a number of more than 64 bits")
        return value

    def imported(self, name: str) -> _Global | _Leaf:
        """Return a stand-in for a function, storage class or dtype; refuse every other import."""
        import torch

        if name in FUNCTIONS or name in ITEM_SIZES:
            return _Global(name)
        dtype = vars(torch).get(name.removeprefix("torch "))
        if not isinstance(dtype, torch.dtype):
            raise self.refuse_more(shown(name.replace(" ", ".")))
        return _Leaf(dtype.itemsize)

    def add(self, items: list[Any], target: Any) -> None:
        """Append items to a list, or add alternating keys and values to a dict."""
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, dict) and all(type(key) in (str, int) for key in items[::2]):
            target.update(zip(items[::2], items[1::2], strict=True))
        else:  # hashing a nested tuple may take years
            raise self.refuse("it has a dict with keys that are neither strings nor integers")

    def stored(self, pid: Any) -> _Storage:
        """Return a stand-in for the storage that a persistent id refers to."""
        match pid:
            case ("storage", _Global(kind), str(key), str(), int(count)) if kind in ITEM_SIZES:
                nbytes, listed = count * ITEM_SIZES[kind], self.sizes.get(f"data/{key}")
                if nbytes == listed:
                    return _Storage(nbytes, ITEM_SIZES[kind])
                raise self.refuse(
                    f"{shown(f'data/{key}')} in it should have {shown(nbytes)} bytes, and has {listed or 'none'}"
                )
        raise self.refuse("its pickle refers to something other than the data of a tensor")

    def called(self, function: Any, args: Any) -> OrderedDict[Any, Any] | _Leaf:
        """Return what a call returns; refuse calls that `torch.save` does not write."""
        match function, args:
            case _Global("collections OrderedDict"), ():
                return OrderedDict()
            case _Global("torch Size"), (tuple(size),) if self.naturals(size):
                return _Leaf()
            case _Global("torch device"), (str(),) | (str(), int()):
                return _Leaf()
            case _Global("torch._utils _rebuild_parameter"), (_Leaf() as tensor, bool(), OrderedDict() as hooks):
                self.hooks.append(hooks)
                return tensor
            case (
                _Global("torch._utils _rebuild_tensor_v2"),
                (_Storage() as storage, offset, size, stride, bool(), OrderedDict() as hooks),
            ):
                self.hooks.append(hooks)
                return self.view(storage, storage.item_size, offset, size, stride)
            case (
                _Global("torch._utils _rebuild_tensor_v3"),
                (_Storage() as storage, offset, size, stride, bool(), OrderedDict() as hooks, _Leaf(item_size)),
            ) if item_size:
                self.hooks.append(hooks)
                return self.view(storage, item_size, offset, size, stride)
        called = shown(function.name.replace(" ", ".")) if isinstance(function, _Global) else "something else"
        raise self.refuse_more(f"a call of {called} that torch.save does not write for dense tensors")

    def view(self, storage: _Storage, item_size: int, offset: Any, size: Any, stride: Any) -> _Leaf:
        """Return a stand-in for a tensor; refuse one that is not within its storage."""
        if not (self.naturals((offset,)) and self.naturals(size) and self.naturals(stride)) or len(size) != len(stride):
            raise self.refuse("it has a tensor of an impossible shape")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count and max(count, last + 1) * item_size > storage.nbytes:
            raise self.refuse(
                f"it has a tensor of shape {shown(size)} and strides {shown(stride)} in {storage.nbytes} bytes, "
                "which is too few; clone it before it is saved"
            )
        self.left -= count * item_size
        if self.left < 0:
            raise self.refuse("its tensors together are more than ten times larger than the file")
        return _Leaf()

    @staticmethod
    def naturals(values: Any) -> bool:
        """Return True for a tuple that can be the shape or the strides of a tensor."""
        return (
            type(values) is tuple
            and len(values) <= MAX_AXES
            and all(type(value) is int and 0 <= value < 2**62 for value in values)
        )

    def describe(self, state: Any, target: Any) -> None:
        """Set ``_metadata``, which `torch.nn.Module.state_dict` adds to its dict; refuse any other attribute."""
        if type(target) is not OrderedDict or type(state) is not dict or state.keys() != {"_metadata"}:
            raise self.refuse_more("an object with attributes")
        vars(target).update(state)

    def measure(self, value: Any, depth: int = 0) -> tuple[int, int]:
        """Return the number of values and characters in a value, shared ones counted repeatedly, and its depth."""
        if value is None or isinstance(value, bool | int | float | str | _Leaf):
            return len(value) + 1 if isinstance(value, str) else 1, 0
        if not isinstance(value, list | tuple | dict):
            raise self.refuse_more("a function, or data that belongs to no tensor")
        if depth >= MAX_DEPTH:
            raise self.refuse(f"its values are nested more than {MAX_DEPTH} deep")
        known = self.measured.get(id(value))
        if known is None:
            self.measured[id(value)] = 0, MAX_DEPTH  # for a value that contains itself
            inner = [*value, *value.values(), *self.metadata(value)] if isinstance(value, dict) else value
            lengths, depths = zip((1, 0), *(self.measure(each, depth + 1) for each in inner), strict=True)
            known = self.measured[id(value)] = sum(lengths), 1 + max(depths)
        if known[0] > MAX_LENGTH or depth + known[1] > MAX_DEPTH:
            raise self.refuse(
                f"it would expand to more than {MAX_LENGTH} values, or is nested more than {MAX_DEPTH} deep"
            )
        return known

    def metadata(self, value: dict[Any, Any]) -> list[Any]:
        """Return the attributes that `describe` set on a dict."""
        attributes = list(vars(value).values()) if isinstance(value, OrderedDict) else []
        for metadata in attributes:
            if not isinstance(metadata, dict) or not all(isinstance(entry, dict) for entry in metadata.values()):
                raise self.refuse_more("a dict with attributes")
        return attributes
