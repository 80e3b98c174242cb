"""Process groups: Megatron's parallel state, and where this rank stands in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_vlm.layout import Layout
from nemo_vlm.mcore import cpu


@dataclass(frozen=True)
class Stage:
    """All that a model knows of parallelism: whether it holds the first and the last part of the pipeline."""

    first: bool = True
    last: bool = True


def initialize(layout: Layout, seed: int) -> None:
    """Make Megatron's groups; torch.distributed must be running with `layout.world_size` ranks."""
    cpu.enable()
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shut_down() -> None:
    parallel_state.destroy_model_parallel()


def stage() -> Stage:
    return Stage(parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage())


def data_parallel_rank() -> int:
    return parallel_state.get_data_parallel_rank()


def sum_over_data(values: torch.Tensor) -> torch.Tensor:
    """Sum over the data-parallel ranks of values that the last pipeline stage holds; every rank gets the result."""
    torch.distributed.all_reduce(values, group=parallel_state.get_data_parallel_group())
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(values, last, group=parallel_state.get_pipeline_model_parallel_group())
    return values


def without_tensor_parallel() -> ProcessGroupCollection:
    """Groups for a part that every tensor-parallel rank holds whole: its tensor-parallel group is this rank alone."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.tp = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    return groups


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
