"""Videos to frames, by decord, or by PyAV on machines that decord is not built for."""

from __future__ import annotations

import bisect
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, Protocol, TypeVar

import numpy
import torch
from PIL import Image

from nemo_vlm.data.media import Frames, Source, opened, reraise_of_disk
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.models.images import image_size, load_image

T = TypeVar("T")
AT_ONCE = 16  # frames that decord decodes at a time


class Reader(Protocol):
    """An open video.

    Attributes:
        fps: frames a second; None: it does not say.
        picked: it is given as images, so somebody has chosen its frames.
    """

    fps: float | None
    picked: bool

    def __len__(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        ...

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Frames as RGB, one after another, so that a long video takes no memory; the indices ascend."""
        ...


class Decord:
    """decord.VideoReader, which seeks."""

    picked = False

    def __init__(self, file: BinaryIO) -> None:
        import decord

        self.video = decord.VideoReader(file, num_threads=1)
        self.fps: float | None = float(self.video.get_avg_fps()) or None

    @property
    def size(self) -> tuple[int, int]:
        return next(self.read([0])).size

    def __len__(self) -> int:
        return len(self.video)

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        for first in range(0, len(indices), AT_ONCE):
            yield from map(Image.fromarray, self.video.get_batch(indices[first : first + AT_ONCE]).asnumpy())


class PyAv:
    """PyAV: the packets are counted and not decoded, then each run of frames is decoded from its keyframe on, once."""

    picked = False

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        with self._opened() as (container, stream):
            self.fps: float | None = float(stream.average_rate) if stream.average_rate else None
            packets = [(one.pts, one.is_keyframe) for one in container.demux(stream) if one.size and not one.is_discard]
        self.total, self.times = len(packets), sorted({time for time, _ in packets if time is not None})
        self.numbers = {time: number for number, time in enumerate(self.times)}
        self.keys: list[int] = []  # none, where packets do not say when they are shown: then frames are counted
        if len(self.times) == self.total:
            self.keys = sorted(self.numbers[time] for time, is_key in packets if is_key)

    @property
    def size(self) -> tuple[int, int]:
        return next(self.read([0])).size

    def __len__(self) -> int:
        return self.total

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Raises:
        ValueError: a frame cannot be decoded.
        """
        given = 0
        for seeks in (True, False):  # a seek may go astray in a rare container
            for frame in self._decoded(indices[given:], seeks and bool(self.keys)):
                given += 1
                yield upright(frame)
        if given < len(indices):
            raise ValueError(f"frame {indices[given]} of {self.total} cannot be decoded")

    def _decoded(self, indices: Sequence[int], seeks: bool) -> Iterator[Any]:
        """Frames of PyAV, until there is none of the next index."""
        with self._opened() as (container, stream):
            frames, number, frame = container.decode(stream), -1, None
            for index in indices:
                key = self.keys[bisect.bisect_right(self.keys, index) - 1] if seeks else -1
                if key > number:
                    container.seek(self.times[key], stream=stream)
                    frames = container.decode(stream)
                while number < index and (frame := next(frames, None)) is not None:
                    number = self.numbers.get(frame.pts, self.total) if seeks else number + 1
                if number != index:
                    return
                yield frame

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        import av

        self.file.seek(0)
        with av.open(self.file) as container:
            yield container, container.streams.video[0]


def upright(frame: Any) -> Image.Image:
    """A frame of PyAV as it is to be looked at, as decord gives it; telephones film sideways."""
    return frame.to_image().rotate(frame.rotation, expand=True) if frame.rotation else frame.to_image()


class FrameFiles:
    """A video that is given as images; where they differ in size, the first one's counts."""

    picked = True

    def __init__(self, frames: Frames) -> None:
        self.files = frames.files
        self.fps: float | None = frames.fps

    @property
    def size(self) -> tuple[int, int]:
        return image_size(self.files[0], upright=True)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        return (load_image(self.files[index], upright=True) for index in indices)


READER = Decord if importlib.util.find_spec("decord") else PyAv


@dataclass(frozen=True)
class Video:
    """A video, told apart from an image: a file, or images that are its frames."""

    source: Source | Frames

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
        return use(video, lambda reader: list(reader.read(self.indices(len(reader)))))

    def indices(self, total: int) -> list[int]:
        count = total if self.num_frames < 0 else min(self.num_frames, total)
        found = [int(index) for index in numpy.linspace(0, total - 1, count)]
        found += [found[-1]] * (self.num_frames - len(found))
        if self.single is None:
            return found
        return [found[{"first": 0, "middle": len(found) // 2, "last": -1}[self.single]]]


@dataclass(frozen=True)
class RateSampling:
    """So many frames a second of a video, by the rule of qwen_vl_utils (smart_nframes, and linspace rounded).

    Attributes:
        multiple: frames of a temporal patch; the number is one of its multiples. Where it cannot be, the last frame is
            repeated: of a video of one frame, of all frames, and of images all of which are seen.
        min_frames, max_frames: of a video, as far as it has them.
        num_frames: that many instead; -1: all.
    """

    multiple: int
    fps: float
    min_frames: int
    max_frames: int
    num_frames: int | None

    def count(self, reader: Reader) -> int:
        """Frames that are read.

        Raises:
            ValueError: the video does not say how fast it is.
        """
        total, wanted = len(reader), self._wanted(reader)
        if self.num_frames == -1 or (reader.picked and wanted >= total):
            return total
        return max(self._whole(min(wanted, total), math.floor), 1)

    def indices(self, reader: Reader) -> list[int]:
        """Raises:
        ValueError: as count.
        """
        return torch.linspace(0, len(reader) - 1, self.count(reader)).round().long().tolist()

    def _wanted(self, reader: Reader) -> float:
        if self.num_frames is not None:
            return self._whole(self.num_frames, round)
        if reader.fps is None:
            raise ValueError("it names no frame rate; model.data.num_frames needs none")
        wanted = max(len(reader) / reader.fps * self.fps, self._whole(self.min_frames, math.ceil))
        return min(wanted, self._whole(self.max_frames, math.floor))

    def _whole(self, count: float, rounded: Callable[[float], int]) -> int:
        return rounded(count / self.multiple) * self.multiple


def frame_size(video: Video) -> tuple[int, int]:
    """(width, height).

    Raises:
        SampleError: as FrameSampling.frames.
    """
    return use(video, lambda reader: reader.size)


def use(video: Video, question: Callable[[Reader], T]) -> T:
    """What an open video answers.

    Raises:
        SampleError: the file does not exist, or cannot be decoded.
        ConfigError: there is no decoder.
        OSError: the file system fails.
    """
    if isinstance(video.source, Frames):
        return question(FrameFiles(video.source))
    with opened(video.source, "video") as file:
        try:
            reader = READER(file)
            return question(reader) if len(reader) else no_frame()
        except ImportError as error:
            raise ConfigError(f"{video}: videos need decord or PyAV (pip install av): {error}") from None
        except SampleError:
            raise
        except Exception as error:  # both libraries raise what they like
            reraise_of_disk(video.source, error)
            text = " ".join(str(error).split())[:200]
            what = f"not a readable video: damaged, cut off or of an unknown format ({READER.__name__}: {text})"
            raise SampleError("broken_video", f"{video}: {what}") from None


def no_frame() -> NoReturn:
    raise ValueError("it has no frame")
