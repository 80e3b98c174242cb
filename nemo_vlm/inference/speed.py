"""How fast prompts are read, and answers made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_vlm.inference.generate import Row
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups


@dataclass
class Speed:
    """What one copy of the model has done. `begin` is called before `generate`, which then lets `hear` count.

    Attributes:
        read, reading: tokens of prompts, and the seconds until each batch had the first tokens of its answers.
        firsts: these.
        others, decoding: the further ones, and their seconds.
    """

    read: int = 0
    firsts: int = 0
    others: int = 0
    reading: float = 0.0
    decoding: float = 0.0
    last: float = field(default=0.0, repr=False)  # time.perf_counter()

    def begin(self) -> None:
        self.last = time.perf_counter()

    def hear(self, rows: Sequence[Row]) -> None:
        """Every row has its first token, or those that still ran have one more."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        longest = max(len(row.tokens) for row in rows)
        if longest == 1:
            self.reading += seconds
            self.read += sum(len(row.prompt) for row in rows)
            self.firsts += len(rows)
        else:
            self.decoding += seconds
            self.others += sum(len(row.tokens) == longest for row in rows)


def in_words(speed: Speed, layout: Layout) -> str:
    """Of all copies together, which work at the same time; every rank tells its own."""
    speeds = dict(groups.from_every_rank((groups.copies(layout)[0], speed))).values()
    read, firsts = sum(speed.read for speed in speeds), sum(speed.firsts for speed in speeds)
    others = sum(speed.others for speed in speeds)
    reading, decoding = max(speed.reading for speed in speeds), max(speed.decoding for speed in speeds)
    told = f"prompts: {read} tokens{rate(read, reading)}; answers: {firsts + others} tokens{rate(others, decoding)}"
    return told + (f"; first token after {reading:.3f} s" if firsts == 1 else "")


def rate(count: int, seconds: float) -> str:
    return f", {count / seconds:.1f} tokens/s" if seconds else ""
