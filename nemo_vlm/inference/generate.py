"""Greedy generation; every rank makes the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from nemo_vlm import heartbeat
from nemo_vlm.batch import Batch, Sample, join


def greedy(
    last: Callable[[Batch], Tensor], prompts: list[Sample], limit: int, stop_ids: Collection[int] = ()
) -> list[Tensor]:
    """The most likely continuation of each prompt.

    Prompts are padded on the right and grow at their own ends: causal attention never sees the padding.

    Args:
        last: logits [b, vocab_size] behind the last token of each sample of a batch, as Forward.last.
        limit: the most tokens to generate.
        stop_ids: any of these tokens ends a row.
    Returns:
        for each prompt its new tokens, the one that ended it included.
    """
    lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
    starts, rows = lengths.clone(), torch.arange(len(prompts))
    tokens = torch.zeros(len(prompts), int(lengths.max()) + limit, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = prompt.tokens
    images, stops = join(prompt.images for prompt in prompts), torch.tensor(sorted(stop_ids), dtype=torch.int64)
    running = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(limit):
        heartbeat.at("generation")
        visible = tokens[:, : int(lengths.max())]
        chosen = last(Batch(visible, visible, lengths, images, torch.full_like(lengths, -1))).argmax(-1).cpu()
        tokens[rows[running], lengths[running]] = chosen[running]
        lengths += running
        running &= ~torch.isin(chosen, stops)
        if not running.any():
            break
    return [tokens[row, start:end] for row, (start, end) in enumerate(zip(starts, lengths, strict=True))]
