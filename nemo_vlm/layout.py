"""How a run is laid out: ranks, data-parallel size, pipeline stages, micro-batches; before any rank starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_vlm.config import LanguageConfig, ParallelConfig, RunConfig, demand
from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """A resolved layout. Sizes count ranks; `stage_layers` the decoder layers of each pipeline stage."""

    num_nodes: int
    ranks_per_node: int
    tensor: int
    pipeline: int
    sequence_parallel: bool
    stage_layers: tuple[int, ...]
    micro_batch_size: int
    num_micro_batches: int  # of each data-parallel rank, each step

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def samples_per_rank(self) -> int:
        """Samples that one data-parallel rank reads each step."""
        return self.micro_batch_size * self.num_micro_batches


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
    if world_size % replica:
        raise ConfigError(
            f"trainer.devices={ranks} x trainer.num_nodes={run.trainer.num_nodes}: {world_size} ranks do not divide by "
            f"the {replica} of tensor_model_parallel_size={parallel.tensor_model_parallel_size} x "
            f"pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}"
        )
    return Layout(
        num_nodes=run.trainer.num_nodes,
        ranks_per_node=ranks,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        stage_layers=stage_layers(run.model.num_layers, parallel),
        micro_batch_size=run.step.micro_batch_size,
        num_micro_batches=num_micro_batches(
            run.step.micro_batch_size, run.step.global_batch_size, world_size // replica
        ),
    )


def check(run: RunConfig) -> None:
    """What can be said without a look at the machine, so that mistakes show at once.

    Raises:
        ConfigError: as resolve.
    """
    positive("trainer.max_steps", run.trainer.max_steps)
    positive("model.cpu_data_parallel_size", run.parallel.cpu_data_parallel_size)
    demand(
        run.trainer.gradient_clip_val >= 0,
        "trainer.gradient_clip_val",
        run.trainer.gradient_clip_val,
        "0 (off) or more",
    )
    check_model(run.model, run.parallel)
    stage_layers(run.model.num_layers, run.parallel)
    num_micro_batches(run.step.micro_batch_size, run.step.global_batch_size, data_parallel_size=1)


def ranks_per_node(run: RunConfig, num_gpus: int, env: Mapping[str, str]) -> int:
    """What trainer.devices=auto means: the launcher's ranks, else the GPUs, else (CPU) what the layout needs."""
    trainer = run.trainer
    positive("trainer.num_nodes", trainer.num_nodes)
    launched = int(env["WORLD_SIZE"]) if env.get("WORLD_SIZE", "").isdigit() else None
    if launched is not None and launched % trainer.num_nodes:
        raise ConfigError(f"trainer.num_nodes={trainer.num_nodes}: WORLD_SIZE={launched} ranks do not divide by it")
    if trainer.devices != "auto":
        positive("trainer.devices", trainer.devices)
        if launched is not None and launched != trainer.devices * trainer.num_nodes:
            raise ConfigError(
                f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}: "
                f"the launcher has set WORLD_SIZE={launched}; "
                f"give trainer.devices={launched // trainer.num_nodes}, or auto"
            )
        return trainer.devices
    if launched is not None:
        return launched // trainer.num_nodes
    if num_gpus:
        return usable_gpus(run, num_gpus)
    return -(-replica_size(run.parallel) * run.parallel.cpu_data_parallel_size // trainer.num_nodes)


def usable_gpus(run: RunConfig, num_gpus: int) -> int:
    """All GPUs of a node, or as many of them as can share the global batch equally."""
    for gpus in range(num_gpus, 0, -1):
        replicas, left = divmod(gpus * run.trainer.num_nodes, replica_size(run.parallel))
        if replicas and not left and run.step.global_batch_size % (run.step.micro_batch_size * replicas) == 0:
            return gpus
    return num_gpus


def replica_size(parallel: ParallelConfig) -> int:
    """Ranks that hold one copy of the model."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size


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
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    for key in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
        "encoder_seq_length",
    ):
        positive(f"model.{key}", getattr(model, key))
    if positive("model.num_query_groups", groups) > heads or heads % groups:
        raise ConfigError(f"model.num_query_groups={groups}: model.num_attention_heads={heads} must divide by it")
    demand(model.kv_channels % 2 == 0, "model.kv_channels", model.kv_channels, "even, for rotary positions")
    if groups % tp and tp % groups:
        raise ConfigError(
            f"model.num_query_groups={groups}: must divide by tensor_model_parallel_size={tp}, or divide it"
        )
    for key, value in (("num_attention_heads", heads), ("ffn_hidden_size", model.ffn_hidden_size)):
        if value % tp:
            raise ConfigError(f"model.{key}={value}: must divide by tensor_model_parallel_size={tp}")


def stage_layers(num_layers: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Decoder layers of every pipeline stage; where they do not divide, the first (with the ViT) takes fewer."""
    stages = parallel.pipeline_model_parallel_size
    by_hand, first = parallel.pipeline_layers, parallel.first_pipeline_num_layers
    if by_hand is not None:
        if len(by_hand) != stages or sum(by_hand) != num_layers or by_hand[0] < 0 or min(by_hand[1:], default=1) < 1:
            raise ConfigError(
                f"model.pipeline_layers={list(by_hand)}: must be a number for each of "
                f"pipeline_model_parallel_size={stages} stages, "
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


def positive(key: str, value: int | None) -> int:
    if not value or value < 1:
        raise ConfigError(f"{key}={value}: must be 1 or more")
    return value
