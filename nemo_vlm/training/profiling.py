"""trainer.profile=torch: what a few steps did, kernel by kernel, and what memory they took.

<run>/profile/  trace_rank_00000.json      for chrome://tracing and https://ui.perfetto.dev
                operators_rank_00000.txt   the operators that took most time, and those that took most memory
                memory_rank_00000.png      memory over these steps
                memory_rank_00000.pickle   on a GPU: the allocator's history, for https://pytorch.org/memory_viz
"""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, schedule

from nemo_vlm import heartbeat
from nemo_vlm.files import partial_of, written_whole
from nemo_vlm.mcore import groups

log = logging.getLogger(__name__)

FIRST, LAST = 3, 5  # steps of this process that are traced; the first two are unlike the others
ROWS = 40  # of a table
ALLOCATIONS = 200_000  # that the allocator's history holds


class Profile(Callback):
    """Traces steps FIRST to LAST of each rank, from the wait for their data on."""

    def __init__(self, run_folder: Path) -> None:
        self.folder, self.steps = run_folder / "profile", 0
        on_gpu = [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *on_gpu],
            schedule=schedule(wait=0, warmup=1, active=LAST - FIRST + 1, repeat=1),
            on_trace_ready=self.write,
            record_shapes=True,
            profile_memory=True,
        )

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        module.times.unlike = LAST  # the mean at the end is of steps that nobody watches

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *unused: Any) -> None:
        self.steps += 1
        if self.steps == FIRST - 2:
            self.profiler.start()
        elif FIRST - 2 < self.steps <= LAST:
            self.profiler.step()
        if self.steps == FIRST - 1 and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        if self.steps == LAST:
            groups.barrier()  # no rank's next step waits for another's files
        if self.steps <= LAST:
            module.times.restart()  # writing is part of no step

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.steps < FIRST:
            log.warning("trainer.profile=torch: no profile, the run ended before step %d of this process", FIRST)
            self.profiler.on_trace_ready = None
        if FIRST - 2 <= self.steps < LAST:
            self.profiler.stop()

    def write(self, profiler: profile) -> None:
        """The files of this rank, each whole."""
        heartbeat.at("profile")
        self.folder.mkdir(exist_ok=True)
        rank = f"rank_{torch.distributed.get_rank():05d}"
        trace = self.folder / f"trace_{rank}.json"
        profiler.export_chrome_trace(str(partial_of(trace)))
        os.replace(partial_of(trace), trace)
        with written_whole(self.folder / f"operators_{rank}.txt") as file:
            file.write(tables(profiler))
        draw_memory(profiler, self.folder / f"memory_{rank}.png")
        if torch.cuda.is_available():
            history = self.folder / f"memory_{rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(partial_of(history)))
            torch.cuda.memory._record_memory_history(enabled=None)
            os.replace(partial_of(history), history)
        log.info("wrote the profile of steps %d to %d of this process: %s", FIRST, min(LAST, self.steps), trace)


def tables(profiler: profile) -> str:
    """The operators by their own time and by their own memory, the most first; on a GPU by its."""
    averages = profiler.key_averages()
    device = "device" if torch.cuda.is_available() else "cpu"
    columns = {"time": f"self_{device}_time_total", "memory": f"self_{device}_memory_usage"}
    return "\n\n".join(
        f"By {what}\n{averages.table(sort_by=column, row_limit=ROWS)}" for what, column in columns.items()
    )


def draw_memory(profiler: profile, path: Path) -> None:
    """Memory over the time of the trace, above what there was when it began: of the GPU, where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    on_cpu, events = not torch.cuda.is_available(), profiler.profiler.kineto_results.events()
    found = [each for each in events if each.name() == "[memory]" and (each.device_type().name == "CPU") == on_cpu]
    found.sort(key=lambda each: each.start_ns())
    milliseconds = [(each.start_ns() - found[0].start_ns()) / 1e6 for each in found]
    in_use = itertools.accumulate(each.nbytes() / 2**20 for each in found)
    figure, axis = pyplot.subplots(figsize=(9, 3.5), constrained_layout=True)
    axis.plot(milliseconds, list(in_use), drawstyle="steps-post", linewidth=1)
    axis.set(xlabel="ms", ylabel="MiB above the start", title=f"memory of steps {FIRST} to {LAST}")
    axis.grid(alpha=0.3)
    figure.savefig(partial_of(path), dpi=120, format="png")
    pyplot.close(figure)
    os.replace(partial_of(path), path)
