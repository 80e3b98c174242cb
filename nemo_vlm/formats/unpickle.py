"""Pickles of others, read without executing anything.

A pickle is a program that names classes and functions and calls them. Here every name is answered by something inert:
a class of torch, Megatron or any other package by a `Record` class made on the fly, which keeps what it is given; the
few functions that make containers and tensors by harmless ones of ours. The standard library is refused but for some
plain data classes. What a pickle is handed it could also try to change (the opcode BUILD sets attributes) or take apart
(REDUCE unpacks tuples), so these things are either made anew for each pickle, or immutable and no containers.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import opcodes
from nemo_vlm.formats.reader import Shape
from nemo_vlm.formats.store import Span

RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's names, which protocol 2 writes
PLAIN_TYPES = (dict, list, tuple, set, frozenset, int, float, bool, complex, slice, object)
HARMLESS = {
    "argparse.Namespace",
    *(f"collections.{name}" for name in ("Counter", "defaultdict", "deque")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    "decimal.Decimal",
    "fractions.Fraction",
    "functools.partial",
    "_io.BytesIO",
    "io.BytesIO",
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    "pathlib._local.PosixPath",
    "signal.Signals",
    "types.SimpleNamespace",
    "uuid.UUID",
}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


class Record:
    """What a pickle says of an object: its class, as a name, and all that it was given."""

    called = ""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    items: list[Any]
    entries: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        self = object.__new__(cls)  # pickles make objects this way too, without __init__
        self.args, self.kwargs = args, kwargs
        self.state, self.items, self.entries = None, [], {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.called}>"

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def fields(self) -> dict[str, Any]:
        """Its attributes, where the pickle set them by their names."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


class Dict(dict):
    """An OrderedDict; attributes that a module hung on its state dict are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class Sealed:
    """What a pickle may hold but not change. Slots are written by hand: dataclass(slots=True) adds a __setstate__."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise TypeError(f"a pickle that changes a {type(self).__name__}")


@dataclass(frozen=True, eq=False)
class Storage(Sealed):
    """The memory of tensors: bytes of a mapped file."""

    __slots__ = ("dtype", "span")

    span: Span
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Stored(Sealed):
    """A tensor that lies in a mapped file, in the hands of a pickle, which could change a Tensor."""

    __slots__ = ("dtype", "offset", "shape", "storage", "stride")

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: Shape
    stride: Shape

    def tensor(self) -> Tensor:
        """A view of the file."""
        span = self.storage.span
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        count = span.size // self.dtype.itemsize
        flat = torch.frombuffer(span.memory, dtype=self.dtype, count=count, offset=span.start)
        return flat.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True, eq=False)
class Call(Sealed):
    """A function of ours in the hands of a pickle, which cannot change it.

    Attributes:
        first: what its first argument must be, where that is not plain data.
    """

    __slots__ = ("first", "function")

    function: Callable[..., Any]
    first: type[Sealed] | None

    def __call__(self, *args: Any) -> Any:
        sealed = [type(arg) for arg in args if isinstance(arg, Sealed)]
        if sealed != ([] if self.first is None else [self.first]) or sealed and type(args[0]) is not self.first:
            raise TypeError(f"{self.function.__name__} of {', '.join(type(arg).__name__ for arg in args)}")
        return self.function(*args)


def rebuild(storage: Storage, offset: int, size: Shape, stride: Shape, *rest: Any) -> Stored:
    return stored(storage, storage.dtype, offset, size, stride)


def rebuild_as(storage: Storage, offset: int, size: Shape, stride: Shape, *rest: Any) -> Stored:
    """With its own type over bytes: torch._utils._rebuild_tensor_v3."""
    _, _, dtype, *_ = rest
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor whose type is a {type(dtype).__name__}")
    return stored(storage, dtype, offset, size, stride)


def stored(storage: Storage, dtype: torch.dtype, offset: int, size: Shape, stride: Shape) -> Stored:
    """Checked, since a view outside its storage would read anything.

    Raises:
        ValueError: the tensor does not lie in its storage.
    """
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and number >= 0 for number in numbers) or len(size) != len(stride):
        raise ValueError("a tensor whose offset, size and stride are no numbers that go together")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * dtype.itemsize > storage.span.size:
        raise ValueError(f"a tensor of size {size} and stride {stride} at {offset} lies outside its storage")
    return Stored(storage, dtype, offset, tuple(size), tuple(stride))


def parameter(data: Stored, *rest: Any) -> Stored:
    return data


def reconstruct(kind: type[Record], base: type, state: Any) -> Record:
    """copyreg._reconstructor: how protocols 0 and 1 make an object."""
    if not issubclass(kind, Record):
        raise TypeError(f"an object made of {kind}")
    return kind() if base is object else kind(state)


def to_bytes(content: str | bytes = b"", encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes encoded as {encoding}")
    return content.encode("latin1") if isinstance(content, str) else bytes(memoryview(content))


KNOWN: dict[str, Any] = {
    "collections.OrderedDict": Call(Dict, None),
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": Call(rebuild, Storage),
    "torch._utils._rebuild_tensor_v2": Call(rebuild, Storage),
    "torch._utils._rebuild_tensor_v3": Call(rebuild_as, Storage),
    "torch._utils._rebuild_parameter": Call(parameter, Stored),
    "torch._utils._rebuild_parameter_with_state": Call(parameter, Stored),
    "copyreg._reconstructor": Call(reconstruct, None),
    "_codecs.encode": Call(to_bytes, None),
    "builtins.bytearray": Call(to_bytes, None),
    "builtins.bytes": Call(to_bytes, None),
    **{f"builtins.{kind.__name__}": kind for kind in PLAIN_TYPES},
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
}


class Inert(pickle.Unpickler):
    """Answers every name by something that does nothing."""

    def __init__(self, content: bytes, called: str, storage: Callable[[Any], Storage] | None) -> None:
        super().__init__(io.BytesIO(content))
        self.called, self.storage = called, storage
        self.classes: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = RENAMED.get(module, module)
        full = f"{module}.{name}"
        if full in KNOWN:
            return KNOWN[full]
        if module.partition(".")[0] in sys.stdlib_module_names and full not in HARMLESS:
            raise ConfigError(f"{self.called}: its pickle names {full}: refused, nothing of it was executed")
        if full not in self.classes:
            self.classes[full] = type(name, (Record,), {"called": full})
        return self.classes[full]

    def persistent_load(self, key: Any) -> Storage:
        if self.storage is None:
            raise ConfigError(f"{self.called}: its pickle holds tensors, which do not belong there")
        return self.storage(key)


def opened(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """The same tree with tensors, views of the file, for what stands in for them; containers are changed in place.

    Args:
        done: what has become of values, by their ids: a pickle can describe containers that hold themselves, and tuples
            of the same tuples whose every path would take forever. It keeps both alive, since ids are used again.
    """
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, Stored):
        new: Any = value.tensor()
    elif type(value) is tuple:
        new = tuple(opened(item, done) for item in value)
    elif isinstance(value, dict | list | Record):
        new = value
        done[id(value)] = value, value
        open_inside(value, done)
    else:
        return value
    done[id(value)] = value, new
    return new


def open_inside(value: dict[Any, Any] | list[Any] | Record, done: dict[int, tuple[Any, Any]]) -> None:
    if isinstance(value, dict):
        value.update({key: opened(item, done) for key, item in value.items()})
    elif isinstance(value, list):
        value[:] = [opened(item, done) for item in value]
    else:
        value.args, value.state = opened(value.args, done), opened(value.state, done)
        opened(value.items, done)
        opened(value.entries, done)


def unpickle(content: bytes, called: str, storage: Callable[[Any], Storage] | None = None) -> Any:
    """The tree of plain values, tensors (views of the file) and `Record`s that a pickle describes.

    Args:
        called: the file, as messages name it.
        storage: finds the storage that the pickle refers to by a key.
    Raises:
        ConfigError: it is damaged, or names what no data needs.
    """
    try:
        opcodes.check(content)
        return opened(Inert(content, called, storage).load(), {})
    except ConfigError:
        raise
    except Exception as error:  # a damaged pickle can make Python raise anything
        raise ConfigError(f"{called}: its pickle is damaged ({' '.join(str(error).split()) or repr(error)})") from None
