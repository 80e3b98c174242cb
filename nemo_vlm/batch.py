"""One micro-batch as every model takes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

IMAGE_TAG = "<image>"  # where an image stands in the text of a LLaVA record
VIDEO_TAG = "<video>"  # a video
HUMANS = ("human", "user")  # who asks in a LLaVA record
IGNORE_INDEX = -100  # label of a position that is not trained on, as in PyTorch and Hugging Face

NUM_COUNTS = 6  # of Batch.counts

Skip = tuple[int, str]  # a record of which no sample could be made, and why


@dataclass(frozen=True)
class Images:
    """Views as patches, in order of appearance: an image or a part of it, a frame of a video, in Qwen2-VL all of it.

    Attributes:
        pixel_values: [patches, channels * frames * height * width of a patch] float32, view by view; inside a view by
            time, then row by row, or where a family merges blocks of patches, block by block.
        image_grid_thw: [views, 3] int64, on the CPU: patches of each view in time, height and width, as in Qwen2-VL.
    """

    pixel_values: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    image_grid_thw: Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.image_grid_thw)

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        return [tuple(grid) for grid in self.image_grid_thw.tolist()]

    def to(self, device: torch.device) -> Images:
        return replace(self, pixel_values=self.pixel_values.to(device, non_blocking=True))

    def pin_memory(self) -> Images:
        return replace(self, pixel_values=self.pixel_values.pin_memory())


def join(parts: Iterable[Images]) -> Images:
    """All views, one after another."""
    found = [part for part in parts if len(part)]
    if len(found) < 2:  # one is not copied
        return found[0] if found else Images()
    return Images(torch.cat([part.pixel_values for part in found]), torch.cat([part.image_grid_thw for part in found]))


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
    """

    tokens: Tensor
    labels: Tensor
    lengths: Tensor
    images: Images
    records: Tensor
    views: Tensor
    skipped: tuple[Skip, ...] = ()
    loss_weight: Tensor | None = None

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
        tokens, labels = (tensor.to(device, non_blocking=True) for tensor in (self.tokens, self.labels))
        return replace(self, tokens=tokens, labels=labels, images=self.images.to(device))

    def rows(self, kept: Tensor) -> Batch:
        """Those rows [b] bool of a padded batch, as wide as it was, with their images."""
        views = kept.repeat_interleave(self.views)
        patches = views.repeat_interleave(self.images.image_grid_thw.prod(1))
        images = Images(self.images.pixel_values[patches], self.images.image_grid_thw[views])
        named = {name: getattr(self, name)[kept] for name in ("tokens", "labels", "lengths", "records", "views")}
        return replace(self, images=images if len(images) else Images(), **named)

    def counts(self) -> Tensor:
        """[6] float64: tokens, positions with padding, sum of squared lengths; patches, sum of their squared numbers in
        each frame, inside which the tower attends; skipped records.
        """
        lengths, grids = self.lengths.double(), self.images.image_grid_thw.double()
        frames = grids[:, 1] * grids[:, 2]
        patches, squares = (grids[:, 0] * frames).sum(), (grids[:, 0] * frames.square()).sum()
        positions, skipped = torch.tensor([self.tokens.numel(), len(self.skipped)], dtype=torch.float64)
        return torch.stack([lengths.sum(), positions, lengths.square().sum(), patches, squares, skipped])

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
