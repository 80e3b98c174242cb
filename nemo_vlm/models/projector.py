"""From the vision tower's width to the language model's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_vlm.config.dynamic import DynamicConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.mcore.config import BuildContext
from nemo_vlm.mcore.mlp import LinearStack, Mergers
from nemo_vlm.models.adapter import DOWNSAMPLE, num_linear_layers


def build_projector(kind: str, in_size: int, out_size: int, build: BuildContext) -> nn.Module:
    count = num_linear_layers(kind)
    if count == 0:
        if in_size != out_size:
            raise ConfigError(f"model.mm_cfg.mm_mlp_adapter_type=identity: widths differ, {in_size} and {out_size}")
        return nn.Identity()
    if kind == DOWNSAMPLE:
        return LinearStack([4 * in_size] + [out_size] * count, build, norm_size=4 * in_size)
    return LinearStack([in_size] + [out_size] * count, build)


def build_merger(config: DynamicConfig, build: BuildContext, joined_first: bool = False) -> LinearStack:
    """HF's PatchMerger: patches are normalised, those of a block joined, and projected.

    Args:
        joined_first: they are joined and then normalised, as for DeepStack.
    """
    vision, joined = config.mm_cfg.vision_encoder, config.mm_cfg.projector_input_size
    norm_size = joined if joined_first else vision.hidden_size
    return LinearStack([joined, joined, config.hidden_size], build, norm_size, vision.layernorm_epsilon)


def build_mergers(config: DynamicConfig, build: BuildContext) -> Mergers:
    """Qwen3-VL's: of the tower's last layer, and for DeepStack."""
    deepstack = [build_merger(config, build, joined_first=True) for _ in range(config.deepstack_layers)]
    return Mergers(build_merger(config, build), deepstack)


def fuse_neighbours(features: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Features [patches, h] of views -> [about a quarter, 4 h]: each 2 x 2 patches become one, odd edges padded by 0.

    They come column by column, as VILA's DownSampleBlock has them, so that its weights go on to work.
    """
    fused = []
    sizes = [math.prod(grid) for grid in grids]
    for view, (_, rows, columns) in zip(features.split(sizes), grids, strict=True):
        square = F.pad(view.view(rows, columns, -1), (0, 0, 0, columns % 2, 0, rows % 2))
        blocks = square.unflatten(1, (-1, 2)).unflatten(0, (-1, 2))  # [rows / 2, 2, columns / 2, 2, h]
        fused.append(blocks.permute(2, 0, 1, 3, 4).flatten(2).flatten(0, 1))
    return torch.cat(fused)
