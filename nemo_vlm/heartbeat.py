"""Where a process stands, and the watch that ends it when it no longer moves.

`at` is called at the stations of a run. It writes a few bytes, under a supervisor into a file that both map, so that
a rank that was killed or stopped has still told where it was. There the supervisor watches; else a thread does.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

RECORD = struct.Struct("<dq48s")  # time, step (-1: none yet), place
FRAMES = 4  # innermost ones that a message shows


@dataclass(frozen=True)
class Beat:
    """The last sign of life. `time` is time.monotonic(), one clock for all processes of a machine."""

    time: float
    step: int | None
    place: str

    def __str__(self) -> str:
        return self.place if self.step is None else f"step {self.step}, {self.place}"


_record: bytearray | mmap.mmap = bytearray(RECORD.size)


def at(place: str, step: int | None = None) -> None:
    """This process now comes to `place`, in `step` as metrics.csv counts (from 1); without one, the last step stays."""
    number = RECORD.unpack_from(_record)[1] if step is None else step
    RECORD.pack_into(_record, 0, time.monotonic(), number, place.encode())


def last() -> Beat:
    return decode(_record)


def decode(record: bytes | bytearray | mmap.mmap) -> Beat:
    seconds, step, place = RECORD.unpack_from(record)
    return Beat(seconds, None if step < 0 else step, place.rstrip(b"\0").decode(errors="replace"))


def start(place: str = "start") -> None:
    """Forget the steps of an earlier run of this process."""
    at(place, -1)


def create(path: Path) -> None:
    """The file of a rank that has not begun yet."""
    path.write_bytes(RECORD.pack(time.monotonic(), -1, b"start"))


def record_to(path: Path) -> None:
    """From now on write into a file that `create` made."""
    global _record
    with open(path, "r+b") as file:
        _record = mmap.mmap(file.fileno(), RECORD.size)


@contextlib.contextmanager
def watch(timeout: float, on_hang: Callable[[str], None]) -> Iterator[None]:
    """While inside, call `on_hang` from a thread when this process has recorded nothing for `timeout` seconds.

    Args:
        on_hang: takes what is known as text; it should end the process, which nothing else can any more.
    """
    start()
    done = threading.Event()

    def run() -> None:
        while not done.wait(min(1.0, timeout / 4)):
            beat = last()
            if time.monotonic() - beat.time > timeout:
                on_hang(describe(beat, timeout, main_frames()))
                return

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def describe(beat: Beat, timeout: float, frames: list[str]) -> str:
    """One line: how long, where, and what the main thread was doing, the innermost call first."""
    return f"stood still for {timeout:g} s at: {beat}" + (f"; in {' < '.join(frames)}" if frames else "")


def main_frames() -> list[str]:
    """The innermost Python frames of the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame)[-FRAMES:] if frame else []
    return [f"{entry.filename}:{entry.lineno} {entry.name}" for entry in reversed(stack)]
