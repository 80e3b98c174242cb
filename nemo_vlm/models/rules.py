"""What families share of weights in Hugging Face's names: a Llama-style decoder, experts, a vision layer."""

from __future__ import annotations

from collections.abc import Callable

from nemo_vlm.config import LanguageConfig
from nemo_vlm.config.dynamic import DynamicConfig, DynamicVisionConfig
from nemo_vlm.mapping import Rows, Rule, Stacked, Swapped, fuse_gate_up, fuse_qkv, regroup_qkv, rename

ExpertRules = Callable[[LanguageConfig, str, str], list[Rule]]  # of a layer, by prefixes of ours and theirs


def joint_experts(config: LanguageConfig, ours: str, theirs: str) -> list[Rule]:
    """HF Qwen3VLMoeTextExperts, all of a layer in two tensors, as the hub and transformers 4.57 have their axes."""
    count, width, ffn = expert_sizes(config)
    return [
        Swapped(f"{ours}linear_fc1.weight", (count, 2 * ffn, width), f"{theirs}gate_up_proj"),
        Swapped(f"{ours}linear_fc2.weight", (count, width, ffn), f"{theirs}down_proj"),
    ]


def single_experts(config: LanguageConfig, ours: str, theirs: str) -> list[Rule]:
    """HF Qwen3MoeSparseMoeBlock, every expert a module of its own."""
    count, width, ffn = expert_sizes(config)
    fronts = [f"{theirs}{expert}." for expert in range(count)]
    fc1 = [fuse_gate_up("", f"{front}gate_proj.weight", f"{front}up_proj.weight", ffn, (width,)) for front in fronts]
    fc2 = [rename("", f"{front}down_proj.weight", (width, ffn)) for front in fronts]
    return [Stacked(f"{ours}linear_fc1.weight", tuple(fc1)), Stacked(f"{ours}linear_fc2.weight", tuple(fc2))]


def expert_sizes(config: LanguageConfig) -> tuple[int, int, int]:
    """How many experts, the width of their input, and that between their layers."""
    return config.num_moe_experts or 0, config.hidden_size, config.moe_ffn_hidden_size or config.ffn_hidden_size


def decoder_rules(
    config: LanguageConfig, ours: str, theirs: str, their_head: str, experts: ExpertRules = joint_experts
) -> list[Rule]:
    """HF LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3VLMoeTextModel and, by `experts`, its kin.

    Args:
        ours: prefix of our language model, "language_model.".
        theirs: prefix of their decoder, "model.".
        their_head: name of their output layer's weight; unused where embeddings are tied.
        experts: the rules of a layer's experts, where the model has any.
    """
    vocabulary = (config.vocab_size or 0, config.hidden_size)
    rules: list[Rule] = [
        rename(f"{ours}embedding.word_embeddings.weight", f"{theirs}embed_tokens.weight", vocabulary),
        rename(f"{ours}decoder.final_layernorm.weight", f"{theirs}norm.weight", (config.hidden_size,)),
    ]
    if not config.share_embeddings_and_output_weights:
        rules.append(rename(f"{ours}output_layer.weight", their_head, vocabulary))
    for layer in range(config.num_layers):
        prefixes = f"{ours}decoder.layers.{layer}.", f"{theirs}layers.{layer}."
        rules += attention_rules(config, *prefixes)
        rules += (
            ffn_rules(config, *prefixes) if config.num_moe_experts is None else moe_rules(config, *prefixes, experts)
        )
    return rules


def attention_rules(config: LanguageConfig, ours: str, theirs: str) -> list[Rule]:
    width, heads = config.hidden_size, config.num_attention_heads
    groups, head_size = config.num_query_groups or heads, config.kv_channels or 0
    rules: list[Rule] = [
        rename(f"{ours}self_attention.linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight", (width,)),
        fused_qkv(ours, f"{theirs}self_attn.", heads, groups, head_size, width),
        rename(
            f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight", (width, heads * head_size)
        ),
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
        rules.append(rename(f"{ours}self_attention.linear_proj.bias", f"{theirs}self_attn.o_proj.bias", (width,)))
    return rules


def ffn_rules(config: LanguageConfig, ours: str, theirs: str) -> list[Rule]:
    width, ffn = config.hidden_size, config.ffn_hidden_size
    rules: list[Rule] = [
        rename(f"{ours}mlp.linear_fc1.layer_norm_weight", f"{theirs}post_attention_layernorm.weight", (width,)),
        gate_up(ours, theirs, "weight", ffn, (width,)),
        rename(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (width, ffn)),
    ]
    if config.bias:
        rules += [
            gate_up(ours, theirs, "bias", ffn),
            rename(f"{ours}mlp.linear_fc2.bias", f"{theirs}mlp.down_proj.bias", (width,)),
        ]
    return rules


def moe_rules(config: LanguageConfig, ours: str, theirs: str, experts: ExpertRules) -> list[Rule]:
    """Router and experts; the norm in front stands alone, since no linear layer follows it directly."""
    width = config.hidden_size
    rules: list[Rule] = [
        rename(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", (width,)),
        rename(f"{ours}mlp.router.weight", f"{theirs}mlp.gate.weight", (config.num_moe_experts or 0, width)),
    ]
    return rules + experts(config, f"{ours}mlp.experts.experts.", f"{theirs}mlp.experts.")


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


def fused_vision_layer_rules(vision: DynamicVisionConfig, ours: str, theirs: str, fc: str) -> list[Rule]:
    """HF Qwen2VLVisionBlock, Qwen3VLVisionBlock.

    Args:
        fc: what their linear layers of the MLP are called, without the number.
    """
    width, ffn_size, num_heads = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads
    qkv, head_size = "self_attention.linear_qkv", width // num_heads
    shapes = {
        "self_attention.linear_proj": ("attn.proj", width, width),
        "mlp.linear_fc1": (f"mlp.{fc}1", ffn_size, width),
        "mlp.linear_fc2": (f"mlp.{fc}2", width, ffn_size),
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


def patch_rule(vision: DynamicVisionConfig, ours: str, theirs: str) -> Rows:
    """The convolution over patches, in HF's PatchEmbed."""
    patch = (3, vision.temporal_patch_size, vision.patch_dim, vision.patch_dim)
    return rename(f"{ours}conv1.weight", f"{theirs}patch_embed.proj.weight", (vision.hidden_size, *patch))


def merger_rules(config: DynamicConfig, ours: str, theirs: str, names: tuple[str, str, str], norm: int) -> list[Rule]:
    """HF PatchMerger, Qwen3VLVisionPatchMerger.

    Args:
        names: theirs, of the norm and the two linear layers.
        norm: what the norm normalises, in numbers.
    """
    inner, out = config.mm_cfg.projector_input_size, config.hidden_size
    shapes = zip(("norm", "0", "1"), names, ((norm,), (inner, inner), (out, inner)), strict=True)
    return [
        rename(f"{ours}{name}.{kind}", f"{theirs}{their_name}.{kind}", shape if kind == "weight" else shape[:1])
        for name, their_name, shape in shapes
        for kind in ("weight", "bias")
    ]
