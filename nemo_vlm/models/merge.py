"""Vision features at placeholder positions: the seam of every vision-language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(embeddings: Tensor, tokens: Tensor, features: Tensor, placeholder_ids: Sequence[int]) -> Tensor:
    """Put features where the tokens say so, sample by sample, in order.

    Args:
        embeddings: [s, b, h] word embeddings.
        tokens: [b, s].
        features: [n, h], one for each placeholder in the batch, whichever it is.
    Returns:
        [s, b, h].
    Raises:
        ValueError: the counts differ.
    """
    mask = torch.isin(tokens, torch.tensor(placeholder_ids, device=tokens.device))
    count = int(mask.sum())
    if count != len(features):
        raise ValueError(f"{count} placeholders of images and videos in the tokens, {len(features)} vision features")
    by_sample = embeddings.transpose(0, 1)
    return by_sample.masked_scatter(mask.unsqueeze(-1), features.to(embeddings.dtype)).transpose(0, 1).contiguous()
