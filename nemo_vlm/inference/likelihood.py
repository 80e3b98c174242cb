"""Multiple choice: how likely a model finds each option as the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_vlm import heartbeat
from nemo_vlm.batch import Sample, collate
from nemo_vlm.mcore.inference import Forward
from nemo_vlm.models.conversation import options, turns


def choices(record: Mapping[str, Any]) -> list[str]:
    """The answers that a record leaves the choice of: its field `choices`, or the options that its question lists.

    Those are meant by their letters where the right answer is one of these, else by their texts. None of a question
    without at least two.
    """
    if isinstance(record.get("choices"), list):
        return [str(choice) for choice in record["choices"]]
    first = turns(record)[0]
    _, listed = options(first.question)
    return list(listed) if first.answer in listed else list(listed.values())


def log_likelihoods(forward: Forward, prompts: Sequence[Sample], options: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """For each prompt the log-likelihood of each of its options, of all tokens together; prompts are read once.

    Args:
        options: token ids of what may follow each prompt, one or more each.
    """
    heartbeat.at("reading prompts")
    longest = [max(len(option) for option in found) for found in options]
    capacity = max(len(prompt.tokens) + length for prompt, length in zip(prompts, longest, strict=True))
    cache, logits = forward.start(collate(list(prompts)), capacity)
    counts, rows = [len(found) for found in options], [option for found in options for option in found]
    cache, logits = cache.repeated(counts), logits.repeat_interleave(torch.tensor(counts, device=logits.device), 0)
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for place in range(tokens.shape[1]):
        heartbeat.at("scoring options")
        logprobs = logits.cpu().double().log_softmax(-1).gather(1, tokens[:, place : place + 1])[:, 0]
        total += logprobs.where(lengths > place, 0)
        if place + 1 < tokens.shape[1]:
            logits = forward.step(cache, tokens[:, place], lengths > place + 1)
    return list(total.split(counts))
