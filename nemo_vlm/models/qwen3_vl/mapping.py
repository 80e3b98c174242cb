"""Weights as on the hub in checkpoints of HF Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_vlm.config.dynamic import DynamicMediaConfig, DynamicVisionConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.mapping import Rule, Variant, rename
from nemo_vlm.models.hf_decoder import decoder_config, decoder_fields, rope_of
from nemo_vlm.models.qwen3_vl.config import MOST_TAPS, Config
from nemo_vlm.models.rules import decoder_rules, fused_vision_layer_rules, merger_rules, patch_rule

HF_TYPES = ("qwen3_vl", "qwen3_vl_moe")  # model_type in config.json
VISION_TYPES = ()
HF_VARIANTS: dict[str, str] = {}
MERGER = ("norm", "linear_fc1", "linear_fc2")
LAYERNORM_EPSILON = 1e-6  # of the tower; a constant in Hugging Face's code
SECTIONS = (24, 20, 20)  # what Hugging Face's code takes where a config.json says nothing


def merger_names(main: tuple[str, str, str], deepstack: tuple[str, str, str]) -> dict[str, str]:
    """Our names of the mergers' norms and linear layers, and theirs; {} is a merger's number."""
    ours = ("norm.", "0.", "1.")
    names = {f"vision_projection.merger.{part}": name for part, name in zip(ours, main, strict=True)}
    for number in range(MOST_TAPS):
        front = f"vision_projection.deepstack.{number}."
        names |= {front + part: name.format(number) for part, name in zip(ours, deepstack, strict=True)}
    return names


TOWER = {
    "vision_model.conv1.": "vision_model.patch_embed.proj.",
    "vision_model.position_embeddings.": "vision_model.pos_embed.",
    "vision_model.layers.": "vision_model.decoder.layers.",
}
MAIN, DEEPSTACK = "vision_model.merger.", "vision_model.decoder.deepstack_merger_list.{}."
PAI_MAIN = "vision_model.projection.encoder."
MEGATRON_VARIANTS = {
    "pai": Variant(  # Pai-Megatron-Patch
        TOWER
        | merger_names(
            ("vision_model.decoder.final_layernorm.", f"{PAI_MAIN}linear_fc1.", f"{PAI_MAIN}linear_fc2."),
            (
                "vision_model.decoder.deepstack_norm_list.{}.",
                f"{DEEPSTACK}encoder.linear_fc1.",
                f"{DEEPSTACK}encoder.linear_fc2.",
            ),
        ),
        lists_moe_layers=True,
    ),
    "megatron": Variant(  # Megatron-Bridge
        TOWER
        | merger_names(
            (f"{MAIN}patch_norm.", f"{MAIN}linear_fc1.", f"{MAIN}linear_fc2."),
            (f"{DEEPSTACK}patch_norm.", f"{DEEPSTACK}linear_fc1.", f"{DEEPSTACK}linear_fc2."),
        ),
        pads=True,
    ),
}


def rules(config: Config) -> list[Rule]:
    language = decoder_rules(config, "language_model.", "model.language_model.", "lm_head.weight")
    vision, projection = config.mm_cfg.vision_encoder, "vision_projection."
    tower = vision_rules(vision, "vision_model.", "model.visual.")
    mergers = merger_rules(config, f"{projection}merger.", "model.visual.merger.", MERGER, vision.hidden_size)
    for number in range(config.deepstack_layers):
        ours, theirs = f"{projection}deepstack.{number}.", f"model.visual.deepstack_merger_list.{number}."
        mergers += merger_rules(config, ours, theirs, MERGER, config.mm_cfg.projector_input_size)
    return language + tower + mergers


def vision_rules(vision: DynamicVisionConfig, ours: str, theirs: str) -> list[Rule]:
    """HF Qwen3VLVisionModel without its mergers."""
    width, positions = vision.hidden_size, (vision.num_position_embeddings or 0, vision.hidden_size)
    rules: list[Rule] = [
        patch_rule(vision, ours, theirs),
        rename(f"{ours}conv1.bias", f"{theirs}patch_embed.proj.bias", (width,)),
        rename(f"{ours}position_embeddings.weight", f"{theirs}pos_embed.weight", positions),
    ]
    for layer in range(vision.num_layers):
        rules += fused_vision_layer_rules(vision, f"{ours}layers.{layer}.", f"{theirs}blocks.{layer}.", "linear_fc")
    return rules


def hf_config(config: Config) -> dict[str, Any]:
    """HF Qwen3VLConfig or Qwen3VLMoeConfig as on the hub, which transformers 4.57 and 5 read.

    Raises:
        ConfigError: it has no place for this model.
    """
    language = decoder_config(config)
    if not config.qk_layernorm:
        raise ConfigError("model.qk_layernorm=false: Hugging Face's Qwen3-VL has norms of queries and keys")
    moe, mm = config.num_moe_experts is not None, config.mm_cfg
    kind = "qwen3_vl_moe" if moe else "qwen3_vl"
    sections = {"mrope_interleaved": True, "mrope_section": list(config.mrope_section or ()), "rope_type": "default"}
    kept = {key: value for key, value in language.items() if key != "architectures" and "window" not in key}
    return {
        "architectures": [f"Qwen3VL{'Moe' if moe else ''}ForConditionalGeneration"],
        "model_type": kind,
        "text_config": {**kept, "model_type": f"{kind}_text", "rope_scaling": sections},
        "vision_config": vision_hf_config(mm.vision_encoder, kind, config.hidden_size),
        "image_token_id": mm.image_token_index,
        "video_token_id": mm.video_token_index,
        "vision_start_token_id": mm.vision_start_token_index,
        "vision_end_token_id": mm.vision_end_token_index,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }


def vision_hf_config(vision: DynamicVisionConfig, kind: str, out_size: int) -> dict[str, Any]:
    """HF Qwen3VLVisionConfig or Qwen3VLMoeVisionConfig."""
    if vision.layernorm_epsilon != LAYERNORM_EPSILON:
        raise ConfigError(
            f"model.mm_cfg.vision_encoder.layernorm_epsilon={vision.layernorm_epsilon}: Hugging Face's Qwen3-VL knows "
            f"{LAYERNORM_EPSILON} only"
        )
    return {
        "model_type": kind,
        "depth": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "hidden_act": vision.activation,
        "intermediate_size": vision.ffn_hidden_size,
        "num_heads": vision.num_attention_heads,
        "in_channels": 3,
        "patch_size": vision.patch_dim,
        "spatial_merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "out_hidden_size": out_size,
        "num_position_embeddings": vision.num_position_embeddings,
        "deepstack_visual_indexes": list(vision.deepstack_visual_indexes),
    }


def from_hf(hf: Mapping[str, Any], names: set[str], path: str) -> Config:
    """The config of an HF Qwen3VLConfig or Qwen3VLMoeConfig whose defaults are filled in; see llava's for arguments."""
    text, tied = hf["text_config"], hf["tie_word_embeddings"]
    rope = rope_of(text)
    mm_cfg = DynamicMediaConfig(
        vision_encoder=DynamicVisionConfig(**vision_from_hf(hf["vision_config"], text["hidden_size"], path)),
        image_token_index=hf["image_token_id"],
        video_token_index=hf["video_token_id"],
        vision_start_token_index=hf["vision_start_token_id"],
        vision_end_token_index=hf["vision_end_token_id"],
    )
    fields = decoder_fields({**text, "tie_word_embeddings": tied}, path)
    sections = rope.get("mrope_section", SECTIONS)
    return Config(**fields, mrope_section=tuple(sections), mm_cfg=mm_cfg)


def vision_from_hf(hf: Mapping[str, Any], out_size: int, path: str) -> dict[str, Any]:
    """DynamicVisionConfig's fields of an HF Qwen3VLVisionConfig.

    Raises:
        ConfigError: it has something that is not built here.
    """
    for key, right in (("in_channels", 3), ("out_hidden_size", out_size)):
        if hf[key] != right:
            raise ConfigError(f"{path}: vision_config.{key}={hf[key]} is not supported, only {right}")
    return {
        "patch_dim": hf["patch_size"],
        "temporal_patch_size": hf["temporal_patch_size"],
        "spatial_merge_size": hf["spatial_merge_size"],
        "num_layers": hf["depth"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_heads"],
        "activation": hf["hidden_act"],
        "layernorm_epsilon": LAYERNORM_EPSILON,
        "num_position_embeddings": hf["num_position_embeddings"],
        "deepstack_visual_indexes": tuple(hf["deepstack_visual_indexes"]),
    }
