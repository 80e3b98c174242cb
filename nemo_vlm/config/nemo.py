"""`model.*`, settings of NeMo's engine that this one has a single way for.

Recipes and command lines of NeMo carry them. They are read and checked, so that nobody is told one thing and given
another, and not kept: those that are accepted change nothing here (docs/from_nemo.md says why, key by key).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_vlm.config.checks import only, refuse_others

KERNELS = "attention is chosen by model.attention_backend; leave it out"
DROPOUT = "there is no dropout in these models; model.peft.lora_tuning.adapter_dropout is an adapter's"
RECOMPUTE = "recomputation is the same for all micro-batches and stages; use model.activations_checkpoint_num_layers"
LLAMA = "only Llama's architecture is built here, which has"
ROUTER = "experts are chosen by the softmax over all of them, in fp32; leave it out"
DROPLESS = "no token is dropped and no expert has a limit; leave it out"


@dataclass(frozen=True)
class NsysConfig:
    """`model.nsys_profile.*`."""

    enabled: bool = only(False, "start the command itself under `nsys profile` instead")
    start_step: int = 10
    end_step: int = 10
    ranks: tuple[int, ...] = (0,)
    gen_shape: bool = False

    def __post_init__(self) -> None:
        refuse_others(self, "model.nsys_profile")


@dataclass(frozen=True)
class NemoConfig:
    """`model.*`, NeMo's. A field with `only` has one possible value; any value of the others gives the same run."""

    precision: str | int | None = None  # trainer.precision, if anything; typed.check_repeated compares
    override_vocab_size: int | None = only(None, "give model.vocab_size")
    drop_last: bool = only(True, "every global batch is full: what is left of an epoch goes on into the next")
    resume_from_checkpoint: str | None = only(None, "give exp_manager.resume_from_checkpoint")

    # Layout
    overlap_p2p_comm: bool | None = None
    batch_p2p_comm: bool | None = None

    # Architecture
    position_embedding_type: str = only("rope", f"{LLAMA} rope")
    rotary_percentage: float = only(1.0, f"{LLAMA} 1.0")
    normalization: str = only("rmsnorm", f"{LLAMA} rmsnorm")
    activation: Literal["fast-swiglu", "swiglu"] = "fast-swiglu"
    transformer_block_type: str = only("pre_ln", f"{LLAMA} pre_ln")
    attention_type: str = only("multihead", f"{LLAMA} multihead")
    normalize_attention_scores: bool = only(True, f"{LLAMA} true")
    apply_query_key_layer_scaling: bool = only(False, f"{LLAMA} false")
    headscale: bool = only(False, f"{LLAMA} false")
    openai_gelu: bool = only(False, f"{LLAMA} false")
    hidden_dropout: float = only(0.0, DROPOUT)
    attention_dropout: float = only(0.0, DROPOUT)
    ffn_dropout: float = only(0.0, DROPOUT)
    use_scaled_init_method: bool = only(True, "layers that end a residual branch always begin smaller, as GPT-2's")
    do_layer_norm_weight_decay: bool = only(False, "norms and biases never decay")
    pre_process: bool = only(True, "the first pipeline stage embeds")
    post_process: bool = only(True, "the last pipeline stage has the head")

    # Experts
    moe_layer_freq: int = only(1, "experts stand in all layers; leave it out")
    moe_router_load_balancing_type: Literal["aux_loss", "none"] = "aux_loss"  # typed.check_repeated compares
    moe_router_dtype: str | None = only("fp32", ROUTER)
    moe_router_score_function: str = only("softmax", ROUTER)
    moe_router_pre_softmax: bool = only(False, ROUTER)
    moe_router_enable_expert_bias: bool = only(False, ROUTER)
    moe_z_loss_coeff: float | None = only(None, ROUTER)
    moe_input_jitter_eps: float | None = only(None, ROUTER)
    moe_expert_capacity_factor: float | None = only(None, DROPLESS)
    moe_pad_expert_input_to_capacity: bool = only(False, DROPLESS)
    moe_token_dropping: bool = only(False, DROPLESS)
    moe_shared_expert_intermediate_size: int | None = only(None, "no expert is shared by all tokens; leave it out")
    moe_per_layer_logging: bool | None = None

    # Engine and kernels
    mcore_gpt: bool = only(True, "Megatron-Core is the only engine")
    megatron_legacy: bool = only(False, "Megatron-Core is the only engine")
    transformer_engine: bool = only(True, "take model.transformer_impl=local")
    use_flash_attention: bool = only(True, KERNELS)
    use_emha: bool = only(False, KERNELS)
    masked_softmax_fusion: bool | None = None
    bias_activation_fusion: bool | None = None
    bias_dropout_add_fusion: bool | None = None
    apply_rope_fusion: bool | None = None
    gradient_accumulation_fusion: bool | None = None
    get_attention_mask_from_fusion: bool | None = None
    persist_layer_norm: bool | None = None
    onnx_safe: bool | None = None
    use_cpu_initialization: bool | None = None
    megatron_amp_O2: bool | None = None  # noqa: N815
    async_grad_allreduce: bool | None = None
    grad_allreduce_chunk_size_mb: int | None = None
    grad_div_ar_fusion: bool | None = None
    gradient_as_bucket_view: bool | None = None
    fsdp_limit_all_gathers: bool | None = None
    fsdp_cpu_offload: bool = only(False, "shards stay on the GPU; without FSDP, optim=offload uses the host's memory")
    fp32_residual_connection: bool = only(False, "the residual stream has the weights' precision")
    fp16_lm_cross_entropy: bool = only(False, "the loss is computed in fp32")
    cpu_offloading_activations: bool = only(True, "they are what model.cpu_offloading moves; leave it out")
    cpu_offloading_weights: bool | None = None  # beside cpu_offloading=false in recipes; typed.check_repeated compares
    fp8_interval: int = only(1, "Transformer Engine computes the scales anew at every step")
    num_micro_batches_with_partial_activation_checkpoints: int | None = only(None, RECOMPUTE)
    activations_checkpoint_layers_per_pipeline: int | None = only(None, RECOMPUTE)

    # Checkpoints, logs
    dist_ckpt_format: str = only("torch_dist", "zarr is not written; leave it out")
    dist_ckpt_load_on_device: bool | None = None
    dist_ckpt_parallel_save: bool | None = None
    gc_interval: int | None = None
    apex_transformer_log_level: int | None = None
    enable_megatron_timers: bool = only(False, "times of steps stand in metrics.csv")
    megatron_timer_kwargs: dict | None = None
    nsys_profile: NsysConfig = field(default_factory=NsysConfig)

    def __post_init__(self) -> None:
        refuse_others(self, "model")
