"""Greedy generation in one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nemo_vlm.batch import Batch, Sample
from nemo_vlm.mcore import cpu


@torch.no_grad()
def greedy(model: nn.Module, prompts: list[Sample], limit: int, stop_id: int | None) -> list[Tensor]:
    """The most likely continuation of each prompt.

    Prompts are padded on the right and grow at their own ends: causal attention never sees the padding.

    Args:
        limit: the most tokens to generate.
        stop_id: generation of a row ends behind this token.
    Returns:
        for each prompt its new tokens, without the stop token.
    """
    lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
    starts, rows = lengths.clone(), torch.arange(len(prompts))
    tokens = torch.zeros(len(prompts), int(lengths.max()) + limit, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = prompt.tokens
    images = torch.cat([prompt.images for prompt in prompts])
    running = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(limit):
        visible = tokens[:, : int(lengths.max())]
        batch = Batch(visible, visible, lengths, images, torch.full_like(lengths, -1)).to(cpu.device())
        chosen = model(batch)[rows, lengths - 1].argmax(-1).cpu()
        if stop_id is not None:
            running &= chosen != stop_id
        if not running.any():
            break
        tokens[rows[running], lengths[running]] = chosen[running]
        lengths += running
    return [tokens[row, start:end] for row, (start, end) in enumerate(zip(starts, lengths, strict=True))]
