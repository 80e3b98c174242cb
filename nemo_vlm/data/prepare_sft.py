"""Conversations to an idxmap file of packs (data.idxmap), over all cores; the order is the input's, whatever the cores.

What cannot be used is left out, and counted; where that is too much, nothing is written.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
from rich.progress import track

from nemo_vlm.data.pool import mapped
from nemo_vlm.data.records import JsonFile
from nemo_vlm.data.sequences import Line, Shifted, cut, document, of_run
from nemo_vlm.data.skipped import Skipped
from nemo_vlm.files import written_whole
from nemo_vlm.mcore.indexed import output_prefix, written

UNLIMITED = 2**31  # encoder_seq_length of the processor, so that lengths are known before anything is cut
AT_ONCE = 500  # lines that a process takes at a time
WINDOW = 4096  # sequences that are packed together


@dataclass(frozen=True)
class Packing:
    """How sequences become documents.

    Attributes:
        across: sequences share documents whatever their lines; else those of one line do.
        too_long: what becomes of a sequence of more than seq_length tokens.
        padding: the id behind the sequences of a pack.
    """

    seq_length: int
    across: bool
    too_long: str
    padding: int


@dataclass
class Report:
    """What was found.

    Attributes:
        lengths: of all sequences, before any was cut.
    """

    seq_length: int
    skipped: Skipped
    lengths: list[int] = field(default_factory=list)
    documents: int = 0
    kept_tokens: int = 0
    truncated: int = 0

    def __str__(self) -> str:
        full = self.kept_tokens / max(self.documents * self.seq_length, 1)
        middle, most = (int(numpy.quantile(self.lengths or [0], share)) for share in (0.5, 0.95))
        return (
            f"{self.skipped.kept} sequences in {self.documents} documents of {self.seq_length} tokens, "
            f"{full:.1%} full\n"
            f"tokens of a sequence: mean {numpy.mean(self.lengths or [0]):.1f}, median {middle}, "
            f"95% up to {most}, longest {max(self.lengths, default=0)}\n"
            f"{self.truncated} were cut to {self.seq_length}, {self.skipped}"
        )


def prepare(path: Path, prefix: Path, processor: Any, how: Packing, workers: int, max_skip_fraction: float) -> Report:
    """Write PREFIX.bin, PREFIX.idx and PREFIX_lengths.png.

    Args:
        processor: of a family, for UNLIMITED tokens.
    Raises:
        ConfigError: the input cannot be read, or the folder of the output not be made.
        RuntimeError: too much of it would be left out.
    """
    prefix, file = output_prefix(prefix), JsonFile(path, "--input")
    report = Report(how.seq_length, Skipped("conversations", max_skip_fraction))
    with written(prefix, numpy.int32) as builder:
        fitting = (fit(line, how, report) for line in encode_all(file, processor, workers))
        for pack in packs(fitting, how):
            builder.add(document(pack, how.seq_length, how.padding))
            report.documents += 1
        report.skipped.check(finished=True)
    draw(report, prefix.with_name(f"{prefix.name}_lengths.png"))
    return report


def fit(line: Line, how: Packing, report: Report) -> list[Shifted]:
    """The sequences of a line, none too long."""
    found = []
    for one in line:
        if isinstance(one[0], str):
            report.skipped.add(*one)
            continue
        report.lengths.append(len(one[0]))
        short = cut(one, how.seq_length)
        if short is None or (short is not one and how.too_long == "drop"):
            report.skipped.add("too_long", f"{len(one[0])} tokens do not fit --seq-length={how.seq_length}")
            continue
        report.truncated += short is not one
        report.skipped.kept += 1
        report.kept_tokens += len(short[0])
        found.append(short)
    return found


def packs(lines: Iterable[list[Shifted]], how: Packing) -> Iterator[list[Shifted]]:
    """What each document holds."""
    if not how.across:
        for line in lines:
            yield from in_order(line, how.seq_length)
        return
    window: list[Shifted] = []
    for line in lines:
        window += line
        if len(window) >= WINDOW:
            yield from best_fit(window, how.seq_length)
            window = []
    yield from best_fit(window, how.seq_length)


def in_order(line: Sequence[Shifted], capacity: int) -> Iterator[list[Shifted]]:
    """The sequences of one line one after another, in a further document where one is full."""
    pack: list[Shifted] = []
    for one in line:
        if pack and sum(len(tokens) for tokens, _ in pack) + len(one[0]) > capacity:
            yield pack
            pack = []
        pack.append(one)
    if pack:
        yield pack


def best_fit(window: Sequence[Shifted], capacity: int) -> Iterator[list[Shifted]]:
    """Few packs, in the order of their first sequences: the longest first, each where it leaves the least room."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # in the packs, and the pack; sorted
    for place in sorted(range(len(window)), key=lambda place: -len(window[place][0])):
        size = len(window[place][0])
        tightest = bisect.bisect_left(rooms, (size, 0))
        if tightest == len(rooms):
            packs.append([])
            rooms.append((capacity, len(packs) - 1))
        room, pack = rooms.pop(tightest)
        packs[pack].append(place)
        bisect.insort(rooms, (room - size, pack))
    for places in sorted(map(sorted, packs)):
        yield [window[place] for place in places]


def encode_all(file: JsonFile, processor: Any, workers: int) -> Iterator[Line]:
    """Every line of the input in its order, with a progress bar."""
    runs = [range(first, min(first + AT_ONCE, len(file))) for first in range(0, len(file), AT_ONCE)]
    found = mapped(partial(of_run, file, processor), runs, workers)
    return chain.from_iterable(track(found, f"tokens of {file.path.name}", len(runs)))


def draw(report: Report, path: Path) -> None:
    """A histogram of the lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), constrained_layout=True)
    axis.hist(report.lengths, bins=60)
    axis.axvline(report.seq_length, color="black", linewidth=1, label=f"--seq-length {report.seq_length}")
    axis.set(xlabel="tokens", ylabel="sequences", title=path.name.removesuffix("_lengths.png"))
    axis.legend()
    with written_whole(path, "wb") as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
