"""A small Qwen3-VL to prove the family on."""

from __future__ import annotations

from dataclasses import replace

from nemo_vlm.config.dynamic import DynamicMediaConfig
from nemo_vlm.models.dynamic_samples import hf_inputs, samples
from nemo_vlm.models.qwen3_vl.config import TOWER, Config

__all__ = ["config", "hf_inputs", "samples"]

IMAGE, VIDEO, START, END = range(246, 250)


def config() -> Config:
    """A mixture of experts; heads x head size != hidden size, positions that most views interpolate, the last tapped.

    No matrix of an expert is square: the two layouts of its files tell each other apart by their shapes.
    """
    vision = replace(
        TOWER,
        num_layers=4,
        hidden_size=48,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_position_embeddings=16,
        deepstack_visual_indexes=(0, 1, 3),
    )
    placeholders = DynamicMediaConfig(
        vision_encoder=vision,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_start_token_index=START,
        vision_end_token_index=END,
    )
    return Config(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_moe_experts=4,
        moe_ffn_hidden_size=48,
        moe_router_topk=2,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=32,
        qk_layernorm=True,
        vocab_size=250,
        make_vocab_size_divisible_by=8,
        encoder_seq_length=128,
        rotary_base=5e6,
        layernorm_epsilon=1e-6,
        mm_cfg=placeholders,
    )
