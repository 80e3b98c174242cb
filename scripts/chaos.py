"""Kill a run with SIGKILL at random moments, resume it each time, and compare it with one that was left alone.

python scripts/chaos.py --kills 20 --while-saving 8 --steps 200 -- parallel=ddp
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "examples" / "neva_finetune.py"
COMPARED = ("global_step", "consumed_samples", "reduced_train_loss", "lr", "grad_norm")
PATIENCE = 300.0  # seconds for what a kill waits for


def main() -> None:
    options = arguments()
    draw = random.Random(options.seed)
    run(command(options, "calm"), options.folder / "calm.log").wait()
    in_saves = 0
    plan = [number < options.while_saving for number in range(options.kills)]
    draw.shuffle(plan)
    for number, saving in enumerate(plan, start=1):
        process = run(command(options, "chaos"), options.folder / "chaos.log")
        moment = wait_for_marker(process, options, draw) if saving else wait_for_steps(process, options, draw)
        if process.poll() is not None:
            sys.exit(f"the run ended by itself (exit code {process.returncode}) before kill {number}; see chaos.log")
        kill_tree(process)
        unfinished = len(markers(options))
        in_saves += bool(unfinished)
        print(f"kill {number:2}: {moment}, {rows(options, 'chaos')} rows, {unfinished} unfinished", flush=True)
    if run(command(options, "chaos"), options.folder / "chaos.log").wait():
        sys.exit("the last run failed; see chaos.log")
    report(options, in_saves)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--while-saving", type=int, default=8, help="kills that wait for an unfinished marker")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("chaos"))
    parser.add_argument("overrides", nargs="*", help="of examples/neva_finetune.py, behind --")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"--folder {options.folder}: is not empty")
    options.folder.mkdir(parents=True, exist_ok=True)
    return options


def command(options: argparse.Namespace, name: str) -> list[str]:
    return [
        sys.executable,
        str(TRAIN),
        f"trainer.max_steps={options.steps}",
        "trainer.enable_progress_bar=false",
        f"exp_manager.exp_dir={options.folder}",
        f"exp_manager.name={name}",
        "exp_manager.resume_if_exists=true",
        f"exp_manager.checkpoint_callback_params.every_n_train_steps={options.every}",
        *options.overrides,
    ]


def run(arguments: list[str], log: Path) -> subprocess.Popen:
    with open(log, "a") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT)


def checkpoints(options: argparse.Namespace) -> Path:
    return options.folder / "chaos" / "checkpoints"


def wait_for_marker(process: subprocess.Popen, options: argparse.Namespace, draw: random.Random) -> str:
    """Until this run writes one of its first checkpoints, and a few milliseconds more."""
    seen = markers(options)  # left by the kill before
    count, until = draw.randint(1, 3), time.monotonic() + PATIENCE
    while count and process.poll() is None and time.monotonic() < until:
        fresh = markers(options) - seen
        count -= bool(fresh)
        seen |= fresh
        time.sleep(0.0005)
    delay = draw.uniform(0, 0.015)
    time.sleep(delay)
    return f"{1000 * delay:2.0f} ms after a marker"


def markers(options: argparse.Namespace) -> set[tuple[str, int]]:
    """Those of checkpoints being written, not removed; one of the same name that was made anew counts as another."""
    folder, found = checkpoints(options), set()
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):  # a run that begins anew moves away what one without a checkpoint left
        names = sorted(name for name in os.listdir(folder) if name.startswith("step_"))
    for name in names[-2:]:
        with contextlib.suppress(FileNotFoundError):
            if name.endswith("-unfinished"):
                found.add((name, (folder / name).stat().st_mtime_ns))
    return found


def wait_for_steps(process: subprocess.Popen, options: argparse.Namespace, draw: random.Random) -> str:
    """Until the run has taken steps, or (one of five) while it starts."""
    if draw.random() < 0.2:
        delay = draw.uniform(0, 8)
    else:
        before, until = rows(options, "chaos"), time.monotonic() + PATIENCE
        while rows(options, "chaos") == before and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        delay = draw.uniform(0, 3)
    time.sleep(delay)
    return f"after {delay:.2f} s"


def rows(options: argparse.Namespace, name: str) -> int:
    path = options.folder / name / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.exists() else 0


def table(options: argparse.Namespace, name: str) -> list[list[str]]:
    with open(options.folder / name / "metrics.csv", newline="") as file:
        return [[row[column] for column in COMPARED] for row in csv.DictReader(file)]


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to the process and everything it has started, at once."""
    family = [process.pid]
    for pid in family:
        family += [child for child, parent in parents().items() if parent == pid]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def parents() -> dict[int, int]:
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return found


def report(options: argparse.Namespace, in_saves: int) -> None:
    calm, chaos = (table(options, name) for name in ("calm", "chaos"))
    print(f"{options.kills} kills, {in_saves} while an unfinished marker stood")
    if not len(calm) == len(chaos) == options.steps:
        sys.exit(f"DIFFERENT: {len(calm)} and {len(chaos)} rows, {options.steps} steps")
    differing = [a[0] for a, b in zip(calm, chaos, strict=True) if a != b]
    if differing:
        sys.exit(f"DIFFERENT from step {differing[0]}")
    print(f"bit-equal: {', '.join(COMPARED)} of {len(calm)} steps")


if __name__ == "__main__":
    main()
