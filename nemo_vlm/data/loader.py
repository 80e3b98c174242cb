"""The order of samples, and the loader of one data-parallel rank.

The order depends on the seed alone: sample k of a run is the same under every layout and batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from nemo_vlm.batch import Batch, Sample, collate
from nemo_vlm.config import StepConfig
from nemo_vlm.layout import Layout


@dataclass(frozen=True)
class Share:
    """A data-parallel rank."""

    rank: int
    of: int


class Order:
    """Sample k of an endless run over `size` samples: each epoch a new permutation, or the file's order."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.epoch, self.permutation = -1, torch.arange(size)

    def __getitem__(self, k: int) -> int:
        epoch, position = divmod(k, self.size)
        if self.shuffle and epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.permutation = epoch, torch.randperm(self.size, generator=generator)
        return int(self.permutation[position])


def batch_size_at(consumed_samples: int, step: StepConfig) -> int:
    """The global batch of a step that begins after so many samples; ramp-up as Megatron's num_microbatches_calculator.

    The batch grows by equal increments, each held for an equal share of the ramp-up's samples.
    """
    if step.rampup_batch_size is None:
        return step.global_batch_size
    start, increment, samples = step.rampup_batch_size
    increments = (step.global_batch_size - start) // increment
    if consumed_samples > samples or not increments:
        return step.global_batch_size
    return min(start + int(consumed_samples / (samples / increments)) * increment, step.global_batch_size)


class StepSampler(Sampler[list[int]]):
    """For each step, the samples that one data-parallel rank reads of the global batch.

    Args:
        num_steps: steps that are left.
        consumed_samples: where the first of them begins.
    """

    def __init__(self, order: Order, num_steps: int, consumed_samples: int, step: StepConfig, share: Share) -> None:
        self.order, self.num_steps, self.consumed_samples = order, num_steps, consumed_samples
        self.step, self.share = step, share

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        consumed = self.consumed_samples
        for _ in range(self.num_steps):
            size = batch_size_at(consumed, self.step)
            each = size // self.share.of
            first = consumed + self.share.rank * each
            yield [self.order[k] for k in range(first, first + each)]
            consumed += size


def make_loader(dataset: Dataset, sampler: StepSampler, layout: Layout, num_workers: int) -> DataLoader:
    """One item a step: this rank's micro-batches."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(
            collate_step,
            micro_batch_size=layout.micro_batch_size,
            pad_multiple=pad_multiple(layout),
        ),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: the run's random numbers do not depend on when a loader starts
    )


def collate_step(samples: list[Sample], micro_batch_size: int, pad_multiple: int) -> list[Batch]:
    """Micro-batches of samples of like length, the longest first: less padding, and memory peaks at once.

    Which samples share one does not matter to the loss of the global batch, unless loss_reduction=micro_batch.
    """
    samples = sorted(samples, key=lambda sample: len(sample.tokens), reverse=True)
    return [collate(samples[i : i + micro_batch_size], pad_multiple) for i in range(0, len(samples), micro_batch_size)]


def pad_multiple(layout: Layout) -> int:
    """Sequence parallelism splits the tokens over the tensor-parallel ranks."""
    return layout.tensor if layout.sequence_parallel else 1
