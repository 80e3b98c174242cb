"""What a checkpoint of 1 GB costs: how long it holds training up, when it is complete, how fast it is loaded.

    python scripts/benchmarks/checkpoint.py [--tokens N] [--rounds N] [--folder DIR] [--json FILE]

84 million parameters in fp32 with both of Adam's moments, in one process on all cores. Steps with and without a save
before them take turns. Held up is what the step's own columns of metrics.csv tell: the call that saves, and what the
optimizer then still waits for; the steps behind it are slower as well where copying and writing take a core of theirs.
Complete means on disk, beside `cp` and fsync of as many bytes; loading stands beside reading the same files. The two
starts are commands, timed from their start until the first step stands in metrics.csv.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from side_by_side import flags, report, row

from nemo_vlm import checkpoints
from nemo_vlm.batch import Batch, Sample, collate
from nemo_vlm.checkpoints import Position
from nemo_vlm.config import (
    CheckpointConfig,
    DataConfig,
    ExpManagerConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    StepConfig,
    TokenizerConfig,
    TrainerConfig,
)
from nemo_vlm.files import sync
from nemo_vlm.layout import one_process
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.engine import Engine
from nemo_vlm.models.base import family
from nemo_vlm.training import saving
from nemo_vlm.training.build import build_engine
from nemo_vlm.training.step_times import STALL

ROOT = Path(__file__).resolve().parents[2]
SHAPE = dict(num_layers=12, hidden_size=768, ffn_hidden_size=1920, num_attention_heads=12, num_query_groups=12)
VOCABULARY = 2048
PATIENCE = 120.0  # seconds that a command may take to its first step


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="of a step (256)")
    parser.add_argument("--folder", type=Path, help="on the disk that is measured (the system's temporary one)")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    settings = {"threads": cores, "tokens of a step": options.tokens, "precision": "fp32"}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        report(measure(Path(scratch), options.tokens, options.rounds), options.json, settings)


def measure(scratch: Path, tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    run = make_run(scratch)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    layout = one_process(run.model)
    groups.initialize(layout, seed=0)
    engine, saver = build_engine(run, layout), saving.Saver(run, layout)
    ids = torch.randint(VOCABULARY, (tokens + 1,))
    yield from saves(engine, saver, [collate([Sample(ids[:-1], ids[1:])])], rounds)
    (path,) = checkpoints.complete(saver.folder)
    files = [file for file in path.rglob("*") if file.is_file()]
    loads = [timed(saving.load, engine, path, run.exp_manager, layout) for _ in range(rounds)]
    reads = [timed(lambda: [file.read_bytes() for file in files]) for _ in range(rounds)]
    yield row("loading it, beside reading its files", loads, reads, "s")
    torch.distributed.destroy_process_group()
    first, again = (started(scratch, steps) for steps in (1, 2))
    yield row("a command to its first step, from it beside from zero", again, first, "s")


def make_run(scratch: Path) -> RunConfig:
    model = family("gpt", "config").Config(**SHAPE, vocab_size=VOCABULARY)
    manager = ExpManagerConfig(
        name="save", exp_dir=str(scratch), checkpoint_callback_params=CheckpointConfig(async_save=True, save_top_k=0)
    )
    step, trainer, optim = StepConfig(micro_batch_size=1, global_batch_size=1), TrainerConfig(), OptimConfig()
    return RunConfig("gpt", trainer, manager, model, ParallelConfig(), step, DataConfig(), optim, TokenizerConfig())


def saves(engine: Engine, saver: saving.Saver, step: list[Batch], rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of how steps fare with and without a save before them, and of how long a save takes alone."""
    plain, held, after, behind, complete, copied = ([] for _ in range(6))
    for number in range(-1, rounds):
        for way in ("plain", "save")[:: -1 if number % 2 else 1]:
            if way == "plain":
                plain.append(timed(engine.step, step, 1e-4))
                continue
            call = timed(saver.save, engine, Position(2 * number + 4))
            began = time.perf_counter()
            stall = engine.step(step, 1e-4).seconds["checkpoint_stall"]
            after.append(call + time.perf_counter() - began)
            behind.append(timed(engine.step, step, 1e-4))
            held.append(call + stall)
            saver.wait()
        began = time.perf_counter()
        saver.save(engine, Position(2 * number + 5))
        saver.wait()
        complete.append(time.perf_counter() - began)
        copied.append(timed(copy, checkpoints.complete(saver.folder)[-1]))
    plain, held, after, behind, complete, copied = (x[1:] for x in (plain, held, after, behind, complete, copied))
    yield row(f"held up by a save ({STALL}), beside a step", held, plain, "s", "<= 0.05")
    yield row("the step after a save in all, beside a step", after, plain, "s")
    yield row("the one behind it, while it is written", behind, plain, "s")
    yield row("a save until it is complete, beside cp and fsync", complete, copied, "s")


def timed(function: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def copy(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parents[1]) as scratch:
        subprocess.run(["cp", "-r", path, scratch], check=True)
        for file in Path(scratch, path.name).iterdir():
            sync(file)


def started(folder: Path, steps: int) -> float:
    """Seconds from a command's start to its last of so many steps, of which a checkpoint holds all but that."""
    table = folder / "nemo_experiments/start/metrics.csv"
    shape = [f"model.{key}={value}" for key, value in SHAPE.items()]
    more = ["exp_manager.name=start", "exp_manager.resume_if_exists=true", f"trainer.max_steps={steps}"]
    more += ["model.data.num_workers=0", "model.micro_batch_size=1", "model.global_batch_size=1"]
    more += ["trainer.limit_val_batches=0", "model.data.validation_split=0", "samples.prompts=[]"]
    more += ["exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false"]
    command = [sys.executable, str(ROOT / "examples/gpt_pretrain.py"), *shape, *more]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    while not (table.exists() and table.read_text().count("\n") > steps):
        if process.poll() is not None or time.perf_counter() - began > PATIENCE:
            process.kill()
            raise RuntimeError("the command took no step")
        time.sleep(0.01)
    told = time.perf_counter() - began
    process.wait()
    return told


if __name__ == "__main__":
    main()
