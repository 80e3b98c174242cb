"""How long steps take, and where that time goes: columns of metrics.csv, and a line about all of them at the end."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch.utils.data import DataLoader

from nemo_vlm.config import TrainerConfig
from nemo_vlm.planning.hardware import peak_tflops

STEP = "train_step_timing in s"
WITHIN = {  # the step, one after the other, each with what the line at the end calls it
    "data_wait in s": "data wait",
    "forward_backward in s": "forward and backward",
    "grad_reduction in s": "gradient reduction",
    "optimizer in s": "optimizer",
}
STALL = "checkpoint_stall in s"
COLUMNS = (STEP, *WITHIN, STALL)
OWN_WORK = ("data_wait in s", "forward_backward in s", STALL)  # what the other ranks wait for


class StepTimes:
    """The steps of this rank and process, each from the end of the one before it.

    What saving takes belongs to no step but is told with the next one; validation is told nowhere.

    Attributes:
        unlike: the first steps, which are unlike the others and do not count at the end.
    """

    def __init__(self) -> None:
        self.start, self.data_wait, self.stall = time.perf_counter(), 0.0, 0.0
        self.steps, self.unlike, self.totals = 0, 1, Counter[str]()

    def restart(self) -> None:
        """The next step begins now."""
        self.start = time.perf_counter()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        held = time.perf_counter() - began
        self.stall += held
        self.start += held

    def end_step(self, phases: Mapping[str, float]) -> list[float]:
        """Seconds of the step that ends now, in the order of COLUMNS.

        Args:
            phases: StepResult.seconds.
        """
        now = time.perf_counter()
        of_step = {"data_wait": self.data_wait, **phases}
        stall = of_step.pop("checkpoint_stall")
        within = [of_step[column.removesuffix(" in s")] for column in WITHIN]
        row = [now - self.start - stall, *within, self.stall + stall]
        self.start, self.data_wait, self.stall = now, 0.0, 0.0
        return row

    def tell(self, ranks: Iterable[Sequence[float]]) -> dict[str, float]:
        """The columns of a step: the seconds of the rank that the others waited for; all of one, so that they add up.

        Args:
            ranks: end_step of each rank.
        """
        rows = [dict(zip(COLUMNS, seconds, strict=True)) for seconds in ranks]
        slowest = max(rows, key=lambda row: sum(row[column] for column in OWN_WORK))
        self.steps += 1
        if self.steps == self.unlike + 1:
            self.totals.clear()
        self.totals.update(slowest)
        return slowest

    def summary(self) -> str:
        """Means and shares of the steps of this process that count; of all, where there are no others."""
        counted = self.steps - self.unlike if self.steps > self.unlike else self.steps
        step = self.totals[STEP]
        shares = {name: self.totals[column] / step for column, name in WITHIN.items()}
        shares["other"] = 1 - sum(shares.values())
        told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        stall = round(self.totals[STALL] / counted, 3)  # of a step without a save some microseconds
        return f"{step / counted:.4g} s a step, the mean of {counted}: {told}; and {stall:.4g} s for checkpoints"


class Timed:
    """A loader whose steps are waited for."""

    def __init__(self, loader: DataLoader, times: StepTimes) -> None:
        self.loader, self.times = loader, times

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        items = iter(self.loader)
        for _ in range(len(self)):
            began = time.perf_counter()
            item = next(items)
            self.times.data_wait += time.perf_counter() - began
            yield item


def mfu_peak(trainer: TrainerConfig) -> tuple[float | None, str]:
    """The TFLOP/s of a rank that MFU is taken against, and where they come from."""
    if trainer.peak_tflops is not None:
        return trainer.peak_tflops, f"MFU is taken against trainer.peak_tflops={trainer.peak_tflops:g} of each rank"
    if not torch.cuda.is_available():
        return None, "no MFU: there is no GPU whose peak is known; trainer.peak_tflops=N tells it"
    name = torch.cuda.get_device_name()
    peak = peak_tflops(name)
    if peak is None:
        return None, f"no MFU: the peak of {name} is not known; trainer.peak_tflops=N tells it"
    return peak, f"MFU is taken against {peak:g} TFLOP/s of each rank: dense bf16 of {name}, by its data sheet"
