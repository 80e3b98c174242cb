"""From logits to the next token of each row: Hugging Face's logits processors, in the order of its generate."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

NEVER = float("-inf")


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that a row has had already less likely (HF RepetitionPenaltyLogitsProcessor; arXiv:1909.05858).

    Args:
        logits: [b, vocab_size].
        seen: [b, s] int64, tokens of each row, its prompt's too; any may stand more than once.
    """
    scores = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def forbid(logits: Tensor, rows: Tensor, tokens: list[int]) -> Tensor:
    """These tokens are not to be chosen in the rows [b] bool (HF MinNewTokensLengthLogitsProcessor, of EOS)."""
    hidden = torch.zeros_like(logits, dtype=torch.bool)
    hidden[:, tokens] = rows[:, None]
    return logits.masked_fill(hidden, NEVER)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """The k most likely tokens, and those as likely as the last of them (HF TopKLogitsWarper)."""
    least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, NEVER)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The fewest most likely tokens whose probabilities add up to p, one at least (HF TopPLogitsWarper)."""
    ordered, order = logits.sort()
    left_out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    left_out[:, -1] = False
    return logits.masked_fill(torch.zeros_like(left_out).scatter(1, order, left_out), NEVER)


def draw(logits: Tensor, seed: int, places: list[tuple[int, int]]) -> Tensor:
    """A token [b] for each row, drawn with the probabilities that the logits [b, vocab_size] say.

    A draw depends on its seed and its place alone, so on no other row of the batch, and on no rank.

    Args:
        places: of each row: the number of its prompt, and of the token in its answer.
    """
    probabilities = logits.double().softmax(-1)
    points = torch.tensor([numpy.random.default_rng([seed, *place]).random() for place in places], dtype=torch.float64)
    reached = probabilities.cumsum(-1)
    chosen = torch.searchsorted(reached, points[:, None] * reached[:, -1:], right=True)[:, 0]
    last = logits.shape[-1] - 1 - probabilities.flip(-1).ne(0).int().argmax(-1)  # rounding must lead to none behind
    return torch.minimum(chosen, last)
