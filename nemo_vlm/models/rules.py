"""What families share of Hugging Face's side: rules of a Llama-style decoder and a vision layer, Llama's config."""

from __future__ import annotations

from typing import Any

from nemo_vlm.config import LanguageConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.mapping import FuseGateUp, FuseQKV, Rename, Rule


def decoder_rules(config: LanguageConfig, ours: str, theirs: str, their_head: str) -> list[Rule]:
    """HF LlamaForCausalLM and its kin.

    Args:
        ours: prefix of our language model, "language_model.".
        theirs: prefix of their decoder, "model.".
        their_head: name of their output layer's weight; unused where embeddings are tied.
    """
    rules: list[Rule] = [
        Rename(f"{ours}embedding.word_embeddings.weight", f"{theirs}embed_tokens.weight"),
        Rename(f"{ours}decoder.final_layernorm.weight", f"{theirs}norm.weight"),
    ]
    if not config.share_embeddings_and_output_weights:
        rules.append(Rename(f"{ours}output_layer.weight", their_head))
    for layer in range(config.num_layers):
        rules += decoder_layer_rules(config, f"{ours}decoder.layers.{layer}.", f"{theirs}layers.{layer}.")
    return rules


def decoder_layer_rules(config: LanguageConfig, ours: str, theirs: str) -> list[Rule]:
    rules: list[Rule] = [
        Rename(f"{ours}self_attention.linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight"),
        Rename(f"{ours}mlp.linear_fc1.layer_norm_weight", f"{theirs}post_attention_layernorm.weight"),
    ]
    for kind in ("weight", "bias"):
        if kind == "weight" or config.bias or config.qkv_bias:
            rules.append(
                fused_qkv(
                    config.num_attention_heads,
                    config.num_query_groups or 0,
                    ours,
                    f"{theirs}self_attn.",
                    kind,
                )
            )
        if kind == "weight" or config.bias:
            rules += [
                Rename(f"{ours}self_attention.linear_proj.{kind}", f"{theirs}self_attn.o_proj.{kind}"),
                FuseGateUp(
                    f"{ours}mlp.linear_fc1.{kind}",
                    f"{theirs}mlp.gate_proj.{kind}",
                    f"{theirs}mlp.up_proj.{kind}",
                ),
                Rename(f"{ours}mlp.linear_fc2.{kind}", f"{theirs}mlp.down_proj.{kind}"),
            ]
    return rules


def fused_qkv(num_heads: int, num_groups: int, ours: str, theirs: str, kind: str) -> FuseQKV:
    query, key, value = (f"{theirs}{part}_proj.{kind}" for part in "qkv")
    return FuseQKV(f"{ours}self_attention.linear_qkv.{kind}", query, key, value, num_heads, num_groups)


def vision_layer_rules(num_heads: int, ours: str, theirs: str) -> list[Rule]:
    """HF CLIPEncoderLayer, SiglipEncoderLayer."""
    rules: list[Rule] = []
    for kind in ("weight", "bias"):
        rules += [
            Rename(f"{ours}self_attention.linear_qkv.layer_norm_{kind}", f"{theirs}layer_norm1.{kind}"),
            fused_qkv(num_heads, num_heads, ours, f"{theirs}self_attn.", kind),
            Rename(f"{ours}self_attention.linear_proj.{kind}", f"{theirs}self_attn.out_proj.{kind}"),
            Rename(f"{ours}mlp.linear_fc1.layer_norm_{kind}", f"{theirs}layer_norm2.{kind}"),
            Rename(f"{ours}mlp.linear_fc1.{kind}", f"{theirs}mlp.fc1.{kind}"),
            Rename(f"{ours}mlp.linear_fc2.{kind}", f"{theirs}mlp.fc2.{kind}"),
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
        "max_position_embeddings": config.encoder_seq_length,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_theta": config.rotary_base,
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }
