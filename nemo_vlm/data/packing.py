"""Which samples of a global batch share a pack: online sequence packing, planned anew for each step.

The samples of a step stay those of the order, so a packed step has the loss and the gradients of the padded one. Every
data-parallel rank gets the same number of packs: FSDP gathers weights in each forward pass of all ranks together, and
virtual stages take packs in groups of the pipeline's size.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Pack = list[int]  # places in the global batch
EVEN = 1.01  # a pack this much larger than their mean is left as it is
TRIED = 32  # of the emptiest packs, for an exchange


def plan(lengths: Sequence[int], capacity: int, multiple: int) -> list[Pack]:
    """Few packs, a multiple of `multiple`, of like sizes, the longest first; one may be empty where samples are few.

    Args:
        lengths: tokens of each sample, none more than the capacity.
        capacity: tokens of a pack at most.
    """
    total = max(sum(lengths), 1)
    count = -(-total // (capacity * multiple)) * multiple
    while True:
        bins = Bins(lengths, count)
        bins.even_out(min(capacity, total / count * EVEN))
        if max(bins.sizes) <= capacity:
            return bins.fullest_first()
        count += multiple


class Bins:
    """Packs while they are filled: each sample into the emptiest, the longest first."""

    def __init__(self, lengths: Sequence[int], count: int) -> None:
        self.lengths, self.sizes = lengths, [0] * count
        self.packs: list[Pack] = [[] for _ in range(count)]
        for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
            emptiest = self.sizes.index(min(self.sizes))
            self.packs[emptiest].append(place)
            self.sizes[emptiest] += lengths[place]

    def even_out(self, enough: float) -> None:
        """Exchange samples of the fullest pack for shorter ones, or none, of an empty one, until it holds `enough`."""
        while max(self.sizes) > enough:
            fullest = self.sizes.index(max(self.sizes))
            emptiest = heapq.nsmallest(TRIED, range(len(self.sizes)), self.sizes.__getitem__)
            if not any(self._exchange(fullest, other) for other in emptiest if other != fullest):
                return

    def _exchange(self, fuller: int, other: int) -> bool:
        """The exchange after which the sizes of both are the most alike; whether there is one."""
        excess = self.sizes[fuller] - self.sizes[other]
        against = [(0, []), *((self.lengths[place], [place]) for place in self.packs[other])]
        gains = [
            (abs(excess - 2 * (self.lengths[given] - length)), self.lengths[given] - length, given, taken)
            for given in self.packs[fuller]
            for length, taken in against
            if 0 < self.lengths[given] - length < excess
        ]
        if not gains:
            return False
        _, gain, given, taken = min(gains)
        self.packs[fuller] = [place for place in self.packs[fuller] if place != given] + taken
        self.packs[other] = [place for place in self.packs[other] if place not in taken] + [given]
        self.sizes[fuller] -= gain
        self.sizes[other] += gain
        return True

    def fullest_first(self) -> list[Pack]:
        return [self.packs[pack] for pack in sorted(range(len(self.packs)), key=lambda pack: -self.sizes[pack])]


def share(packs: Sequence[Pack], rank: int, of: int) -> list[Pack]:
    """One data-parallel rank's packs: packs of like sizes run at the same time on all ranks."""
    return [
        packs[first + (rank if row % 2 == 0 else of - 1 - rank)] for row, first in enumerate(range(0, len(packs), of))
    ]
