"""A small language model to prove the family on."""

from __future__ import annotations

from typing import Any

import torch

from nemo_vlm.batch import Batch, Images, Sample
from nemo_vlm.models.gpt.config import Config


def config() -> Config:
    """Grouped queries, heads x head size != hidden size, a vocabulary that needs padding."""
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


def samples(config: Config, count: int, generator: torch.Generator) -> list[Sample]:
    """Random text of several lengths."""
    vocabulary = min(240, config.vocab_size)
    rows = [torch.randint(0, vocabulary, (20 + 4 * (i % 3),), generator=generator) for i in range(count)]
    return [Sample(row[:-1], row[1:], Images()) for row in rows]


def hf_inputs(config: Config, batch: Batch) -> dict[str, Any]:
    """The arguments of the Hugging Face class's forward."""
    return {"input_ids": batch.tokens}
