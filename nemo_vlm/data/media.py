"""Where images and videos stand: in a folder, or in a tar that is not unpacked."""

from __future__ import annotations

import bisect
import os
import tarfile
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy

from nemo_vlm.data.cached import cached, prefix
from nemo_vlm.errors import ConfigError, SampleError


@dataclass(frozen=True)
class Member:
    """A file inside a tar."""

    tar: Path
    name: str
    offset: int
    size: int

    def open(self) -> BinaryIO:
        return BytesIO(os.pread(descriptor(self.tar), self.size, self.offset))

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


class TarFolder:
    """The files inside an uncompressed tar; each process opens it once.

    Raises:
        ConfigError: it cannot be read.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        try:
            cached(path, "members", "", lambda: members(path))
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(f"{key}={path}: not an uncompressed tar with files ({error})") from None

    @property
    def version(self) -> str:
        """Another one where the tar may hold something else."""
        return f"{os.path.abspath(self.path)} {prefix(self.path)}"

    def file(self, name: str) -> Member:
        """Raises:
        SampleError: there is none of the name.
        """
        table, wanted = member_table(self.path), os.fsencode(os.path.normpath(name))
        place = bisect.bisect_left(table["name"], wanted)
        if place == len(table) or table["name"][place] != wanted:
            raise SampleError("missing_image", f"{self.path}: holds no {name}")
        return Member(self.path, name, int(table["offset"][place]), int(table["size"][place]))


class Folder:
    """The files below a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def version(self) -> str:
        """Which folder it is; whether files in it have changed cannot be told without a look at each."""
        return os.path.abspath(self.path)

    def file(self, name: str) -> Path:
        return self.path / name


def open_folder(path: str, key: str) -> Folder | TarFolder:
    """A folder, or a tar.

    Args:
        key: the setting that named it, for messages.
    Raises:
        ConfigError: there is no such folder, or the tar cannot be read.
    """
    if Path(path).suffix == ".tar":
        return TarFolder(Path(path), key)
    if not Path(path).is_dir():
        raise ConfigError(f"{key}={path}: neither a folder nor an uncompressed tar")
    return Folder(Path(path))


@cache
def descriptor(path: Path) -> int:
    """Of a file that stays open; os.pread leaves nothing in it that processes could share by mistake."""
    return os.open(path, os.O_RDONLY)


@cache
def member_table(path: Path) -> numpy.ndarray:
    return cached(path, "members", "", lambda: members(path))


def members(path: Path) -> numpy.ndarray:
    """[files] of name, offset, size; in the order of names."""
    found = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isfile():
                found.append((os.fsencode(os.path.normpath(member.name)), member.offset_data, member.size))
            tar.members = []  # type: ignore[attr-defined]  # they would be kept, a kilobyte each
    if not found:
        raise tarfile.TarError("it holds no file")
    width = max(len(name) for name, _, _ in found)
    return numpy.sort(numpy.array(found, dtype=[("name", f"S{width}"), ("offset", "i8"), ("size", "i8")]), order="name")
