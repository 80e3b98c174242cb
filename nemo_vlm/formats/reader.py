"""Tensors by name, of which slices can be read: what every format and every translation of names offers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from nemo_vlm.errors import ConfigError

Slices = tuple[slice, ...]  # one for each dimension, or none, which means all
Shape = tuple[int, ...]


def whole(shape: Shape) -> Slices:
    """All of a tensor."""
    return tuple(slice(0, size) for size in shape)


class Reader(Protocol):
    """Whole tensors by name. `str()` of it is what messages call it.

    `read` gives a tensor or, with one slice for each dimension, a part of it; the result may be a view of mapped
    memory, so it is copied before it is changed.
    """

    def names(self) -> set[str]: ...
    def shape(self, name: str) -> Shape: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, slices: Slices = ()) -> Tensor: ...


@dataclass(frozen=True)
class InMemory:
    """Tensors that are there already."""

    tensors: Mapping[str, Tensor]
    called: str = "memory"

    def __str__(self) -> str:
        return self.called

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> Shape:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        return self.tensors[name][slices]


@dataclass(frozen=True)
class Renamed:
    """Some tensors of a reader, under other names.

    Attributes:
        originals: the reader's name of each.
    """

    reader: Reader
    originals: Mapping[str, str]

    def __str__(self) -> str:
        return str(self.reader)

    def names(self) -> set[str]:
        return set(self.originals)

    def shape(self, name: str) -> Shape:
        return self.reader.shape(self.originals[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(self.originals[name])

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        return self.reader.read(self.originals[name], slices)


@dataclass(frozen=True)
class Joined:
    """Several readers' tensors as one's; no two have the same."""

    readers: Sequence[Reader]

    def __str__(self) -> str:
        return " and ".join(dict.fromkeys(map(str, self.readers)))

    def names(self) -> set[str]:
        return set(self.owners)

    @cached_property
    def owners(self) -> dict[str, Reader]:
        return {name: reader for reader in reversed(self.readers) for name in reader.names()}

    def shape(self, name: str) -> Shape:
        return self.owners[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.owners[name].dtype(name)

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        return self.owners[name].read(name, slices)


def chosen(reader: Reader, prefixes: Iterable[str]) -> Renamed:
    """The tensors whose names begin with one of the prefixes."""
    fronts = tuple(prefixes)
    return Renamed(reader, {name: name for name in reader.names() if name.startswith(fronts)})


def check_names(reader: Reader, needed: set[str]) -> None:
    """Nothing is missing and nothing left over.

    Raises:
        ConfigError: names the tensors.
    """
    if missing := sorted(needed - reader.names()):
        raise ConfigError(f"{reader}: tensors are missing: {listed(missing)}")
    if unused := sorted(reader.names() - needed):
        raise ConfigError(f"{reader}: the model has no place for these tensors: {listed(unused)}")


def listed(names: list[str], limit: int = 5) -> str:
    """Some names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
