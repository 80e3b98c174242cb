"""What each rank holds of a run's model, and the bytes of it; counted from the real modules on the meta device.

A stage's decoder layers are alike but for their numbers: one is built, and stands for all.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from nemo_vlm.config import RunConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import cpu, groups, weights
from nemo_vlm.mcore.config import DTYPES
from nemo_vlm.mcore.ranks import first_replica
from nemo_vlm.models.build import build_chunks

FP32_BYTES = 4  # gradients are accumulated, main weights kept in fp32
ADAM_BYTES = 8  # two fp32 moments
LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)(\..*)")
EXPERTS = ".experts."  # in the names of a layer's experts, stacked in whole tensors


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
    kept = kept_ranks(run, layout, stage)
    short, few = shortened(replace(run, step=run.step.on_paper()), layout, kept)
    with groups.pretend(few, first_replica(few)[kept.index(stage)][number]):
        with WithoutValues():
            chunks = build_chunks(short, few)
        with cpu.without_redirection():
            regions = [weights.regions(chunk, run.model.vocab_size).values() for chunk in chunks]
    sizes = {
        (name, tuple((s.start, s.stop) for s in region.slices)): math.prod(region.size)
        for region in chain.from_iterable(chain.from_iterable(regions))
        for name in stood_for(region.name, few, layout, kept)
    }
    held = [
        parameter
        for chunk, place in zip(chunks, range(stage, len(layout.stage_layers), layout.pipeline), strict=True)
        for name, parameter in chunk.named_parameters()
        for _ in range(times(name, layout.stage_layers[place]))
    ]
    trained = [parameter for parameter in held if parameter.requires_grad and trains]
    if layout.fsdp is not None:
        memory = fsdp_memory(layout, DTYPES[run.trainer.precision].itemsize, held, trained)
    else:
        memory = replicated_memory(run, layout, held, trained)
    return Holding(sizes, num_elements(held) - sum(sizes.values()), memory)


class WithoutValues(TorchFunctionMode):
    """Parameters are not initialised: on the meta device there is nothing to fill, and to try it loads the compiler."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def moved(holding: Holding, layout: Layout, stage: int, onto: int) -> Holding:
    """What one stage's rank holds as the other's, where both have only decoder layers, and as many."""
    firsts = [0, *accumulate(layout.stage_layers)]

    def renamed(name: str) -> str:
        found = LAYER.match(name)
        assert found, "between the first and the last stage are layers only"
        place = bisect(firsts, int(found[2])) - 1
        return f"{found[1]}{int(found[2]) - firsts[place] + firsts[place + onto - stage]}{found[3]}"

    return replace(holding, sizes={(renamed(name), bounds): size for (name, bounds), size in holding.sizes.items()})


def with_others(holding: Holding, shift: int) -> Holding:
    """What a rank holds whose experts stand so far behind this one's, and that else is like it."""

    def shifted(name: str, bounds: weights.Bounds) -> tuple[str, weights.Bounds]:
        (start, stop), *rest = bounds
        return name, ((start + shift, stop + shift), *rest) if EXPERTS in name else bounds

    return replace(holding, sizes={shifted(*place): size for place, size in holding.sizes.items()})


def alike(layout: Layout, stage: int, other: int) -> bool:
    """Whether two stages have only decoder layers, and as many."""
    between = all(0 < one < layout.pipeline - 1 for one in (stage, other))
    return between and layout.stage_layers[stage :: layout.pipeline] == layout.stage_layers[other :: layout.pipeline]


def kept_ranks(run: RunConfig, layout: Layout, stage: int) -> list[int]:
    """The first, the last and a stage's rank of a pipeline; all, where DeepStack needs more layers than these have."""
    kept = sorted({0, stage, layout.pipeline - 1})
    layers = sum(sum(layout.stage_layers[rank :: layout.pipeline]) for rank in kept)
    return kept if layers >= run.model.deepstack_layers else list(range(layout.pipeline))


def shortened(run: RunConfig, layout: Layout, kept: Sequence[int]) -> tuple[RunConfig, Layout]:
    """One copy of the model, with as few decoder layers in each stage as it can have, and only some ranks' stages.

    Args:
        kept: these ranks' places in the pipeline.
    """
    least = max(run.model.deepstack_layers, 1)
    places = [first + rank for first in range(0, len(layout.stage_layers), layout.pipeline) for rank in kept]
    counts = tuple(min(layout.stage_layers[place], least) for place in places)
    ranks = layout.ranks_of_copy * len(kept)
    one = replace(layout, num_nodes=1, ranks_per_node=ranks, fsdp=None, context=1)
    few = replace(one, pipeline=len(kept), stage_layers=counts)
    return replace(run, model=replace(run.model, num_layers=sum(counts))), few


def stood_for(name: str, few: Layout, layout: Layout, kept: Sequence[int]) -> list[str]:
    """The names of the tensors that one of the short model's stands for; none, where another does already."""
    if not (found := LAYER.match(name)):
        return [name]
    before, number, behind = found[1], int(found[2]), found[3]
    firsts = [0, *accumulate(few.stage_layers)]
    stage = bisect(firsts, number) - 1
    if number > firsts[stage]:
        return []
    chunk, rank = divmod(stage, few.pipeline)
    place = chunk * layout.pipeline + kept[rank]
    first = sum(layout.stage_layers[:place])
    return [f"{before}{first + layer}{behind}" for layer in range(layout.stage_layers[place])]


def times(name: str, num_layers: int) -> int:
    """How many of a chunk's parameters one of the short chunk's stands for."""
    if not (found := LAYER.match(name)):
        return 1
    return num_layers if found[2] == "0" else 0


def replicated_memory(run: RunConfig, layout: Layout, held: Sequence[Tensor], trained: Sequence[Tensor]) -> RankMemory:
    """Under Megatron's gradient buffers and its optimizer, which counts main weights of reduced precision as its own.

    The distributed optimizer's state is shared by the ranks that train the same weights; of experts (Megatron's mark is
    `allreduce`) these are others.
    """
    experts = num_elements([parameter for parameter in trained if not getattr(parameter, "allreduce", True)])
    return replicated_bytes(run, layout, num_elements(held), num_elements(trained) - experts, experts)


def replicated_bytes(run: RunConfig, layout: Layout, held: int, others: int, experts: int) -> RankMemory:
    """The same of so many elements held, and trained outside of experts and in them."""
    size = DTYPES[run.trainer.precision].itemsize
    state = ADAM_BYTES if size == FP32_BYTES else ADAM_BYTES + FP32_BYTES
    sharing = run.optim.sharing(layout, run.trainer.precision)
    optimizer = sum(-(-state * count // ranks) for count, ranks in zip((others, experts), sharing, strict=True))
    return RankMemory(size * held, FP32_BYTES * (others + experts), optimizer)


def fsdp_memory(layout: Layout, size: int, held: Sequence[Tensor], trained: Sequence[Tensor]) -> RankMemory:
    """Under FSDP: shards of fp32 weights, which are the main weights too, of their gradients and of the moments.

    What is gathered of `size` bytes a weight counts under the strategy grad alone, which holds it all from the forward
    pass to the end of the backward pass; full and hybrid gather a layer at a time.
    """
    shards = sum(first_shard(parameter, layout.shards) for parameter in held)
    trained_shards = sum(first_shard(parameter, layout.shards) for parameter in trained)
    return fsdp_bytes(layout, size, num_elements(held), shards, trained_shards)


def fsdp_bytes(layout: Layout, size: int, held: int, shards: int, trained: int) -> RankMemory:
    """The same of so many elements, whole, of a rank's shards and of those that train."""
    gathered = size * held if layout.fsdp == "grad" else 0
    return RankMemory(FP32_BYTES * shards + gathered, FP32_BYTES * trained, ADAM_BYTES * trained)


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
