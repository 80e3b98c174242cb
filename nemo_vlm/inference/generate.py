"""Generation: one pass over the prompts, then one token a step for all rows; all ranks of a copy agree on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from nemo_vlm import heartbeat
from nemo_vlm.batch import Batch, Sample, collate
from nemo_vlm.inference import sampling
from nemo_vlm.inference.settings import DecodingConfig

BYTES_BESIDE = 4  # of special tokens and broken characters at the borders of what is searched for an end string
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are no whole character


@dataclass(frozen=True)
class Answer:
    """What followed a prompt.

    Attributes:
        tokens: [n] int64, the one that ended it included.
        end_string: the end string that these tokens completed; None: EOS or the limit has ended it.
        finish_reason: "stop" where EOS or an end string has ended it, "length" where its limit has.
        logprob: [n] float32 of its tokens, or None.
        full_logprob: [n, vocab_size] float32, or None.
    """

    tokens: Tensor
    end_string: str | None = None
    finish_reason: Literal["stop", "length"] = "stop"
    logprob: Tensor | None = None
    full_logprob: Tensor | None = None

    def text(self, tokenizer: Any) -> str:
        """Without special tokens, and without the end string, which the last token has completed."""
        if self.end_string is None:
            return tokenizer.decode(self.tokens, skip_special_tokens=True)
        return text_before(self.tokens, completed(self.tokens, self.end_string, tokenizer), tokenizer)


def completed(tokens: Tensor, string: str, tokenizer: Any) -> int:
    """Where in the tokens' text the string stands that the last of them completes; -1: it completes none."""
    before = tokenizer.decode(tokens[:-1]).rstrip(BROKEN)
    return tokenizer.decode(tokens).find(string, max(len(before) - len(string) + 1, 0))


def text_before(tokens: Tensor, place: int, tokenizer: Any) -> str:
    """The first `place` characters of the tokens' whole text, less the special tokens there."""
    count, whole = len(tokens), tokenizer.decode(tokens)
    while count and len(tokenizer.decode(tokens[:count])) > place:
        count -= 1
    special = count < len(tokens) and not tokenizer.decode(tokens[count : count + 1], skip_special_tokens=True)
    part_of_token = "" if special else whole[len(tokenizer.decode(tokens[:count])) : place]
    return tokenizer.decode(tokens[:count], skip_special_tokens=True) + part_of_token


@dataclass(frozen=True)
class Ends:
    """What ends an answer before its limit: any of some tokens, or any of some strings."""

    stop_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    tokenizer: Any = None

    def string(self, tokens: Tensor) -> str | None:
        """The end string that the last of these tokens completes: the first of several, the longest in its place."""
        if not self.strings:
            return None
        most = max(len(string.encode()) for string in self.strings) + BYTES_BESIDE  # a token has a byte at least
        tail = tokens[-most:]
        text = self.tokenizer.decode(tail)
        places = {string: completed(tail, string, self.tokenizer) for string in self.strings if string in text}
        found = [(place, -len(string), string) for string, place in places.items() if place >= 0]
        return min(found)[-1] if found else None


@dataclass
class Row:
    """An answer in the making.

    Attributes:
        number: of its prompt among all, which draws depend on.
        limit: the most tokens of the answer.
    """

    prompt: Tensor
    number: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    end_string: str | None = None
    running: bool = True
    finish_reason: Literal["stop", "length"] = "length"

    def take(self, token: int, ends: Ends, least: int) -> None:
        """The next token, and whether it is the last."""
        self.tokens.append(token)
        if ends.strings and len(self.tokens) > least:
            self.end_string = ends.string(torch.tensor(self.tokens))
        if self.end_string is not None or token in ends.stop_ids:
            self.running, self.finish_reason = False, "stop"
        elif len(self.tokens) == self.limit:
            self.running = False


class Decoder(Protocol):
    """What takes tokens and gives logits, the same on every rank of a copy: mcore.inference.Forward, or its like."""

    def start(self, batch: Batch, capacity: int) -> tuple[Any, Tensor]:
        """Read prompts: a cache for rows of so many tokens at most, and the logits [b, vocab_size] of what follows."""
        ...

    def step(self, cache: Any, tokens: Tensor, longer: Tensor) -> Tensor:
        """Put one token [b] behind each row, to stay in those that are `longer` [b] bool; [b, vocab_size] as above."""
        ...


Heard = Callable[[Sequence[Row]], None]


def unheard(rows: Sequence[Row]) -> None:
    """Nobody listens."""


def generate(
    forward: Decoder,
    prompts: Sequence[Sample],
    limits: Sequence[int],
    settings: DecodingConfig,
    ends: Ends,
    numbers: Sequence[int],
    heard: Heard = unheard,
) -> list[Answer]:
    """Continue each prompt.

    Args:
        limits: the most tokens for each, 1 or more.
        numbers: of the prompts among all; draws depend on them.
        heard: is told the rows whenever those that still ran have got a token, first when the prompts are read.
    """
    assert min(limits) >= 1
    numbered = zip(prompts, numbers, limits, strict=True)
    rows = [Row(prompt.tokens, number, limit) for prompt, number, limit in numbered]
    heartbeat.at("reading prompts")
    capacity = max(len(row.prompt) + row.limit for row in rows)
    cache, logits = forward.start(collate(list(prompts)), capacity)
    while True:
        heartbeat.at("generation")
        chosen = choose(logits, rows, settings, ends)
        keep_logprobs(logits, chosen, rows, settings)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row.running:
                row.take(token, ends, settings.min_tokens_to_generate)
        heard(rows)
        running = [row.running for row in rows]
        if not any(running):
            return [answer_of(row, settings) for row in rows]
        logits = forward.step(cache, chosen, torch.tensor(running))


def choose(logits: Tensor, rows: Sequence[Row], settings: DecodingConfig, ends: Ends) -> Tensor:
    """The next token [b] of each row; on the CPU, where sums are the same on every rank and in every run."""
    early = [len(row.tokens) < settings.min_tokens_to_generate for row in rows]
    if settings.repetition_penalty == 1 and not any(early) and settings.greedy:
        return logits.max(-1).indices.cpu()  # on a CPU a third of the time that argmax takes
    logits = logits.cpu()
    if settings.repetition_penalty != 1:
        logits = sampling.penalize(logits, seen(rows), settings.repetition_penalty)
    if any(early):
        logits = sampling.forbid(logits, torch.tensor(early), sorted(ends.stop_ids))
    if settings.greedy:
        return logits.argmax(-1)
    logits = logits / settings.temperature
    if settings.top_k:
        logits = sampling.keep_top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = sampling.keep_top_p(logits, settings.top_p)
    return sampling.draw(logits, settings.seed, [(row.number, len(row.tokens)) for row in rows])


def seen(rows: Sequence[Row]) -> Tensor:
    """[b, s] tokens of prompts and answers so far; shorter rows repeat their first."""
    had = [torch.cat([row.prompt, torch.tensor(row.tokens, dtype=torch.int64)]) for row in rows]
    width = max(len(one) for one in had)
    return torch.stack([torch.cat([one, one[:1].expand(width - len(one))]) for one in had])


def keep_logprobs(logits: Tensor, chosen: Tensor, rows: Sequence[Row], settings: DecodingConfig) -> None:
    """As the model has them: before penalty, temperature and the like."""
    if not (settings.compute_logprob or settings.all_probs):
        return
    logprobs = logits.cpu().log_softmax(-1)
    if not settings.all_probs:
        logprobs = logprobs.gather(1, chosen[:, None])
    for row, logprob in zip(rows, logprobs, strict=True):
        if row.running:
            row.logprobs.append(logprob)


def answer_of(row: Row, settings: DecodingConfig) -> Answer:
    tokens = torch.tensor(row.tokens)
    full = torch.stack(row.logprobs) if settings.all_probs else None
    logprob = None
    if settings.compute_logprob:
        logprob = full.gather(1, tokens[:, None])[:, 0] if full is not None else torch.cat(row.logprobs)
    return Answer(tokens, row.end_string, row.finish_reason, logprob, full)
