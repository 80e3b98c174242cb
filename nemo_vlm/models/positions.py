"""Rotary positions with an axis each for time, height and width: M-RoPE of Qwen2-VL (arXiv:2409.12191, section 2.1).

Qwen3-VL writes the time of each frame of a video into the text before it, so its views are single frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_vlm.batch import Batch


def mrope_positions(
    batch: Batch, placeholder_ids: Sequence[int], merge_size: int, frames_apart: bool = False
) -> Tensor:
    """The position of each token of each sample, by the rule of get_rope_index in transformers 4.57.

    Text counts on, the same on all axes. A view's tokens stand at the place where it begins, plus their time, row and
    column among the merged patches; the text behind it goes on behind the largest of these. (transformers 5 goes on
    behind the larger of height and width, whatever the time: it is wrong for long videos.)

    Args:
        placeholder_ids: the tokens that stand for features of views.
        merge_size: patches along an edge of the block that a token stands for.
        frames_apart: what stands at each time of a video is a view of its own, with text between them.
    Returns:
        [3, b, s] int64 on the device of the tokens, from 0 in each sample. They are made where the tokens are at hand.
    """
    device, batch = batch.tokens.device, batch.at_hand
    tokens = batch.tokens
    steps, offsets = torch.ones_like(tokens), tokens.new_zeros(3, *tokens.shape)
    if len(batch.images):
        grids = batch.images.image_grid_thw
        advances, places = view_tokens(single_frames(grids) if frames_apart else grids, merge_size)
        seen = torch.isin(tokens, torch.tensor(placeholder_ids, device=tokens.device))
        # A count that is wrong is told of by models.merge
        numbers = (seen.flatten().cumsum(0) - 1).clamp(0, len(advances) - 1).view(tokens.shape)
        steps = torch.where(seen, advances.to(tokens.device)[numbers], 1)
        offsets = torch.where(seen, places.to(tokens.device)[:, numbers], 0)
    before = steps.flatten().cumsum(0).view(tokens.shape) - steps
    starts = first_tokens(batch).to(tokens.device)
    return (before - before.flatten()[starts] + offsets).to(device, non_blocking=True)


def single_frames(grids: Tensor) -> Tensor:
    """[views, 3] -> [frames, 3], each with a time of 1."""
    frames = grids.repeat_interleave(grids[:, 0], 0)
    return torch.cat([torch.ones_like(frames[:, :1]), frames[:, 1:]], 1)


def view_tokens(grids: Tensor, merge_size: int) -> tuple[Tensor, Tensor]:
    """What each token of the views does to positions, in their order.

    Args:
        grids: [views, 3] on the CPU.
    Returns:
        [tokens], by how much positions grow behind it: at the last of a view by the longest of its axes, else not at
        all; [3, tokens], its place in its view in time, height and width.
    """
    merged = grids // torch.tensor([1, merge_size, merge_size])
    sizes = merged.prod(1)
    advances = torch.zeros(int(sizes.sum()), dtype=torch.int64)
    advances[sizes.cumsum(0) - 1] = merged.amax(1)
    places = [torch.cartesian_prod(*map(torch.arange, grid)) for grid in merged.tolist()]
    return advances, torch.cat(places).T


def first_tokens(batch: Batch) -> Tensor:
    """[b, s] on the CPU: where the sample of each position begins in the flattened batch."""
    if batch.packed:
        firsts = batch.lengths.cumsum(0) - batch.lengths
    else:
        firsts = torch.arange(len(batch.tokens)) * batch.tokens.shape[1]
    return firsts[batch.segments]
