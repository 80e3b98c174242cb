"""Bytes that a training step keeps for its backward pass and works on beside it, in closed form, by stage and part.

What is kept is counted by the inputs that each module's kernels save: our own on a CPU, Transformer Engine's on an
accelerator. How many micro-batches wait for their backward pass is taken from Megatron's schedules (1F1B,
arXiv:2104.04473), run event by event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

from nemo_vlm.config import RunConfig
from nemo_vlm.layout import Layout
from nemo_vlm.planning.footprints import Part, buffers, chunk_parts, shapes_of
from nemo_vlm.planning.schedule import FEW, order
from nemo_vlm.planning.workload import Workload, num_micro_batches, workload

WORKING = "working"  # what is made and given back within one module's pass


def activation_bytes(run: RunConfig, layout: Layout, stage: int, work: Workload | None = None) -> dict[str, int]:
    """What a rank of a pipeline stage holds at its peak beside weights, gradients and optimizer, by part.

    Args:
        stage: the rank's place in its pipeline.
        work: of the fullest micro-batch; None: estimated.
    """
    work = work or workload(run, layout, fullest=True)
    shapes = shapes_of(run, layout, work)
    chunks = [chunk_parts(shapes, stage, chunk) for chunk in range(layout.virtual)]
    few = min(num_micro_batches(run, layout, work), FEW * layout.pipeline)
    events = order(stage, layout.pipeline, layout.virtual, few)
    return dict(peak(events, chunks))


def buffer_bytes(run: RunConfig, layout: Layout, work: Workload | None = None) -> int:
    """What communication takes on any rank."""
    return round(buffers(shapes_of(run, layout, work or workload(run, layout, fullest=True))))


def peak(events: Iterable[tuple[bool, int, int]], chunks: Sequence[Sequence[Part]]) -> Counter[str]:
    """The most that is held at once, by part.

    Args:
        events: the rank's passes, as schedule.order gives them.
        chunks: the parts of each of its chunks.
    """
    kept = [sum(part.kept for part in parts) for parts in chunks]
    tops = [[top(parts, backward) for backward in (False, True)] for parts in chunks]
    waiting, held, most = [0] * len(chunks), 0.0, -1.0
    for backward, chunk, _ in events:
        waiting[chunk] -= backward
        held -= backward * kept[chunk]
        size, number = tops[chunk][backward]
        if held + size > most:
            most, at = held + size, (tuple(waiting), chunk, backward, number)
        waiting[chunk] += not backward
        held += (not backward) * kept[chunk]
    return by_part(chunks, *at)


def top(parts: Sequence[Part], backward: bool) -> tuple[float, int]:
    """The most that one pass through a chunk needs, and in which of its parts."""
    kept = accumulate(part.kept for part in parts)
    return max(
        (held + (part.backward if backward else part.forward), number)
        for number, (held, part) in enumerate(zip(kept, parts, strict=True))
    )


def by_part(
    chunks: Sequence[Sequence[Part]], waiting: Sequence[int], chunk: int, backward: bool, number: int
) -> Counter[str]:
    """What is held while a chunk's part `number` runs and others wait for their backward passes."""
    running = chunks[chunk][number]
    found: Counter[str] = Counter()
    for parts, times in zip(chunks, waiting, strict=True):
        for part in parts:
            found[part.name] += round(times * part.kept)
    for part in chunks[chunk][: number + 1]:
        found[part.name] += round(part.kept)
    found[WORKING] = round(running.backward if backward else running.forward)
    return found
