"""Where the time of a step goes: marks between its phases, read once when it is over.

On a GPU a mark is an event in the stream of kernels, so that nothing waits for it until the step has ended.
"""

from __future__ import annotations

import time

import torch

from nemo_vlm.mcore import cpu


class Clock:
    """The seconds of each phase of one step."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.marks = [now()]

    def end(self, phase: str) -> None:
        """It began where the one before it ended."""
        self.phases.append(phase)
        self.marks.append(now())

    def seconds(self) -> dict[str, float]:
        """By phase; on a GPU this waits for the last one."""
        if isinstance(self.marks[-1], torch.cuda.Event):
            self.marks[-1].synchronize()
        return dict(zip(self.phases, map(between, self.marks[:-1], self.marks[1:]), strict=True))


def now() -> float | torch.cuda.Event:
    if cpu.device().type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Seconds."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float) and isinstance(end, float)
    return end - start
