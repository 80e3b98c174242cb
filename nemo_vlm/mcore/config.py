"""Our settings as Megatron's TransformerConfig."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_vlm.config import LanguageConfig, StepConfig
from nemo_vlm.layout import Layout, one_process
from nemo_vlm.mcore.groups import pretending
from nemo_vlm.mcore.layers import Kernels, kernels
from nemo_vlm.options import offloaded_layers

DTYPES = {
    "32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "16": torch.float16,
}


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's activation. Megatron's own is compiled at its first call, which needs a C++ compiler."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}


@dataclass(frozen=True)
class BuildContext:
    """What a model is built under, beside its own config; families hand it on without looking inside."""

    layout: Layout
    dtype: torch.dtype
    step: StepConfig

    @property
    def kernels(self) -> Kernels:
        return kernels(self.step.transformer_impl)

    @property
    def fuses(self) -> bool:
        """Whether there are kernels for several operations at once."""
        return self.kernels == "transformer_engine"


def context(layout: Layout, precision: str = "32", step: StepConfig | None = None) -> BuildContext:
    return BuildContext(layout, DTYPES[precision], step or StepConfig())


def one_process_context(model: LanguageConfig, precision: str = "32") -> BuildContext:
    return context(one_process(model), precision)


def language_config(model: LanguageConfig, build: BuildContext) -> TransformerConfig:
    """A Llama-style decoder: RMSNorm, SwiGLU, grouped-query attention."""
    layout, step = build.layout, build.step
    layers = "|".join("t" * count for count in layout.stage_layers)  # Megatron's notation of a pipeline
    return TransformerConfig(
        **shared(build),
        recompute_granularity=step.activations_checkpoint_granularity,
        recompute_method=step.activations_checkpoint_method,
        recompute_num_layers=step.activations_checkpoint_num_layers,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.layernorm_epsilon,
        add_bias_linear=model.bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_layernorm,
        mrope_section=list(model.mrope_section) if model.mrope_section else None,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        # Megatron's SwiGLU with a weight for each token, that of experts one by one, takes no bias.
        bias_activation_fusion=build.fuses and not (model.num_moe_experts and model.bias),
        apply_rope_fusion=build.fuses,  # M-RoPE is RotatedAttention's own business
        cuda_graph_impl="local" if step.enable_cuda_graph else "none",
        cuda_graph_scope=[],  # whole layers
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_model_parallel_layout=f"E{layers}L" if layout.pipeline > 1 else None,
        pipeline_dtype=build.dtype,
        overlap_p2p_comm=layout.virtual > 1,  # batched messages of two ranks are mixed up between virtual stages
        batch_p2p_comm=layout.virtual == 1,
        batch_p2p_sync=False,  # the device is waited for with the shapes; once more was for an older torch
        sequence_parallel=layout.sequence_parallel,
        context_parallel_size=layout.context,
        variable_seq_lengths=layout.pipeline > 1,  # each micro-batch is padded to its own longest sample
        **expert_settings(model, build),
        calculate_per_token_loss=True,
        tp_comm_overlap=step.ub_tp_comm_overlap,
        cpu_offloading=step.cpu_offloading,
        cpu_offloading_num_layers=offloaded_layers(step, model.num_layers) if step.cpu_offloading else 0,
        fp8=step.fp8_format,
        fp8_recipe=step.fp8_recipe,
        fp8_margin=step.fp8_margin,
        fp8_amax_history_len=step.fp8_amax_history_len,
        fp8_amax_compute_algo=step.fp8_amax_compute_algo,
    )


def expert_settings(model: LanguageConfig, build: BuildContext) -> dict[str, Any]:
    """TransformerConfig's fields of experts."""
    step = build.step  # Megatron's default dispatcher is refused with variable_seq_lengths, even without experts
    settings: dict[str, Any] = dict(moe_token_dispatcher_type=step.moe_token_dispatcher_type)
    if model.num_moe_experts is None:
        return settings
    return settings | dict(
        num_moe_experts=model.num_moe_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_router_topk=model.moe_router_topk,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",  # mcore.experts takes the auxiliary loss in
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_grouped_gemm=build.fuses if step.moe_grouped_gemm is None else step.moe_grouped_gemm,
        moe_permute_fusion=step.moe_permute_fusion,
        expert_model_parallel_size=build.layout.expert,
        expert_tensor_parallel_size=build.layout.expert_tensor,
    )


def encoder_config(build: BuildContext, tensor_parallel: bool, **shape: Any) -> TransformerConfig:
    """A part that stands whole on the first stage and outside sequence parallelism: a vision tower or projector.

    Neither 8-bit floats nor overlap nor offload nor CUDA graphs are for it. Of the activations, Megatron fuses the GELU
    of a tanh with the bias before it, which it then takes for F.gelu.

    Args:
        tensor_parallel: split it over the tensor-parallel ranks, or hold it whole on each.
        shape: TransformerConfig's fields for the part itself.
    """
    selective = build.step.activations_checkpoint_granularity == "selective"  # full: the tower runs its own layers
    if build.fuses and shape.get("activation_func") is gelu_tanh:
        shape |= dict(activation_func=F.gelu, bias_activation_fusion=True)
    return TransformerConfig(
        **shared(build),
        **shape,
        cuda_graph_scope=[],
        recompute_granularity="selective" if selective else None,
        tensor_model_parallel_size=build.layout.tensor if tensor_parallel else 1,
    )


def shared(build: BuildContext) -> dict[str, Any]:
    """Settings of every part: no dropout, initial values drawn elsewhere (mcore.weights), fusions where kernels are."""
    fused = build.fuses
    on_meta = torch.get_default_device().type == "meta"
    return dict(
        params_dtype=build.dtype,
        bf16=build.dtype is torch.bfloat16,
        fp16=build.dtype is torch.float16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=leave,
        output_layer_init_method=leave,
        # On the meta device neither Megatron nor Transformer Engine may name another device.
        use_cpu_initialization=on_meta and not fused,
        init_model_with_meta_device=on_meta and fused,
        perform_initialization=not pretending(),  # what is only counted needs no marks, and is built in half the time
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,  # of attention that materialises the scores, which none does here
        # Products add to the gradient buffers of Megatron's DistributedDataParallel themselves; FSDP has none.
        gradient_accumulation_fusion=fused and build.layout.fsdp is None and adds_gradients(),
        attention_backend=AttnBackend[build.step.attention_backend],
    )


def adds_gradients() -> bool:
    """Whether NVIDIA's apex is here, by which the layers that are not Transformer Engine's do it."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def forget_attention_choice() -> None:
    """Megatron tells Transformer Engine of attention_backend in the environment, and stops at an earlier model's."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)


def leave(weight: torch.Tensor) -> torch.Tensor:
    """perform_initialization=False would also drop the tensor-parallel marks of the weight."""
    return weight
