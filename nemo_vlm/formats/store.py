"""A folder or an uncompressed tar as a set of named files, mapped into memory and never unpacked."""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
import tarfile
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class Span:
    """A run of bytes of a mapped file.

    Attributes:
        called: what messages call it, "x.nemo: model_weights/model-00001-of-00002.safetensors".
    """

    __slots__ = ("called", "memory", "size", "start")

    memory: mmap.mmap
    start: int
    size: int
    called: str

    def __str__(self) -> str:
        return self.called

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a span of a mapped file cannot be pickled, and not be changed by a pickle")

    def bytes(self, start: int = 0, size: int | None = None) -> bytes:
        """A copy of a part of it.

        Raises:
            ConfigError: it ends before.
        """
        part = self.part(start, self.size - start if size is None else size)
        return self.memory[part.start : part.start + part.size]

    def part(self, start: int, size: int) -> Span:
        """A run inside this one.

        Raises:
            ConfigError: it ends before.
        """
        if start < 0 or size < 0 or start + size > self.size:
            raise ConfigError(f"{self.called}: cut short or damaged (bytes {start} to {start + size} of {self.size})")
        return Span(self.memory, self.start + start, size, self.called)


class SpanFile(io.RawIOBase):
    """A span as a file to read, for libraries that want one."""

    def __init__(self, span: Span) -> None:
        self.span, self.position = span, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.span.size}[whence]
        self.position = max(base + offset, 0)
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        rest = max(self.span.size - self.position, 0)
        content = self.span.bytes(min(self.position, self.span.size), rest if size < 0 else min(size, rest))
        self.position += len(content)
        return content


class Store(Protocol):
    """Named files; names are relative, with slashes. `str()` of it is its path."""

    path: Path

    def names(self) -> set[str]: ...
    def span(self, name: str) -> Span:
        """Raises ConfigError where there is no such file."""
        ...


class Mapped(mmap.mmap):
    """A file's bytes that know where they stand.

    Attributes:
        address: of the first byte in memory.
        path: of the file, and what it was when it was mapped.
    """

    address: int
    path: Path
    was: os.stat_result


MAPPED: weakref.WeakSet[Mapped] = weakref.WeakSet()
LOCK = threading.Lock()  # files are mapped where others are looked up


def map_file(path: Path) -> Mapped:
    """The bytes of a file that is not empty.

    The mapping is private, so it is writable, as torch wants it; nothing is ever written to it.
    """
    with open(path, "rb") as file:
        memory = Mapped(file.fileno(), 0, access=mmap.ACCESS_COPY)
        memory.path, memory.was = path, os.fstat(file.fileno())
    memory.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory.madvise(mmap.MADV_SEQUENTIAL)  # large tensors are read from end to end: three times faster
    with LOCK:
        MAPPED.add(memory)
    return memory


def place_of(address: int, size: int) -> tuple[Mapped, int] | None:
    """The mapped file that these bytes in memory are a run of, and where they begin in it."""
    with LOCK:
        for memory in MAPPED:
            if memory.address <= address and address + size <= memory.address + len(memory):
                return memory, address - memory.address
    return None


def expect(memory: mmap.mmap, start: int, size: int) -> None:
    """Have bytes of a mapped file read from the disk, without waiting for them."""
    first = start - start % mmap.PAGESIZE
    memory.madvise(mmap.MADV_WILLNEED, first, start + size - first)


@contextlib.contextmanager
def opened(address: int, size: int) -> Iterator[tuple[int, int] | None]:
    """A descriptor of the file that these bytes in memory are a run of, and where they begin in it.

    None where they are of no file, or another stands in its place by now.
    """
    place = place_of(address, size)
    if place is None or not place[0].path.exists():
        yield None
        return
    memory, start = place
    with open(memory.path, "rb") as file:
        yield (file.fileno(), start) if os.path.samestat(os.fstat(file.fileno()), memory.was) else None


GZIP = b"\x1f\x8b"
EMPTY = mmap.mmap(-1, 1)


class Folder:
    """The files of a directory, those in its folders included."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.maps: dict[str, mmap.mmap] = {}

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def found(self) -> set[str]:
        return {file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file()}

    def names(self) -> set[str]:
        return self.found

    def span(self, name: str) -> Span:
        file = self.path / name
        if not is_inside(name) or not file.is_file():
            raise ConfigError(f"{self.path}: has no {name}")
        if file.stat().st_size == 0:
            return Span(EMPTY, 0, 0, str(file))
        if name not in self.maps:
            self.maps[name] = map_file(file)
        return Span(self.maps[name], 0, len(self.maps[name]), str(file))


def is_inside(name: str) -> bool:
    """Whether a file of that name lies inside the folder that it is taken from."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not PurePosixPath(name).is_absolute() and ".." not in parts


class Tar:
    """The members of an uncompressed tar.

    Raises:
        ConfigError: it is no tar, is compressed, or has a member that is absolute, points outside, is sparse, or is a
            link or device.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"{path}: there is no such archive")
        with open(self.path, "rb") as file:
            if file.read(len(GZIP)) == GZIP:
                raise ConfigError(f"{path}: is compressed; decompress it: gzip -dc {path} > {plain_name(self.path)}")
        try:
            with tarfile.open(self.path, "r:") as tar:
                self.members = {
                    safe_name(member, self.path): (member.offset_data, member.size)
                    for member in tar
                    if not member.isdir()
                }
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(f"{path}: not a .nemo archive ({error})") from None
        self.memory = map_file(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> set[str]:
        return set(self.members)

    def span(self, name: str) -> Span:
        if name not in self.members:
            raise ConfigError(f"{self.path}: has no {name}")
        start, size = self.members[name]
        if start + size > len(self.memory):
            raise ConfigError(f"{self.path}: cut short in {name}")
        return Span(self.memory, start, size, f"{self.path}: {name}")


def safe_name(member: tarfile.TarInfo, path: Path) -> str:
    """The member's name, without the ./ that NeMo writes; only plain files inside the archive are allowed."""
    name = PurePosixPath(member.name)
    if not member.isfile() or member.sparse is not None or not is_inside(member.name):
        raise ConfigError(f"{path}: refuses the member '{member.name}', which is not a plain file inside the archive")
    return str(name)


def plain_name(path: Path) -> str:
    """A name for an archive that is not compressed any more."""
    return f"{path.with_suffix('')}-plain{path.suffix}"


def extract(store: Store, folder: str, target: Path) -> Path:
    """Copy a folder of the store to `target`."""
    for name in sorted(store.names()):
        if name.startswith(f"{folder}/"):
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.span(name).bytes())
    return target / folder
