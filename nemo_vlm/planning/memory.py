"""What each rank holds of a run's model, and the bytes of it; counted from the real modules on the meta device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nemo_vlm.config import RunConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups, weights
from nemo_vlm.mcore.config import DTYPES
from nemo_vlm.mcore.ranks import first_replica
from nemo_vlm.models.build import build_chunks

FP32_BYTES = 4  # gradients are accumulated, main weights kept in fp32
ADAM_BYTES = 8  # two fp32 moments


@dataclass(frozen=True)
class RankMemory:
    """Bytes of what a rank keeps from step to step; activations are not counted."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Holding:
    """One rank's share of the model.

    Attributes:
        sizes: elements of each part of a whole tensor that it holds, by the tensor's name and the part's bounds.
        num_padding: elements that only pad the vocabulary, no part of a whole tensor.
    """

    sizes: dict[tuple[str, weights.Bounds], int]
    num_padding: int
    memory: RankMemory

    @property
    def num_parameters(self) -> int:
        """Without the padding."""
        return sum(self.sizes.values())


def hold(run: RunConfig, layout: Layout, stage: int, number: int = 0, trains: bool = True) -> Holding:
    """Build a rank's part of a settled run's model, without memory, and count; that of each replica is the same.

    Args:
        stage: the rank's place in its pipeline.
        number: which of the ranks that hold a copy of the stage, see mcore.ranks.first_replica.
        trains: gradients and the optimizer's state are kept.
    """
    run = replace(run, step=run.step.on_paper())
    ranks = layout.ranks_of_copy * layout.pipeline
    one_replica = replace(layout, num_nodes=1, ranks_per_node=ranks, fsdp=None, context=1)
    with groups.pretend(one_replica, first_replica(one_replica)[stage][number]):
        chunks = build_chunks(run, one_replica)
        parts = [part for chunk in chunks for part in weights.parts(chunk, run.model.vocab_size)]
    held = [parameter for chunk in chunks for parameter in chunk.parameters()]
    trained = [parameter for parameter in held if parameter.requires_grad and trains]
    sizes = {(part.name, part.bounds): math.prod(stop - start for start, stop in part.bounds) for part in parts}
    if layout.fsdp is not None:
        memory = fsdp_memory(layout, DTYPES[run.trainer.precision].itemsize, held, trained)
    else:
        memory = replicated_memory(run, layout, held, trained)
    return Holding(sizes, num_elements(held) - sum(sizes.values()), memory)


def replicated_memory(run: RunConfig, layout: Layout, held: Sequence[Tensor], trained: Sequence[Tensor]) -> RankMemory:
    """Under Megatron's gradient buffers and its optimizer, which counts main weights of reduced precision as its own.

    The distributed optimizer's state is shared by the ranks that train the same weights; of experts (Megatron's mark is
    `allreduce`) these are others.
    """
    size = DTYPES[run.trainer.precision].itemsize
    state = ADAM_BYTES if size == FP32_BYTES else ADAM_BYTES + FP32_BYTES
    experts = num_elements([parameter for parameter in trained if not getattr(parameter, "allreduce", True)])
    others = num_elements(trained) - experts
    sharing = (layout.replicas, layout.expert_data) if run.optim.distributed else (1, 1)
    optimizer = sum(-(-state * count // ranks) for count, ranks in zip((others, experts), sharing, strict=True))
    return RankMemory(size * num_elements(held), FP32_BYTES * (others + experts), optimizer)


def fsdp_memory(layout: Layout, size: int, held: Sequence[Tensor], trained: Sequence[Tensor]) -> RankMemory:
    """Under FSDP: shards of fp32 weights, which are the main weights too, of their gradients and of the moments.

    What is gathered of `size` bytes a weight counts under the strategy grad alone, which holds it all from the forward
    pass to the end of the backward pass; full and hybrid gather a layer at a time.
    """
    shards = sum(first_shard(parameter, layout.shards) for parameter in held)
    trained_shards = sum(first_shard(parameter, layout.shards) for parameter in trained)
    gathered = size * num_elements(held) if layout.fsdp == "grad" else 0
    return RankMemory(FP32_BYTES * shards + gathered, FP32_BYTES * trained_shards, ADAM_BYTES * trained_shards)


def first_shard(parameter: Tensor, shards: int) -> int:
    """Elements of a parameter with the first of `shards` ranks: FSDP2 shards rows, the last ranks may get fewer."""
    return -(-parameter.shape[0] // shards) * parameter[0].numel()


def num_elements(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def heaviest(run: RunConfig, layout: Layout, trains: bool) -> Holding:
    """The rank that needs most, of one rank of each pipeline stage.

    Those that share a stage hold equally much: tensors divide by the ranks that share them, and so do experts, which
    are all of one size (layout.check_model, options.check_expert_sizes).
    """
    holdings = [hold(run, layout, stage, trains=trains) for stage in range(layout.pipeline)]
    return max(holdings, key=lambda holding: holding.memory.total)
