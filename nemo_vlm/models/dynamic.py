"""Images and videos in their own resolution, as Qwen2-VL and its successors see them: resized to whole blocks of
patches, within limits of pixels, and cut in the order of the blocks that become one token each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy
import torch
from PIL import Image
from torch import Tensor

from nemo_vlm.batch import RGB, Images, join
from nemo_vlm.config.dynamic import smart_resize
from nemo_vlm.data.media import Source
from nemo_vlm.models.images import Picture, as_tensors, decoding, image_size, line_of, named, resize, write_patches
from nemo_vlm.models.tokens import PlaceholderRun, Runs
from nemo_vlm.models.video import Reader, Video, use

SLACK = 1.05  # a frame's largest size is so much above its smallest at least, whatever a video's budget

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class PatchFormat:
    """How pixels become patches.

    Attributes:
        patch_size: pixels along an edge of a patch.
        temporal_patch_size: frames of a patch.
        merge_size: patches along an edge of the block that becomes one token.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: RGB
    std: RGB

    @property
    def factor(self) -> int:
        """Pixels along an edge of a block."""
        return self.patch_size * self.merge_size

    def times(self, frames: int) -> int:
        """Patches in time of so many frames."""
        return -(-frames // self.temporal_patch_size)

    def features(self, width: int, height: int) -> int:
        """Tokens of a moment of resized frames."""
        return (width // self.factor) * (height // self.factor)

    def grid(self, frames: int, width: int, height: int) -> Grid:
        """Patches in time, height and width of so many resized frames."""
        return self.times(frames), height // self.patch_size, width // self.patch_size

    def patches(self, frames: Sequence[Image.Image]) -> Images:
        """One view: resized frames of one size; an image is one frame, which its patches hold once, see Images.copies.

        A number that makes no whole patches is filled up with the last frame.
        """
        grid, copies = self.grid(len(frames), *frames[0].size), self.temporal_patch_size if len(frames) == 1 else 1
        depth, edge, block = self.temporal_patch_size // copies, self.patch_size, self.merge_size
        shape = (grid[0], grid[1] // block, grid[2] // block, block, block, depth, edge)
        pixels = numpy.empty(shape, line_of(edge))
        for number, frame in enumerate(frames):
            time, place = divmod(number, depth)
            end = depth if number == len(frames) - 1 else place + 1
            write_patches(frame, pixels[time, ..., place:end, :])
        return Images(*as_tensors(pixels, [grid]), self.mean, self.std, copies)

    def frames(self, images: Images) -> list[list[Image.Image]]:
        """The frames of each view again; those that only fill up its last patches are left out."""
        views = images.pixel_values.split(images.image_grid_thw.prod(1).tolist())
        return [self._frames(view, *grid) for view, grid in zip(views, images.grids, strict=True)]

    def _frames(self, view: Tensor, time: int, rows: int, columns: int) -> list[Image.Image]:
        depth, edge, block = view.shape[1] // (3 * self.patch_size**2), self.patch_size, self.merge_size
        parted = view.view(time, rows // block, columns // block, block, block, depth, edge, edge, 3)
        frames = parted.permute(0, 5, 1, 3, 6, 2, 4, 7, 8).reshape(time * depth, rows * edge, columns * edge, 3)
        while len(frames) > (time - 1) * depth + 1 and torch.equal(frames[-1], frames[-2]):
            frames = frames[:-1]
        return [Image.fromarray(frame.numpy()) for frame in frames]


@dataclass(frozen=True)
class PixelLimits:
    """Between what a view is resized, in pixels of an image or of each frame.

    Attributes:
        total_pixels: of a video, over all its temporal patches, whatever their frames; it lowers max_pixels.
    """

    min_pixels: int
    max_pixels: int
    total_pixels: int | None = None

    def resized(self, size: tuple[int, int], frames: int, patches: PatchFormat) -> tuple[int, int]:
        """(width, height) of each of so many frames, among which qwen_vl_utils (fetch_video) shares the total.

        Raises:
            SampleError: it is too narrow.
        """
        most = self.max_pixels
        if self.total_pixels is not None:
            share = self.total_pixels * patches.temporal_patch_size // frames
            most = max(min(most, share), int(self.min_pixels * SLACK))
        return smart_resize(*size, patches.factor, self.min_pixels, most)


class VideoLimits(Protocol):
    """Between what a video is resized."""

    def resized(self, size: tuple[int, int], frames: int, patches: PatchFormat) -> tuple[int, int]:
        """As PixelLimits."""
        ...


class Sampling(Protocol):
    """Which frames of a video are seen."""

    def count(self, reader: Reader) -> int:
        """How many."""
        ...

    def indices(self, reader: Reader) -> list[int]: ...


@dataclass(frozen=True)
class DynamicViews:
    """The image part of a processor: each image and each video is one view.

    Attributes:
        draft: JPEGs may be decoded smaller than they are; no length depends on it.
    """

    format: PatchFormat
    images: PixelLimits
    videos: VideoLimits
    sampling: Sampling
    draft: bool = field(default=False, repr=False)

    @property
    def settings(self) -> tuple[Any, ...]:
        """All that `runs` depends on, beside the files."""
        return (self,)

    @property
    def pixel_settings(self) -> tuple[Any, ...]:
        """All that `pixels` depends on, beside the files."""
        return self, self.draft

    def runs(self, media: Source | Video) -> Runs:
        """The placeholders of an image or a video; of the file, only what it says of its size is read.

        Raises:
            SampleError: it cannot be read, or is too narrow.
        """
        with named(media):
            return use(media, self._video_runs) if isinstance(media, Video) else self._image_runs(media)

    def pixels(self, media: Sequence[Source | Video]) -> Images:
        """Raises:
        SampleError: as runs.
        """
        return join(self._view(one) for one in media)

    def frames(self, images: Images) -> list[list[Image.Image]]:
        """The pictures that the patches of each view were cut from: an image's one, or a video's frames."""
        return self.format.frames(images)

    def _view(self, media: Source | Video) -> Images:
        with named(media):
            return use(media, self._video) if isinstance(media, Video) else self._image(media)

    def _image_runs(self, image: Source) -> Runs:
        width, height = self.images.resized(image_size(image, upright=True), 1, self.format)
        return (PlaceholderRun(self.format.features(width, height)),)

    def _image(self, source: Source) -> Images:
        with decoding(source) as file:
            picture = Picture(file, upright=True)
            size = self.images.resized(picture.size, 1, self.format)
            image = picture.load(size if self.draft else None)
        return self.format.patches([resize(image, size)])

    def _video_runs(self, reader: Reader) -> Runs:
        """One, of all its moments."""
        times = self.format.times(self.sampling.count(reader))
        return (PlaceholderRun(times * self.format.features(*self._size(reader))),)

    def _video(self, reader: Reader) -> Images:
        size = self._size(reader)
        return self.format.patches([resize(frame, size) for frame in reader.read(self.sampling.indices(reader))])

    def _size(self, reader: Reader) -> tuple[int, int]:
        return self.videos.resized(reader.size, self.sampling.count(reader), self.format)
