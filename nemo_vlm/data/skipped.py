"""What is left out of data that are read, and how much of that is too much: in training, and when data are prepared."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.progress import track

from nemo_vlm.errors import SampleError

T = TypeVar("T")
log = logging.getLogger(__name__)

JUDGED_FROM = 100  # records; before, one broken record would look like many
HOPELESS_FROM = 8  # of which none can be used
CHANCE = 3  # standard deviations


def too_many(left_out: int, count: int, fraction: float, finished: bool) -> bool:
    """At the end, `fraction` of all may be left out; before, as many more as chance makes of such a share.

    Judged from the JUDGED_FROM-th on and at the end; from the HOPELESS_FROM-th on, where nothing is left yet.
    """
    allowed = fraction * count
    if not finished:
        allowed += CHANCE * math.sqrt(allowed)
    return left_out > allowed and (finished or count >= (HOPELESS_FROM if left_out == count else JUDGED_FROM))


class Skipped:
    """What a script leaves out, by reason.

    Args:
        kind: of what is counted, for messages.
        fraction: the --max-skip-fraction.
    Attributes:
        kept: how many are not left out.
        faults: of those left out, how many should not be there.
    """

    def __init__(self, kind: str, fraction: float) -> None:
        self.kind, self.fraction = kind, fraction
        self.reasons, self.kept, self.faults = Counter[str](), 0, 0

    def add(self, reason: str, message: str | None = None, fault: bool = True) -> None:
        """One more that is left out.

        Args:
            message: told of the first for its reason.
        Raises:
            RuntimeError: there are too many already.
        """
        if message is not None and not self.reasons[reason]:
            log.warning("left out, as others like it: %s", message)
        self.reasons[reason] += 1
        self.faults += fault
        self.check(finished=False)

    def check(self, finished: bool) -> None:
        """Raises RuntimeError: there are too many, or in the end nothing is left."""
        if too_many(self.faults, self.count, self.fraction, finished):
            told = f"more than --max-skip-fraction={self.fraction}"
        elif finished and not self.kept:
            told = "all there are"
        else:
            return
        raise RuntimeError(f"{self}, {told}; nothing was written")

    @property
    def count(self) -> int:
        return self.kept + self.reasons.total()

    def __str__(self) -> str:
        why = ", ".join(f"{number} {reason}" for reason, number in self.reasons.most_common())
        return f"{self.reasons.total()} of {self.count} {self.kind} are left out" + (f" ({why})" if why else "")


def made(make: Callable[[int], T], count: int, skipped: Skipped, told: str) -> Iterator[T]:
    """What is made of each of so many records that can be used, with a progress bar; the others are counted.

    Args:
        make: raises SampleError for those.
        told: beside the bar.
    Raises:
        RuntimeError: as Skipped.
    """
    for number in track(range(count), told):
        try:
            found = make(number)
        except SampleError as error:
            skipped.add(error.reason, str(error))
            continue
        skipped.kept += 1
        yield found
