"""A small Qwen2-VL to prove the family on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.batch import IGNORE_INDEX, Batch, Images, Sample
from nemo_vlm.models.positions import mrope_positions
from nemo_vlm.models.qwen2_vl.config import Config, MultimodalConfig, VisionConfig

IMAGE, VIDEO, START, END = range(246, 250)
# What samples see, in turn: the patches of each view in time, height and width; more than one in time is a video.
VIEWS = (
    ((1, 4, 6), (1, 2, 2)),
    ((6, 2, 4),),  # longer than it is high or wide
    (),
    ((2, 4, 2), (1, 2, 4), (1, 4, 4)),
)


def config() -> Config:
    """Grouped queries, a padded vocabulary, patches of the real size."""
    vision = VisionConfig(num_layers=2, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4)
    placeholders = MultimodalConfig(
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


def samples(config: Config, count: int, generator: torch.Generator) -> list[Sample]:
    """Random text with two images, a video, nothing, a video before two images, ..."""
    mm, made = config.mm_cfg, []
    for number in range(count):
        views = VIEWS[number % len(VIEWS)]
        text = torch.randint(0, min(240, config.vocab_size or 0), (12 + 4 * (number % 3),), generator=generator)
        text[torch.isin(text, torch.tensor(config.placeholder_ids))] = 0
        pieces = [text[:3]]
        for place, (time, height, width) in enumerate(views):
            token = mm.video_token_index if time > 1 else mm.image_token_index
            tokens = time * height * width // mm.vision_encoder.spatial_merge_size**2
            around = [torch.tensor([index]) for index in (mm.vision_start_token_index, mm.vision_end_token_index)]
            pieces += [around[0], torch.full((tokens,), token), around[1], text[3 + place : 4 + place]]
        ids = torch.cat([*pieces, text[3 + len(views) :]])
        labels = ids.masked_fill(torch.isin(ids, torch.tensor(config.placeholder_ids)), IGNORE_INDEX)[1:]
        made.append(Sample(ids[:-1], labels, random_views(views, mm.vision_encoder.patch_values, generator)))
    return made


def random_views(views: tuple[tuple[int, int, int], ...], patch_values: int, generator: torch.Generator) -> Images:
    if not views:
        return Images()
    patches = torch.randn(sum(map(math.prod, views)), patch_values, generator=generator)
    return Images(patches, torch.tensor(views))


def hf_inputs(config: Config, batch: Batch) -> dict[str, Any]:
    """The arguments of the Hugging Face class's forward, which takes images and videos apart; with our positions."""
    merge_size, (image, video) = config.mm_cfg.vision_encoder.spatial_merge_size, config.placeholder_ids
    tokens = batch.tokens.cpu()
    placeholders = tokens[torch.isin(tokens, torch.tensor([image, video]))]
    patches = batch.images.image_grid_thw.prod(1)
    firsts = (patches.cumsum(0) - patches) // merge_size**2
    inputs: dict[str, Any] = {
        "input_ids": batch.tokens,
        "position_ids": mrope_positions(batch, config.placeholder_ids, merge_size),
        "mm_token_type_ids": (batch.tokens == image).int() + 2 * (batch.tokens == video).int(),
    }
    for token, pixels, grid in ((image, "", "image"), (video, "_videos", "video")):
        if (chosen := placeholders[firsts] == token).any():
            inputs |= {f"pixel_values{pixels}": pixels_of(batch.images, chosen)}
            inputs |= {f"{grid}_grid_thw": batch.images.image_grid_thw[chosen]}
    return inputs


def pixels_of(images: Images, chosen: Tensor) -> Tensor:
    """The patches of those views."""
    return images.pixel_values[chosen.repeat_interleave(images.image_grid_thw.prod(1))]
