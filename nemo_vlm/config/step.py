"""`model.*`, the layout over ranks and one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_vlm.config.checks import demand, fill
from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """`model.*`, the layout over ranks. The data-parallel size is what the ranks leave."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None  # parts of the pipeline that each of its ranks holds
    sequence_parallel: bool = False
    pipeline_layers: tuple[int, ...] | None = None  # layers of each stage, by hand; 0 is allowed on the first
    first_pipeline_num_layers: int | None = None  # as Megatron's decoder-first-pipeline-num-layers
    cpu_data_parallel_size: int = 1  # replicas that trainer.devices=auto starts where there is no GPU
    fsdp: bool = False  # weights, gradients and optimizer sharded over the data-parallel ranks (FSDP2)
    # full: weights are gathered for each use; grad: once a step, for forward and backward; hybrid: as full inside
    # each node, nodes hold copies (on one node: each half of its ranks)
    fsdp_sharding_strategy: Literal["full", "hybrid", "grad"] = "full"
    fsdp_grad_reduce_dtype: Literal["32", "bf16", "16"] = "32"  # dtype in which gradients are reduced
    fsdp_sharded_checkpoint: bool = True  # false: the first rank gathers a checkpoint into one file
    fsdp_use_orig_params: bool = True

    def __post_init__(self) -> None:
        if not self.fsdp_use_orig_params:
            raise ConfigError(
                "model.fsdp_use_orig_params=false: FSDP2 always keeps the original parameters; leave it out"
            )


@dataclass(frozen=True)
class StepConfig:
    """`model.*`, one optimizer step: batch sizes, loss, recomputation, kernels."""

    micro_batch_size: int = 4
    global_batch_size: int = 32
    rampup_batch_size: tuple[int, int, int] | None = None  # first global batch, increment, samples until the full one
    # token: mean over all trained tokens of the global batch; sample: mean of the samples' means;
    # micro_batch: mean of the micro-batches' means, as Megatron's default; depends on which samples share one
    loss_reduction: Literal["token", "sample", "micro_batch"] = "token"
    mega_batch_mult: int = 50  # global batches of which dataloader_type=modality sorts the samples together
    seed: int = 1234
    max_skipped_steps: int = 20  # steps with NaN or Inf gradients, which change nothing, before the run gives up
    # Of 16-mixed: what the loss is multiplied by at first (gradients are of sums over tokens: more only wastes steps),
    # steps without overflow after which that doubles, and overflows after which it halves
    native_amp_init_scale: float = 1024.0
    native_amp_growth_interval: int = 1000
    hysteresis: int = 2
    activations_checkpoint_granularity: Literal["full", "selective"] | None = None
    activations_checkpoint_method: Literal["uniform", "block"] | None = None
    activations_checkpoint_num_layers: int | None = None
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"

    def __post_init__(self) -> None:
        count = self.activations_checkpoint_num_layers
        demand(count is None or count > 0, "model.activations_checkpoint_num_layers", count, "1 or more")
        demand(self.max_skipped_steps >= 0, "model.max_skipped_steps", self.max_skipped_steps, "0 or more")
        demand(self.mega_batch_mult > 0, "model.mega_batch_mult", self.mega_batch_mult, "1 or more")
        for key in ("native_amp_init_scale", "native_amp_growth_interval", "hysteresis"):
            demand(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "1 or more")
        demand(0 <= self.seed < 2**32, "model.seed", self.seed, "0 or more, and fit into 32 bits")
        if self.activations_checkpoint_granularity == "full":
            fill(self, activations_checkpoint_method="uniform", activations_checkpoint_num_layers=1)
        elif self.activations_checkpoint_method or self.activations_checkpoint_num_layers:
            raise ConfigError(
                f"model.activations_checkpoint_granularity={self.activations_checkpoint_granularity or 'null'}: "
                "activations_checkpoint_method and activations_checkpoint_num_layers go with full"
            )
