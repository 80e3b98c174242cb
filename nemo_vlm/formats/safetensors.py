"""The safetensors format (https://huggingface.co/docs/safetensors): read in place, written tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

import torch
from torch import Tensor

from nemo_vlm.errors import ConfigError
from nemo_vlm.files import Behind
from nemo_vlm.formats.reader import Shape, Slices
from nemo_vlm.formats.store import Span, Store, opened

MAX_SHARD_BYTES = 5 * 10**9
MAX_HEADER_BYTES = 100 * 10**6  # as safetensors' own reader
MAX_NUMBER = 2**63
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    shape: Shape
    dtype: torch.dtype
    span: Span


class Safetensors:
    """The tensors of some safetensors files of a store, as views of the mapped files.

    Raises:
        ConfigError: a header is damaged, a file is cut short, or two files hold the same tensor.
    """

    def __init__(self, store: Store, files: Iterable[str]) -> None:
        self.store = store
        self.entries: dict[str, Entry] = {}
        for file in sorted(files):
            found = entries(store.span(file))
            if twice := found.keys() & self.entries.keys():
                raise ConfigError(f"{store}: the tensor '{min(twice)}' stands in {file} and in another file")
            self.entries |= found

    def __str__(self) -> str:
        return str(self.store)

    def names(self) -> set[str]:
        return set(self.entries)

    def shape(self, name: str) -> Shape:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].dtype

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        entry = self.entries[name]
        if 0 in entry.shape:
            return torch.empty(entry.shape, dtype=entry.dtype)[slices]
        flat = torch.frombuffer(
            entry.span.memory, dtype=entry.dtype, count=math.prod(entry.shape), offset=entry.span.start
        )
        return flat.view(entry.shape)[slices]


def entries(file: Span) -> dict[str, Entry]:
    """The tensors of one file.

    Raises:
        ConfigError: the header is damaged, or places a tensor outside the file or over another.
    """
    length = int.from_bytes(file.bytes(0, 8), "little")
    if 8 + length > file.size:
        raise ConfigError(f"{file}: cut short or damaged in its header")
    if length > MAX_HEADER_BYTES:
        raise ConfigError(f"{file}: its header has {length} bytes, more than {MAX_HEADER_BYTES}: damaged")
    data = file.part(8 + length, file.size - 8 - length)
    try:
        header = json.loads(file.bytes(8, length), object_pairs_hook=without_repetition)
        header.pop("__metadata__", None)
        found = {name: entry_of(name, info, data) for name, info in header.items()}
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{file}: its header is damaged ({error!r})") from None
    check_apart(file, found)
    return found


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"twice the key '{next(name for name in found if names.count(name) > 1)}'")
    return found


def entry_of(name: str, info: dict[str, Any], data: Span) -> Entry:
    """A header's entry, if it lies inside the data."""
    shape, (first, last) = tuple(info["shape"]), info["data_offsets"]
    if info["dtype"] not in DTYPES:
        raise ConfigError(f"{data}: the tensor '{name}' is of type {info['dtype']}; known are {', '.join(DTYPES)}")
    dtype = DTYPES[info["dtype"]]
    numbers = (*shape, first, last)
    if not all(type(number) is int and 0 <= number < MAX_NUMBER for number in numbers):
        raise ConfigError(f"{data}: the tensor '{name}' has no shape and no place that can be")
    if math.prod(filter(None, shape)) >= MAX_NUMBER or last - first != math.prod(shape) * dtype.itemsize:
        raise ConfigError(f"{data}: the tensor '{name}' of shape {shape} does not fit its bytes {first} to {last}")
    if last > data.size:
        raise ConfigError(f"{data}: cut short in the tensor '{name}'")
    return Entry(shape, dtype, data.part(first, last - first))


def check_apart(file: Span, found: dict[str, Entry]) -> None:
    """Raises ConfigError where two tensors share bytes."""
    places = sorted((entry.span.start, name) for name, entry in found.items() if entry.span.size)
    for (start, name), (following, other) in pairwise(places):
        if start + found[name].span.size > following:
            raise ConfigError(f"{file}: the tensors '{name}' and '{other}' overlap: damaged")


def split(specs: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Consecutive groups of at most `limit` bytes each; a larger tensor stands alone."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """Hugging Face's names of so many files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def index(shards: dict[str, list[TensorSpec]]) -> bytes:
    """model.safetensors.index.json: which file holds which tensor."""
    total = sum(spec.num_bytes for shard in shards.values() for spec in shard)
    places = {spec.name: name for name, shard in shards.items() for spec in shard}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1).encode()


def header(specs: list[TensorSpec]) -> bytes:
    """8 bytes of length, then JSON, padded to a multiple of 8."""
    listed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        listed[spec.name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(listed).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(specs: list[TensorSpec]) -> int:
    return len(header(specs)) + sum(spec.num_bytes for spec in specs)


def write(file: IO[bytes], specs: list[TensorSpec], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """One file, holding one tensor at a time, or one part of it.

    Args:
        tensors: begins with those of `specs`, in their order, whole or in parts one after another along the first
            dimension; what follows is left in it.
    """
    file.write(header(specs))
    with Behind(file) as disk:
        for spec in specs:
            rest = -1
            while rest:
                name, part = next(tensors)
                assert (name, part.dtype) == (spec.name, spec.dtype), (name, part.dtype, spec)
                assert tuple(part.shape[1:]) == spec.shape[1:], (part.shape, spec)
                rest = (spec.num_bytes if rest < 0 else rest) - part.nbytes
                assert rest >= 0, spec
                if part.numel():
                    content: Any = part.contiguous().flatten().view(torch.uint8).numpy()
                    with opened(content.ctypes.data, part.nbytes) as place:
                        disk.write(memoryview(content), place)
