"""Tensors on their way from a reader to files, one at a time, and what is told about it."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import Reader, Shape, Slices
from nemo_vlm.formats.safetensors import TensorSpec
from nemo_vlm.formats.store import expect, place_of

PART, AHEAD = 4 * 2**20, 4  # bytes of a part, and how many parts are read before they are written
SMALL_FILES = 64 * 10**6  # room for headers, tokenizer and configuration


class Cast:
    """A reader's tensors, those of floating point in another dtype; None leaves each its own."""

    def __init__(self, reader: Reader, target: torch.dtype | None) -> None:
        self.reader, self.target = reader, target

    def __str__(self) -> str:
        return str(self.reader)

    def names(self) -> set[str]:
        return self.reader.names()

    def shape(self, name: str) -> Shape:
        return self.reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        own = self.reader.dtype(name)
        return self.target if self.target is not None and own.is_floating_point else own

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        own = self.reader.read(name, slices)
        made = own.to(self.dtype(name))
        if made.dtype is torch.float16 and own.dtype is not torch.float16 and not torch.isfinite(made).all():
            raise ConfigError(
                f"--precision=fp16: {self}: the tensor '{name}' has values beyond fp16; take bf16 or fp32"
            )
        return made

    def specs(self, order: Iterable[str]) -> list[TensorSpec]:
        return [TensorSpec(name, self.shape(name), self.dtype(name)) for name in order]


class Meter:
    """Watches tensors go by: a progress bar on a terminal, counts, time, and the peak of anonymous memory."""

    def __init__(self, specs: list[TensorSpec], called: str) -> None:
        self.specs, self.called = specs, called
        self.num_bytes, self.peak, self.start = sum(spec.num_bytes for spec in specs), 0, time.monotonic()
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.bar = Progress(TextColumn("{task.description}"), *columns, disable=not sys.stdout.isatty())

    def tensors(self, reader: Reader) -> Iterator[tuple[str, Tensor]]:
        """All of them, by name."""
        return self.watched((spec.name, reader.read(spec.name)) for spec in self.specs)

    def parts(self, reader: Reader) -> Iterator[tuple[str, Tensor]]:
        """All of them, each in runs of rows that are small enough for the processor's caches."""
        wanted = ((spec.name, rows) for spec in self.specs for rows in runs(spec))
        return self.watched(read_ahead(reader, wanted))

    def watched(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        with self.bar, one_thread():
            task = self.bar.add_task(self.called, total=self.num_bytes)
            for name, tensor in tensors:
                yield name, tensor
                self.peak = max(self.peak, anonymous_memory())
                self.bar.advance(task, tensor.nbytes)

    def report(self) -> str:
        """What has been written since the meter was made."""
        seconds = time.monotonic() - self.start
        parameters = sum(torch.Size(spec.shape).numel() for spec in self.specs)
        dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in self.specs})
        memory = f", anonymous memory at most {self.peak / 1e6:.0f} MB" if self.peak else ""
        return (
            f"{self.called}: {len(self.specs)} tensors, {parameters:,} parameters, {' and '.join(dtypes)}, "
            f"{self.num_bytes / 1e6:,.1f} MB in {seconds:.1f} s ({self.num_bytes / 1e6 / seconds:,.0f} MB/s){memory}"
        )


def read_ahead(reader: Reader, wanted: Iterable[tuple[str, Slices]]) -> Iterator[tuple[str, Tensor]]:
    """Parts of tensors in this order; while one is written, the disk already brings the next ones."""
    pending: deque[tuple[str, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        try:
            for name, rows in wanted:
                pending.append((name, thread.submit(fetch, reader, name, rows)))
                if len(pending) > AHEAD:
                    yield pending[0][0], pending.popleft()[1].result()
            while pending:
                yield pending[0][0], pending.popleft()[1].result()
        finally:
            thread.shutdown(cancel_futures=True)


def fetch(reader: Reader, name: str, rows: Slices) -> Tensor:
    """A part that is in memory, or on its way from the disk to where it is mapped."""
    part = reader.read(name, rows).contiguous()
    if place := place_of(part.data_ptr(), part.nbytes):
        expect(*place, part.nbytes)
    return part


@contextmanager
def one_thread() -> Iterator[None]:
    """Joining small parts takes less time than threads need to meet, on a busy machine by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def runs(spec: TensorSpec) -> Iterator[Slices]:
    """All rows of a tensor, PART bytes at a time."""
    if not spec.shape:
        yield ()
        return
    count, rest = spec.shape[0], tuple(slice(0, size) for size in spec.shape[1:])
    step = max(PART * count // max(spec.num_bytes, 1), 1)
    for first in range(0, max(count, 1), step):
        yield (slice(first, min(first + step, count)), *rest)


def anonymous_memory() -> int:
    """Bytes of this process that the kernel cannot drop, as mapped files can be; 0 where it does not tell."""
    try:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:")), 0)
    except OSError:
        return 0


def check_space(output: Path, num_bytes: int) -> None:
    """Raises ConfigError where the disk has no room for so many bytes beside what is there."""
    place = next(folder for folder in output.parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes + SMALL_FILES:
        raise ConfigError(
            f"{output}: needs {(num_bytes + SMALL_FILES) / 1e9:,.1f} GB, its disk has {free / 1e9:,.1f} GB free"
        )
