"""Process groups: Megatron's parallel state, and where this rank stands in it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_vlm.layout import Layout
from nemo_vlm.mcore import cpu

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """All that a model knows of parallelism: which part of the pipeline it is.

    Attributes:
        chunk: which of this rank's virtual stages; None without virtual stages.
    """

    num_layers: int
    first: bool = True
    last: bool = True
    chunk: int | None = None


def initialize(layout: Layout, seed: int, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Make Megatron's groups; torch.distributed must be running with `layout.world_size` ranks.

    Args:
        timeout: of their collectives.
    """
    cpu.enable()
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    seed_ranks(layout, seed)


def seed_ranks(layout: Layout, seed: int, for_graphs: bool = False) -> None:
    """Seed Megatron's random numbers: tensor-parallel ranks share a seed, and have one of their own; others do not.

    Args:
        for_graphs: keep their states where CUDA graphs may take them from; to be said before a layer is built.
    """
    first_of_tensor_group = torch.distributed.get_rank() // layout.tensor * layout.tensor
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed + first_of_tensor_group, use_cudagraphable_rng=for_graphs, force_reset_rng=for_graphs
    )


def shut_down() -> None:
    parallel_state.destroy_model_parallel()


def stages(layout: Layout) -> list[Stage]:
    """The stages that this rank holds, in the order of the pipeline."""
    rank, last = parallel_state.get_pipeline_model_parallel_rank(), len(layout.stage_layers) - 1
    indices = range(rank, last + 1, layout.pipeline)
    return [
        Stage(layout.stage_layers[index], index == 0, index == last, chunk if layout.virtual > 1 else None)
        for chunk, index in enumerate(indices)
    ]


def data_parallel_rank() -> int:
    return parallel_state.get_data_parallel_rank()


def first_of_context() -> bool:
    """Whether this rank is the one of its context-parallel ranks that counts what all of them know."""
    return parallel_state.get_context_parallel_rank() == 0


def sum_over_data(values: torch.Tensor) -> list[float]:
    """Sum over the data-parallel ranks of values that the last pipeline stage holds; every rank gets the result.

    Read here, where the supervisor knows that ranks wait for each other: under NCCL they do so when a result is read.
    """
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    if not last or not first_of_context() or parallel_state.get_tensor_model_parallel_rank() > 0:
        values = torch.zeros_like(values)
    summed = values.float() if values.device.type == "npu" else values  # HCCL sums no float64
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def send(tensor: torch.Tensor, rank: int) -> None:
    """Until it is received, under NCCL too, where the timeout of what is only queued would run."""
    torch.distributed.send(tensor, rank)
    torch.cuda.current_stream().synchronize()


def of_every_rank(values: Sequence[float]) -> list[list[float]]:
    """The values of each rank, in order of ranks, on every rank."""
    mine = torch.tensor(values, dtype=torch.float64, device=cpu.device())
    found = mine.new_empty(torch.distributed.get_world_size() * len(values))
    torch.distributed.all_gather_into_tensor(found, mine)
    return found.view(-1, len(values)).tolist()


def from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """What the last pipeline stage has, on all stages; on the others `values` is overwritten."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(values, last, parallel_state.get_pipeline_model_parallel_group())
    return values


def from_previous_stage(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What the pipeline stage before this one hands to_next_stage."""
    values = torch.empty(shape, dtype=dtype, device=cpu.device())
    before = parallel_state.get_pipeline_model_parallel_prev_rank()
    torch.distributed.recv(values, before, parallel_state.get_pipeline_model_parallel_group())
    return values


def to_next_stage(values: torch.Tensor) -> None:
    behind = parallel_state.get_pipeline_model_parallel_next_rank()
    torch.distributed.send(values, behind, parallel_state.get_pipeline_model_parallel_group())


def copies(layout: Layout) -> tuple[int, int]:
    """Which copy of the model this rank holds a part of, and how many there are; those that share experts share one."""
    ranks = layout.world_size // layout.pipeline
    return torch.distributed.get_rank() % ranks // layout.ranks_of_copy, ranks // layout.ranks_of_copy


def from_first_of_experts(values: torch.Tensor) -> torch.Tensor:
    """What the first of the ranks that share experts has, on all of them; on the others `values` is overwritten.

    All compute it, but their sums may differ in the last bits.
    """
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    if group.size() > parallel_state.get_tensor_model_parallel_world_size():
        torch.distributed.broadcast(values, torch.distributed.get_global_rank(group, 0), group)
    return values


def first_of_batch() -> bool:
    """Whether this rank is the first of those that see the same samples at the same stage."""
    return first_of_context() and parallel_state.get_tensor_model_parallel_rank() == 0


def owners_in_batch(flags: Sequence[bool]) -> list[int | None]:
    """For each flag the first rank that has raised it, of those that see the same samples; None where all or none have.

    All of them must call it with as many flags.
    """
    group = parallel_state.get_tensor_and_context_parallel_group()
    if group.size() == 1 or not flags:
        return [None] * len(flags)
    mine = torch.tensor(flags, dtype=torch.int32, device=cpu.device())
    raised = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(raised, mine, group)
    each = torch.stack(raised, 1).tolist()
    return [torch.distributed.get_global_rank(group, by.index(1)) if len(set(by)) > 1 else None for by in each]


def from_owner(values: torch.Tensor, owner: int) -> torch.Tensor:
    """What that rank has, on all that see the same samples; on the others `values` is overwritten."""
    torch.distributed.broadcast(values, owner, parallel_state.get_tensor_and_context_parallel_group())
    return values


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether any rank has raised it."""
    raised = torch.tensor(flags, dtype=torch.int32, device=cpu.device())
    torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def from_first_rank(value: T) -> T:
    """Rank 0's value, on every rank."""
    values = [value]
    torch.distributed.broadcast_object_list(values, 0)
    return values[0]


def from_every_rank(value: T) -> list[T]:
    """Each rank's value, in order of ranks, on every rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def barrier(group: torch.distributed.ProcessGroup | None = None) -> None:
    torch.distributed.barrier(group)


def background_group() -> torch.distributed.ProcessGroup:
    """All ranks once more, for a thread beside the training; every rank must call it."""
    return torch.distributed.new_group(backend="gloo")


def without_tensor_parallel() -> ProcessGroupCollection:
    """Groups for a part that every tensor-parallel rank holds whole: its tensor-parallel group is this rank alone.

    It sends nothing, and is gloo's: NCCL would split it off from all ranks' group, where those of other stages would
    have to take part.
    """
    groups, backend = ProcessGroupCollection.use_mpu_process_groups(), None if pretending() else "gloo"
    mine = [torch.distributed.get_rank()]
    groups.tp = torch.distributed.new_group(mine, backend=backend, use_local_synchronization=True)
    return groups


def pretending() -> bool:
    """Whether the other ranks are not there, see pretend."""
    return torch.distributed.is_initialized() and torch.distributed.get_backend() == "fake"


@contextlib.contextmanager
def pretend(layout: Layout, rank: int = 0) -> Iterator[None]:
    """Stand at one rank of a layout of any size without starting the others, to build its part on the meta device."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        initialize(layout, seed=0)
        with torch.device("meta"):
            yield
    finally:
        shut_down()
        torch.distributed.destroy_process_group()
