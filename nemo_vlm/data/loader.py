"""The loaders of one data-parallel rank: each item is a step's micro-batches, padded or packed.

Which samples a step has is the order's business, see data.orders: the same under every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from nemo_vlm.batch import Batch, Sample, collate, empty_sample, pack, round_up
from nemo_vlm.config import RunConfig, StepConfig
from nemo_vlm.data import packing
from nemo_vlm.data.dataset import Samples
from nemo_vlm.data.orders import Blend, Grouped
from nemo_vlm.data.records import RecordDataset
from nemo_vlm.layout import Layout
from nemo_vlm.options import gathers_samples, least_multiple, row_length

Groups = list[list[int]]  # record numbers, see Shares


@dataclass(frozen=True)
class Share:
    """A data-parallel rank."""

    rank: int
    of: int


class InTurn:
    """One group, as long as every other rank's; it is cut into micro-batches when it has been read."""

    def __call__(self, batch: Sequence[int], share: Share) -> Groups:
        each = len(batch) // share.of
        return [list(batch[share.rank * each : (share.rank + 1) * each])]


class Evened:
    """As InTurn, but for which rank reads which sample: all have about as many visual tokens.

    Args:
        lengths: [records, 2] as lengths.of_file.
    """

    def __init__(self, lengths: numpy.ndarray) -> None:
        self.lengths = lengths

    def __call__(self, batch: Sequence[int], share: Share) -> Groups:
        each = len(batch) // share.of
        plain = [range(rank * each, (rank + 1) * each) for rank in range(share.of)]
        mine = packing.evened(sizes_of(self.lengths, batch), plain)[share.rank]
        return [[batch[place] for place in sorted(mine)]]


class MicroBatches:
    """A group for each micro-batch.

    Args:
        size: of one; it divides what a rank has of a batch.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, batch: Sequence[int], share: Share) -> Groups:
        (mine,) = InTurn()(batch, share)
        return [mine[first : first + self.size] for first in range(0, len(mine), self.size)]


class Packs:
    """A group for each pack, as many as every other rank's.

    Args:
        lengths: [records, 2] as lengths.of_file.
        capacities: tokens of a pack at most, and visual tokens, where these are limited too.
        together: packs that each rank must take together, one or the pipeline's size.
        evened: the ranks have about as many visual tokens.
    """

    def __init__(self, lengths: numpy.ndarray, capacities: Sequence[int], together: int, evened: bool = False) -> None:
        self.lengths, self.capacities, self.together, self.evened = lengths, capacities, together, evened

    def __call__(self, batch: Sequence[int], share: Share) -> Groups:
        sizes = sizes_of(self.lengths, batch)
        packs = packing.plan(sizes[:, : len(self.capacities)], self.capacities, share.of * self.together)
        dealt = [packing.share(range(len(packs)), rank, share.of) for rank in range(share.of)]
        if self.evened:
            dealt = packing.evened(numpy.stack([sizes[places].sum(0) for places in packs]), dealt)
        return [[batch[place] for place in packs[number]] or [-1] for number in sorted(dealt[share.rank])]


def sizes_of(lengths: numpy.ndarray, batch: Sequence[int]) -> numpy.ndarray:
    """[samples, 2] int64: tokens and visual tokens of a batch's records; an empty sample is one token.

    Args:
        lengths: [records, 2] as lengths.of_file.
    """
    return numpy.array([lengths[number] if number >= 0 else (1, 0) for number in batch], numpy.int64)


Shares = Callable[[Sequence[int], Share], Groups]  # what one rank reads of a global batch


class StepSampler(Sampler[Groups]):
    """For each step, the samples that one data-parallel rank reads of the global batch.

    Args:
        order: its batches() are the global batches.
        num_steps: steps that are left.
        consumed_samples: where the first of them begins.
    """

    def __init__(
        self,
        order: Blend | Grouped,
        num_steps: int,
        consumed_samples: int,
        step: StepConfig,
        share: Share,
        shares: Shares = InTurn(),
    ) -> None:
        self.order, self.num_steps, self.consumed_samples = order, num_steps, consumed_samples
        self.step, self.share, self.shares = step, share, shares

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Groups]:
        for batch in islice(self.order.batches(self.consumed_samples, self.step), self.num_steps):
            yield self.shares(batch, self.share)


class Steps(Dataset):
    """Micro-batches of the groups that a sampler gives, read in a worker."""

    def __init__(self, dataset: Samples, put_together: Callable[[Iterable[list[Sample]]], list[Batch]]) -> None:
        self.dataset, self.put_together = dataset, put_together

    def __getitem__(self, groups: Groups) -> list[Batch]:
        samples = self.dataset.samples
        return self.put_together([sample for number in group for sample in samples(number)] for group in groups)


def padded(groups: Iterable[list[Sample]], micro_batch_size: int, pad_multiple: int) -> list[Batch]:
    """Micro-batches of samples of like length, the longest first: less padding, and memory peaks at once.

    Which samples share one does not matter to the loss of the global batch, unless loss_reduction=micro_batch.
    """
    samples = sorted((s for group in groups for s in group), key=lambda sample: len(sample.tokens), reverse=True)
    batches = []
    while samples:  # pixels are large: none is held twice for long
        batches.append(collate(samples[:micro_batch_size], pad_multiple))
        del samples[:micro_batch_size]
    return batches


def in_rows(groups: Iterable[list[Sample]], pad_multiple: int) -> list[Batch]:
    """A row of each group, whose numbers stand for packed samples already."""
    return [pack(group, pad_multiple) for group in groups]


def packed(groups: Iterable[list[Sample]], pad_multiple: int, capacity: int, dataset: RecordDataset) -> list[Batch]:
    return [pack(fitting(group, capacity, dataset), pad_multiple) for group in groups]


def fitting(group: list[Sample], capacity: int, dataset: RecordDataset) -> list[Sample]:
    """The samples of a pack; where they are too long for it, those that have outgrown their plan are left out.

    An image that has changed since it was measured can do that. Other ranks know nothing of it, and have as many packs.

    Args:
        capacity: 0: every sample that has outgrown its plan is left out.
    """
    excess = sum(len(sample.tokens) for sample in group) - capacity
    fits = []
    for sample in group:
        if excess > 0 and (message := dataset.outgrown(sample)):
            excess -= len(sample.tokens) - 1
            sample = empty_sample(sample.record, f"stale_length: {message}")
        fits.append(sample)
    return fits


def pad_multiple(run: RunConfig, layout: Layout, packed: bool) -> int:
    """What the layout and 8-bit products need, or a given number; where all micro-batches must be of one length, that.

    Args:
        packed: the rows of a micro-batch are joined into one.
    """
    if run.step.ub_tp_comm_overlap or gathers_samples(run):
        return row_length(run, layout) * (layout.micro_batch_size if packed else 1)
    return least_multiple(run, layout) if run.data.pad_to == "batch" else run.data.pad_to


def training_loader(
    dataset: Samples, layout: Layout, share: Share, run: RunConfig, num_steps: int, consumed_samples: int
) -> DataLoader:
    """One item for each of the steps that are left: this rank's micro-batches."""
    order = order_of(dataset, run)
    shares = shares_of(dataset, layout, run)
    return loader(dataset, StepSampler(order, num_steps, consumed_samples, run.step, share, shares), layout, run)


def validation_loader(dataset: Samples, layout: Layout, share: Share, run: RunConfig, limit: int) -> DataLoader:
    """One item for each of the first `limit` global batches: this rank's micro-batches, as many as every other rank's.

    Each sample is seen once; empty ones fill the last batch.
    """
    size = run.step.global_batch_size
    numbers = [int(number) for number in islice(chain.from_iterable(dataset.parts), limit * size)]
    together = share.of * layout.micro_batch_size * (layout.pipeline if layout.virtual > 1 else 1)
    batches = []
    for first in range(0, len(numbers), size):
        batch = numbers[first : first + size]
        batches.append(batch + [-1] * (round_up(len(batch), together) - len(batch)))
    shares = shares_of(dataset, layout, run)
    return loader(dataset, [shares(batch, share) for batch in batches], layout, run)


def loader(dataset: Samples, sampler: Sampler | list[Groups], layout: Layout, run: RunConfig) -> DataLoader:
    multiple = pad_multiple(run, layout, dataset.packed)
    if dataset.packed:
        put_together = partial(in_rows, pad_multiple=multiple)
    elif run.data.packing:
        assert isinstance(dataset, RecordDataset)
        visual = run.data.max_visual_tokens_per_micro_batch  # more of these may be too many too
        capacity = run.model.encoder_seq_length if visual is None else 0
        put_together = partial(packed, pad_multiple=multiple, capacity=capacity, dataset=dataset)
    else:
        put_together = partial(padded, micro_batch_size=layout.micro_batch_size, pad_multiple=multiple)
    return DataLoader(
        Steps(dataset, put_together),
        sampler=sampler,
        batch_size=None,
        num_workers=run.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: the run's random numbers do not depend on when a loader starts
    )


def shares_of(dataset: Samples, layout: Layout, run: RunConfig) -> Shares:
    if dataset.packed:
        return MicroBatches(layout.micro_batch_size)
    data, lengths = run.data, dataset.lengths
    if not data.packing and not data.balance_visual_tokens:
        return InTurn()
    assert lengths is not None
    if not data.packing:
        return Evened(lengths)
    together, visual = layout.pipeline if layout.virtual > 1 else 1, data.max_visual_tokens_per_micro_batch
    capacities = (run.model.encoder_seq_length, *([] if visual is None else [visual]))
    return Packs(lengths, capacities, together, data.balance_visual_tokens)


def joined(parts: Sequence[numpy.ndarray | range]) -> numpy.ndarray | range:
    """The numbers of all files; ranges, of which each goes on where the one before it ends, need no memory."""
    if all(isinstance(part, range) for part in parts):
        return range(parts[0][0], parts[-1][-1] + 1)
    return parts[0] if len(parts) == 1 else numpy.concatenate(parts)


def order_of(dataset: Samples, run: RunConfig) -> Blend | Grouped:
    """The order that dataloader_type asks for; without weights, all files are drawn from as one."""
    parts, weights, seed = dataset.parts, run.data.weights, run.step.seed
    if weights is None:
        parts, weights = [joined(parts)], (1.0,)
    if run.data.dataloader_type != "modality":
        return Blend(parts, weights, seed, shuffle=run.data.dataloader_type == "cyclic")
    assert dataset.lengths is not None
    kinds, shares = [], []
    for kind in (1, 0):  # with images or videos, without
        arrays = [numpy.asarray(part) for part in parts]
        some = [part[(dataset.lengths[part, 1] > 0) == kind] for part in arrays]
        held = [weight * len(few) / len(part) for weight, few, part in zip(weights, some, parts, strict=True)]
        present = [number for number, share in enumerate(held) if share]
        if present:
            shares.append(sum(held))
            within = [held[number] / shares[-1] for number in present]
            kinds.append(Blend([some[number] for number in present], within, seed, shuffle=True))
    return Grouped(kinds, shares, dataset.lengths[:, 0], seed)
