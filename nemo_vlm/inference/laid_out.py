"""A checkpoint laid out over ranks, before any of them starts; and how its copies share what is to be done."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import track

from nemo_vlm import layout as layouts
from nemo_vlm import options
from nemo_vlm.config import ExpManagerConfig, ParallelConfig, RunConfig, StepConfig, TrainerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.inference.restore import stored_precision
from nemo_vlm.inference.settings import MachineConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.planning import machine
from nemo_vlm.planning.plan import Planned
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source

T = TypeVar("T")
log = logging.getLogger(__name__)


class Asks(Protocol):
    """The settings of a task that answers."""

    @property
    def trainer(self) -> MachineConfig: ...

    @property
    def source(self) -> tuple[str, str]:
        """The key that names the checkpoint, and the checkpoint."""
        ...

    @property
    def parallel(self) -> ParallelConfig: ...


@dataclass(frozen=True)
class LaidOut:
    """A model to be restored.

    Attributes:
        run: the model as a run of its layout.
    """

    source: Source
    run: RunConfig
    layout: Layout

    @property
    def planned(self) -> Planned:
        return Planned(self.run, self.layout, False, [])

    def check_machine(self, env: Mapping[str, str]) -> None:
        """Raises ConfigError where this machine does not take the model."""
        gpus = machine.num_gpus(self.run.trainer.accelerator)
        machine.check_machine(self.run, self.layout, gpus, env, trains=False)


def lay_out(config: Asks, env: Mapping[str, str], data: Mapping[str, Any] | None = None) -> LaidOut:
    """Open a checkpoint and settle where it runs; trainer.devices=auto takes a copy for all GPUs that there are.

    Args:
        data: settings of model.data that take the place of the checkpoint's own.
    Raises:
        ConfigError: there is none, or it cannot be laid out so.
    """
    if config.trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    key, path = config.source
    source = open_source(path, key)
    source = replace(source, tree=source.tree | {"data": source.tree.get("data", {}) | (data or {})})
    settled = config.trainer
    precision: Any = stored_precision(source) if settled.precision == "auto" else settled.precision
    trainer = TrainerConfig(
        settled.devices, settled.num_nodes, settled.accelerator, precision, hang_timeout=settled.hang_timeout
    )
    # What serves training alone is left out; context-parallel ranks become copies.
    parallel = replace(config.parallel, virtual_pipeline_model_parallel_size=None, context_parallel_size=1)
    gpus, copy = machine.num_gpus(trainer.accelerator), layouts.replica_size(parallel)
    settings = source.settings | {"parallel": parallel, "step": one_each(gpus * trainer.num_nodes // copy)}
    run = RunConfig(trainer=trainer, exp_manager=ExpManagerConfig(name=Path(path).stem), **settings)
    layouts.check(run)
    options.check_data(run)
    options.check_experts(run)
    copies = layouts.ranks_per_node(run, gpus, env) * trainer.num_nodes // copy
    run = replace(run, step=one_each(copies))
    layout = layouts.resolve(run, gpus, env)
    check_copies(layout)
    return LaidOut(source, run, replace(layout, sequence_parallel=False))


def check_copies(layout: Layout) -> None:
    """Raises ConfigError where no group of ranks would hold both all of a stage's experts and all of its tensors."""
    experts = layout.expert * layout.expert_tensor
    if layout.ranks_of_copy not in (layout.tensor, experts):
        raise ConfigError(
            f"model.expert_model_parallel_size={layout.expert}: {experts} ranks share the experts, which must divide "
            f"by the {layout.tensor} of tensor_model_parallel_size, or divide them"
        )


def one_each(copies: int) -> StepConfig:
    """A prompt for each copy of the model."""
    return StepConfig(micro_batch_size=1, global_batch_size=max(copies, 1))


def share(
    count: int, batch_size: int, work: Callable[[range], list[T]], layout: Layout, description: str = ""
) -> list[T]:
    """What `work` makes of 0 to count - 1, in order, on every rank; the copies of the model take batches in turn.

    Args:
        work: takes the numbers of a batch, and returns as many; it may use collectives of one copy alone.
        description: of a progress bar; none: without one.
    """
    batches = [range(begin, min(begin + batch_size, count)) for begin in range(0, count, batch_size)]
    number, copies = groups.copies(layout)
    mine = batches[number::copies]
    shown = bool(description) and torch.distributed.get_rank() == 0
    progress = track(mine, description, disable=not shown, console=Console(stderr=True))
    made = {batch.start: work(batch) for batch in progress}
    everything = {start: found for part in groups.from_every_rank(made) for start, found in part.items()}
    return [one for start in sorted(everything) for one in everything[start]]


def make_folder(folder: Path, key: str) -> None:
    """Raises ConfigError where it cannot be made."""
    with writing(key):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def writing(key: str) -> Iterator[None]:
    """Raises ConfigError, which names the key that asked for it, where what is written inside cannot be."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{key}: cannot be written ({error.strerror})") from None
