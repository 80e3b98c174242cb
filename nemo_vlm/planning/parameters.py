"""Parameters of any pipeline stage without building it: counted once on a model of few layers, and multiplied.

hold (planning.memory) builds what a rank holds, which is exact and takes seconds for a large model; a search over
thousands of layouts asks this instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from nemo_vlm.config import RunConfig, StepConfig
from nemo_vlm.layout import Layout
from nemo_vlm.planning.flops import passes
from nemo_vlm.planning.footprints import TOWER
from nemo_vlm.planning.memory import EXPERTS, FP32_BYTES, Holding, RankMemory, fsdp_bytes, hold, replicated_bytes

FEW_EXPERTS = 2  # of a layer that is built


@dataclass(frozen=True)
class Count:
    """Elements on one rank; of a layer's experts, all of them, as if no rank shared them.

    Attributes:
        held: outside of experts, the vocabulary's padding counted.
        trained: of these.
        experts: of weights that one token does not see all of.
        trained_experts: of these.
        forward_only: of those held, a tower's that no gradient reaches.
    """

    held: int
    trained: int
    experts: int = 0
    trained_experts: int = 0
    forward_only: int = 0

    def plus(self, other: Count, times: int = 1) -> Count:
        return Count(
            self.held + times * other.held,
            self.trained + times * other.trained,
            self.experts + times * other.experts,
            self.trained_experts + times * other.trained_experts,
            self.forward_only + times * other.forward_only,
        )


@dataclass(frozen=True)
class Parameters:
    """Of one tensor-parallel rank.

    Attributes:
        layer: one decoder layer.
        first: what the first of several stages has beside its layers: word embeddings, tower, projector.
        last: what the last of several has: norm and output.
        alone: what the only stage has; tied embeddings are there once.
    """

    layer: Count
    first: Count
    last: Count
    alone: Count

    def of_stage(self, layout: Layout, stage: int) -> Count:
        """All on a rank of that place in the pipeline, virtual stages together, with its share of the experts."""
        layers = sum(layout.stage_layers[stage :: layout.pipeline])
        around = self.alone if layout.pipeline == 1 else Count(0, 0)
        if layout.pipeline > 1 and stage in (0, layout.pipeline - 1):
            around = self.last if stage else self.first
        whole = around.plus(self.layer, layers)
        ranks = layout.expert * layout.expert_tensor
        return replace(whole, experts=whole.experts // ranks, trained_experts=whole.trained_experts // ranks)

    def heaviest(self, layout: Layout) -> Count:
        """Of the stage that trains most: one with embeddings beside its layers, or with most layers."""
        stages = (self.of_stage(layout, stage) for stage in {0, min(1, layout.pipeline - 1), layout.pipeline - 1})
        return max(stages, key=lambda count: count.trained + count.trained_experts)

    def memory(self, run: RunConfig, layout: Layout, stage: int) -> RankMemory:
        """As Holding.memory; FSDP's shards without the rows that do not divide."""
        count = self.of_stage(layout, stage)
        held, trained = count.held + count.experts, count.trained + count.trained_experts
        if layout.fsdp is not None:
            size = 4 if run.trainer.precision == "32" else 2
            return fsdp_bytes(layout, size, held, -(-held // layout.shards), -(-trained // layout.shards))
        return replicated_bytes(run, layout, held, count.trained, count.trained_experts)


def counter(run: RunConfig) -> Callable[[int], Parameters]:
    """Of a settled run, the parameters for a tensor-parallel size, each counted once."""
    return cache(lambda tensor: count(run, tensor))


def count(run: RunConfig, tensor: int) -> Parameters:
    """Build stages of a few layers and experts, and divide."""
    model, experts = run.model, run.model.num_moe_experts and FEW_EXPERTS
    few = max(model.deepstack_layers, 1)
    if experts:
        model = replace(model, num_moe_experts=experts, moe_router_topk=experts)
    run = replace(run, step=StepConfig())  # what is recomputed does not divide so few layers
    stages = [
        held(replace(run, model=replace(model, num_layers=sum(layers))), tensor, layers, stage)
        for layers, stage in (((few, 1), 0), ((few, 1), 1), ((few, 2), 1))
    ]
    first, short, long = (of_holding(run, *each) for each in stages)
    layer = long.plus(short, -1)
    bare_first, bare_last = first.plus(layer, -few), short.plus(layer, -1)
    alone = bare_first.plus(bare_last).plus(in_both(run, *stages[:2]), -1)
    if experts:
        layer = with_experts(layer, run, experts)
    return Parameters(layer, bare_first, bare_last, alone)


def held(run: RunConfig, tensor: int, layers: tuple[int, ...], stage: int) -> tuple[Layout, Holding]:
    """What one rank of a small pipeline holds."""
    stages = len(layers)
    layout = Layout(1, tensor * stages, tensor, stages, tensor > 1, layers, 1, 1)
    return layout, hold(run, layout, stage)


def in_both(run: RunConfig, first: tuple[Layout, Holding], last: tuple[Layout, Holding]) -> Count:
    """Tied embeddings, which the only stage has once."""
    (_, one), (_, other) = first, last
    shared = sum(size for place, size in other.sizes.items() if place in one.sizes)
    elements = shared + (one.num_padding if shared else 0)
    return Count(elements, 0 if run.peft.lora or frozen(run) else elements)


def of_holding(run: RunConfig, layout: Layout, holding: Holding) -> Count:
    """What a rank was found to hold, with its own share of the experts."""
    experts = sum(size for (name, _), size in holding.sizes.items() if EXPERTS in name)
    trained = holding.memory.gradients // FP32_BYTES * layout.shards
    trained_experts = 0 if run.peft.lora or frozen(run) or not trained else experts
    all_held = holding.num_parameters + holding.num_padding
    tower = sum(size for (name, _), size in holding.sizes.items() if name.startswith(f"{TOWER}."))
    unreached = tower if passes(run.model, run.peft.lora is not None)["vision"] == 1 else 0
    return Count(all_held - experts, trained - trained_experts, experts, trained_experts, unreached)


def frozen(run: RunConfig) -> bool:
    parts = run.model.parts
    return "language_model" in parts and parts["language_model"].freeze


def with_experts(layer: Count, run: RunConfig, few: int) -> Count:
    """A layer with all experts: the router has a row for each."""
    experts = run.model.num_moe_experts or few
    router, train = run.model.hidden_size * (experts - few), layer.trained_experts > 0
    return Count(
        layer.held + router,
        layer.trained + router * train,
        layer.experts * experts // few,
        layer.trained_experts * experts // few,
    )
