"""`model.*`, the layout over ranks and one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from nemo_vlm.config.checks import demand, fill, show
from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """`model.*`, the layout over ranks. The data-parallel size is what the ranks leave."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None  # parts of the pipeline that each of its ranks holds
    sequence_parallel: bool = False
    context_parallel_size: int = 1  # ranks that share the tokens of each sample, packed or padded
    expert_model_parallel_size: int = 1  # ranks that share a layer's experts, each holding some of them
    expert_tensor_parallel_size: int | None = None  # ranks that share each expert; null: tensor_model_parallel_size
    pipeline_layers: tuple[int, ...] | None = None  # layers of each stage, by hand; 0 is allowed on the first
    first_pipeline_num_layers: int | None = None  # as Megatron's decoder-first-pipeline-num-layers
    num_layer_list: tuple[int, ...] | None = None  # as MindSpeed's: the first layer of each stage, by hand
    cpu_data_parallel_size: int = 1  # replicas that trainer.devices=auto starts where there is no GPU
    fsdp: bool = False  # weights, gradients and optimizer sharded over the data- and context-parallel ranks (FSDP2)
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

    micro_batch_size: int = 1
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
    # flash: flash-attn; fused: cuDNN; unfused: plain products, of these Transformer Engine's; local: ours
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"  # how tokens reach their experts' ranks
    moe_grouped_gemm: bool | None = None  # all experts of a rank in one product; null: where Transformer Engine is
    moe_permute_fusion: bool = False  # Transformer Engine's kernel sorts the tokens by experts
    ub_tp_comm_overlap: bool = False  # tensor parallelism's communication runs beside the products it belongs to
    # Each layer of the language model, forward and backward, as one CUDA graph; all batches must be of one shape
    enable_cuda_graph: bool = False
    fp8: bool = False  # 8-bit floats in the language model's linear layers
    fp8_recipe: Literal["delayed", "tensorwise"] = "delayed"  # scaled by what was seen before, or by the tensor at hand
    fp8_e4m3: bool = False  # E4M3 in the backward pass too
    fp8_hybrid: bool | None = None  # E5M2 in the backward pass; null: unless fp8_e4m3
    fp8_margin: int = 0  # of delayed: the scale is lowered by 2 to this power
    fp8_amax_history_len: int = 1024  # steps that a scale looks back
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"  # of which it takes this
    cpu_offloading: bool = False  # what the first layers keep for the backward pass waits in the host's memory
    cpu_offloading_num_layers: int | None = None  # so many of them; null: all but the last

    def __post_init__(self) -> None:
        count = self.activations_checkpoint_num_layers
        demand(count is None or count > 0, "model.activations_checkpoint_num_layers", count, "1 or more")
        demand(self.max_skipped_steps >= 0, "model.max_skipped_steps", self.max_skipped_steps, "0 or more")
        demand(self.mega_batch_mult > 0, "model.mega_batch_mult", self.mega_batch_mult, "1 or more")
        for key in ("native_amp_init_scale", "native_amp_growth_interval", "hysteresis"):
            demand(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "1 or more")
        self._check_fp8()
        demand(0 <= self.seed < 2**32, "model.seed", self.seed, "0 or more, and fit into 32 bits")
        if self.activations_checkpoint_granularity == "full":
            fill(self, activations_checkpoint_method="uniform", activations_checkpoint_num_layers=1)
        elif self.activations_checkpoint_method or self.activations_checkpoint_num_layers:
            raise ConfigError(
                f"model.activations_checkpoint_granularity={self.activations_checkpoint_granularity or 'null'}: "
                "activations_checkpoint_method and activations_checkpoint_num_layers go with full"
            )

    def _check_fp8(self) -> None:
        if self.fp8 and self.fp8_hybrid == self.fp8_e4m3:
            value = show(self.fp8_e4m3)
            raise ConfigError(f"model.fp8_e4m3={value}: model.fp8_hybrid={value} too; one of them goes with fp8=true")
        demand(self.fp8_amax_history_len > 0, "model.fp8_amax_history_len", self.fp8_amax_history_len, "1 or more")
        if self.fp8_recipe == "delayed":
            return
        for key in ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"):
            default = getattr(StepConfig, key)
            right = f"{default} with model.fp8_recipe={self.fp8_recipe}, which looks at no step before"
            demand(getattr(self, key) == default, f"model.{key}", getattr(self, key), right)

    @property
    def fp8_format(self) -> Literal["e4m3", "hybrid"] | None:
        """Megatron's name of what fp8 takes; None without."""
        if not self.fp8:
            return None
        return "e4m3" if self.fp8_e4m3 else "hybrid"

    def on_paper(self) -> StepConfig:
        """The same for modules that are built only to be counted, on any machine: the parameters are no others."""
        fewer = replace(self, fp8=False, ub_tp_comm_overlap=False, cpu_offloading=False, enable_cuda_graph=False)
        return replace(fewer, transformer_impl="local", moe_grouped_gemm=None, moe_permute_fusion=False)
