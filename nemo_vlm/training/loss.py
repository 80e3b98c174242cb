"""How token losses become the loss of a global batch.

Every reduction is a weighted sum over tokens divided by a weight that is summed over the global batch, so gradients do
not depend on accumulation or data-parallel size. `token` and `sample` do not depend on the micro-batch size either, nor
on packing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_vlm.batch import IGNORE_INDEX, Batch


def token_mean(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses [b, s] -> (their sum over trained tokens, the number of trained tokens)."""
    mask = batch.labels != IGNORE_INDEX
    return (losses * mask).sum(), mask.sum()


def sample_mean(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses [b, s] -> (sum of the samples' means, the number of samples with a trained token)."""
    mask = batch.labels != IGNORE_INDEX
    segments = batch.segments.flatten().to(losses.device, non_blocking=True)
    counts, sums = (
        torch.zeros(len(batch.lengths), dtype=values.dtype, device=values.device).index_add(0, segments, values)
        for values in (mask.flatten().long(), (losses * mask).flatten())
    )
    return (sums / counts.clamp(min=1)).sum(), (counts > 0).sum()


def micro_batch_mean(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses [b, s] -> (the mean over the micro-batch's trained tokens, 1): Megatron's default."""
    total, count = token_mean(losses, batch)
    return total / count.clamp(min=1), torch.ones_like(count)


REDUCTIONS: dict[str, Callable[[Tensor, Batch], tuple[Tensor, Tensor]]] = {
    "token": token_mean,
    "sample": sample_mean,
    "micro_batch": micro_batch_mean,
}
