"""Videos to frames, by decord."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
from PIL import Image

from nemo_vlm.errors import SampleError
from nemo_vlm.models.images import Source, opened

SINGLE = ("first", "middle", "last")


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
        """Frames that `frames` gives."""
        if self.single is not None:
            return 1
        return self.num_frames if self.num_frames > 0 else len(reader(video))

    def frames(self, video: Video) -> list[Image.Image]:
        """As RGB images.

        Raises:
            SampleError: the file does not exist or cannot be decoded.
        """
        decoded = reader(video)
        chosen = self.indices(len(decoded))
        try:
            pixels = decoded.get_batch(sorted(set(chosen))).asnumpy()
        except Exception as error:  # decord's errors derive from Exception alone
            raise unreadable(video, error) from None
        place = {index: number for number, index in enumerate(sorted(set(chosen)))}
        return [Image.fromarray(pixels[place[index]]) for index in chosen]

    def indices(self, total: int) -> list[int]:
        count = total if self.num_frames < 0 else min(self.num_frames, total)
        found = [int(index) for index in numpy.linspace(0, total - 1, count)]
        found += [found[-1]] * (self.num_frames - len(found))
        if self.single is None:
            return found
        return [found[{"first": 0, "middle": len(found) // 2, "last": -1}[self.single]]]


def reader(video: Video) -> Any:
    """decord's VideoReader.

    Raises:
        SampleError: the file does not exist or is no video.
    """
    import decord

    with opened(video.source) as file:
        try:
            found = decord.VideoReader(file, num_threads=1)
        except Exception as error:  # as above
            raise unreadable(video, error) from None
    if not len(found):
        raise SampleError("broken_image", f"{video}: the video has no frame")
    return found


def unreadable(video: Video, error: Exception) -> SampleError:
    return SampleError("broken_image", f"{video}: not a readable video ({' '.join(str(error).split())[:200]})")
