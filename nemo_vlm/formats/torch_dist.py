"""Directories of torch.distributed.checkpoint (Megatron's `torch_dist`), read in place without torch's readers.

.metadata       a pickle: the shape and type of every tensor, its chunks, and where each lies
__R_N.distcp    chunks one after another, each a file of torch.save
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import torch_file
from nemo_vlm.formats.reader import Shape, Slices, whole
from nemo_vlm.formats.store import Store
from nemo_vlm.formats.unpickle import Record, unpickle

METADATA = ".metadata"
Box = tuple[Shape, Shape]  # where it begins, and its sizes
KEPT_OPEN = 1024  # chunks whose place in their file is remembered


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where it is stored: None if .metadata does not say."""

    offsets: Shape
    sizes: Shape
    place: tuple[str, int, int] | None  # file, first byte, length


@dataclass(frozen=True)
class Entry:
    """A tensor; its chunks are sorted by where they begin."""

    shape: Shape
    dtype: torch.dtype
    chunks: list[Chunk]

    @cached_property
    def starts(self) -> list[int]:
        """Where each chunk begins along the first axis."""
        return [chunk.offsets[0] for chunk in self.chunks]

    @cached_property
    def longest(self) -> int:
        return max((chunk.sizes[0] for chunk in self.chunks), default=0)

    def near(self, wanted: list[tuple[int, int]]) -> range:
        """The chunks that may hold something of a box; experts of many layers have thousands that do not."""
        if not wanted:
            return range(len(self.chunks))
        start, stop = wanted[0]
        return range(bisect_right(self.starts, start - self.longest), bisect_left(self.starts, stop))


class TorchDist:
    """The tensors of a directory, which may lie in a tar.

    Attributes:
        objects: names of what is stored beside tensors.
    Raises:
        ConfigError: .metadata is missing or damaged.
    """

    def __init__(self, store: Store, folder: str = "") -> None:
        self.store, self.folder = store, folder
        file = store.span(f"{folder}{METADATA}")
        table = unpickle(file.bytes(), str(file))
        try:
            self.entries, self.objects = contents(table)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise ConfigError(f"{file}: not a table of tensors ({error!r})") from None
        self.chunk = lru_cache(KEPT_OPEN)(self.open_chunk)

    def __str__(self) -> str:
        return f"{self.store}: {self.folder}" if self.folder else str(self.store)

    def names(self) -> set[str]:
        return set(self.entries)

    def shape(self, name: str) -> Shape:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].dtype

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        """A view where one chunk holds all of it.

        Raises:
            ConfigError: a file is missing, cut short or damaged, or not all of the tensor is stored.
        """
        entry = self.entries[name]
        wanted = [s.indices(size)[:2] for s, size in zip(slices or whole(entry.shape), entry.shape, strict=True)]
        shape = [max(stop - start, 0) for start, stop in wanted]
        result, filled = torch.empty(0, dtype=entry.dtype), 0
        for number in entry.near(wanted):
            chunk = entry.chunks[number]
            box = overlap(chunk, wanted)
            if box is None:
                continue
            here = shifted(box, chunk.offsets)
            size = math.prod(stop - start for start, stop in box)
            if size == math.prod(shape):
                return self.chunk(name, number)[here]
            if not filled:
                result = torch.empty(shape, dtype=entry.dtype)
            result[shifted(box, [start for start, _ in wanted])] = self.chunk(name, number)[here]
            filled += size
        if filled != math.prod(shape):
            raise ConfigError(f"{self}: not all of the tensor '{name}' is stored")
        return result.view(shape)

    def open_chunk(self, name: str, number: int) -> Tensor:
        """A view of a chunk.

        Raises:
            ConfigError: it is not as .metadata says.
        """
        entry, chunk = self.entries[name], self.entries[name].chunks[number]
        if chunk.place is None:
            raise ConfigError(f"{self}: {METADATA} does not say where a part of the tensor '{name}' is stored")
        file, offset, length = chunk.place
        try:
            found = torch_file.load(self.store.span(f"{self.folder}{file}").part(offset, length))
        except ConfigError as error:
            raise ConfigError(f"{error}, in the tensor '{name}'") from None
        if not isinstance(found, Tensor) or (tuple(found.shape), found.dtype) != (chunk.sizes, entry.dtype):
            raise ConfigError(f"{self}: {file}: the tensor '{name}' is not what {METADATA} says")
        return found


def contents(table: Record) -> tuple[dict[str, Entry], set[str]]:
    """The tensors that .metadata lists, and the names of its other objects."""
    fields = table.fields()
    places: dict[str, dict[Shape, tuple[str, int, int]]] = defaultdict(dict)
    for key, info in fields["storage_data"].items():
        index, place = key.fields(), info.fields()
        if place.get("transform_descriptors"):
            raise ValueError(f"compressed by {place['transform_descriptors']}")
        at = (str(place["relative_path"]), int(place["offset"]), int(place["length"]))
        places[index["fqn"]][index.get("offset") or ()] = at
    tensors, objects = {}, set()
    for name, kind in fields["state_dict_metadata"].items():
        if kind.called.endswith(".BytesStorageMetadata"):
            objects.add(name)
        else:
            tensors[name] = entry_of(name, kind.fields(), places[name])
    return tensors, objects


def entry_of(name: str, fields: dict[str, Any], places: dict[Shape, tuple[str, int, int]]) -> Entry:
    dtype, *_ = fields["properties"].state  # TensorProperties.__getstate__
    chunks = [chunk.fields() for chunk in fields["chunks"]]
    boxes = [(numbers(chunk["offsets"]), numbers(chunk["sizes"])) for chunk in chunks]
    shape = numbers(fields["size"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the type of '{name}' is a {type(dtype).__name__}")
    for offsets, sizes in boxes:
        if any(not 0 <= o <= o + n <= s for o, n, s in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"a chunk of {sizes} at {offsets} in the tensor '{name}' of shape {shape}")
    if both := overlapping([box for box in boxes if 0 not in box[1]]):
        raise ValueError(f"the chunks at {both[0][0]} and {both[1][0]} of the tensor '{name}' overlap")
    return Entry(shape, dtype, [Chunk(offsets, sizes, places.get(offsets)) for offsets, sizes in sorted(boxes)])


def numbers(sizes: Any) -> Shape:
    found = tuple(sizes)
    if not all(type(number) is int and 0 <= number < 2**63 for number in found):
        raise ValueError("a shape or an offset that are no numbers")
    return found


def overlapping(boxes: list[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element. Together they would hide that others are missing.

    Boxes cut along a grid, as nearly all are, need no comparison: in no dimension does one begin inside another, so two
    that share an element begin at the same one.
    """
    boxes = sorted(boxes)
    for one, other in pairwise(boxes):
        if one[0] == other[0]:
            return one, other
    dims = range(len(boxes[0][0]) if boxes else 0)
    starts = [sorted({offsets[dim] for offsets, _ in boxes}) for dim in dims]
    if all(bisect_right(starts[d], o[d]) == bisect_left(starts[d], o[d] + n[d]) for o, n in boxes for d in dims):
        return None
    axis = max(dims, key=lambda dim: len(starts[dim]))
    return swept(sorted(boxes, key=lambda box: box[0][axis]), axis)


def swept(boxes: list[Box], axis: int) -> tuple[Box, Box] | None:
    """The same along an axis that they are sorted by: each is compared with those that reach to its beginning."""
    reaching: list[Box] = []
    for box in boxes:
        offsets, sizes = box
        reaching = [(o, n) for o, n in reaching if o[axis] + n[axis] > offsets[axis]]
        for o, n in reaching:
            if all(a < b + m and b < a + k for a, k, b, m in zip(o, n, offsets, sizes, strict=True)):
                return (o, n), box
        reaching.append(box)
    return None


def overlap(chunk: Chunk, wanted: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """The box that is wanted of a chunk, in the tensor's coordinates; None where there is nothing."""
    box = [
        (max(start, offset), min(stop, offset + size))
        for (start, stop), offset, size in zip(wanted, chunk.offsets, chunk.sizes, strict=True)
    ]
    return box if all(start < stop for start, stop in box) else None


def shifted(box: list[tuple[int, int]], origin: Shape | list[int]) -> Slices:
    return tuple(slice(start - first, stop - first) for (start, stop), first in zip(box, origin, strict=True))
