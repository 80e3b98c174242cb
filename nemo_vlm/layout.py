"""How a run is laid out: ranks, data-parallel size, pipeline stages, micro-batches; before any rank starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from nemo_vlm.config import LanguageConfig, ParallelConfig, RunConfig, StepConfig, demand
from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """A resolved layout. Sizes count ranks.

    Attributes:
        virtual: pipeline stages on each pipeline rank; rank p holds stages p, p + pipeline, ...
        stage_layers: decoder layers of each stage, in the order of the pipeline.
        fsdp: None: each data-parallel rank holds the whole of its stage.
        context: ranks that share the tokens of each sample, and hold copies of the weights.
        expert: ranks that share the experts of a layer, taken from those that share tensors, tokens and data.
        expert_tensor: ranks that share each expert.
    """

    num_nodes: int
    ranks_per_node: int
    tensor: int
    pipeline: int
    sequence_parallel: bool
    stage_layers: tuple[int, ...]
    micro_batch_size: int
    num_micro_batches: int  # of each data-parallel rank, each step
    virtual: int = 1
    fsdp: Literal["full", "hybrid", "grad"] | None = None
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.context * self.pipeline)

    @property
    def replicas(self) -> int:
        """Ranks that train the same weights, over which gradients are summed: data- and context-parallel ones."""
        return self.data * self.context

    @property
    def shards(self) -> int:
        """Of these, the ranks that share one copy of the weights under FSDP."""
        if self.fsdp is None:
            return 1
        return self.replicas // max(self.num_nodes, 2) if self.fsdp == "hybrid" else self.replicas

    @property
    def expert_data(self) -> int:
        """Ranks that train the same experts."""
        return self.world_size // (self.expert * self.expert_tensor * self.pipeline)

    @property
    def experts_apart(self) -> bool:
        """Whether experts are laid out in another way than the rest of a stage."""
        return (self.expert, self.expert_tensor) != (1, self.tensor)

    @property
    def ranks_of_copy(self) -> int:
        """The first ranks of a stage that hold all of it, of experts too."""
        return math.lcm(self.tensor, self.expert * self.expert_tensor)

    @property
    def samples_per_rank(self) -> int:
        """Samples that one data-parallel rank reads each step."""
        return self.micro_batch_size * self.num_micro_batches

    @property
    def global_batch_size(self) -> int:
        return self.samples_per_rank * self.data


def one_process(model: LanguageConfig, micro_batch_size: int = 1) -> Layout:
    """The layout of a single process, for tests and inference."""
    return Layout(1, 1, 1, 1, False, (model.num_layers,), micro_batch_size, 1)


def resolve(run: RunConfig, num_gpus: int, env: Mapping[str, str]) -> Layout:
    """The layout of a run on this machine.

    Args:
        num_gpus: visible GPUs that the run may use; 0 means CPU.
        env: the process environment; WORLD_SIZE and NODE_RANK count where a launcher set them.
    Raises:
        ConfigError: a size that does not divide or contradicts another.
    """
    parallel = run.parallel
    ranks = ranks_per_node(run, num_gpus, env)
    world_size, replica = ranks * run.trainer.num_nodes, replica_size(parallel)
    check_world_size(run, ranks)
    layout = Layout(
        num_nodes=run.trainer.num_nodes,
        ranks_per_node=ranks,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        sequence_parallel=splits_sequence(run),
        stage_layers=stage_layers(run.model.num_layers, parallel),
        micro_batch_size=run.step.micro_batch_size,
        num_micro_batches=num_micro_batches(
            run.step.micro_batch_size, run.step.global_batch_size, world_size // replica
        ),
        virtual=parallel.virtual_pipeline_model_parallel_size or 1,
        fsdp=parallel.fsdp_sharding_strategy if parallel.fsdp else None,
        context=parallel.context_parallel_size,
        expert=parallel.expert_model_parallel_size,
        expert_tensor=expert_tensor_size(parallel),
    )
    check_batches(run, layout)
    check_recompute(run.step, layout)
    copies = max(layout.num_nodes, 2)
    if layout.fsdp == "hybrid" and layout.replicas % copies:
        raise ConfigError(
            f"model.fsdp_sharding_strategy=hybrid: {layout.replicas} data- and context-parallel ranks do "
            f"not divide into {copies} copies"
        )
    return layout


def check_world_size(run: RunConfig, ranks: int) -> None:
    """Copies of the model's dense part and of its experts both fill all ranks."""
    parallel = run.parallel
    sizes = [(replica_size(parallel), ["tensor_model", "pipeline_model", "context"])]
    if run.model.num_moe_experts:
        sizes.append((experts_size(parallel), ["expert_model", "expert_tensor", "pipeline_model"]))
    world_size, least = ranks * run.trainer.num_nodes, math.lcm(*(size for size, _ in sizes))
    for size, parts in sizes:
        if world_size % size:
            values = {part: getattr(parallel, f"{part}_parallel_size") for part in parts}
            values |= {"expert_tensor": expert_tensor_size(parallel)} if "expert_tensor" in values else {}
            named = [f"{part}_parallel_size={n}" for part, n in values.items() if n > 1 or part != "context"]
            raise ConfigError(
                f"trainer.devices={ranks} x trainer.num_nodes={run.trainer.num_nodes}: {world_size} ranks do not "
                f"divide by the {size} of {' x '.join(named)}; {least} or a multiple would do"
            )


def splits_sequence(run: RunConfig) -> bool:
    """Whether training runs sequence-parallel: always where experts are beside tensor parallelism, as Megatron demands.

    Of every token only one tensor-parallel rank then asks the router.
    """
    tensor = run.parallel.tensor_model_parallel_size > 1
    return tensor and (run.parallel.sequence_parallel or run.model.num_moe_experts is not None)


def check_recompute(step: StepConfig, layout: Layout) -> None:
    """Megatron cuts every stage into equal runs."""
    count = step.activations_checkpoint_num_layers or 1
    most = max(layout.stage_layers)
    if step.activations_checkpoint_method == "block" and count > most:
        raise ConfigError(f"model.activations_checkpoint_num_layers={count}: no stage has more than {most} layers")
    if step.activations_checkpoint_method == "uniform" and any(layers % count for layers in layout.stage_layers):
        raise ConfigError(
            f"model.activations_checkpoint_num_layers={count}: with activations_checkpoint_method=uniform the "
            f"layers of every stage must divide by it; they are {list(layout.stage_layers)}"
        )


def check_batches(run: RunConfig, layout: Layout) -> None:
    """Every batch of a ramp-up must divide; virtual stages take micro-batches in groups of the pipeline's size."""
    together = layout.micro_batch_size * layout.data * (layout.pipeline if layout.virtual > 1 else 1)
    if layout.virtual > 1 and layout.num_micro_batches % layout.pipeline:
        raise ConfigError(
            f"model.global_batch_size={run.step.global_batch_size}: virtual stages need a multiple of {together}, "
            f"micro_batch_size x data-parallel ranks x pipeline stages"
        )
    if run.step.rampup_batch_size is None:
        return
    start, increment, samples = run.step.rampup_batch_size
    full = run.step.global_batch_size
    right = 0 < start <= full and increment > 0 and samples > 0 and (full - start) % increment == 0
    if not right or start % together or increment % together:
        raise ConfigError(
            f"model.rampup_batch_size={[start, increment, samples]}: must be the first global batch, an increment that "
            f"leads to model.global_batch_size={full}, both multiples of {together}, and samples until then"
        )


def check(run: RunConfig) -> None:
    """What can be said without a look at the machine, so that mistakes show at once.

    Raises:
        ConfigError: as resolve.
    """
    positive("model.cpu_data_parallel_size", run.parallel.cpu_data_parallel_size)
    check_model(run.model, run.parallel)
    check_strategy(run)
    given, parts = run.exp_manager.checkpoint_callback_params.model_parallel_size, run.parallel
    size = parts.tensor_model_parallel_size * parts.pipeline_model_parallel_size
    key = "exp_manager.checkpoint_callback_params.model_parallel_size"
    demand(given in (None, size), key, given, f"{size}, tensor times pipeline parallelism; leave it out")
    stage_layers(run.model.num_layers, run.parallel)
    num_micro_batches(run.step.micro_batch_size, run.step.global_batch_size, data_parallel_size=1)


def check_strategy(run: RunConfig) -> None:
    """What of the layouts and of the parts' training does not go together."""
    parallel, virtual = run.parallel, run.parallel.virtual_pipeline_model_parallel_size
    if virtual is not None and positive("model.virtual_pipeline_model_parallel_size", virtual) > 1:
        demand(
            parallel.pipeline_model_parallel_size > 1,
            "model.virtual_pipeline_model_parallel_size",
            virtual,
            "1 without a pipeline (model.pipeline_model_parallel_size)",
        )
    if parallel.fsdp and parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            f"model.fsdp=true: model.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}; "
            "FSDP goes with tensor parallelism, not with a pipeline"
        )
    for key in ("fsdp_sharding_strategy", "fsdp_grad_reduce_dtype", "fsdp_sharded_checkpoint"):
        if not parallel.fsdp and getattr(parallel, key) != getattr(ParallelConfig(), key):
            raise ConfigError(f"model.{key}={getattr(parallel, key)}: goes with model.fsdp=true")
    for name, part in run.model.parts.items():
        demand(part.lr_ratio >= 0, f"learning-rate ratio of {name}", part.lr_ratio, "0 or more")
    if run.peft.lora is None and run.model.parts and all(part.freeze for part in run.model.parts.values()):
        raise ConfigError(f"model.mm_cfg: {', '.join(run.model.parts)} are all frozen, nothing is left to train")


def under_slurm(env: Mapping[str, str]) -> bool:
    """As Lightning sees it: srun has started this process; in a job with an interactive name it has not."""
    return "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def launched_ranks(num_nodes: int, env: Mapping[str, str]) -> tuple[str, int | None]:
    """The environment variable that gives the number of all ranks, and what it says, if anything."""
    if "TORCHELASTIC_RUN_ID" in env or not under_slurm(env):
        given = env.get("WORLD_SIZE", "")
        demand(given.isdigit() or not given, "WORLD_SIZE", given, "the number of all ranks")
        return "WORLD_SIZE", int(given) if given else None
    tasks, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", num_nodes))
    if nodes != num_nodes:
        raise ConfigError(f"trainer.num_nodes={num_nodes}: Slurm has started the run on SLURM_NNODES={nodes} nodes")
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in env:
        raise ConfigError(f"SLURM_NTASKS={tasks}: give the job --ntasks-per-node={tasks // nodes} too, Lightning asks")
    return "SLURM_NTASKS", tasks


def ranks_per_node(run: RunConfig, num_gpus: int, env: Mapping[str, str]) -> int:
    """What trainer.devices=auto means: the launcher's ranks, else the GPUs, else (CPU) what the layout needs."""
    trainer = run.trainer
    positive("trainer.num_nodes", trainer.num_nodes)
    variable, launched = launched_ranks(trainer.num_nodes, env)
    if launched is not None and launched % trainer.num_nodes:
        raise ConfigError(f"trainer.num_nodes={trainer.num_nodes}: {variable}={launched} ranks do not divide by it")
    if trainer.devices != "auto":
        if launched is not None and launched != trainer.devices * trainer.num_nodes:
            raise ConfigError(
                f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}: "
                f"the launcher has set {variable}={launched}; "
                f"give trainer.devices={launched // trainer.num_nodes}, or auto"
            )
        return trainer.devices
    if launched is not None:
        return launched // trainer.num_nodes
    if num_gpus:
        return usable_gpus(run, num_gpus)
    return -(-least_ranks(run) * run.parallel.cpu_data_parallel_size // trainer.num_nodes)


def usable_gpus(run: RunConfig, num_gpus: int) -> int:
    """All GPUs of a node, or as many of them as can share the global batch equally."""
    for gpus in range(num_gpus, 0, -1):
        replicas = gpus * run.trainer.num_nodes // replica_size(run.parallel)
        fits = gpus * run.trainer.num_nodes % least_ranks(run) == 0
        if replicas and fits and run.step.global_batch_size % (run.step.micro_batch_size * replicas) == 0:
            return gpus
    return num_gpus


def replica_size(parallel: ParallelConfig) -> int:
    """Ranks that train on one sample together."""
    model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return model * parallel.context_parallel_size


def expert_tensor_size(parallel: ParallelConfig) -> int:
    given = parallel.expert_tensor_parallel_size
    return parallel.tensor_model_parallel_size if given is None else given


def experts_size(parallel: ParallelConfig) -> int:
    """Ranks that hold one copy of all experts together."""
    model = parallel.expert_model_parallel_size * expert_tensor_size(parallel)
    return model * parallel.pipeline_model_parallel_size


def least_ranks(run: RunConfig) -> int:
    """The fewest ranks that hold whole copies of the model's dense part and of its experts."""
    dense = replica_size(run.parallel)
    return math.lcm(dense, experts_size(run.parallel)) if run.model.num_moe_experts else dense


def num_micro_batches(micro_batch_size: int, global_batch_size: int, data_parallel_size: int) -> int:
    positive("model.micro_batch_size", micro_batch_size)
    positive("model.global_batch_size", global_batch_size)
    together = micro_batch_size * data_parallel_size
    if global_batch_size % together:
        below = max(global_batch_size // together, 1) * together
        raise ConfigError(
            f"model.global_batch_size={global_batch_size}: does not divide by "
            f"model.micro_batch_size={micro_batch_size} x {data_parallel_size} data-parallel ranks; "
            f"{below} or {below + together} would"
        )
    return global_batch_size // together


def check_model(model: LanguageConfig, parallel: ParallelConfig) -> None:
    """Heads, query groups and FFN must divide by the tensor-parallel size; fewer query groups than ranks repeat."""
    tp = positive("model.tensor_model_parallel_size", parallel.tensor_model_parallel_size)
    positive("model.pipeline_model_parallel_size", parallel.pipeline_model_parallel_size)
    positive("model.context_parallel_size", parallel.context_parallel_size)
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    sizes = "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels encoder_seq_length"
    for key in sizes.split():
        positive(f"model.{key}", getattr(model, key))
    if positive("model.num_query_groups", groups) > heads or heads % groups:
        raise ConfigError(f"model.num_query_groups={groups}: model.num_attention_heads={heads} must divide by it")
    demand(model.kv_channels % 2 == 0, "model.kv_channels", model.kv_channels, "even, for rotary positions")
    if groups % tp and tp % groups:
        raise ConfigError(
            f"model.num_query_groups={groups}: must divide by tensor_model_parallel_size={tp}, or divide it"
        )
    for key, value in (("num_attention_heads", heads), ("ffn_hidden_size", model.ffn_hidden_size)):
        if value % tp and (key != "ffn_hidden_size" or model.num_moe_experts is None):
            raise ConfigError(f"model.{key}={value}: must divide by tensor_model_parallel_size={tp}")


def stage_layers(num_layers: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Decoder layers of every pipeline stage; where they do not divide, the first (with the ViT) takes fewer."""
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    by_hand, first = parallel.pipeline_layers, parallel.first_pipeline_num_layers
    if parallel.num_layer_list is not None:
        return layers_between(num_layers, stages, parallel)
    if by_hand is not None:
        if len(by_hand) != stages or sum(by_hand) != num_layers or by_hand[0] < 0 or min(by_hand[1:], default=1) < 1:
            raise ConfigError(
                f"model.pipeline_layers={list(by_hand)}: must be a number for each of {stages} pipeline stages, "
                f"adding up to model.num_layers={num_layers}; only the first may be 0"
            )
        if first is not None and first != by_hand[0]:
            raise ConfigError(
                f"model.first_pipeline_num_layers={first}: model.pipeline_layers={list(by_hand)} says otherwise; "
                "give one of them"
            )
        return by_hand
    if first is None:
        if num_layers < stages - 1:
            raise ConfigError(
                f"model.pipeline_model_parallel_size={stages}: more stages than model.num_layers={num_layers} can fill"
            )
        first = num_layers // stages
    elif not 0 <= first <= num_layers - (stages - 1) or (stages == 1 and first != num_layers):
        raise ConfigError(
            f"model.first_pipeline_num_layers={first}: leaves no layer for each of the other {stages - 1} stages"
        )
    if stages == 1:
        return (num_layers,)
    each, extra = divmod(num_layers - first, stages - 1)
    return (first, *(each + (stage < extra) for stage in range(stages - 1)))


def layers_between(num_layers: int, stages: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """What model.num_layer_list means, [0, 0, 10, 20] of 28 layers: 0, 10, 10 and 8."""
    firsts = parallel.num_layer_list or ()
    for key in ("pipeline_layers", "first_pipeline_num_layers"):
        if getattr(parallel, key) is not None:
            raise ConfigError(f"model.num_layer_list={list(firsts)}: model.{key} says the same; give one of them")
    counts = tuple(last - first for first, last in pairwise((*firsts, num_layers)))
    if len(firsts) != stages or firsts[0] != 0 or counts[0] < 0 or min(counts[1:], default=1) < 1:
        raise ConfigError(
            f"model.num_layer_list={list(firsts)}: must be the first layer of each of {stages} pipeline stages, from 0 "
            f"on and below model.num_layers={num_layers}; only the first stage may be empty"
        )
    return counts


def positive(key: str, value: int | None) -> int:
    if not value or value < 1:
        raise ConfigError(f"{key}={value}: must be 1 or more")
    return value
