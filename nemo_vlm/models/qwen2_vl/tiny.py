"""A small Qwen2-VL to prove the family on."""

from __future__ import annotations

from nemo_vlm.config.dynamic import DynamicMediaConfig, DynamicVisionConfig
from nemo_vlm.models.dynamic_samples import hf_inputs, samples
from nemo_vlm.models.qwen2_vl.config import Config

__all__ = ["config", "hf_inputs", "samples"]

IMAGE, VIDEO, START, END = range(246, 250)


def config() -> Config:
    """Grouped queries, a padded vocabulary, patches of the real size."""
    vision = DynamicVisionConfig(num_layers=2, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4)
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
        num_attention_heads=4,
        num_query_groups=2,
        qkv_bias=True,
        vocab_size=250,
        make_vocab_size_divisible_by=8,
        encoder_seq_length=128,
        rotary_base=1e6,
        layernorm_epsilon=1e-6,
        mm_cfg=placeholders,
    )
