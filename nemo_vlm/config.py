"""The settings of a run as frozen dataclasses, in NeMo's tree. Every default of a run stands here and nowhere else.

The tree has three branches, `trainer`, `exp_manager` and `model`. NeMo keeps everything about the model flat under
`model`; here that branch is read into several dataclasses (the architecture, which each family defines on top of
`LanguageConfig`, then `ParallelConfig`, `StepConfig`, and the nested `data`, `optim`, `tokenizer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_vlm.errors import ConfigError

Precision = Literal["32", "bf16", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class TrainerConfig:
    """`trainer.*`: where the run happens and how long it is."""

    devices: int | Literal["auto"] = "auto"  # ranks on each node; auto: see layout.ranks_per_node
    num_nodes: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    # bf16, bf16-mixed: bf16 weights, fp32 main weights in the optimizer; 16-mixed: so with fp16, and loss scaling
    precision: Precision = "32"
    max_steps: int = 100
    max_time: str | None = None  # DD:HH:MM:SS of this process; then the run saves and ends as on SIGTERM
    gradient_clip_val: float = 1.0  # global norm over all ranks; 0 turns clipping off
    enable_progress_bar: bool = True
    # Seconds without a sign of life after which the run is ended. The default is what torch's collectives wait for, and
    # above all that a healthy run does in silence, such as writing the archive of a large model to a slow disk.
    hang_timeout: float = 1800.0

    def __post_init__(self) -> None:
        demand(
            0 < self.hang_timeout < 1e9, "trainer.hang_timeout", self.hang_timeout, "more than 0 seconds, and finite"
        )


@dataclass(frozen=True)
class WandbConfig:
    """`exp_manager.wandb_logger_kwargs.*`."""

    project: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """`exp_manager.checkpoint_callback_params.*`: when a training checkpoint is written, and which are kept."""

    every_n_train_steps: int | None = None  # null: only the last
    train_time_interval: str | None = None  # DD:HH:MM:SS between two checkpoints, beside the steps
    monitor: Literal["global_step", "reduced_train_loss", "grad_norm"] = "global_step"  # a column of metrics.csv
    mode: Literal["min", "max"] | None = None  # null: max of global_step, min of the others
    save_top_k: int = 3  # the best by `monitor` are kept, the newest always; -1: all
    save_optimizer: bool = True
    save_rng: bool = True
    async_save: bool = False  # written in the background while the next steps run
    save_nemo_on_train_end: bool = True

    def __post_init__(self) -> None:
        key = "exp_manager.checkpoint_callback_params"
        every = self.every_n_train_steps
        demand(every is None or every > 0, f"{key}.every_n_train_steps", every, "1 or more, or null")
        fill(self, mode="max" if self.monitor == "global_step" else "min")
        demand(self.save_top_k >= -1, f"{key}.save_top_k", self.save_top_k, "-1 (all) or more")
        seconds(f"{key}.train_time_interval", self.train_time_interval)


@dataclass(frozen=True)
class ExpManagerConfig:
    """`exp_manager.*`: what is kept of the run, where, and from where it goes on."""

    name: str = "default"
    exp_dir: str = "./nemo_experiments"
    create_checkpoint_callback: bool = True
    checkpoint_callback_params: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume_if_exists: bool = False  # go on from the newest complete checkpoint of this name
    resume_ignore_no_checkpoint: bool = True  # false: to find none is an error
    resume_from_step: int | None = None  # go on from this checkpoint; later ones are removed
    resume_optimizer: bool = True  # false: weights only, the optimizer starts anew
    resume_rng: bool = True
    max_time_per_run: str | None = None  # as trainer.max_time
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ConfigError(f"exp_manager.name={self.name}: must be the name of a folder, which is made in exp_dir")
        seconds("exp_manager.max_time_per_run", self.max_time_per_run)


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
    seed: int = 1234
    max_skipped_steps: int = 20  # steps with NaN or Inf gradients, which change nothing, before the run gives up
    activations_checkpoint_granularity: Literal["full", "selective"] | None = None
    activations_checkpoint_method: Literal["uniform", "block"] | None = None
    activations_checkpoint_num_layers: int | None = None
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"

    def __post_init__(self) -> None:
        count = self.activations_checkpoint_num_layers
        demand(count is None or count > 0, "model.activations_checkpoint_num_layers", count, "1 or more")
        demand(self.max_skipped_steps >= 0, "model.max_skipped_steps", self.max_skipped_steps, "0 or more")
        demand(0 <= self.seed < 2**32, "model.seed", self.seed, "0 or more, and fit into 32 bits")
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

    name: Literal[
        "adam", "adamw", "fused_adam", "megatron_fused_adam", "distributed_fused_adam", "mcore_distributed_optim"
    ] = "fused_adam"
    overlap_grad_sync: bool = False  # reduce gradients while the backward pass runs
    overlap_param_sync: bool = False  # gather weights while the forward pass runs; for the distributed names
    # share of the optimizer's state and step that is moved to the host's memory; auto: what the GPU has no room for
    offload: bool | float | Literal["auto", "static"] = False
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    sched: SchedConfig = field(default_factory=SchedConfig)

    def __post_init__(self) -> None:
        if self.overlap_param_sync and not self.distributed:
            raise ConfigError(
                f"model.optim.overlap_param_sync=true: model.optim.name={self.name} gathers no weights; "
                "take distributed_fused_adam"
            )
        if isinstance(self.offload, float):
            demand(0 <= self.offload <= 1, "model.optim.offload", self.offload, "from 0.0 to 1.0")
        demand(self.lr >= 0, "model.optim.lr", self.lr, "0 or more")
        demand(self.weight_decay >= 0, "model.optim.weight_decay", self.weight_decay, "0 or more")
        demand(all(0 <= beta < 1 for beta in self.betas), "model.optim.betas", list(self.betas), "from 0 to below 1")
        demand(self.eps > 0, "model.optim.eps", self.eps, "more than 0")

    @property
    def distributed(self) -> bool:
        """Megatron's distributed optimizer; the other names are plain AdamW."""
        return self.name in ("distributed_fused_adam", "mcore_distributed_optim")


@dataclass(frozen=True)
class TokenizerConfig:
    """`model.tokenizer.*`."""

    type: str | None = None  # a directory in Hugging Face's layout, or a name in its local cache


@dataclass(frozen=True)
class StartConfig:
    """`model.*`, the first weights."""

    # Hugging Face's directory, a .nemo, one that is extracted, or a training checkpoint; the optimizer starts anew
    restore_from_path: str | None = None


@dataclass(frozen=True)
class PartConfig:
    """How one part of a model trains."""

    freeze: bool = False
    lr_ratio: float = 1.0  # of model.optim.lr


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
    max_position_embeddings: int | None = None  # what an export says of it; null: encoder_seq_length
    rotary_base: float = 10000.0
    seq_len_interpolation_factor: float | None = None  # rotary positions are divided by it
    rope_scaling_factor: float | None = None  # Llama 3.1's scaling of rotary frequencies
    layernorm_epsilon: float = 1e-5
    bias: bool = False
    qkv_bias: bool = False
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        demand(self.init_method_std > 0, "model.init_method_std", self.init_method_std, "more than 0")
        fill(self, num_query_groups=self.num_attention_heads, max_position_embeddings=self.encoder_seq_length)
        if self.kv_channels is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.num_attention_heads={self.num_attention_heads}: model.hidden_size={self.hidden_size} "
                "must divide by it, or model.kv_channels be given"
            )
        fill(self, kv_channels=self.hidden_size // max(self.num_attention_heads, 1))

    @property
    def parts(self) -> dict[str, PartConfig]:
        """How the model's top-level modules train, by name; those not named train as usual."""
        return {}

    @property
    def pretrained(self) -> dict[str, tuple[str, str | None]]:
        """For top-level modules, by name: the key that says where their first weights come from, and its value."""
        return {}

    @property
    def image_placeholder(self) -> str:
        """What stands in a text where an image goes."""
        return "<image>"

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
    start: StartConfig = field(default_factory=StartConfig)


def demand(condition: bool, key: str, value: Any, right: str) -> None:
    """Raise the one-line error for a value that is out of range."""
    if not condition:
        raise ConfigError(f"{key}={value}: must be {right}")


def seconds(key: str, duration: str | None) -> float | None:
    """NeMo's DD:HH:MM:SS as seconds.

    Raises:
        ConfigError: it has another form.
    """
    if duration is None:
        return None
    fields = duration.split(":")
    if len(fields) != 4 or not all(field.isdigit() for field in fields):
        raise ConfigError(f"{key}={duration}: must be DD:HH:MM:SS, days to seconds, as 00:03:55:00")
    days, hours, minutes, rest = map(int, fields)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    demand(total > 0, key, duration, "longer than nothing")
    return float(total)


# Which dataclasses the flat branch `model` is made of, beside the architecture, and its nested branches.
MODEL_SECTIONS = {"parallel": ParallelConfig, "step": StepConfig, "start": StartConfig}
MODEL_BRANCHES = {"data": DataConfig, "optim": OptimConfig, "tokenizer": TokenizerConfig}


def fill(config: Any, **values: Any) -> None:
    """Set those fields of a frozen dataclass that are None: values that follow from the others."""
    for name, value in values.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)
