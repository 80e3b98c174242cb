"""Weights as in checkpoints of Hugging Face's LlavaForConditionalGeneration, CLIPVisionModel and SiglipVisionModel.

The names are those on the hub. In memory, transformers 5 has others (`model.language_model...`) and translates while it
reads and writes; but a tower that it made itself is written without `vision_model.`, see VisionConfig.hf_prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_vlm.errors import ConfigError
from nemo_vlm.mapping import Reshape, Rule, Variant, rename
from nemo_vlm.models.adapter import DOWNSAMPLE, num_linear_layers
from nemo_vlm.models.hf_decoder import CLASSES, decoder_config, decoder_fields
from nemo_vlm.models.llava.config import Config, MultimodalConfig, VisionConfig
from nemo_vlm.models.rules import decoder_rules, vision_layer_rules

HF_TYPES = ("llava",)  # model_type in config.json
VISION_TYPES = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")  # of a tower alone
# Beginnings of names in other files, and what they are here.
HF_VARIANTS = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
# In Megatron-Core's LLaVAModel.
MEGATRON_VARIANTS = {
    "megatron": Variant(
        {
            "vision_model.layers.": "vision_model.decoder.layers.",
            "vision_projection.0.": "vision_projection.encoder.linear_fc1.",
            "vision_projection.1.": "vision_projection.encoder.linear_fc2.",
        },
        pads=True,
    )
}
PROJECTOR = "multi_modal_projector.linear_"


def rules(config: Config) -> list[Rule]:
    vision = config.mm_cfg.vision_encoder
    language = decoder_rules(config, "language_model.", "language_model.model.", "language_model.lm_head.weight")
    tower = vision_rules(vision, "vision_model.", f"vision_tower.{vision.hf_prefix}")
    return language + projector_rules(config, PROJECTOR) + tower


def projector_rules(config: Config, theirs: str) -> list[Rule]:
    """The projector's linear layers, which HF counts from 1. Of kinds that HF's LLaVA has not, only our side counts."""
    width, inner = config.hidden_size, config.mm_cfg.projector_input_size
    rules: list[Rule] = []
    if config.mm_cfg.mm_mlp_adapter_type == DOWNSAMPLE:
        rules += [rename(f"vision_projection.norm.{k}", f"{theirs}norm.{k}", (inner,)) for k in ("weight", "bias")]
    for index in range(num_linear_layers(config.mm_cfg.mm_mlp_adapter_type)):
        ours, their_layer = f"vision_projection.{index}", f"{theirs}{index + 1}"
        rules += [
            rename(f"{ours}.weight", f"{their_layer}.weight", (width, width if index else inner)),
            rename(f"{ours}.bias", f"{their_layer}.bias", (width,)),
        ]
    return rules


def vision_rules(vision: VisionConfig, ours: str, theirs: str) -> list[Rule]:
    """HF CLIPVisionModel or SiglipVisionModel."""
    clip, width, patch = vision.model_type == "clip", vision.hidden_size, vision.patch_dim
    positions = vision.num_patches + int(clip)
    embeddings = f"{theirs}embeddings"
    rules: list[Rule] = [
        rename(f"{ours}conv1.weight", f"{embeddings}.patch_embedding.weight", (width, 3, patch, patch)),
        rename(f"{ours}position_embeddings.weight", f"{embeddings}.position_embedding.weight", (positions, width)),
    ]
    if clip:
        rules.append(Reshape(f"{ours}class_token", (1, 1, width), f"{embeddings}.class_embedding", (width,)))
    else:
        rules.append(rename(f"{ours}conv1.bias", f"{embeddings}.patch_embedding.bias", (width,)))
    for kind in ("weight", "bias"):
        if clip:
            rules.append(rename(f"{ours}ln_pre.{kind}", f"{theirs}pre_layrnorm.{kind}", (width,)))  # so spelled there
        rules.append(rename(f"{ours}ln_post.{kind}", f"{theirs}post_layernorm.{kind}", (width,)))
    for layer in range(vision.num_layers):
        prefixes = f"{ours}layers.{layer}.", f"{theirs}encoder.layers.{layer}."
        rules += vision_layer_rules(*prefixes, vision.num_attention_heads, width, vision.ffn_hidden_size)
    return rules + (head_rules(vision, f"{ours}head.", f"{theirs}head.") if vision.use_head else [])


def head_rules(vision: VisionConfig, ours: str, theirs: str) -> list[Rule]:
    """HF SiglipMultiheadAttentionPoolingHead, which LLaVA does not use but its checkpoints hold."""
    width, ffn = vision.hidden_size, vision.ffn_hidden_size
    shapes = {
        "probe": (1, 1, width),
        "attention.in_proj_weight": (3 * width, width),
        "attention.in_proj_bias": (3 * width,),
        "attention.out_proj.weight": (width, width),
        "attention.out_proj.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
        "mlp.fc1.weight": (ffn, width),
        "mlp.fc1.bias": (ffn,),
        "mlp.fc2.weight": (width, ffn),
        "mlp.fc2.bias": (width,),
    }
    return [rename(ours + name, theirs + name, shape) for name, shape in shapes.items()]


def hf_config(config: Config) -> dict[str, Any]:
    """HF LlavaConfig.

    Raises:
        ConfigError: it has no place for this model.
    """
    vision = config.mm_cfg.vision_encoder
    if config.mm_cfg.mm_mlp_adapter_type != "mlp2x_gelu":
        raise ConfigError(
            f"model.mm_cfg.mm_mlp_adapter_type={config.mm_cfg.mm_mlp_adapter_type}: Hugging Face's LLaVA knows "
            "mlp2x_gelu only"
        )
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": decoder_config(config),
        "vision_config": vision_hf_config(vision),
        "image_token_index": config.mm_cfg.image_token_index,
        "image_seq_length": config.mm_cfg.num_image_tokens,
        "vision_feature_layer": vision.vision_select_layer,
        "vision_feature_select_strategy": "default" if vision.class_token_length else "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
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
    } | ({} if vision.model_type == "clip" else {"vision_use_head": vision.use_head})


def from_hf(hf: Mapping[str, Any], names: set[str], path: str) -> Config:
    """The config of an HF LlavaConfig whose defaults are filled in.

    Args:
        names: the tensors beside it, in the names of `rules`; none where they are of another format.
        path: what messages call it.
    Raises:
        ConfigError: it has something that is not built here.
    """
    text, vision = hf["text_config"], hf["vision_config"]
    if text["model_type"] not in CLASSES:
        raise ConfigError(
            f"{path}: text_config.model_type={text['model_type']} is not supported, only {', '.join(CLASSES)}"
        )
    strategy = "default" if "clip" in vision["model_type"] else "full"
    expected = {
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_select_strategy": strategy,
    }
    for key, right in expected.items():
        if hf[key] != right:
            raise ConfigError(f"{path}: {key}={hf[key]} is not supported, only {right}")
    if not isinstance(hf["vision_feature_layer"], int):
        raise ConfigError(f"{path}: vision_feature_layer={hf['vision_feature_layer']} is not supported, only one layer")
    fields = vision_from_hf(vision, {name.removeprefix("vision_tower.") for name in names}, path)
    tower = VisionConfig(**fields, vision_select_layer=hf["vision_feature_layer"])
    mm_cfg = MultimodalConfig(vision_encoder=tower, image_token_index=hf["image_token_index"])
    tied = {"share_embeddings_and_output_weights": hf["tie_word_embeddings"]}
    return Config(**decoder_fields(text, path) | tied, mm_cfg=mm_cfg)


def vision_from_hf(hf: Mapping[str, Any], names: set[str], path: str) -> dict[str, Any]:
    """VisionConfig's fields of an HF CLIPVisionConfig or SiglipVisionConfig; arguments as from_hf's."""
    if hf["model_type"] not in VISION_TYPES:
        raise ConfigError(f"{path}: vision_config.model_type={hf['model_type']} is not supported: clip, siglip")
    hf = hf.get("vision_config", hf)  # a whole CLIP
    clip = hf["model_type"].startswith("clip")
    return {
        "model_type": "clip" if clip else "siglip",
        "image_size": hf["image_size"],
        "patch_dim": hf["patch_size"],
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "activation": hf["hidden_act"],
        "layernorm_epsilon": hf["layer_norm_eps"],
        "class_token_length": int(clip),
        "use_head": any(name.endswith("head.probe") for name in names) if names else hf.get("vision_use_head", False),
        "hf_prefix": "" if names and not any(name.startswith("vision_model.") for name in names) else "vision_model.",
    }
