"""What families share of weights in Hugging Face's names: a Llama-style decoder, a vision layer."""

from __future__ import annotations

from nemo_vlm.config import LanguageConfig
from nemo_vlm.mapping import Rows, Rule, fuse_gate_up, fuse_qkv, regroup_qkv, rename


def decoder_rules(config: LanguageConfig, ours: str, theirs: str, their_head: str) -> list[Rule]:
    """HF LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM.

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
    if config.qk_layernorm:
        rules += [
            rename(
                f"{ours}self_attention.{part}_layernorm.weight", f"{theirs}self_attn.{part}_norm.weight", (head_size,)
            )
            for part in "qk"
        ]
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


def fused_vision_layer_rules(ours: str, theirs: str, num_heads: int, width: int, ffn_size: int) -> list[Rule]:
    """HF Qwen2VLVisionBlock."""
    qkv, head_size = "self_attention.linear_qkv", width // num_heads
    shapes = {
        "self_attention.linear_proj": ("attn.proj", width, width),
        "mlp.linear_fc1": ("mlp.fc1", ffn_size, width),
        "mlp.linear_fc2": ("mlp.fc2", width, ffn_size),
    }
    rules: list[Rule] = []
    for kind in ("weight", "bias"):
        rest = (width,) if kind == "weight" else ()
        rules += [
            regroup_qkv(f"{ours}{qkv}.{kind}", f"{theirs}attn.qkv.{kind}", num_heads, head_size, rest),
            rename(f"{ours}{qkv}.layer_norm_{kind}", f"{theirs}norm1.{kind}", (width,)),
            rename(f"{ours}mlp.linear_fc1.layer_norm_{kind}", f"{theirs}norm2.{kind}", (width,)),
        ]
        for name, (their_name, rows, columns) in shapes.items():
            shape = (rows, columns) if kind == "weight" else (rows,)
            rules.append(rename(f"{ours}{name}.{kind}", f"{theirs}{their_name}.{kind}", shape))
    return rules
