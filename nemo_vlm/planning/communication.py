"""What ranks send to each other in a training step, in bytes, and over which links.

Counted is what one rank sends, as rings do it: of n bytes that r ranks gather or scatter, (r - 1) / r * n; of a sum
that all get, twice that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nemo_vlm.config import RunConfig
from nemo_vlm.config.peft import BY_COLUMNS
from nemo_vlm.config.plan import PlanConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore.vit import recompute_runs
from nemo_vlm.planning.flops import passes
from nemo_vlm.planning.footprints import engine, picked, shapes_of, tower_shape
from nemo_vlm.planning.hardware import Hardware, named
from nemo_vlm.planning.memory import FP32_BYTES
from nemo_vlm.planning.parameters import Count
from nemo_vlm.planning.workload import Workload, num_micro_batches, workload

Passes = tuple[float, float]  # forward and backward
Shared = tuple[float, float]  # outside of experts, and in them
ATTENTION, MLP = frozenset({"linear_qkv", "linear_proj"}), frozenset({"linear_fc1", "linear_fc2"})


@dataclass(frozen=True)
class Case:
    """A settled run on a machine.

    Attributes:
        work: a micro-batch of one data-parallel rank.
        fullest: the one that takes most memory.
    """

    run: RunConfig
    layout: Layout
    work: Workload
    fullest: Workload
    hardware: Hardware

    @property
    def size(self) -> int:
        """Bytes of a weight, and of an activation."""
        return 4 if self.run.trainer.precision == "32" else 2

    @property
    def num_micro_batches(self) -> int:
        """Of a data-parallel rank in a step."""
        return num_micro_batches(self.run, self.layout, self.work)

    @property
    def in_all(self) -> float:
        """Micro-batches of all ranks in a step; of packs, not all of which are full, as many as are full."""
        return self.layout.global_batch_size / self.work.samples

    @property
    def tokens(self) -> float:
        """Positions of a micro-batch that a rank's layers see; under sequence parallelism, those of its group."""
        return self.work.positions / self.layout.context

    @property
    def own_tokens(self) -> float:
        """Those that are a rank's own between the layers' products."""
        return self.tokens / (self.layout.tensor if self.layout.sequence_parallel else 1)

    def recomputed(self, layers: int) -> int:
        """Of so many layers of a stage or of the tower, those that run again in the backward pass."""
        return sum(stop - start for start, stop, again in recompute_runs(layers, self.run.step) if again)

    @cached_property
    def overlap(self) -> tuple[bool, bool]:
        """Whether gradients are reduced beside the backward pass, and weights gathered beside the forward pass."""
        optim = self.run.optim.settled(self.layout, self.run.trainer.precision, on_cpu=False)
        return bool(optim.overlap_grad_sync), bool(optim.overlap_param_sync)


def case_for(run: RunConfig, layout: Layout, wanted: PlanConfig) -> Case:
    """Raises ConfigError as workload, and for hardware that is not in the table."""
    asked = wanted.plan_tokens, wanted.plan_images
    work, fullest = (workload(run, layout, *asked, fullest) for fullest in (False, True))
    return Case(run, layout, work, fullest, named(wanted.hardware))


def ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def of_layer(case: Case) -> dict[str, Passes]:
    """Of one decoder layer and micro-batch."""
    return {"tensor": tensor(case), "context": context(case), "expert": expert(case)}


def tensor(case: Case) -> Passes:
    """Sums behind attention and FFN, and backward in front of them; of adapters, between their two products.

    Under sequence parallelism these are a gather and a scatter each, and what was gathered is gathered again where
    there are gradients of weights. Experts' FFNs take no part in it: their tokens travel as `expert` counts.
    """
    attention, mlp = (sums(case, linears) for linears in (ATTENTION, MLP))
    if case.run.model.num_moe_experts:
        return attention
    return attention[0] + mlp[0], attention[1] + mlp[1]


def sums(case: Case, linears: frozenset[str]) -> Passes:
    """Of a block, which is made of these linear layers, and of their adapters."""
    layout, lora = case.layout, case.run.peft.lora
    number, columns, rows = ring(layout.tensor) * case.tokens * case.size, 0, 0
    if lora is not None:
        own = lora.linears & linears
        columns, rows = (lora.adapter_dim * len(kind) for kind in (own & BY_COLUMNS, own - BY_COLUMNS))
    one = 2 * number * case.run.model.hidden_size
    if layout.sequence_parallel:
        again = passes(case.run.model, lora is not None)["decoder"] == 3
        return one + number * (columns + rows), (1.5 if again else 1) * one + number * (columns + rows)
    return one + 2 * number * rows, one + 2 * number * columns


def context(case: Case) -> Passes:
    """Keys and values go round; backward their gradients too.

    Our own kernels (mcore.context) gather them, keep them, and scatter their gradients.
    """
    model, layout = case.run.model, case.layout
    groups = max(model.num_query_groups // layout.tensor, 1)  # type: ignore[operator]
    sent = (layout.context - 1) * case.tokens * 2 * groups * model.kv_channels * case.size  # type: ignore[operator]
    return sent, (2 if engine(case.run) else 1) * sent


def expert(case: Case) -> Passes:
    """Tokens to their experts and back, evenly spread; ranks that share an expert gather and scatter them."""
    model, layout = case.run.model, case.layout
    if model.num_moe_experts is None:
        return 0.0, 0.0
    own = case.own_tokens * model.hidden_size * case.size
    if case.run.step.moe_token_dispatcher_type == "allgather":
        both = 2 * own * (layout.expert * layout.expert_tensor - 1)
    else:
        routed = own * model.moe_router_topk
        both = 2 * routed * (ring(layout.expert) + layout.expert_tensor - 1)
    return both, both


def tower(case: Case) -> Passes:
    """Of a micro-batch in the vision tower and the projectors, which know no sequence parallelism: as `tensor`.

    Two sums a layer and one a projector (DeepStack has more) each way, backward of what it takes; the tower's backward
    ones where it trains.
    """
    media, work = case.run.model.media, case.work
    if media is None or not work.patches:
        return 0.0, 0.0
    vision, times = media.vision_encoder, passes(case.run.model, case.run.peft.lora is not None)
    share, whole = 2 * ring(case.layout.tensor) * case.size, tower_shape(case.run).split(case.layout.tensor) == 1
    layers = 0.0 if whole else share * 2 * vision.depth * work.patches * vision.hidden_size  # type: ignore[attr-defined]
    tokens = share * work.visual_tokens * (1 + case.run.model.deepstack_layers)
    taken = tokens * media.projector_input_size * (times["projector"] > 1)  # type: ignore[attr-defined]
    return layers + tokens * case.run.model.hidden_size, layers * (times["vision"] == 3) + taken


def unlabelled(case: Case) -> tuple[float, bool]:
    """The share of positions that the last layer's MLP is spared, and whether it would have run again."""
    layers = case.layout.stage_layers[-1]
    return 1 - picked(shapes_of(case.run, case.layout, case.work)), case.recomputed(layers) == layers


def spared(case: Case) -> Passes:
    """Sums of the last layer's MLP at those positions; those that would run again do so backward."""
    share, again = unlabelled(case)
    forward, backward = (share * way for way in sums(case, MLP))
    return forward, backward + again * forward


def ends(case: Case) -> tuple[Passes, Passes]:
    """Of a micro-batch behind the word embeddings, and in front of the output: sums, as `tensor`.

    Embeddings are summed whole; under sequence parallelism their gradients are gathered, and so are the hidden states
    that the output takes, of which it takes the labelled ones alone.
    """
    times = passes(case.run.model, case.run.peft.lora is not None)
    trains = max(times["decoder"], times["projector"], times["vision"]) == 3  # something below the layers
    one = ring(case.layout.tensor) * case.run.model.hidden_size * case.size
    embedded, gathered = 2 * one * case.work.positions, one * case.tokens
    if case.layout.sequence_parallel:
        wide = gathered * (1 + case.run.model.deepstack_layers)
        return (embedded, wide * trains), (gathered, gathered)
    return (embedded, 0.0), (0.0, 2 * one * case.work.trained_tokens / case.layout.context)


def boundary(case: Case) -> float:
    """Of hidden states from one stage to the next, and of their gradients back."""
    return case.own_tokens * case.run.model.hidden_size * case.size if case.layout.pipeline > 1 else 0.0


def of_update(case: Case, count: Count) -> tuple[Shared, Shared]:
    """Gradients that are summed over the replicas once a step, and weights that they gather."""
    layout = case.layout
    sharded = case.run.optim.shards(layout, case.run.trainer.precision)
    others, experts = count.trained * ring(layout.replicas), count.trained_experts * ring(layout.expert_data)
    reduced, gathered = (1 if sharded else 2) * FP32_BYTES, case.size * sharded
    return (reduced * others, reduced * experts), (gathered * others, gathered * experts)


def tied(case: Case) -> float:
    """Gradients of tied embeddings, which the first and the last of several stages sum once a step."""
    model, layout = case.run.model, case.layout
    trained = passes(model, case.run.peft.lora is not None)["output"] == 3
    if layout.pipeline == 1 or not model.share_embeddings_and_output_weights or not trained:
        return 0.0
    return FP32_BYTES * (model.vocab_size or 0) * model.hidden_size / layout.tensor


def of_fsdp(case: Case, count: Count) -> tuple[float, Passes, float]:
    """Gradients scattered and weights gathered over the shards by a micro-batch, and gradients summed over the copies.

    Weights are gathered forward and backward, unless they are kept or no gradient reaches them.
    """
    layout, held = case.layout, count.held + count.experts
    again = 0 if layout.fsdp == "grad" else held - count.forward_only
    trained, share = count.trained + count.trained_experts, ring(layout.shards)
    reduced = trained * (FP32_BYTES if case.run.parallel.fsdp_grad_reduce_dtype == "32" else 2)
    copies = 2 * ring(layout.replicas // layout.shards) / layout.shards
    return reduced * share, (case.size * held * share, case.size * again * share), reduced * copies


def of_step(case: Case, count: Count, stage: int) -> dict[str, float]:
    """By kind, what a rank of a stage sends in a step; what is recomputed sends once more."""
    layout, times = case.layout, case.num_micro_batches
    held = layout.stage_layers[stage :: layout.pipeline]
    layers, again = sum(held), sum(map(case.recomputed, held))
    sent = {kind: times * (layers * sum(way) + again * way[0]) for kind, way in of_layer(case).items()}
    if case.run.step.activations_checkpoint_granularity == "selective":
        sent["context"] += times * layers * context(case)[0]
    first, last = ends(case)
    if stage == 0:
        sent["tensor"] += times * (sum(tower(case)) + sum(first))
    if stage == layout.pipeline - 1:
        sent["tensor"] += times * (sum(last) - sum(spared(case)))
    forward = layout.virtual - (stage == layout.pipeline - 1)  # the last chunk of all sends nothing on
    backward = layout.virtual - (stage == 0)
    gradients, weights = map(sum, of_update(case, count))
    if layout.fsdp is not None:
        scattered, gathered, summed = of_fsdp(case, count)
        gradients, weights = times * (scattered + summed), times * sum(gathered)
    if stage in (0, layout.pipeline - 1):
        gradients += tied(case)
    sent |= {"pipeline": times * (forward + backward) * boundary(case)}
    return sent | {"gradients": gradients, "weights": weights}


def inside_node(layout: Layout, ranks: int, stride: int) -> int:
    """Of so many ranks, each so far from the next, those on one node."""
    return max(min(ranks, layout.ranks_per_node // stride), 1)


def group_speed(case: Case, ranks: int, stride: int) -> float:
    """Bytes a second of a ring over a group: at a node's border it has the adapters of all its members there."""
    inside, hardware = inside_node(case.layout, ranks, stride), case.hardware
    if inside >= ranks:
        return hardware.link
    return min(hardware.link, inside * hardware.network)


def tensor_speed(case: Case) -> float:
    return group_speed(case, case.layout.tensor, 1)


def context_speed(case: Case) -> float:
    """Each rank waits for its neighbour, the slowest of whom is on another node."""
    layout, hardware = case.layout, case.hardware
    return hardware.link if layout.tensor * layout.context <= layout.ranks_per_node else hardware.network


def expert_speed(case: Case) -> float:
    """To peers on other nodes each rank sends through its own adapter, beside what it sends inside its node."""
    layout, hardware = case.layout, case.hardware
    peers = layout.expert * layout.expert_tensor
    outside = peers - inside_node(layout, peers, 1)
    if not outside:
        return hardware.link
    return min(hardware.network * (peers - 1) / outside, hardware.link)


def pipeline_speed(case: Case) -> float:
    return case.hardware.link if case.layout.num_nodes == 1 else case.hardware.network


def replica_speed(case: Case) -> float:
    """Data- and context-parallel ranks, which are as far from each other as tensor-parallel ones are many."""
    return group_speed(case, case.layout.replicas, case.layout.tensor)


def expert_data_speed(case: Case) -> float:
    """Ranks that train the same experts."""
    layout = case.layout
    return group_speed(case, layout.expert_data, layout.expert * layout.expert_tensor)


def shard_speed(case: Case) -> float:
    """FSDP's shards of one copy of the weights."""
    return group_speed(case, case.layout.shards, case.layout.tensor)


def copy_speed(case: Case) -> float:
    """Those that hold the same shard under FSDP's hybrid strategy."""
    layout = case.layout
    return group_speed(case, layout.replicas // layout.shards, layout.tensor * layout.shards)
