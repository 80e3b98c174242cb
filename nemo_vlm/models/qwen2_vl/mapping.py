"""Weights as in checkpoints of Hugging Face's Qwen2VLForConditionalGeneration.

The names are those on the hub. In memory, and in files of some other writers, the model's parts stand under `model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_vlm.config.dynamic import DynamicMediaConfig, DynamicVisionConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.mapping import SEPARATE_NORMS, Rule, Variant
from nemo_vlm.models.hf_decoder import decoder_config, decoder_fields, rope_of
from nemo_vlm.models.qwen2_vl.config import Config
from nemo_vlm.models.rules import decoder_rules, fused_vision_layer_rules, merger_rules, patch_rule

HF_TYPES = ("qwen2_vl",)  # model_type in config.json
VISION_TYPES = ()
# Beginnings of names in other files, and what they are here.
HF_VARIANTS = {"model.visual.": "visual.", "model.language_model.": "model."}
MINDSPEED = {
    "vision_model.conv1.": "image_encoder.encoder.patch_embed.proj.",
    "vision_model.layers.": "image_encoder.encoder.blocks.layers.",
    "vision_projection.norm.": "image_encoder.projector.layernorm.",
    "vision_projection.0.": "image_encoder.projector.encoder.linear_fc1.",
    "vision_projection.1.": "image_encoder.projector.encoder.linear_fc2.",
    **SEPARATE_NORMS,
}
MEGATRON_VARIANTS = {
    "pai": Variant(  # Pai-Megatron-Patch
        {
            "vision_model.conv1.": "vision_model.patch_embed.proj.",
            "vision_model.layers.": "vision_model.decoder.layers.",
            "vision_projection.norm.": "vision_model.decoder.final_layernorm.",
            "vision_projection.0.": "vision_model.projection.encoder.linear_fc1.",
            "vision_projection.1.": "vision_model.projection.encoder.linear_fc2.",
        }
    ),
    "mindspeed": Variant({"language_model.": "", **MINDSPEED}),  # MindSpeed-MM 1
    "mindspeed2": Variant({"language_model.": "text_decoder.", **MINDSPEED}, args_tell=False, embeds_first=False),
}
LAYERNORM_EPSILON = 1e-6  # of the tower; a constant in Hugging Face's code


def rules(config: Config) -> list[Rule]:
    language = decoder_rules(config, "language_model.", "model.", "lm_head.weight")
    tower = vision_rules(config.mm_cfg.vision_encoder, "vision_model.", "visual.")
    names, width = ("ln_q", "mlp.0", "mlp.2"), config.mm_cfg.vision_encoder.hidden_size
    return language + tower + merger_rules(config, "vision_projection.", "visual.merger.", names, width)


def vision_rules(vision: DynamicVisionConfig, ours: str, theirs: str) -> list[Rule]:
    """HF Qwen2VisionTransformerPretrainedModel without its merger."""
    rules: list[Rule] = [patch_rule(vision, ours, theirs)]
    for layer in range(vision.num_layers):
        rules += fused_vision_layer_rules(vision, f"{ours}layers.{layer}.", f"{theirs}blocks.{layer}.", "fc")
    return rules


def hf_config(config: Config) -> dict[str, Any]:
    """HF Qwen2VLConfig as transformers 4 writes it, and 5 reads it: the language model's fields at the top.

    Raises:
        ConfigError: it has no place for this model.
    """
    language = decoder_config(config)
    if language["model_type"] != "qwen2":
        raise ConfigError(
            f"model.qkv_bias={str(config.qkv_bias).lower()}: Hugging Face's Qwen2-VL has biases of queries, keys and "
            "values, and no other biases or norms (model.qkv_bias=true, bias=false, qk_layernorm=false)"
        )
    if "head_dim" in language:
        raise ConfigError(
            f"model.kv_channels={config.kv_channels}: Hugging Face's Qwen2-VL has heads of "
            "hidden_size / num_attention_heads"
        )
    mm = config.mm_cfg
    return {
        **language,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope_section or ())},
        "vision_config": vision_hf_config(mm.vision_encoder, config.hidden_size),
        "image_token_id": mm.image_token_index,
        "video_token_id": mm.video_token_index,
        "vision_start_token_id": mm.vision_start_token_index,
        "vision_end_token_id": mm.vision_end_token_index,
        # The tokenizer says; the class assumes tokens that a small vocabulary has not.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def vision_hf_config(vision: DynamicVisionConfig, out_size: int) -> dict[str, Any]:
    """HF Qwen2VLVisionConfig, whose `hidden_size` is the language model's."""
    ratio, rest = divmod(vision.ffn_hidden_size, vision.hidden_size)
    branch = "model.mm_cfg.vision_encoder"
    if rest:
        raise ConfigError(
            f"{branch}.ffn_hidden_size={vision.ffn_hidden_size}: Hugging Face's Qwen2-VL needs a multiple of "
            f"hidden_size={vision.hidden_size}"
        )
    if vision.layernorm_epsilon != LAYERNORM_EPSILON:
        raise ConfigError(
            f"{branch}.layernorm_epsilon={vision.layernorm_epsilon}: Hugging Face's Qwen2-VL knows "
            f"{LAYERNORM_EPSILON} only"
        )
    return {
        "depth": vision.num_layers,
        "embed_dim": vision.hidden_size,
        "hidden_act": vision.activation,
        "hidden_size": out_size,
        "in_channels": 3,
        "in_chans": 3,  # so spelled on the hub
        "mlp_ratio": ratio,
        "num_heads": vision.num_attention_heads,
        "patch_size": vision.patch_dim,
        "spatial_merge_size": vision.spatial_merge_size,
        "spatial_patch_size": vision.patch_dim,
        "temporal_patch_size": vision.temporal_patch_size,
    }


def from_hf(hf: Mapping[str, Any], names: set[str], path: str) -> Config:
    """The config of an HF Qwen2VLConfig whose defaults are filled in; see llava's for the arguments."""
    text, tied = hf["text_config"], hf["tie_word_embeddings"]
    fields = decoder_fields({**text, "tie_word_embeddings": tied}, path)
    sections = rope_of(text)["mrope_section"]
    mm_cfg = DynamicMediaConfig(
        vision_encoder=DynamicVisionConfig(**vision_from_hf(hf["vision_config"], path)),
        image_token_index=hf["image_token_id"],
        video_token_index=hf["video_token_id"],
        vision_start_token_index=hf["vision_start_token_id"],
        vision_end_token_index=hf["vision_end_token_id"],
    )
    return Config(**fields, mrope_section=tuple(sections), mm_cfg=mm_cfg)


def vision_from_hf(hf: Mapping[str, Any], path: str) -> dict[str, Any]:
    """DynamicVisionConfig's fields of an HF Qwen2VLVisionConfig.

    Raises:
        ConfigError: it has something that is not built here.
    """
    if hf["in_channels"] != 3:
        raise ConfigError(f"{path}: vision_config.in_channels={hf['in_channels']} is not supported, only 3")
    return {
        "patch_dim": hf["patch_size"],
        "temporal_patch_size": hf["temporal_patch_size"],
        "spatial_merge_size": hf["spatial_merge_size"],
        "num_layers": hf["depth"],
        "hidden_size": hf["embed_dim"],
        "ffn_hidden_size": int(hf["embed_dim"] * hf["mlp_ratio"]),
        "num_attention_heads": hf["num_heads"],
        "activation": hf["hidden_act"],
        "layernorm_epsilon": LAYERNORM_EPSILON,
    }
