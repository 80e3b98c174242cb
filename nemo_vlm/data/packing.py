"""Which samples of a global batch share a pack, and which rank gets which: planned anew for each step.

The samples of a step stay those of the order, so a packed or an evened step has the loss and the gradients of the plain
one; not with model.loss_reduction=micro_batch, which averages over what happens to run together. Every data-parallel
rank gets the same number of packs: FSDP gathers weights in each forward pass of all ranks together, and virtual stages
take packs in groups of the pipeline's size.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy

Pack = list[int]  # places in the global batch
EVEN = 1.01  # a pack this much fuller than their mean is left as it is
TRIED = 32  # of the emptiest packs, for an exchange


def plan(sizes: numpy.ndarray, capacities: Sequence[int], multiple: int) -> list[Pack]:
    """Few packs, a multiple of `multiple`, of like sizes, the fullest first; one may be empty where samples are few.

    Args:
        sizes: [samples, kinds] of tokens: all of a sample, and where a second capacity is given its visual ones; none
            more than the capacity of its kind.
        capacities: tokens of each kind that a pack holds at most.
    """
    fullness = float((sizes.sum(0) / capacities).max())
    count = max(-int(-fullness // multiple), 1) * multiple
    while True:
        bins = Bins(sizes, capacities, count)
        bins.even_out(min(1.0, fullness / count * EVEN))
        if bins.fullness.max() <= 1:
            return bins.fullest_first()
        count += multiple


class Bins:
    """Packs while they are filled: each sample into the one that is then the least full, the largest first.

    A pack is as full as the fuller of its kinds of tokens.
    """

    def __init__(self, sizes: numpy.ndarray, capacities: Sequence[int], count: int) -> None:
        self.sizes, self.capacities = sizes, numpy.asarray(capacities)
        self.loads = numpy.zeros((count, len(self.capacities)), numpy.int64)
        self.packs: list[Pack] = [[] for _ in range(count)]
        for place in numpy.argsort(-self._full(sizes), kind="stable").tolist():
            pack = int(self._full(self.loads + sizes[place]).argmin())
            self.packs[pack].append(place)
            self.loads[pack] += sizes[place]

    @property
    def fullness(self) -> numpy.ndarray:
        """[packs], 1 at the capacity."""
        return self._full(self.loads)

    def even_out(self, enough: float) -> None:
        """Exchange samples of the fullest pack for smaller ones, or none, of an emptier one, until it is `enough`."""
        while (fullness := self.fullness).max() > enough:
            fullest = int(fullness.argmax())
            emptiest = numpy.argsort(fullness, kind="stable")[:TRIED].tolist()
            if not any(self._exchange(fullest, other) for other in emptiest if other != fullest):
                return

    def _exchange(self, fuller: int, other: int) -> bool:
        """The exchange after which the fuller one of both is the least full; whether there is one."""
        given, taken = self.packs[fuller], [-1, *self.packs[other]]
        moved = self.sizes[given][:, None] - numpy.vstack([0 * self.capacities, self.sizes[self.packs[other]]])
        worst = numpy.maximum(self._full(self.loads[fuller] - moved), self._full(self.loads[other] + moved))
        row, column = divmod(int(worst.argmin()), len(taken))
        if worst[row, column] >= self._full(self.loads[fuller]):
            return False
        gives, takes = given[row], taken[column]
        self.packs[fuller] = [place for place in given if place != gives] + [takes] * (takes >= 0)
        self.packs[other] = [place for place in self.packs[other] if place != takes] + [gives]
        self.loads[fuller] -= moved[row, column]
        self.loads[other] += moved[row, column]
        return True

    def _full(self, loads: numpy.ndarray) -> numpy.ndarray:
        return (loads / self.capacities).max(-1)

    def fullest_first(self) -> list[Pack]:
        return [self.packs[pack] for pack in numpy.argsort(-self.fullness, kind="stable").tolist()]


def evened(loads: numpy.ndarray, plain: Sequence[Sequence[int]]) -> list[list[int]]:
    """What each rank has of some items, as many as before, so that no rank has many more visual tokens than another.

    The largest goes first, to the rank that has the least of them and still has a place; those without any go where the
    least tokens are. The most visual tokens of a rank are never more than before.

    Args:
        loads: [items, 2]: tokens, and how many of them stand for images and videos.
        plain: the items of each rank as they are without.
    """
    dealt: list[list[int]] = [[] for _ in plain]
    free = [(0, 0, rank) for rank, items in enumerate(plain) if items]  # a heap by visual tokens, then by all
    with_some, pairs = int((loads[:, 1] > 0).sum()), loads.tolist()
    for place, item in enumerate(numpy.lexsort((-loads[:, 0], -loads[:, 1])).tolist()):
        if place == with_some:  # from here on by all
            free = sorted((0, tokens, rank) for _, tokens, rank in free)
        visual, tokens, rank = heapq.heappop(free)
        dealt[rank].append(item)
        if len(dealt[rank]) < len(plain[rank]):
            heapq.heappush(free, (visual + pairs[item][1], tokens + pairs[item][0], rank))
    before, after = (max(loads[list(items), 1].sum() for items in ranks) for ranks in (plain, dealt))
    return dealt if after <= before else [list(items) for items in plain]


def share(packs: Sequence[int], rank: int, of: int) -> list[int]:
    """One data-parallel rank's packs by number: packs of like sizes run at the same time on all ranks."""
    return [
        packs[first + (rank if row % 2 == 0 else of - 1 - rank)] for row, first in enumerate(range(0, len(packs), of))
    ]
