"""What the benchmarks share: ways of doing one thing, taken by turns, and a table of how they compare.

Machines differ and are shared, so what is judged is a ratio of two figures that were taken side by side.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from nemo_vlm.files import written_whole

Figures = float | Sequence[float]  # one, or one of each round
PACKAGES = ("torch", "megatron-core", "pytorch-lightning", "transformers")


def flags(description: str | None, rounds: int | None = 5) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take; without rounds where figures are counts, that do not vary."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help=f"turns of which the median counts ({rounds})")
    made.add_argument("--json", type=Path, help="where the figures are written")
    return made


def by_turns(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; every second round goes backwards, and one before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in in_turn(ways, rounds):
        start = time.perf_counter()
        ways[name]()
        seconds[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in seconds.items()}


def in_processes(sides: Mapping[str, Callable[[Connection], None]], rounds: int, start: str) -> dict[str, list[Any]]:
    """What each side tells of its turns, of the one that warms up too; each is a process of its own.

    Args:
        sides: called with its end of a line, where a side waits for true, takes a turn and sends what it tells of it;
            false is the end.
        start: of processes, as multiprocessing calls it.
    """
    context, lines, processes = get_context(start), {}, []
    for name, side in sides.items():
        lines[name], theirs = context.Pipe()
        processes.append(context.Process(target=side, args=(theirs,), daemon=True))  # type: ignore[attr-defined]
        processes[-1].start()
        theirs.close()  # so that one that dies is noticed
    told: dict[str, list[Any]] = {name: [] for name in sides}
    for name in in_turn(sides, rounds):
        lines[name].send(True)
        told[name].append(lines[name].recv())
    for line in lines.values():
        line.send(False)
    for process in processes:
        process.join()
    return told


def in_turn(names: Iterable[str], rounds: int, first: int = -1) -> Iterator[str]:
    """Whose turn it is: every second round goes backwards, and one before them warms up, unless `first` is 0."""
    for number in range(first, rounds):
        yield from list(names)[:: -1 if number % 2 else 1]


def row(name: str, ours: Figures, peer: Figures | None, unit: str, goal: str = "") -> dict[str, Any]:
    """A line of the table.

    Args:
        ours, peer: medians count where there are several; the spread is then that of the rounds' ratios.
        goal: what the ratio must be, of `ours` where there is no peer: "<= 1.0", ">= 0.9", "+-0.08" (around 1);
            empty: it is only told.
    """
    mine, theirs = middle(ours), None if peer is None else middle(peer)
    ratio = None if theirs is None else mine / theirs
    found = {"name": name, "ours": mine, "peer": theirs, "unit": unit, "ratio": ratio, "goal": goal}
    ok = reached(mine if ratio is None else ratio, goal)
    if isinstance(ours, Sequence) and isinstance(peer, Sequence) and len(ours) == len(peer) > 1:
        ratios = [one / other for one, other in zip(ours, peer, strict=True)]
        return found | {"spread": [min(ratios), max(ratios)], "ok": ok}
    return found | {"ok": ok}


def middle(figures: Figures) -> float:
    return float(median(figures)) if isinstance(figures, Sequence) else float(figures)


def reached(value: float, goal: str) -> bool:
    if not goal:
        return True
    if goal.startswith("+-"):
        return abs(value - 1) <= float(goal[2:])
    sign, limit = goal.split()
    return value <= float(limit) if sign == "<=" else value >= float(limit)


def report(rows: Iterable[dict[str, Any]], path: Path | None, settings: Mapping[str, Any] | None = None) -> None:
    """Print the table, each line as soon as it is there, and write the JSON.

    Args:
        settings: under which both sides ran.
    """
    settings, told = dict(settings or {}), []
    for name, value in settings.items():
        print(f"{name}: {value}")
    print(f"{'':52} {'ours':>10} {'peer':>10} {'':12} {'ratio':>6} {'goal':>8}")
    for one in rows:
        print(line(one), flush=True)
        told.append(one)
    if path is not None:
        with written_whole(path) as file:
            file.write(json.dumps({"machine": machine(), "settings": settings, "rows": told}, indent=1) + "\n")


def line(one: Mapping[str, Any]) -> str:
    peer, ratio = (f"{one[key]:.4g}" if one[key] is not None else "" for key in ("peer", "ratio"))
    verdict = "" if not one["goal"] else "ok" if one["ok"] else "MISSED"
    spread = " ({:.2f} to {:.2f})".format(*one["spread"]) if "spread" in one else ""
    figures = f"{one['ours']:10.4g} {peer:>10} {one['unit']:12} {ratio:>6}"
    return f"{one['name']:52} {figures} {one['goal']:>8} {verdict}{spread}"


def machine() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()}, {cores} cores, {platform.system()}, Python {platform.python_version()}, {versions}"
