"""Where images and videos stand: in a folder, or in a tar that is not unpacked.

A video may stand there as its frames, as Pai-Megatron-Patch has it: images in the folder `path/x` in place of
`path/x.mp4`, in the order of their names, and beside it `path/x.json`, which tells their rate: {"fps": "2.0"}.
"""

from __future__ import annotations

import bisect
import errno
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy

from nemo_vlm.data.cached import cached, prefix
from nemo_vlm.data.forms import parsed
from nemo_vlm.errors import ConfigError, SampleError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # what in a folder is a frame
FPS = 2.0  # of frames whose rate nobody tells
MOST_OPEN = 256  # files; a process may have a thousand or so
descriptors: dict[Path, int] = {}  # of this process, the oldest first


class Openable(Protocol):
    """A file inside something else, as a member of a tar; str() names it."""

    def open(self) -> BinaryIO: ...


Source = str | Path | Openable


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


@dataclass(frozen=True)
class Held:
    """A file in memory.

    Attributes:
        called: where it comes from, for messages.
    """

    content: bytes = field(repr=False)
    called: str

    def open(self) -> BinaryIO:
        return BytesIO(self.content)

    def __str__(self) -> str:
        return self.called


@dataclass(frozen=True)
class Frames:
    """A video that is given as images.

    Attributes:
        files: its frames in their order, at least one: paths, or whatever can be opened and names itself.
        fps: how many of them make a second.
    """

    files: tuple[Any, ...]
    fps: float = FPS

    def __post_init__(self) -> None:
        if not self.files or not 0 < self.fps < float("inf"):
            raise SampleError("broken_video", f"{self}, fps={self.fps}: must be one or more, and fps more than 0")

    def __str__(self) -> str:
        return f"{len(self.files)} frames" + (f" from {self.files[0]} on" if self.files else "")


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
        found = self.find(name)
        if found is None:
            raise SampleError("missing_image", f"{self.path}: holds no {name}")
        return found

    def video(self, name: str) -> Member | Frames:
        """Raises:
        SampleError: there is neither a file of the name nor frames of it.
        """
        found = self.find(name)
        if found is not None:
            return found
        stem, _ = os.path.splitext(os.path.normpath(name))
        table, front = member_table(self.path), os.fsencode(f"{stem}/")
        first = bisect.bisect_left(table["name"], front)
        last = bisect.bisect_left(table["name"], front[:-1] + bytes([front[-1] + 1]))
        inside = [os.fsdecode(name) for name in table["name"][first:last] if b"/" not in name[len(front) :]]
        rate = self.find(f"{stem}.json")
        files = [self.file(inside_name) for inside_name in inside if is_image(inside_name)]
        if not files:
            raise SampleError("missing_video", f"{self.path}: holds no {name}, nor frames in {stem}/")
        return frames(files, rate.open().read() if rate else None, f"{self.path}:{stem}.json")

    def find(self, name: str) -> Member | None:
        table, wanted = member_table(self.path), os.fsencode(os.path.normpath(name))
        place = bisect.bisect_left(table["name"], wanted)
        if place == len(table) or table["name"][place] != wanted:
            return None
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

    def video(self, name: str) -> Path | Frames:
        """Its file, which need not exist, or its frames where there are only these.

        Raises:
            SampleError: broken_video: what tells the rate of the frames does not.
        """
        path = self.path / name
        stem = path if os.path.isdir(path) else path.with_suffix("")
        if os.path.isfile(path) or not os.path.isdir(stem):
            return path
        files = sorted(file for file in stem.iterdir() if is_image(file.name))
        if not files:
            missing = "holds no frames" if stem == path else f"does not exist, and {stem} holds no frames"
            raise SampleError("missing_video", f"{path}: {missing}")
        rate = stem.with_name(f"{stem.name}.json")
        return frames(files, rate.read_bytes() if rate.is_file() else None, str(rate))


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGES) and not os.path.basename(name).startswith(".")


def frames(files: Sequence[Any], rate: bytes | None, called: str) -> Frames:
    """A video of at least one image.

    Args:
        rate: what tells how many make a second; None: nothing does.
        called: that file, for messages.
    Raises:
        SampleError: broken_video: it does not.
    """
    try:
        return Frames(tuple(files), FPS if rate is None else float(parsed(rate, called)["fps"]))
    except (ValueError, TypeError, LookupError) as error:
        raise SampleError("broken_video", f'{called}: must be as {{"fps": "2.0"}} ({error!r})') from None


def opened(source: Source, kind: str = "image") -> BinaryIO:
    """The file, open.

    Raises:
        SampleError: there is none, or none can have that name.
        OSError: the file system fails. The ranks that share a batch must all leave a sample out, or none: one alone
            may meet this.
    """
    try:
        return Path(source).open("rb") if isinstance(source, str | Path) else source.open()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        message = f"{source}: the {kind} does not exist; {kind}_folder says where they stand"
        raise SampleError(f"missing_{kind}", message) from None
    except ValueError as error:
        raise SampleError("broken_record", f"{str(source)!r}: cannot be a file's name ({error})") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise SampleError("broken_record", f"{source}: cannot be a file's name ({error.strerror})") from None
        reraise_of_disk(source, error)
        raise


def reraise_of_disk(source: Source, error: BaseException) -> None:
    """Raises OSError, with the file's name, where the file system says so and not a decoder.

    Pillow's errors have no number, and PyAV's are classes of its own.
    """
    if isinstance(error, OSError) and error.errno is not None and type(error).__module__ == "builtins":
        raise OSError(error.errno, f"{source}: cannot be read ({error.strerror})") from None


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


def descriptor(path: Path) -> int:
    """Of a file that stays open for a while; os.pread leaves nothing in it that processes could share by mistake."""
    if path not in descriptors:
        if len(descriptors) >= MOST_OPEN:
            os.close(descriptors.pop(next(iter(descriptors))))
        descriptors[path] = os.open(path, os.O_RDONLY)
    return descriptors[path]


@cache
def member_table(path: Path) -> numpy.ndarray:
    return cached(path, "members", "", lambda: members(path))


def walk(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file in an uncompressed tar, in its order.

    Raises:
        OSError, tarfile.TarError: it cannot be read.
    """
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.isfile():
                yield member.name, member.offset_data, member.size
            tar.members = []  # type: ignore[attr-defined]  # they would be kept, a kilobyte each
        file.seek(tar.offset)
        if file.read(512).strip(b"\0"):
            raise tarfile.TarError("it is cut off, or damaged")  # tarfile itself takes that for the end


def members(path: Path) -> numpy.ndarray:
    """[files] of name, offset, size; in the order of names."""
    found = [(os.fsencode(os.path.normpath(name)), offset, size) for name, offset, size in walk(path)]
    if not found:
        raise tarfile.TarError("it holds no file")
    width = max(len(name) for name, _, _ in found)
    return numpy.sort(numpy.array(found, dtype=[("name", f"S{width}"), ("offset", "i8"), ("size", "i8")]), order="name")
