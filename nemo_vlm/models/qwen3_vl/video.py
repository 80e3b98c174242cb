"""Videos as Qwen3-VL sees them: which frames, how large, and the time of each moment, which stands in the text."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import numpy

from nemo_vlm.config.dynamic import smart_resize
from nemo_vlm.models.dynamic import DynamicViews, PatchFormat
from nemo_vlm.models.tokens import PlaceholderRun, Runs
from nemo_vlm.models.video import Reader

log = logging.getLogger(__name__)
ASSUMED_FPS = 24.0  # of a video that does not say


@dataclass(frozen=True)
class EvenSampling:
    """So many frames a second of a video, equally spaced, by the rule of Qwen3VLVideoProcessor.sample_frames.

    Attributes:
        min_frames, max_frames: of a video, as far as it has them.
        num_frames: that many instead; -1: all.
    """

    fps: float
    min_frames: int
    max_frames: int
    num_frames: int | None

    def count(self, reader: Reader) -> int:
        total = len(reader)
        if self.num_frames is not None:
            return total if self.num_frames == -1 else min(self.num_frames, total)
        wanted = int(total / rate(reader) * self.fps)
        return min(max(wanted, self.min_frames), self.max_frames, total)

    def indices(self, reader: Reader) -> list[int]:
        return numpy.linspace(0, len(reader) - 1, self.count(reader)).round().astype(int).tolist()


@dataclass(frozen=True)
class TotalLimits:
    """Between what a video is resized, in pixels of all its frames together."""

    min_pixels: int
    max_pixels: int

    def resized(self, size: tuple[int, int], frames: int, patches: PatchFormat) -> tuple[int, int]:
        """(width, height), by smart_resize of Qwen3VLVideoProcessor in transformers 4.57.

        Of what that refuses, a side below a block is enlarged to one first, as in transformers 5, and a single frame
        counts as the whole patch that it fills.

        Raises:
            SampleError: it is too narrow.
        """
        factor, depth = patches.factor, patches.temporal_patch_size
        if min(size) < factor:
            scale = factor / min(size)
            size = int(size[0] * scale), int(size[1] * scale)
        return smart_resize(*size, factor, self.min_pixels, self.max_pixels, max(frames, depth), depth)


@dataclass(frozen=True)
class TimedViews(DynamicViews):
    """A video's moments stand apart in the text, each behind its time."""

    def _video_runs(self, reader: Reader) -> Runs:
        count = self.format.features(*self._size(reader))
        times = moments(self.sampling.indices(reader), rate(reader), self.format.temporal_patch_size)
        return tuple(PlaceholderRun(count, f"<{time:.1f} seconds>") for time in times)


def moments(indices: list[int], fps: float, depth: int) -> list[float]:
    """The seconds of each temporal patch, between its first and its last frame; the last frame fills the last patch.

    As Qwen3VLProcessor._calculate_timestamps.
    """
    filled = indices + indices[-1:] * (-len(indices) % depth)
    seconds = [index / fps for index in filled]
    return [(seconds[first] + seconds[first + depth - 1]) / 2 for first in range(0, len(seconds), depth)]


def rate(reader: Reader) -> float:
    """Frames a second."""
    return assumed_rate() if reader.fps is None else reader.fps


@cache
def assumed_rate() -> float:
    """Tells of it once in a process, as Hugging Face."""
    log.warning("a video names no frame rate: %s frames a second are assumed, for its times in the text", ASSUMED_FPS)
    return ASSUMED_FPS
