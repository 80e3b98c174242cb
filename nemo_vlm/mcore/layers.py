"""Transformer layers from Megatron's parts; the one place that chooses between Transformer Engine and our modules.

Without Transformer Engine, Megatron's norms refuse sequence parallelism and its attention materialises the scores. The
norms and the core attention here have neither limit. Parameter names in checkpoints are the same either way.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_transformer_engine_spec
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from nemo_vlm.errors import ConfigError
from nemo_vlm.mcore import npu
from nemo_vlm.mcore.attention import CoreAttention
from nemo_vlm.mcore.context import ContextParallelAttention
from nemo_vlm.mcore.experts import expert_spec
from nemo_vlm.mcore.linear import ColumnLinear, RowLinear
from nemo_vlm.mcore.norms import LayerNorm, RMSNorm
from nemo_vlm.mcore.rotary import RotatedAttention, TowerAttention
from nemo_vlm.mcore.swiglu import GatedMLP

Kernels = Literal["local", "transformer_engine"]


def kernels(transformer_impl: str) -> Kernels:
    """What model.transformer_impl means here: `auto` takes Transformer Engine on CUDA where it is installed."""
    on_cuda = torch.cuda.is_available() and not npu.started()
    available = on_cuda and HAVE_TE
    if transformer_impl == "transformer_engine" and not available:
        lacking = "it cannot be imported" if on_cuda else "it needs a CUDA device"
        raise ConfigError(f"model.transformer_impl=transformer_engine: {lacking}; auto or local runs here")
    return "transformer_engine" if available and transformer_impl != "local" else "local"


def norm_class(config: TransformerConfig, chosen: Kernels) -> type:
    if chosen == "transformer_engine":
        return TESpecProvider().layer_norm()
    return RMSNorm if config.normalization == "RMSNorm" else LayerNorm


def core_attention(config: TransformerConfig) -> type:
    return ContextParallelAttention if config.context_parallel_size > 1 else CoreAttention


def takes_our_attention(config: TransformerConfig) -> bool:
    """In fp32 Transformer Engine has plain products alone, which refuse context parallelism and, before 2.11, packs."""
    automatic = config.attention_backend is AttnBackend.auto
    return config.attention_backend is AttnBackend.local or (automatic and config.params_dtype is torch.float32)


def layer_spec(config: TransformerConfig, chosen: Kernels, causal: bool, own_positions: bool = False) -> ModuleSpec:
    """A pre-norm transformer layer: norm, self-attention, norm, MLP.

    Args:
        own_positions: each token has a position of its own, see RotatedAttention; else its place in its sample. Our
            modules of a decoder take turns either way.
    """
    rotated = RotatedAttention if causal else TowerAttention
    if chosen == "transformer_engine":
        gpt, vit = get_gpt_layer_with_transformer_engine_spec, get_vit_layer_with_transformer_engine_spec
        spec: Any = gpt(config.num_moe_experts, qk_layernorm=config.qk_layernorm) if causal else vit()
        if config.num_moe_experts:
            spec.submodules.mlp = expert_spec(config, with_engine=True)
        if takes_our_attention(config):
            spec.submodules.self_attention.submodules.core_attention = core_attention(config)
        if own_positions:
            spec.submodules.self_attention.module = rotated
        return spec
    norm = norm_class(config, chosen)
    head_norm = norm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnLinear,
        core_attention=core_attention(config),
        linear_proj=RowLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    mlp: Any = ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear))
    if config.gated_linear_unit:
        mlp = GatedMLP
    # Transformer Engine fuses a norm into the linear layer behind it; checkpoints use its names.
    fused = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if config.num_moe_experts:
        mlp = expert_spec(config, with_engine=False)
    else:
        fused["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                rotated if own_positions or causal else SelfAttention,
                params={"attn_mask_type": mask},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=fused,
        ),
    )
