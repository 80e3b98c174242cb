"""The processes of torchrun around a harness in which one of them may fail alone.

VLMEvalKit asks for NCCL. Its ranks only wait for each other, which gloo can do without a GPU; and they would wait for
DIST_TIMEOUT, or hold a half-done dataset for whole, where one of them has failed and gone on to the next.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from nemo_vlm.errors import explain
from nemo_vlm.script import told

WAITS_FOR = timedelta(days=7)  # for a rank whose part takes longer, or the first one's judge
END = ("", 0)

Place = tuple[str, int]  # file and line


class LastError(logging.Handler):
    """Keeps what the last exception said that was logged."""

    said = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.said = " ".join(str(record.exc_info[1]).split()) or type(record.exc_info[1]).__name__


class Ranks:
    """All processes of a run.

    Args:
        size: how many; with more than one they have a process group of gloo.
        rank: which of them this is.
    """

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = size, rank
        self.start: Place | None = None  # where the harness begins a dataset
        self.error = LastError()

    @property
    def first_of_node(self) -> bool:
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def gather(self, value: Any) -> list[Any]:
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that all ranks take, or none: where it fails on any, all end, and each cause is told once."""
        failure = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            failure = explain(error)
        failures = self.gather(failure)
        if failure and [found and found.message for found in failures].index(failure.message) == self.rank:
            sys.stderr.write(told(failure))
        if any(failures):
            self.gather(None)  # told, before torchrun ends what is left of a run that a process has left
            sys.exit(max(found.code for found in failures if found))

    def replace_torch(self) -> None:
        """Have the harness, which calls torch.distributed, meet here."""
        if self.size > 1:
            dist.init_process_group = lambda *_, **__: None
            dist.barrier = self.meet  # type: ignore[assignment]
            dist.destroy_process_group = self.part  # type: ignore[assignment]

    def listen(self, log: logging.Logger) -> None:
        """For why the harness gives a dataset up, which it logs."""
        log.addHandler(self.error)

    def meet(self) -> None:
        """A barrier of VLMEvalKit's, which goes on to its next dataset where one fails: alone, if no other rank fails.

        Raises:
            RuntimeError: another rank has given up the dataset in which this one waits for it.
        """
        caller = sys._getframe(1)
        place = caller.f_code.co_filename, caller.f_lineno
        self.start = self.start or place
        self.wait(place)

    def part(self) -> None:
        """The harness is done."""
        self.wait(END)

    def wait(self, place: Place) -> None:
        """Until all are at this place; between datasets, for those who are still in one, to give it up as well.

        Raises:
            RuntimeError: as meet.
        """
        between = (self.start, END)
        while True:
            found = enumerate(self.gather((place, self.error.said)))
            gone = [f"rank {rank} gave this dataset up: {said}" for rank, (other, said) in found if other in between]
            if len(gone) in (0, self.size):
                return
            if place not in between:
                raise RuntimeError("; ".join(gone))


def join() -> Ranks:
    """The processes that torchrun started, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo", timeout=WAITS_FOR)
    return Ranks(size, dist.get_rank() if size > 1 else 0)
