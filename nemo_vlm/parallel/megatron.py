"""Lightning strategy for the layouts that Megatron-Core shards: one process, data, tensor, sequence, pipeline."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from typing_extensions import override

from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups


class MegatronStrategy(DDPStrategy):
    """Lightning starts the ranks and their process group; Megatron's engine reduces, clips and steps."""

    strategy_name = "megatron"

    def __init__(self, layout: Layout, seed: int) -> None:
        super().__init__(timeout=timedelta(minutes=30))
        self.layout, self.seed = layout, seed

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.root_device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.layout.ranks_per_node))
        groups.initialize(self.layout, self.seed)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """The module has built its own model on this rank's device; there is nothing to wrap."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.setup_precision_plugin()

    @override
    def model_to_device(self) -> None: ...

    @property
    def data_parallel_rank(self) -> int:
        return groups.data_parallel_rank()

    @property
    def stage(self) -> groups.Stage:
        return groups.stage()

    @override
    def teardown(self) -> None:
        super().teardown()
        groups.shut_down()
        torch.distributed.destroy_process_group()

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        raise AssertionError("the loader shares out its samples itself")
