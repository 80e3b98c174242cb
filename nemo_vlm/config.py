"""The settings of a run as frozen dataclasses, in NeMo's tree. Every default of a run stands here and nowhere else.

The tree has three branches, `trainer`, `exp_manager` and `model`. NeMo keeps everything about the model flat under
`model`; here that branch is read into several dataclasses (the architecture, which each family defines on top of
`LanguageConfig`, then `ParallelConfig`, `StepConfig`, and the nested `data`, `optim`, `tokenizer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_vlm.errors import ConfigError

Precision = Literal["32", "bf16", "bf16-mixed"]


@dataclass(frozen=True)
class TrainerConfig:
    """`trainer.*`: where the run happens and how long it is."""

    devices: int | Literal["auto"] = "auto"  # ranks on each node; auto: see layout.ranks_per_node
    num_nodes: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Precision = "32"  # bf16 and bf16-mixed: bf16 weights, fp32 main weights in the optimizer
    max_steps: int = 100
    gradient_clip_val: float = 1.0  # global norm over all ranks; 0 turns clipping off
    enable_progress_bar: bool = True


@dataclass(frozen=True)
class WandbConfig:
    """`exp_manager.wandb_logger_kwargs.*`."""

    project: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class ExpManagerConfig:
    """`exp_manager.*`: what is kept of the run, and where."""

    name: str = "default"
    exp_dir: str = "./nemo_experiments"
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ConfigError(f"exp_manager.name={self.name}: must be the name of a folder, which is made in exp_dir")


@dataclass(frozen=True)
class ParallelConfig:
    """`model.*`, the layout over ranks. The data-parallel size is what the ranks leave."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_layers: tuple[int, ...] | None = None  # layers of each stage, by hand; 0 is allowed on the first
    first_pipeline_num_layers: int | None = None  # as Megatron's decoder-first-pipeline-num-layers
    cpu_data_parallel_size: int = 1  # replicas that trainer.devices=auto starts where there is no GPU


@dataclass(frozen=True)
class StepConfig:
    """`model.*`, one optimizer step: batch sizes, loss, recomputation, kernels."""

    micro_batch_size: int = 4
    global_batch_size: int = 32
    # token: mean over all trained tokens of the global batch; sample: mean of the samples' means;
    # micro_batch: mean of the micro-batches' means, as Megatron's default; depends on which samples share one
    loss_reduction: Literal["token", "sample", "micro_batch"] = "token"
    seed: int = 1234
    activations_checkpoint_granularity: Literal["full", "selective"] | None = None
    activations_checkpoint_method: Literal["uniform", "block"] | None = None
    activations_checkpoint_num_layers: int | None = None
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"

    def __post_init__(self) -> None:
        if self.activations_checkpoint_granularity == "full":
            fill(self, activations_checkpoint_method="uniform", activations_checkpoint_num_layers=1)
        elif self.activations_checkpoint_method or self.activations_checkpoint_num_layers:
            raise ConfigError(
                f"model.activations_checkpoint_granularity={self.activations_checkpoint_granularity or 'null'}: "
                "activations_checkpoint_method and activations_checkpoint_num_layers go with full"
            )


@dataclass(frozen=True)
class DataConfig:
    """`model.data.*`."""

    data_path: str | None = None  # LLaVA JSON
    image_folder: str | None = None
    prepare: Literal["digits"] | None = None  # a demo data set that is written on first use
    conv_template: Literal["plain", "v1"] = "v1"
    system_message: str | None = None  # null: the template's own
    image_aspect_ratio: Literal["square", "pad"] = "square"
    dataloader_type: Literal["cyclic", "single"] = "cyclic"  # shuffled by epoch; in file order
    num_workers: int = 2

    def __post_init__(self) -> None:
        demand(self.num_workers >= 0, "model.data.num_workers", self.num_workers, "0 or more")


@dataclass(frozen=True)
class SchedConfig:
    """`model.optim.sched.*`: NeMo's learning-rate schedules."""

    name: Literal["CosineAnnealing", "WarmupAnnealing", "constant"] = "CosineAnnealing"
    warmup_steps: int | None = None
    warmup_ratio: float | None = None  # of max_steps, instead of warmup_steps
    min_lr: float = 0.0
    max_steps: int | None = None  # null: trainer.max_steps


@dataclass(frozen=True)
class OptimConfig:
    """`model.optim.*`. All names are AdamW; the distributed ones shard its state over the data-parallel ranks."""

    name: Literal["adam", "adamw", "fused_adam", "distributed_fused_adam"] = "fused_adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    sched: SchedConfig = field(default_factory=SchedConfig)

    def __post_init__(self) -> None:
        demand(self.lr >= 0, "model.optim.lr", self.lr, "0 or more")
        demand(self.weight_decay >= 0, "model.optim.weight_decay", self.weight_decay, "0 or more")
        demand(all(0 <= beta < 1 for beta in self.betas), "model.optim.betas", list(self.betas), "from 0 to below 1")
        demand(self.eps > 0, "model.optim.eps", self.eps, "more than 0")


@dataclass(frozen=True)
class TokenizerConfig:
    """`model.tokenizer.*`."""

    type: str | None = None  # a directory in Hugging Face's layout, or a name in its local cache


@dataclass(frozen=True)
class LanguageConfig:
    """`model.*`, a decoder-only language model (Llama's architecture and its neighbours)."""

    num_layers: int = 32
    hidden_size: int = 4096
    ffn_hidden_size: int = 11008
    num_attention_heads: int = 32
    num_query_groups: int | None = None  # null: one group a head (no grouped-query attention)
    kv_channels: int | None = None  # size of a head; null: hidden_size / num_attention_heads
    vocab_size: int | None = None  # null: as the tokenizer
    make_vocab_size_divisible_by: int = 128
    encoder_seq_length: int = 4096  # longest sample, in tokens
    rotary_base: float = 10000.0
    layernorm_epsilon: float = 1e-5
    bias: bool = False
    qkv_bias: bool = False
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        demand(self.init_method_std > 0, "model.init_method_std", self.init_method_std, "more than 0")
        fill(self, num_query_groups=self.num_attention_heads)
        if self.kv_channels is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads}: model.hidden_size={self.hidden_size} "
                "must divide by it, or model.kv_channels be given"
            )
        fill(self, kv_channels=self.hidden_size // max(self.num_attention_heads, 1))

    @property
    def image_flops(self) -> float:
        """FLOPs of one image's forward pass; a family with a vision tower counts it."""
        return 0.0


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `model` is the family's own config; `family` the name of its folder under `nemo_vlm/models`."""

    family: str
    trainer: TrainerConfig
    exp_manager: ExpManagerConfig
    model: LanguageConfig
    parallel: ParallelConfig
    step: StepConfig
    data: DataConfig
    optim: OptimConfig
    tokenizer: TokenizerConfig


def demand(condition: bool, key: str, value: Any, right: str) -> None:
    """Raise the one-line error for a value that is out of range."""
    if not condition:
        raise ConfigError(f"{key}={value}: must be {right}")


# Which dataclasses the flat branch `model` is made of, beside the architecture, and its nested branches.
MODEL_SECTIONS = {"parallel": ParallelConfig, "step": StepConfig}
MODEL_BRANCHES = {"data": DataConfig, "optim": OptimConfig, "tokenizer": TokenizerConfig}


def fill(config: Any, **values: Any) -> None:
    """Set those fields of a frozen dataclass that are None: values that follow from the others."""
    for name, value in values.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)
