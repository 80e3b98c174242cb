"""Conversations as text, and which of its tokens are trained on.

A template turns a conversation into segments; the whole text is tokenized once, and a token counts as trained where it
begins in a trained segment. So the mask does not depend on how a tokenizer treats the borders of segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.batch import HUMANS, IGNORE_INDEX, IMAGE_TAG
from nemo_vlm.errors import ConfigError

Segment = tuple[str, bool]  # text, trained

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Turn:
    """One question and its answer; None where the answer is to be generated."""

    question: str
    answer: str | None


def plain(turns: Sequence[Turn], system: str | None, end: str) -> list[Segment]:
    """LLaVA's pretraining: the image, then its caption; the question's text is left out."""
    if len(turns) != 1:
        raise ConfigError(f"model.data.conv_template=plain: for one caption, a record has {len(turns)} turns")
    return [
        (IMAGE_TAG * turns[0].question.count(IMAGE_TAG), False),
        (answer(turns[0], "", "\n"), True),
    ]


def v1(turns: Sequence[Turn], system: str | None, end: str) -> list[Segment]:
    """Vicuna 1.1 in NeMo's form: a space between the end of an answer and the next question."""
    system = VICUNA_SYSTEM if system is None else system
    segments = [(f"{system} ", False)] if system else []
    for number, turn in enumerate(turns):
        segments += [
            (f"{' ' if number else ''}USER: {turn.question} ASSISTANT:", False),
            (answer(turn, " ", end), True),
        ]
    return segments


def answer(turn: Turn, before: str, after: str) -> str:
    return "" if turn.answer is None else before + turn.answer + after


TEMPLATES: dict[str, Callable[[Sequence[Turn], str | None, str], list[Segment]]] = {
    "plain": plain,
    "v1": v1,
}


def encode(segments: Sequence[Segment], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids of the whole text, and which of them are trained.

    Returns:
        ids [s] int64, with the tokenizer's BOS in front where it has one, and trained [s] bool.
    """
    encoded = tokenizer("".join(text for text, _ in segments), add_special_tokens=False, return_offsets_mapping=True)
    spans, end = [], 0
    for text, is_trained in segments:
        end += len(text)
        if is_trained:
            spans.append(range(end - len(text), end))
    trained = [any(start in span for span in spans) for start, _ in encoded["offset_mapping"]]
    front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return torch.tensor(front + encoded["input_ids"]), torch.tensor([False] * len(front) + trained)


def expand(ids: Tensor, placeholder_id: int, count: int) -> Tensor:
    """For each token how often it stands in the expanded sequence: a placeholder once for each of its features."""
    return torch.where(ids == placeholder_id, count, 1)


def shift(ids: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token inputs and labels [s - 1] from ids [s]."""
    return ids[:-1], torch.where(trained, ids, IGNORE_INDEX)[1:]


def check_length(record: Mapping[str, Any], length: int, limit: int) -> None:
    if length > limit:
        raise ConfigError(f"record {record.get('id')}: {length} tokens do not fit model.encoder_seq_length={limit}")


def check_prompt(length: int, limit: int) -> None:
    if length >= limit:
        raise ConfigError(f"{length} tokens leave no room for an answer in model.encoder_seq_length={limit}")


def raw_ids(text: str, tokenizer: Any, add_special_tokens: bool) -> Tensor:
    """Ids [s] of a text as it is; special tokens are what the tokenizer puts around every text, BOS as a rule."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def chat_text(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    """Messages as the tokenizer's chat template has them, up to where the answer begins.

    A template takes a message as text, or as a list of its parts; one that loses a text is given the parts.

    Raises:
        ConfigError: there is no template, or it refuses.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ConfigError("the tokenizer has no chat template for 'messages'; give 'prompt', the whole text")
    found = []
    for form in (messages, [in_parts(message) for message in messages]):
        try:
            found.append(tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"the chat template refuses the messages ({' '.join(str(error).split())})") from None
        if all(piece in found[-1] for message in messages for piece in pieces(message)):
            return found[-1]
    return found[0]


def in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of images and texts."""
    content = message["content"]
    if isinstance(content, str):
        texts = [[{"type": "text", "text": text.strip("\n")}] if text else [] for text in content.split(IMAGE_TAG)]
        content = texts[0] + [part for text in texts[1:] for part in ({"type": "image"}, *text)]
    return {**message, "content": content}


def pieces(message: Mapping[str, Any]) -> list[str]:
    """What of a message must be found in any rendering of it."""
    content = message["content"]
    return [piece.strip() for piece in content.split(IMAGE_TAG)] if isinstance(content, str) else []


def turns(record: Mapping[str, Any]) -> list[Turn]:
    """The turns of a LLaVA record; a leading answer without a question is left out, as LLaVA does.

    Raises:
        ConfigError: speakers do not alternate.
    """
    said = [(turn["from"] in HUMANS, turn["value"]) for turn in record["conversations"]]
    if said and not said[0][0]:
        said = said[1:]
    if [human for human, _ in said] != [number % 2 == 0 for number in range(len(said))]:
        raise ConfigError(f"record {record.get('id')}: human and gpt must take turns")
    values = [value for _, value in said] + [None] * (len(said) % 2)
    return [Turn(question, reply) for question, reply in zip(values[::2], values[1::2], strict=True)]
