"""One micro-batch as every model takes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

IMAGE_TAG = "<image>"  # where an image stands in the text of a LLaVA record
VIDEO_TAG = "<video>"  # a video
HUMANS = ("human", "user")  # who asks in a LLaVA record
IGNORE_INDEX = -100  # label of a position that is not trained on, as in PyTorch and Hugging Face

NUM_COUNTS = 7  # of Batch.counts

Skip = tuple[int, str]  # a record of which no sample could be made, and why
RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Kept:
    """What a cache of a vision tower's features knows of an image or a video.

    Attributes:
        key: its name there.
        views: how many are its.
        known: its features stand in the batch, in place of its pixels.
    """

    key: str
    views: int
    known: bool


@dataclass(frozen=True)
class Images:
    """Views as patches, in order of appearance: an image or a part of it, a frame of a video, in Qwen2-VL all of it.

    Attributes:
        pixel_values: [patches, values of a patch], view by view; inside a view by time, then row by row, or where a
            family merges blocks of patches, block by block. As they come from files, uint8, a quarter of the bytes to
            carry: [frames, height, width, channels] of a patch; else float32, normalised: [channels, frames, height,
            width].
        image_grid_thw: [views, 3] int64, on the CPU: patches of each view in time, height and width, as in Qwen2-VL.
        mean, std: what uint8 pixels are normalised by, for each channel, of values from 0 to 1.
        copies: as how many equal frames of a patch uint8 pixels are seen, of which they are one: a still image's.
        kept: of each image and video, where their features are kept on disk.
        features: [patches, width] of those that are known, of which there are no pixels.
    """

    pixel_values: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    image_grid_thw: Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.int64))
    mean: RGB = (0.0, 0.0, 0.0)
    std: RGB = (1.0, 1.0, 1.0)
    copies: int = 1
    kept: tuple[Kept, ...] = ()
    features: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def __len__(self) -> int:
        return len(self.image_grid_thw)

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        return [tuple(grid) for grid in self.image_grid_thw.tolist()]

    def normalised(self) -> Images:
        """With pixels in float32, where they are, of all frames; on a CPU to the last bit as Hugging Face's processors
        on Pillow.
        """
        if self.pixel_values.dtype != torch.uint8:
            return self
        pixels = self.planes().to(torch.float32, memory_format=torch.contiguous_format)
        known = torch.tensor((self.mean, self.std), dtype=torch.float32).to(pixels.device, non_blocking=True)
        mean, std = known[..., None]
        once = pixels.div_(255).sub_(mean).div_(std)[:, :, None]
        return replace(self, pixel_values=once.expand(-1, -1, self.copies, -1).flatten(1), copies=1)

    def planes(self) -> Tensor:
        """[patches, channels, frames * height * width of a patch], uint8 or float32 as they are."""
        if self.pixel_values.dtype != torch.uint8:
            return self.pixel_values.unflatten(1, (len(self.mean), -1))
        return self.pixel_values.unflatten(1, (-1, len(self.mean))).transpose(1, 2)

    def with_all_frames(self) -> Images:
        """With each frame of a patch, also where they are equal."""
        assert self.pixel_values.dtype == torch.uint8, "normalised pixels have all frames"
        return replace(self, pixel_values=self.pixel_values.repeat(1, self.copies), copies=1)

    def to(self, device: torch.device) -> Images:
        pixels, features = (one.to(device, non_blocking=True) for one in (self.pixel_values, self.features))
        return replace(self, pixel_values=pixels, features=features)

    def pin_memory(self) -> Images:
        return replace(self, pixel_values=self.pixel_values.pin_memory(), features=self.features.pin_memory())

    @property
    def unknown_grids(self) -> Tensor:
        """Those [views, 3] of which the tower must be run."""
        if not self.kept:
            return self.image_grid_thw
        known, views = ([getattr(one, name) for one in self.kept] for name in ("known", "views"))
        return self.image_grid_thw[~torch.tensor(known).repeat_interleave(torch.tensor(views))]


def join(parts: Iterable[Images]) -> Images:
    """All views, one after another."""
    found = [part for part in parts if len(part)]
    if len(found) < 2:  # one is not copied
        return found[0] if found else Images()
    shown = [part for part in found if len(part.pixel_values)] or found[:1]  # of the others, features are known
    if len({part.copies for part in shown}) > 1:  # stills beside videos
        shown = [part.with_all_frames() for part in shown]
    known = [part.features for part in found if len(part.features)]
    return replace(
        shown[0],
        pixel_values=torch.cat([part.pixel_values for part in shown]),
        image_grid_thw=torch.cat([part.image_grid_thw for part in found]),
        kept=tuple(one for part in found for one in part.kept),
        features=torch.cat(known) if known else found[0].features,
    )


@dataclass(frozen=True)
class Batch:
    """A micro-batch of samples, with all their images in order of appearance; padded or packed.

    Padded: a row a sample, padding on the right. Packed: all samples in one row, one after another, and padding behind
    the last; each sees only itself, and its positions begin at 0.

    Attributes:
        tokens: [b, s] int64; an image or a video stands as one placeholder token for each of its features.
        labels: [b, s] int64, already shifted: the token to be predicted at each position, or IGNORE_INDEX.
        lengths: [samples] int64, on the CPU: tokens of each sample.
        records: [samples] int64, the number of each sample's record in the data.
        views: [samples] int64, on the CPU: how many of the images are each sample's.
        skipped: records of which no sample could be made; an empty one stands for each.
        loss_weight: [] on the CPU, what its loss weighs in a training step, where the model's routers ask for it.
        token_weights: [b, s] float32, what each position's loss weighs in that, where it is known before the losses.
        host: the batch before it was moved; None: it was not.
    """

    tokens: Tensor
    labels: Tensor
    lengths: Tensor
    images: Images
    records: Tensor
    views: Tensor
    skipped: tuple[Skip, ...] = ()
    loss_weight: Tensor | None = None
    token_weights: Tensor | None = None
    host: Batch | None = None

    @property
    def at_hand(self) -> Batch:
        """The same on the CPU, where it is known: what is asked of that one waits for no device."""
        return self.host or self

    @property
    def packed(self) -> bool:
        return len(self.lengths) > len(self.tokens)

    @cached_property
    def segments(self) -> Tensor:
        """[b, s] int64 on the CPU: the number of the sample that each position belongs to; padding to the last."""
        numbers = torch.arange(len(self.lengths))
        if not self.packed:
            return numbers[:, None].expand(self.tokens.shape)
        rest = self.tokens.shape[1] - int(self.lengths.sum())
        return numbers.repeat_interleave(self.lengths + rest * (numbers == numbers[-1]))[None]

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {"images": self.images.to(device), "host": self.at_hand}
        for name in ("tokens", "labels", "token_weights"):
            if (tensor := getattr(self, name)) is not None:
                moved[name] = tensor.to(device, non_blocking=True)
        return replace(self, **moved)

    def rows(self, kept: Tensor) -> Batch:
        """Those rows [b] bool of a padded batch, as wide as it was, with their images, none of which a cache knows."""
        assert not self.images.kept
        views = kept.repeat_interleave(self.views)
        patches = views.repeat_interleave(self.images.image_grid_thw.prod(1))
        pixels, grids = self.images.pixel_values[patches], self.images.image_grid_thw[views]
        images = replace(self.images, pixel_values=pixels, image_grid_thw=grids)
        named = {name: getattr(self, name)[kept] for name in ("tokens", "labels", "lengths", "records", "views")}
        return replace(self, images=images if len(images) else Images(), host=None, **named)

    def counts(self) -> Tensor:
        """[7] float64: tokens, positions with padding, sum of squared lengths; patches that the tower is shown, sum of
        their squared numbers in each frame, inside which it attends; patches whose features were kept; skipped records.
        """
        lengths, grids = self.lengths.double(), self.images.unknown_grids.double()
        frames = grids[:, 1] * grids[:, 2]
        patches, squares = (grids[:, 0] * frames).sum(), (grids[:, 0] * frames.square()).sum()
        kept = self.images.image_grid_thw.prod(1).sum() - patches
        positions, skipped = torch.tensor([self.tokens.numel(), len(self.skipped)], dtype=torch.float64)
        return torch.stack([lengths.sum(), positions, lengths.square().sum(), patches, squares, kept, skipped])

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader when it pins."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("tokens", "labels", "images")}
        return replace(self, **pinned)


@dataclass(frozen=True)
class Sample:
    """One sample as a family's processor makes it.

    Attributes:
        tokens: [s] int64.
        labels: [s] int64, shifted, as in Batch.
        record: number of its record in the data; -1: it has none.
        skipped: why no sample could be made of its record; this one is then empty.
    """

    tokens: Tensor
    labels: Tensor
    images: Images = field(default_factory=Images)
    record: int = -1
    skipped: str | None = None


def empty_sample(record: int = -1, skipped: str | None = None) -> Sample:
    """One token that is not trained on: it keeps a place in the batch, and changes no loss."""
    return Sample(torch.zeros(1, dtype=torch.int64), torch.tensor([IGNORE_INDEX]), Images(), record, skipped)


def collate(samples: list[Sample], pad_multiple: int = 1) -> Batch:
    """Pad on the right to the longest sample, rounded up to a multiple of `pad_multiple`.

    Padding needs no mask: causal attention never looks right, and padded positions carry no label.
    """
    width = round_up(max(len(sample.tokens) for sample in samples), pad_multiple)
    tokens = torch.zeros(len(samples), width, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = sample.tokens
        labels[row, : len(sample.labels)] = sample.labels
    return batch_of(samples, tokens, labels)


def pack(samples: list[Sample], pad_multiple: int = 1) -> Batch:
    """One sample behind the other, in one row, which is rounded up to a multiple of `pad_multiple`."""
    width = round_up(sum(len(sample.tokens) for sample in samples), pad_multiple)
    tokens = torch.zeros(1, width, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    start = 0
    for sample in samples:
        tokens[0, start : start + len(sample.tokens)] = sample.tokens
        labels[0, start : start + len(sample.labels)] = sample.labels
        start += len(sample.tokens)
    return batch_of(samples, tokens, labels)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def batch_of(samples: list[Sample], tokens: Tensor, labels: Tensor) -> Batch:
    return Batch(
        tokens,
        labels,
        torch.tensor([len(sample.tokens) for sample in samples]),
        join(sample.images for sample in samples),
        torch.tensor([sample.record for sample in samples]),
        torch.tensor([len(sample.images) for sample in samples]),
        tuple((sample.record, sample.skipped) for sample in samples if sample.skipped),
    )
