"""A language model alone."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_vlm.config import LanguageConfig


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Llama: the language model's settings are all there is."""


def tiny() -> Config:
    """A model for tests: grouped queries, heads x head size != hidden size, a vocabulary that needs padding."""
    return Config(
        num_layers=4,
        hidden_size=48,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=250,
        make_vocab_size_divisible_by=8,
        encoder_seq_length=128,
    )
