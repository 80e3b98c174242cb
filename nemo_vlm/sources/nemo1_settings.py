"""NeMo 1.x's model_config.yaml as our settings; what it leaves to other files is read off the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import Reader
from nemo_vlm.sources.megatron import EMBEDDINGS, HEAD

SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "encoder_seq_length",
    "max_position_embeddings",
    "rotary_base",
    "seq_len_interpolation_factor",
    "layernorm_epsilon",
    "bias",
    "qkv_bias",
    "share_embeddings_and_output_weights",
    "init_method_std",
    "make_vocab_size_divisible_by",
)
# Values that are built here; another one is refused.
SUPPORTED = {
    "activation": ("fast-swiglu", "swiglu"),
    "normalization": ("rmsnorm",),
    "position_embedding_type": ("rope",),
    "rotary_percentage": (1.0,),
}
# Settings that change what the model computes, and are not built here unless they are off, as they are by default.
OFF = {
    "apply_embedding_scaling": False,
    "apply_residual_connection_post_layernorm": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "headscale": False,
    "layernorm_zero_centered_gamma": False,
    "normalize_attention_scores": True,
    "num_moe_experts": None,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "transformer_block_type": "pre_ln",
    "window_size": None,
}
ROPE_SCALING_FACTOR = 8.0  # Llama 3.1's, which `scale_positional_embedding: true` means
VISION = ("patch_dim", "vision_select_layer", "class_token_length", "freeze")
SHAPES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "image_size")
PROJECTOR = "vision_projection.0.weight"
SO400M_WIDTH, SO400M_HEADS, HEAD_SIZE = 1152, 16, 64  # all other CLIPs and SigLIPs have heads of 64


def settings_of(saved: Mapping[str, Any], rest: Reader, tower: Reader, called: str) -> dict[str, Any]:
    """The branch `model` of our settings: family, architecture, and how NeVA puts the parts together.

    Args:
        saved: model_config.yaml.
        rest: the tensors without the vision tower's, under our names.
        tower: those, under Hugging Face's.
    Raises:
        ConfigError: something that is not built here.
    """
    for key, right in SUPPORTED.items():
        if key in saved and saved[key] not in right:
            raise ConfigError(f"{called}: model_config.yaml: {key}={saved[key]} is not supported, only {right[0]}")
    for key, default in OFF.items():
        value = None if saved.get(key) == [-1, -1] else saved.get(key)  # a window without bounds
        if value is not None and value != default and (value or default):
            raise ConfigError(f"{called}: model_config.yaml: {key}={saved[key]} is not supported, only {default}")
    tree = {key: saved[key] for key in SAME if saved.get(key) is not None}
    if saved.get("scale_positional_embedding"):
        tree["rope_scaling_factor"] = ROPE_SCALING_FACTOR
    if EMBEDDINGS in rest.names():
        tree["vocab_size"] = saved.get("override_vocab_size") or rest.shape(EMBEDDINGS)[0]
        tree["share_embeddings_and_output_weights"] = HEAD not in rest.names()
    if not isinstance(saved.get("mm_cfg"), dict):
        return {"family": "gpt", **tree}
    return {"family": "llava", **tree, "mm_cfg": multimodal(saved["mm_cfg"], rest, tower, called)}


def multimodal(mm_cfg: Mapping[str, Any], rest: Reader, tower: Reader, called: str) -> dict[str, Any]:
    """NeVA's branch mm_cfg; paths of what it was made from are dropped, they were its writer's."""
    vision = mm_cfg.get("vision_encoder") or {}
    fields = {key: vision[key] for key in (*VISION, *SHAPES) if vision.get(key) is not None}
    if PROJECTOR in rest.names():
        fields["hidden_size"] = rest.shape(PROJECTOR)[1]
        fields.setdefault("num_attention_heads", usual_heads(fields["hidden_size"]))
    if crop := vision.get("crop_size"):
        fields["image_size"] = int(crop[0])
    if "siglip" in str(vision.get("from_pretrained")).lower():
        fields |= {"model_type": "siglip", "class_token_length": 0}
    if tower.names():
        fields |= tower_shapes(tower, fields, called)
    llm = {"freeze": bool((mm_cfg.get("llm") or {}).get("freeze"))}
    made = {"llm": llm, "vision_encoder": fields}
    return made | ({"mm_mlp_adapter_type": kind} if (kind := mm_cfg.get("mm_mlp_adapter_type")) else {})


def tower_shapes(tower: Reader, known: Mapping[str, Any], called: str) -> dict[str, Any]:
    """VisionConfig's fields that the tensors of a CLIP or SigLIP tell.

    Raises:
        ConfigError: they are of something else.
    """
    front = "vision_model." if any(name.startswith("vision_model.") for name in tower.names()) else ""
    patches, positions = f"{front}embeddings.patch_embedding.weight", f"{front}embeddings.position_embedding.weight"
    layers = [name.split(".layers.")[1].split(".")[0] for name in tower.names() if ".layers." in name]
    if not {patches, positions} <= tower.names() or not layers:
        raise ConfigError(f"{called}: its vision tower is neither a CLIP nor a SigLIP of Hugging Face")
    clip = f"{front}embeddings.class_embedding" in tower.names()
    width, _, patch, _ = tower.shape(patches)
    return {
        "model_type": "clip" if clip else "siglip",
        "class_token_length": int(clip),
        "hf_prefix": front,
        "use_head": f"{front}head.probe" in tower.names(),
        "patch_dim": patch,
        "image_size": image_size(tower.shape(positions)[0] - int(clip), patch, known.get("image_size")),
        "num_layers": max(map(int, layers)) + 1,
        "hidden_size": width,
        "ffn_hidden_size": tower.shape(f"{front}encoder.layers.0.mlp.fc1.weight")[0],
        "num_attention_heads": known.get("num_attention_heads") or usual_heads(width),
    }


def usual_heads(width: int) -> int:
    """Heads of a CLIP or SigLIP of that width."""
    return SO400M_HEADS if width == SO400M_WIDTH else max(width // HEAD_SIZE, 1)


def image_size(positions: int, patch: int, saved: int | None) -> int:
    """Of images of so many patches, which need not cover them: SigLIP's 27 of 14 pixels leave some of 384."""
    if saved is not None and (saved // patch) ** 2 == positions:
        return saved
    return math.isqrt(positions) * patch
