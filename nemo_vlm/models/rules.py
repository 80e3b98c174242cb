"""What families share of Hugging Face's side: a Llama-style decoder, a vision layer, LlamaConfig in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_vlm.config import LanguageConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.mapping import Rows, Rule, fuse_gate_up, fuse_qkv, rename


def decoder_rules(config: LanguageConfig, ours: str, theirs: str, their_head: str) -> list[Rule]:
    """HF LlamaForCausalLM and its kin.

    Args:
        ours: prefix of our language model, "language_model.".
        theirs: prefix of their decoder, "model.".
        their_head: name of their output layer's weight; unused where embeddings are tied.
    """
    vocabulary = (config.vocab_size or 0, config.hidden_size)
    rules: list[Rule] = [
        rename(f"{ours}embedding.word_embeddings.weight", f"{theirs}embed_tokens.weight", vocabulary),
        rename(f"{ours}decoder.final_layernorm.weight", f"{theirs}norm.weight", (config.hidden_size,)),
    ]
    if not config.share_embeddings_and_output_weights:
        rules.append(rename(f"{ours}output_layer.weight", their_head, vocabulary))
    for layer in range(config.num_layers):
        rules += decoder_layer_rules(config, f"{ours}decoder.layers.{layer}.", f"{theirs}layers.{layer}.")
    return rules


def decoder_layer_rules(config: LanguageConfig, ours: str, theirs: str) -> list[Rule]:
    width, ffn, heads = config.hidden_size, config.ffn_hidden_size, config.num_attention_heads
    groups, head_size = config.num_query_groups or heads, config.kv_channels or 0
    rules: list[Rule] = [
        rename(f"{ours}self_attention.linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight", (width,)),
        rename(f"{ours}mlp.linear_fc1.layer_norm_weight", f"{theirs}post_attention_layernorm.weight", (width,)),
        fused_qkv(ours, f"{theirs}self_attn.", heads, groups, head_size, width),
        rename(
            f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight", (width, heads * head_size)
        ),
        gate_up(ours, theirs, "weight", ffn, (width,)),
        rename(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (width, ffn)),
    ]
    if config.bias or config.qkv_bias:
        rules.append(fused_qkv(ours, f"{theirs}self_attn.", heads, groups, head_size))
    if config.bias:
        rules += [
            rename(f"{ours}self_attention.linear_proj.bias", f"{theirs}self_attn.o_proj.bias", (width,)),
            gate_up(ours, theirs, "bias", ffn),
            rename(f"{ours}mlp.linear_fc2.bias", f"{theirs}mlp.down_proj.bias", (width,)),
        ]
    return rules


def fused_qkv(
    ours: str, theirs: str, num_heads: int, num_groups: int, head_size: int, width: int | None = None
) -> Rows:
    """The fused weight of a layer of that input width, or its bias."""
    kind, rest = ("bias", ()) if width is None else ("weight", (width,))
    names = [f"{theirs}{part}_proj.{kind}" for part in "qkv"]
    return fuse_qkv(f"{ours}self_attention.linear_qkv.{kind}", names, num_heads, num_groups, head_size, rest)


def gate_up(ours: str, theirs: str, kind: str, ffn_size: int, rest: tuple[int, ...] = ()) -> Rows:
    gate, up = (f"{theirs}mlp.{part}_proj.{kind}" for part in ("gate", "up"))
    return fuse_gate_up(f"{ours}mlp.linear_fc1.{kind}", gate, up, ffn_size, rest)


def vision_layer_rules(ours: str, theirs: str, num_heads: int, width: int, ffn_size: int) -> list[Rule]:
    """HF CLIPEncoderLayer, SiglipEncoderLayer."""
    head_size = width // num_heads
    rules: list[Rule] = [
        fused_qkv(ours, f"{theirs}self_attn.", num_heads, num_heads, head_size, width),
        fused_qkv(ours, f"{theirs}self_attn.", num_heads, num_heads, head_size),
        rename(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.out_proj.weight", (width, width)),
        rename(f"{ours}mlp.linear_fc1.weight", f"{theirs}mlp.fc1.weight", (ffn_size, width)),
        rename(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.fc2.weight", (width, ffn_size)),
        rename(f"{ours}self_attention.linear_proj.bias", f"{theirs}self_attn.out_proj.bias", (width,)),
        rename(f"{ours}mlp.linear_fc1.bias", f"{theirs}mlp.fc1.bias", (ffn_size,)),
        rename(f"{ours}mlp.linear_fc2.bias", f"{theirs}mlp.fc2.bias", (width,)),
    ]
    for kind in ("weight", "bias"):
        rules += [
            rename(f"{ours}self_attention.linear_qkv.layer_norm_{kind}", f"{theirs}layer_norm1.{kind}", (width,)),
            rename(f"{ours}mlp.linear_fc1.layer_norm_{kind}", f"{theirs}layer_norm2.{kind}", (width,)),
        ]
    return rules


def llama_config(config: LanguageConfig) -> dict[str, Any]:
    """HF LlamaConfig, which has biases everywhere in the attention or nowhere."""
    if config.qkv_bias != config.bias:
        raise ConfigError(f"model.qkv_bias={config.qkv_bias}: Hugging Face's Llama needs model.bias to be the same")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.init_method_std,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": rope_scaling(config),
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }


def rope_scaling(config: LanguageConfig) -> dict[str, Any] | None:
    """HF's `rope_scaling`: positions divided (linear), or Llama 3.1's."""
    if config.seq_len_interpolation_factor is not None:
        return {"rope_type": "linear", "factor": config.seq_len_interpolation_factor}
    if config.rope_scaling_factor is not None:
        return {"rope_type": "llama3", "factor": config.rope_scaling_factor, **LLAMA3_SCALING}
    return None


# What Megatron-Core's RotaryEmbedding has fixed beside the factor, and Llama 3.1 and 3.2 use.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama_fields(hf: Mapping[str, Any], path: str) -> dict[str, Any]:
    """LanguageConfig's fields of an HF LlamaConfig, all of whose defaults are filled in.

    Args:
        path: what messages call it.
    Raises:
        ConfigError: it has something that is not built here.
    """
    for key, right in (("hidden_act", "silu"), ("attention_bias", hf["mlp_bias"])):
        if hf[key] != right:
            raise ConfigError(f"{path}: {key}={hf[key]} is not supported, only {right}")
    return {
        "vocab_size": hf["vocab_size"],
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf["head_dim"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "bias": hf["mlp_bias"],
        "qkv_bias": hf["attention_bias"],
        "share_embeddings_and_output_weights": hf["tie_word_embeddings"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "encoder_seq_length": hf["max_position_embeddings"],
        "init_method_std": hf["initializer_range"],
        **rope_fields(hf, path),
    }


def rope_fields(hf: Mapping[str, Any], path: str) -> dict[str, Any]:
    """As transformers 5 has it, one mapping, or as 4, `rope_theta` and `rope_scaling`."""
    rope = dict(hf["rope_parameters"] if "rope_parameters" in hf else hf["rope_scaling"] or {})
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
