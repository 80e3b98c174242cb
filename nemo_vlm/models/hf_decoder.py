"""config.json of a decoder, written and read: HF LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_vlm.config import LanguageConfig
from nemo_vlm.errors import ConfigError

CLASSES = {  # by model_type
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Of all mixtures of experts here: every layer has experts, and the chosen ones' weights sum to 1.
ALL_MOE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
# What Megatron-Core's RotaryEmbedding has fixed beside the factor, and Llama 3.1 and 3.2 use.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def decoder_config(config: LanguageConfig) -> dict[str, Any]:
    """The config.json of the class that has such biases and norms.

    Raises:
        ConfigError: none has.
    """
    kind = decoder_type(config)
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        **head_dim(config, kind),
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.init_method_std,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": rope_scaling(config),
        "hidden_act": "silu",
        **(biases(config) if kind == "llama" else full_attention(config, kind)),
        **({} if config.num_moe_experts is None else expert_settings(config)),
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }


def decoder_type(config: LanguageConfig) -> str:
    """Llama has biases everywhere or nowhere, Qwen2 at queries, keys and values, Qwen3 norms there and no biases."""
    if config.qk_layernorm and (config.bias or config.qkv_bias):
        raise ConfigError("model.qk_layernorm=true: Hugging Face's Qwen3 needs model.bias and model.qkv_bias false")
    if config.bias and not config.qkv_bias:
        raise ConfigError("model.qkv_bias=false: Hugging Face's Llama needs it to be true where model.bias is")
    if config.num_moe_experts is not None and not config.qk_layernorm:
        raise ConfigError(
            f"model.num_moe_experts={config.num_moe_experts}: Hugging Face's Qwen3-MoE needs model.qk_layernorm=true"
        )
    if config.qk_layernorm:
        return "qwen3" if config.num_moe_experts is None else "qwen3_moe"
    return "qwen2" if config.qkv_bias and not config.bias else "llama"


def head_dim(config: LanguageConfig, kind: str) -> dict[str, Any]:
    """Qwen2Config has no such field; its class reads one where heads x head size is not the hidden size."""
    usual = config.num_attention_heads * (config.kv_channels or 0) == config.hidden_size
    return {} if kind == "qwen2" and usual else {"head_dim": config.kv_channels}


def biases(config: LanguageConfig) -> dict[str, Any]:
    return {"attention_bias": config.bias, "mlp_bias": config.bias}


def full_attention(config: LanguageConfig, kind: str) -> dict[str, Any]:
    """What the Qwens on the hub say beside Llama's fields: no sliding windows."""
    windows = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}
    rest = {"attention_dropout": 0.0, "use_cache": True}
    return windows | rest | ({} if kind == "qwen2" else {"attention_bias": False})


def expert_settings(config: LanguageConfig) -> dict[str, Any]:
    return {
        "num_experts": config.num_moe_experts,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "num_experts_per_tok": config.moe_router_topk,
        "router_aux_loss_coef": config.moe_aux_loss_coeff,
        "output_router_logits": False,
        **ALL_MOE,
    }


def rope_scaling(config: LanguageConfig) -> dict[str, Any] | None:
    """HF's `rope_scaling`: positions divided (linear), or Llama 3.1's."""
    if config.seq_len_interpolation_factor is not None:
        return {"rope_type": "linear", "factor": config.seq_len_interpolation_factor}
    if config.rope_scaling_factor is not None:
        return {"rope_type": "llama3", "factor": config.rope_scaling_factor, **LLAMA3_SCALING}
    return None


def decoder_fields(hf: Mapping[str, Any], path: str) -> dict[str, Any]:
    """LanguageConfig's fields of a config.json, all of whose class's defaults are filled in.

    Args:
        path: what messages call it.
    Raises:
        ConfigError: it has something that is not built here.
    """
    if hf["hidden_act"] != "silu":
        raise ConfigError(f"{path}: hidden_act={hf['hidden_act']} is not supported, only silu")
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    return {
        "vocab_size": hf["vocab_size"],
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": width,
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf["head_dim"] if "head_dim" in hf else width // heads,
        "layernorm_epsilon": hf["rms_norm_eps"],
        "share_embeddings_and_output_weights": hf["tie_word_embeddings"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "encoder_seq_length": hf["max_position_embeddings"],
        "init_method_std": hf["initializer_range"],
        **(llama_fields(hf, path) if hf["model_type"] == "llama" else qwen_fields(hf, path)),
        **(expert_fields(hf, path) if "moe_intermediate_size" in hf else {}),
        **rope_fields(hf, path),
    }


def llama_fields(hf: Mapping[str, Any], path: str) -> dict[str, Any]:
    if hf["attention_bias"] != hf["mlp_bias"]:
        raise ConfigError(f"{path}: attention_bias={hf['attention_bias']} is not supported, only {hf['mlp_bias']}")
    return {"bias": hf["mlp_bias"], "qkv_bias": hf["attention_bias"]}


def qwen_fields(hf: Mapping[str, Any], path: str) -> dict[str, Any]:
    if set(hf["layer_types"]) - {"full_attention"} if "layer_types" in hf else hf.get("use_sliding_window"):
        raise ConfigError(f"{path}: use_sliding_window={hf['use_sliding_window']} is not supported, only False")
    third = hf["model_type"].startswith("qwen3")
    if third and hf["attention_bias"]:
        raise ConfigError(f"{path}: attention_bias={hf['attention_bias']} is not supported, only False")
    return {"qkv_bias": not third, "qk_layernorm": third}


def expert_fields(hf: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Of Qwen3MoeConfig, or Qwen3VLMoeTextConfig, whose class always has the weights sum to 1."""
    for key, right in ALL_MOE.items():
        if key in hf and hf[key] != right:
            raise ConfigError(f"{path}: {key}={hf[key]} is not supported, only {right}")
    return {
        "num_moe_experts": hf["num_local_experts" if "num_local_experts" in hf else "num_experts"],  # 4 says the latter
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_aux_loss_coeff": hf["router_aux_loss_coef"],
    }


def rope_of(hf: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers 5 has it, one mapping, or as 4, `rope_scaling` beside `rope_theta`."""
    return dict(hf["rope_parameters"] if "rope_parameters" in hf else hf["rope_scaling"] or {})


def rope_fields(hf: Mapping[str, Any], path: str) -> dict[str, Any]:
    rope = rope_of(hf)
    theta = rope["rope_theta"] if "rope_theta" in rope else hf["rope_theta"]
    kind = rope.get("rope_type") or rope.get("type") or "default"  # older files say `type`
    fields: dict[str, Any] = {"rotary_base": float(theta)}
    if kind == "linear":
        return fields | {"seq_len_interpolation_factor": float(rope["factor"])}
    if kind == "llama3" and {key: rope.get(key) for key in LLAMA3_SCALING} == LLAMA3_SCALING:
        return fields | {"rope_scaling_factor": float(rope["factor"])}
    if kind != "default":
        raise ConfigError(f"{path}: rope_scaling {kind} {rope} is not supported: only default, linear, and Llama 3.1's")
    return fields
