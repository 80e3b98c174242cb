"""The pipeline's schedule on a time axis: Megatron's one forward, one backward, and its interleaved form.

Each rank takes its forward and backward passes in a fixed order and starts one as soon as what it needs has come
(megatron.core.pipeline_parallel.schedules); so stages of unequal length show where the others wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FEW = 4  # groups of micro-batches after which every further one only repeats them


@dataclass(frozen=True)
class Piece:
    """One pass on the time axis, in seconds."""

    rank: int
    chunk: int
    micro_batch: int
    backward: bool
    start: float
    end: float


@dataclass(frozen=True)
class Stages:
    """Seconds of a forward and of a backward pass of each stage, in the order of the pipeline, virtual ones singly."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    ranks: int

    def busy(self, rank: int) -> float:
        """Of one micro-batch on all stages of a rank."""
        return sum(self.forward[rank :: self.ranks]) + sum(self.backward[rank :: self.ranks])


def order(rank: int, ranks: int, chunks: int, micro_batches: int) -> Iterator[tuple[bool, int, int]]:
    """A rank's passes one after another: whether backward, chunk, micro-batch."""
    total, group = micro_batches * chunks, ranks * chunks
    behind = ranks - rank - 1
    warm = min(behind if chunks == 1 else 2 * behind + (chunks - 1) * ranks, total)

    def place(number: int) -> tuple[int, int]:
        if chunks == 1:
            return 0, number
        return number % group // ranks, number // group * ranks + number % ranks

    for number in range(total + warm):
        if number < total:
            yield False, *place(number)
        if number >= warm:
            chunk, micro_batch = place(number - warm)
            yield True, chunks - 1 - chunk, micro_batch


def simulate(stages: Stages, micro_batches: int) -> list[Piece]:
    """When each pass of each rank begins and ends."""
    ranks, chunks = stages.ranks, len(stages.forward) // stages.ranks
    waiting = [list(order(rank, ranks, chunks, micro_batches))[::-1] for rank in range(ranks)]
    done: dict[tuple[bool, int, int], float] = {}  # by whether backward, stage, micro-batch: its end
    free, pieces, last = [0.0] * ranks, [], ranks * chunks - 1
    moved = True
    while moved:
        moved = False
        for rank, left in enumerate(waiting):
            while left:
                backward, chunk, micro_batch = left[-1]
                stage = chunk * ranks + rank
                needed = needs(backward, stage, last, micro_batch)
                if any(each not in done for each in needed):
                    break
                start = max(free[rank], *(done[each] for each in needed), 0.0)
                end = start + (stages.backward if backward else stages.forward)[stage]
                done[backward, stage, micro_batch] = free[rank] = end
                pieces.append(Piece(rank, chunk, micro_batch, backward, start, end))
                left.pop()
                moved = True
    assert not any(waiting), "an order in which every rank waits for another"
    return pieces


def needs(backward: bool, stage: int, last: int, micro_batch: int) -> list[tuple[bool, int, int]]:
    """The passes that must have ended before this one."""
    if not backward:
        return [(False, stage - 1, micro_batch)] if stage else []
    return [(False, stage, micro_batch), *([(True, stage + 1, micro_batch)] if stage < last else [])]


def length(stages: Stages, micro_batches: int) -> float:
    """Seconds from the first pass to the end of the last.

    Once the pipeline is full, each micro-batch adds what the busiest rank needs for it: the rest is not simulated.
    """
    ranks = stages.ranks
    if ranks == 1:
        return micro_batches * stages.busy(0)
    few = min(micro_batches, FEW * ranks)
    simulated = max(piece.end for piece in simulate(stages, few))
    return simulated + (micro_batches - few) * max(map(stages.busy, range(ranks)))


def estimated_length(stages: Stages, micro_batches: int) -> float:
    """As length, without simulating: the busiest rank's passes, behind one way through the pipeline's first chunks."""
    ranks, chunks = stages.ranks, len(stages.forward) // stages.ranks
    busiest = max(map(stages.busy, range(ranks)))
    way = (sum(stages.forward) + sum(stages.backward)) / chunks
    return micro_batches * busiest + max(way - busiest / chunks, 0.0)


def bubble(stages: Stages, micro_batches: int, seconds: float) -> float:
    """The share of that time in which a rank of the pipeline waits, on average."""
    busy = micro_batches * (sum(stages.forward) + sum(stages.backward)) / stages.ranks
    return 1 - busy / seconds if seconds else 0.0
