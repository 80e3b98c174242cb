"""Vision features at placeholder positions: the seam of every vision-language model."""

from __future__ import annotations

from torch import Tensor


def merge(embeddings: Tensor, tokens: Tensor, features: Tensor, placeholder_id: int) -> Tensor:
    """Put features where the tokens say so, sample by sample, in order.

    Args:
        embeddings: [s, b, h] word embeddings.
        tokens: [b, s].
        features: [n, h], one for each placeholder in the batch.
    Returns:
        [s, b, h].
    Raises:
        ValueError: the counts differ.
    """
    mask = tokens == placeholder_id
    count = int(mask.sum())
    if count != len(features):
        raise ValueError(f"{count} image placeholders in the tokens, {len(features)} vision features")
    by_sample = embeddings.transpose(0, 1)
    return by_sample.masked_scatter(mask.unsqueeze(-1), features.to(embeddings.dtype)).transpose(0, 1).contiguous()
