"""Videos to frames, by decord, or by PyAV on machines that decord is not built for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, Protocol, TypeVar

import numpy
from PIL import Image

from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.models.images import Source, opened, reraise_of_disk

T = TypeVar("T")


class Reader(Protocol):
    """An open video: how many frames it has, and some of them as RGB images."""

    def __len__(self) -> int: ...
    def read(self, indices: Sequence[int]) -> list[Image.Image]: ...


class Decord:
    """decord.VideoReader, which seeks."""

    def __init__(self, file: BinaryIO) -> None:
        import decord

        self.video = decord.VideoReader(file, num_threads=1)

    def __len__(self) -> int:
        return len(self.video)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        return [Image.fromarray(pixels) for pixels in self.video.get_batch(indices).asnumpy()]


class PyAv:
    """PyAV, which decodes from the beginning."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.total = sum(1 for _ in self.decoded())

    def __len__(self) -> int:
        return self.total

    def decoded(self) -> Iterator[Any]:
        import av

        self.file.seek(0)
        with av.open(self.file) as container:
            yield from container.decode(video=0)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        wanted = set(indices)
        frames = {n: frame.to_image() for n, frame in enumerate(self.decoded()) if n in wanted}
        return [frames[index] for index in indices]


READER = Decord if importlib.util.find_spec("decord") else PyAv


@dataclass(frozen=True)
class Video:
    """A video file, told apart from an image."""

    source: Source

    def __str__(self) -> str:
        return str(self.source)


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are seen.

    Attributes:
        num_frames: equally spaced, the last repeated where there are fewer; -1: all.
        single: only the first, middle or last of them (NeMo's splice_single_frame).
    """

    num_frames: int
    single: str | None

    def count(self, video: Video) -> int:
        """Frames that `frames` gives.

        Raises:
            SampleError: as frames, where the file must be opened to tell.
        """
        if self.single is not None:
            return 1
        return self.num_frames if self.num_frames > 0 else use(video, len)

    def frames(self, video: Video) -> list[Image.Image]:
        """As RGB images.

        Raises:
            SampleError: the file does not exist, or cannot be decoded.
        """
        return use(video, lambda reader: reader.read(self.indices(len(reader))))

    def indices(self, total: int) -> list[int]:
        count = total if self.num_frames < 0 else min(self.num_frames, total)
        found = [int(index) for index in numpy.linspace(0, total - 1, count)]
        found += [found[-1]] * (self.num_frames - len(found))
        if self.single is None:
            return found
        return [found[{"first": 0, "middle": len(found) // 2, "last": -1}[self.single]]]


def frame_size(video: Video) -> tuple[int, int]:
    """(width, height).

    Raises:
        SampleError: as FrameSampling.frames.
    """
    return use(video, lambda reader: reader.read([0])[0].size)


def use(video: Video, question: Callable[[Reader], T]) -> T:
    """What an open video answers.

    Raises:
        SampleError: the file does not exist, or cannot be decoded.
        ConfigError: there is no decoder.
        OSError: the file system fails.
    """
    with opened(video.source, "video") as file:
        try:
            reader = READER(file)
            return question(reader) if len(reader) else no_frame()
        except ImportError as error:
            raise ConfigError(f"{video}: videos need decord or PyAV (pip install av): {error}") from None
        except Exception as error:  # both libraries raise what they like
            reraise_of_disk(video.source, error)
            text = " ".join(str(error).split())[:200]
            raise SampleError("broken_video", f"{video}: not a readable video ({text})") from None


def no_frame() -> NoReturn:
    raise ValueError("it has no frame")
