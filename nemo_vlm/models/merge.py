"""Vision features at placeholder positions: the seam of every vision-language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def merge(embeddings: Tensor, tokens: Tensor, features: Tensor, placeholder_ids: Sequence[int]) -> Tensor:
    """Put features where the tokens say so, sample by sample, in order.

    Args:
        embeddings: [s, b, h] word embeddings.
        tokens: [b, s], on the CPU where they are known there, so that their count waits for no device.
        features: [n, w], one for each placeholder in the batch, whichever it is; w is h or more.
    Returns:
        [s, b, w]; behind word embeddings stand zeros.
    Raises:
        ValueError: the counts differ.
    """
    mask = torch.isin(tokens, torch.tensor(placeholder_ids, device=tokens.device))
    count = int(mask.sum())
    if count != len(features):
        raise ValueError(f"{count} placeholders of images and videos in the tokens, {len(features)} vision features")
    behind = features.shape[-1] - embeddings.shape[-1]
    mask = mask.to(embeddings.device, non_blocking=True)
    by_sample = (F.pad(embeddings, (0, behind)) if behind else embeddings).transpose(0, 1)
    return by_sample.masked_scatter(mask.unsqueeze(-1), features.to(embeddings.dtype)).transpose(0, 1).contiguous()
