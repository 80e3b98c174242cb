"""Lightning strategy for the layouts that Megatron-Core shards: one process, data, tensor, sequence, pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from typing_extensions import override

from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups


class MegatronStrategy(DDPStrategy):
    """Lightning starts the ranks and their process group; Megatron's engine reduces, clips and steps."""

    strategy_name = "megatron"

    def __init__(self, layout: Layout, seed: int, hang_timeout: float, backend: str) -> None:
        timeout = timedelta(seconds=hang_timeout + 60)  # whoever finds the hang says more than gloo
        super().__init__(process_group_backend=backend, timeout=timeout)
        self.layout, self.seed = layout, seed

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        groups.initialize(self.layout, self.seed, self._timeout)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """The module has built its own model on this rank's device; there is nothing to wrap."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.setup_precision_plugin()

    @override
    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Nothing: what is read, drawn and restored while the model is built stands in the host's memory."""
        yield

    @property
    def data_parallel_rank(self) -> int:
        return groups.data_parallel_rank()

    @override
    def teardown(self) -> None:
        super().teardown()
        if torch.distributed.is_initialized():
            groups.shut_down()
            torch.distributed.destroy_process_group()
