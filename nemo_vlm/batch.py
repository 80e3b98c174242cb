"""One micro-batch as every model takes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IMAGE_TAG = "<image>"  # where an image stands in the text of a LLaVA record
HUMANS = ("human", "user")  # who asks in a LLaVA record
IGNORE_INDEX = -100  # label of a position that is not trained on, as in PyTorch and Hugging Face


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch of `b` samples of up to `s` tokens, with all their images in order of appearance.

    Attributes:
        tokens: [b, s] int64; an image stands as one placeholder token for each of its features.
        labels: [b, s] int64, already shifted: the token to be predicted at each position, or IGNORE_INDEX.
        lengths: [b] int64, tokens of each sample before padding (on the right).
        images: [n, 3, height, width] float32, n >= 0.
        records: [b] int64, the number of each sample's record in the data.
    """

    tokens: Tensor
    labels: Tensor
    lengths: Tensor
    images: Tensor
    records: Tensor

    def to(self, device: torch.device) -> Batch:
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()}
        return replace(self, **moved)

    def counts(self) -> Tensor:
        """[4] float64: tokens, positions with padding, sum of squared lengths, images."""
        lengths = self.lengths.double()
        positions, images = self.tokens.numel(), len(self.images)
        return torch.stack(
            [
                lengths.sum(),
                lengths.new_tensor(positions),
                lengths.square().sum(),
                lengths.new_tensor(images),
            ]
        )

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader when it pins."""
        return replace(self, **{name: value.pin_memory() for name, value in vars(self).items()})


@dataclass(frozen=True)
class Sample:
    """One sample as a family's processor makes it.

    Attributes:
        tokens: [s] int64.
        labels: [s] int64, shifted, as in Batch.
        images: [n, 3, height, width] float32.
        record: number of its record in the data; -1: it has none.
    """

    tokens: Tensor
    labels: Tensor
    images: Tensor
    record: int = -1


def collate(samples: list[Sample], pad_multiple: int = 1) -> Batch:
    """Pad on the right to the longest sample, rounded up to a multiple of `pad_multiple`.

    Padding needs no mask: causal attention never looks right, and padded positions carry no label.
    """
    lengths = torch.tensor([len(sample.tokens) for sample in samples])
    width = -(-int(lengths.max()) // pad_multiple) * pad_multiple
    tokens = torch.zeros(len(samples), width, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = sample.tokens
        labels[row, : len(sample.labels)] = sample.labels
    records = torch.tensor([sample.record for sample in samples])
    return Batch(tokens, labels, lengths, torch.cat([sample.images for sample in samples]), records)
