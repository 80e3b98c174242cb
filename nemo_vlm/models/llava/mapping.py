"""Weights as in checkpoints of Hugging Face's LlavaForConditionalGeneration on the hub.

In memory, transformers 5 has other names (`model.language_model...`) and translates while it reads.
"""

from __future__ import annotations

from typing import Any

from nemo_vlm.mapping import Rename, Reshape, Rule
from nemo_vlm.models.llava.config import Config, VisionConfig
from nemo_vlm.models.projector import num_linear_layers
from nemo_vlm.models.rules import decoder_rules, llama_config, vision_layer_rules

PROJECTOR = "multi_modal_projector.linear_"


def rules(config: Config) -> list[Rule]:
    layers = num_linear_layers(config.mm_cfg.mm_mlp_adapter_type)
    projector: list[Rule] = [
        Rename(f"vision_projection.{index}.{kind}", f"{PROJECTOR}{index + 1}.{kind}")
        for index in range(layers)
        for kind in ("weight", "bias")
    ]
    language = decoder_rules(config, "language_model.", "language_model.model.", "language_model.lm_head.weight")
    return language + projector + vision_rules(config, "vision_model.", "vision_tower.vision_model.")


def vision_rules(config: Config, ours: str, theirs: str) -> list[Rule]:
    """HF CLIPVisionModel or SiglipVisionModel."""
    vision = config.mm_cfg.vision_encoder
    clip = vision.model_type == "clip"
    rules: list[Rule] = [
        Rename(f"{ours}conv1.weight", f"{theirs}embeddings.patch_embedding.weight"),
        Rename(f"{ours}position_embeddings.weight", f"{theirs}embeddings.position_embedding.weight"),
    ]
    if clip:
        width = vision.hidden_size
        rules.append(Reshape(f"{ours}class_token", f"{theirs}embeddings.class_embedding", (1, 1, width), (width,)))
    else:
        rules.append(Rename(f"{ours}conv1.bias", f"{theirs}embeddings.patch_embedding.bias"))
    for kind in ("weight", "bias"):
        if clip:
            rules.append(Rename(f"{ours}ln_pre.{kind}", f"{theirs}pre_layrnorm.{kind}"))  # so spelled there
        rules.append(Rename(f"{ours}ln_post.{kind}", f"{theirs}post_layernorm.{kind}"))
    for layer in range(vision.num_layers):
        rules += vision_layer_rules(
            vision.num_attention_heads, f"{ours}layers.{layer}.", f"{theirs}encoder.layers.{layer}."
        )
    return rules


def hf_config(config: Config) -> dict[str, Any]:
    """HF LlavaConfig."""
    vision = config.mm_cfg.vision_encoder
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": llama_config(config),
        "vision_config": vision_hf_config(vision),
        "image_token_index": config.mm_cfg.image_token_index,
        "image_seq_length": vision.num_image_tokens,
        "vision_feature_layer": vision.vision_select_layer,
        "vision_feature_select_strategy": "default" if vision.class_token_length else "full",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }


def vision_hf_config(vision: VisionConfig) -> dict[str, Any]:
    """HF CLIPVisionConfig or SiglipVisionConfig."""
    return {
        "model_type": f"{vision.model_type}_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_dim,
        "num_hidden_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_attention_heads": vision.num_attention_heads,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.layernorm_epsilon,
    } | ({} if vision.class_token_length else {"vision_use_head": False})
