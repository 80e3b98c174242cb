"""Samples of the families that see in any resolution, to prove them on: random text, images and videos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.batch import IGNORE_INDEX, Batch, Images, Sample
from nemo_vlm.config.dynamic import DynamicConfig
from nemo_vlm.models.positions import mrope_positions

Grid = tuple[int, int, int]
# What samples see, in turn: the patches of each view in time, height and width; more than one in time is a video.
VIEWS: tuple[tuple[Grid, ...], ...] = (
    ((1, 4, 6), (1, 2, 2)),
    ((6, 2, 4),),  # longer than it is high or wide
    (),
    ((2, 4, 2), (1, 2, 4), (1, 4, 4)),
)
WORDS = 240  # ids from here on are not drawn


def samples(config: DynamicConfig, count: int, generator: torch.Generator) -> list[Sample]:
    """Random text with two images, a video, nothing, a video before two images, ..."""
    made = []
    for number in range(count):
        views = VIEWS[number % len(VIEWS)]
        text = words(config, 12 + 4 * (number % 3), generator)
        pieces = [text[:3]]
        for place, view in enumerate(views):
            pieces += [*view_tokens(config, view, generator), text[3 + place : 4 + place]]
        ids = torch.cat([*pieces, text[3 + len(views) :]])
        labels = ids.masked_fill(torch.isin(ids, torch.tensor(config.mm_cfg.placeholder_ids)), IGNORE_INDEX)[1:]
        patch_values = config.mm_cfg.vision_encoder.patch_values
        made.append(Sample(ids[:-1], labels, random_views(views, patch_values, generator)))
    return made


def words(config: DynamicConfig, count: int, generator: torch.Generator) -> Tensor:
    text = torch.randint(0, min(WORDS, config.vocab_size or 0), (count,), generator=generator)
    return text.masked_fill(torch.isin(text, torch.tensor(config.mm_cfg.placeholder_ids)), 0)


def view_tokens(config: DynamicConfig, view: Grid, generator: torch.Generator) -> list[Tensor]:
    """An image's or a video's placeholders with what stands around them: where frames are apart, before each a word."""
    (time, height, width), mm = view, config.mm_cfg
    start, end = (torch.tensor([index]) for index in (mm.vision_start_token_index, mm.vision_end_token_index))
    token = config.mm_cfg.placeholder_ids[int(time > 1)]
    apart = config.frames_apart and time > 1
    tokens = time * height * width // mm.vision_encoder.spatial_merge_size**2
    run = torch.full((tokens // time if apart else tokens,), token)
    if not apart:
        return [start, run, end]
    return [piece for _ in range(time) for piece in (words(config, 1, generator), start, run, end)]


def random_views(views: Sequence[Grid], patch_values: int, generator: torch.Generator) -> Images:
    if not views:
        return Images()
    patches = torch.randn(sum(map(math.prod, views)), patch_values, generator=generator)
    return Images(patches, torch.tensor(views))


def hf_inputs(config: DynamicConfig, batch: Batch) -> dict[str, Any]:
    """The arguments of the Hugging Face class's forward, which takes images and videos apart; with our positions."""
    merge_size, (image, video) = config.mm_cfg.vision_encoder.spatial_merge_size, config.mm_cfg.placeholder_ids
    tokens = batch.tokens.cpu()
    placeholders = tokens[torch.isin(tokens, torch.tensor([image, video]))]
    patches = batch.images.image_grid_thw.prod(1)
    firsts = (patches.cumsum(0) - patches) // merge_size**2
    inputs: dict[str, Any] = {
        "input_ids": batch.tokens,
        "position_ids": mrope_positions(batch, config.mm_cfg.placeholder_ids, merge_size, config.frames_apart),
        "mm_token_type_ids": (batch.tokens == image).int() + 2 * (batch.tokens == video).int(),
    }
    for token, pixels, grid in ((image, "", "image"), (video, "_videos", "video")):
        if (chosen := placeholders[firsts] == token).any():
            inputs |= {f"pixel_values{pixels}": pixels_of(batch.images, chosen)}
            inputs |= {f"{grid}_grid_thw": batch.images.image_grid_thw[chosen]}
    return inputs


def pixels_of(images: Images, chosen: Tensor) -> Tensor:
    """The patches of those views."""
    return images.normalised().pixel_values[chosen.repeat_interleave(images.image_grid_thw.prod(1))]
