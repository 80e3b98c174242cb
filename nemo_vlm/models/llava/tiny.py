"""A small LLaVA to prove the family on."""

from __future__ import annotations

from typing import Any

import torch

from nemo_vlm.batch import IGNORE_INDEX, Batch, Sample
from nemo_vlm.models.images import patchify, unpatchify
from nemo_vlm.models.llava.config import Config, MultimodalConfig, VisionConfig


def config() -> Config:
    """Grouped queries, a padded vocabulary, a layer of the tower that is not used."""
    vision = VisionConfig(
        image_size=32,
        patch_dim=8,
        num_layers=3,
        hidden_size=40,
        ffn_hidden_size=80,
        num_attention_heads=4,
    )
    return Config(
        num_layers=4,
        hidden_size=48,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=250,
        make_vocab_size_divisible_by=8,
        encoder_seq_length=128,
        mm_cfg=MultimodalConfig(vision_encoder=vision, image_token_index=249),
    )


def samples(config: Config, count: int, generator: torch.Generator) -> list[Sample]:
    """Random text with 1, 2, 1, 0, ... images."""
    vision, image_token = config.mm_cfg.vision_encoder, config.mm_cfg.image_token_index
    made = []
    for number in range(count):
        num_images = (1, 2, 1, 0)[number % 4]
        text = torch.randint(0, min(240, config.vocab_size), (12 + 4 * (number % 3),), generator=generator)
        text[text == image_token] = (image_token + 1) % config.vocab_size
        image = torch.full((config.mm_cfg.num_image_tokens * num_images,), image_token)
        ids = torch.cat([text[:3], image, text[3:]])
        labels = torch.where(ids == image_token, IGNORE_INDEX, ids)[1:]
        pixels = torch.randn(num_images, 3, vision.image_size, vision.image_size, generator=generator)
        made.append(Sample(ids[:-1], labels, patchify(list(pixels), vision.patch_dim)))
    return made


def hf_inputs(config: Config, batch: Batch) -> dict[str, Any]:
    """The arguments of the Hugging Face class's forward."""
    views = unpatchify(batch.images.normalised())
    return {"input_ids": batch.tokens} | ({"pixel_values": torch.stack(views)} if views else {})
