"""Seconds until something is there: help, settings, a plan, the first step of a tiny run; each command from its start.

Goals are absolute, of a machine that does nothing else. Beside them, for scale, what it takes to import the libraries
that every rank needs: `python -c "import torch, pytorch_lightning, megatron.core"`.

    python scripts/benchmarks/startup.py [--rounds N] [--json FILE]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import flags, report, row

ROOT = Path(__file__).parents[2]
CLUSTER = ["plan.py", "model=qwen2_vl_72b", "trainer.num_nodes=128", "trainer.devices=8"]
EXPERTS = ["plan.py", "model=qwen3_vl_235b_a22b", "trainer.num_nodes=32", "trainer.devices=8", "search=true"]
PLAN, SEARCH = [*CLUSTER, "parallel=tp8_pp4"], [*CLUSTER, "search=true"]
FIRST_STEP = ["neva_finetune.py", "trainer.accelerator=cpu", "trainer.max_steps=1"]
IMPORTS = "import torch, pytorch_lightning, megatron.core"
WAYS = {  # name: arguments of python, and the goal
    "--help": (["neva_finetune.py", "--help"], "<= 2"),
    "--cfg job": (["neva_finetune.py", "--cfg", "job"], "<= 2"),
    "plan of 72B on 1024 GPUs": (PLAN, "<= 10"),
    "search of its layouts": (SEARCH, "<= 10"),
    "search of 235B with experts on 256 GPUs": (EXPERTS, "<= 10"),
}


def run(folder: Path, arguments: list[str]) -> None:
    """An example to its end."""
    command = [sys.executable, str(ROOT / "examples" / arguments[0]), *arguments[1:]]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def first_step(folder: Path) -> float:
    """Seconds from a run's start until its first step stands in metrics.csv; its data were prepared before."""
    with tempfile.TemporaryDirectory(dir=folder) as experiment:
        metrics = Path(experiment, "neva_digits", "metrics.csv")
        command = [sys.executable, str(ROOT / "examples" / FIRST_STEP[0]), *FIRST_STEP[1:]]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, f"exp_manager.exp_dir={experiment}"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < 2:
            if process.poll() is not None and not metrics.is_file():
                raise RuntimeError(str(process.stderr.read() if process.stderr else ""))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        process.communicate()
        return seconds


def measured(rounds: int, folder: Path) -> Iterator[dict[str, Any]]:
    first_step(folder)  # writes the data, and warms up the disk's cache for all
    for name, (arguments, goal) in WAYS.items():
        yield row(name, [timed(partial(run, folder, arguments)) for _ in range(rounds)], None, "s", goal)
    yield row("tiny run to its first step", [first_step(folder) for _ in range(rounds)], None, "s", "<= 10")
    importing = partial(subprocess.run, [sys.executable, "-W", "ignore", "-c", IMPORTS], cwd=folder, check=True)
    name = "python importing torch, Lightning, Megatron"
    yield row(name, [timed(importing) for _ in range(rounds)], None, "s")


def timed(way: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


if __name__ == "__main__":
    given = flags(__doc__, rounds=3).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report(measured(given.rounds, Path(temporary)), given.json, {"commands": "examples/ with their defaults"})
