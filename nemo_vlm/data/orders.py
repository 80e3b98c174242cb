"""Which records each global batch holds: a function of the seed and of the samples consumed, and of nothing else.

An order has `batches(consumed_samples, step)`: the global batches from there on, without end, as record numbers. It
needs neither the layout nor a table that grows with the run, so that a run can go on anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy
import torch

from nemo_vlm.config import StepConfig

PERIOD = 2**16  # samples after which a blend of files repeats itself; weights are rounded to it
FILES_APART = 7_368_787  # between the seeds of two files


def generator(*seeds: int) -> torch.Generator:
    """Random numbers that belong to these seeds."""
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part) % 2**63
    return torch.Generator().manual_seed(seed)


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


class Order:
    """Sample k of an endless run over `size` samples: each epoch a new permutation, or the file's order."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.epoch, self.permutation = -1, torch.empty(0)

    def __getitem__(self, k: int) -> int:
        epoch, position = divmod(k, self.size)
        if not self.shuffle:
            return position
        if epoch != self.epoch:
            self.epoch, self.permutation = epoch, torch.randperm(self.size, generator=generator(self.seed, epoch))
        return int(self.permutation[position])


@cache
def pattern(weights: tuple[float, ...]) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """[PERIOD] which part, [PERIOD] how many of it came before, [parts] how many of each there are."""
    shares, taken = numpy.asarray(weights), numpy.zeros(len(weights), numpy.int64)
    chosen, before = numpy.zeros((2, PERIOD), numpy.int64)
    for k in range(PERIOD):
        part = int(numpy.argmax(shares * max(k, 1) - taken))  # the largest deficit, as Megatron's blends
        chosen[k], before[k] = part, taken[part]
        taken[part] += 1
    return chosen, before, taken


class Blend:
    """Record k of an endless run over several parts, each in an order and in epochs of its own.

    Args:
        parts: the record numbers of each part.
        weights: how much of what is drawn comes from each, adding up to 1.
    """

    def __init__(
        self, parts: Sequence[numpy.ndarray | range], weights: Sequence[float], seed: int, shuffle: bool
    ) -> None:
        self.parts, self.weights = parts, tuple(weights)
        self.orders = [Order(len(part), seed + FILES_APART * i, shuffle) for i, part in enumerate(parts)]

    def __getitem__(self, k: int) -> int:
        if len(self.parts) == 1:
            return int(self.parts[0][self.orders[0][k]])
        (chosen, before, taken), (period, place) = pattern(self.weights), divmod(k, PERIOD)
        part = int(chosen[place])
        return int(self.parts[part][self.orders[part][period * int(taken[part]) + int(before[place])]])

    def batches(self, consumed_samples: int, step: StepConfig) -> Iterator[list[int]]:
        while True:
            size = batch_size_at(consumed_samples, step)
            yield [self[k] for k in range(consumed_samples, consumed_samples + size)]
            consumed_samples += size


class Grouped:
    """Global batches of like lengths, each with records of one kind only: with images or videos, or without.

    Each kind is an endless run of its own, so that no batch is left incomplete at the end of an epoch; the kinds take
    turns, the one that is furthest behind its share next. The samples of `mega_batch_mult` batches of a kind are sorted
    by length; then these batches, and the samples in each, are shuffled.

    Args:
        kinds: an endless run for each kind.
        shares: how much of what is drawn is of each kind, adding up to 1.
        lengths: [records], tokens by record number.
    """

    def __init__(self, kinds: Sequence[Blend], shares: Sequence[float], lengths: numpy.ndarray, seed: int) -> None:
        self.kinds, self.shares, self.lengths, self.seed = kinds, shares, lengths, seed
        self.windows: dict[int, tuple[int, list[int]]] = {}

    def batches(self, consumed_samples: int, step: StepConfig) -> Iterator[list[int]]:
        """From the first on, but only those from consumed_samples on are looked up."""
        drawn, taken = 0, [0] * len(self.kinds)
        while True:
            size = batch_size_at(drawn, step)
            behind = [share * (drawn + size) - had for share, had in zip(self.shares, taken, strict=True)]
            kind = behind.index(max(behind))
            if drawn >= consumed_samples:
                yield [self._at(kind, k, step) for k in range(taken[kind], taken[kind] + size)]
            taken[kind] += size
            drawn += size

    def _at(self, kind: int, k: int, step: StepConfig) -> int:
        batch, size = step.global_batch_size, sum(map(len, self.kinds[kind].parts))
        width = batch * max(min(step.mega_batch_mult, size // batch), 1)
        number, place = divmod(k, width)
        if self.windows.get(kind, (None,))[0] != number:
            self.windows[kind] = number, self._window(kind, range(number * width, (number + 1) * width), batch)
        return self.windows[kind][1][place]

    def _window(self, kind: int, places: range, batch: int) -> list[int]:
        records = sorted((self.kinds[kind][k] for k in places), key=lambda record: -self.lengths[record])
        random = generator(self.seed, kind, places.start)
        window: list[int] = []
        for number in torch.randperm(len(records) // batch, generator=random).tolist():
            order = torch.randperm(batch, generator=random).tolist()
            window += [records[number * batch + place] for place in order]
        return window
