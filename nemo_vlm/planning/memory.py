"""Bytes that the tensors of a run take on each rank, counted from its real modules on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_vlm.config import RunConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.config import DTYPES, context
from nemo_vlm.models.base import family


@dataclass(frozen=True)
class RankMemory:
    """Parameters of one rank, and bytes of what training keeps of them; activations are not counted."""

    num_parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def rank_memory(run: RunConfig, layout: Layout, rank: int) -> RankMemory:
    """Build rank `rank`'s part of a settled run's model, without memory, and count."""
    with groups.pretend(layout, rank):
        model = family(run.family, "model").Model(
            run.model, context(layout, run.trainer.precision, run.step), groups.stage()
        )
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    size = DTYPES[run.trainer.precision].itemsize
    trained = sum(count for count, trains in sizes if trains)
    shards = layout.data if run.optim.name == "distributed_fused_adam" else 1
    main_weights = 0 if DTYPES[run.trainer.precision] is torch.float32 else 4
    return RankMemory(
        num_parameters=sum(count for count, _ in sizes),
        weights=size * sum(count for count, _ in sizes),
        gradients=4 * trained,
        optimizer=(8 + main_weights) * trained // shards,
    )


def heaviest(run: RunConfig, layout: Layout) -> RankMemory:
    """The rank that needs most, of one rank of each pipeline stage."""
    ranks = range(0, layout.world_size, layout.world_size // layout.pipeline)
    return max((rank_memory(run, layout, rank) for rank in ranks), key=lambda memory: memory.total)
