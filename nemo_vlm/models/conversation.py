"""Conversations as they are given: a record's turns, and messages as a chat template of Hugging Face has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_vlm.batch import HUMANS, IMAGE_TAG
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.models.templates import Turn


def turns(record: Mapping[str, Any]) -> list[Turn]:
    """The turns of a LLaVA record; a leading answer without a question is left out, as LLaVA does.

    Raises:
        SampleError: broken_record: not a list of texts, or the speakers do not alternate.
    """
    said = record.get("conversations")
    if not isinstance(said, list) or not all(is_turn(turn) for turn in said):
        raise SampleError("broken_record", f"record {record.get('id')}: 'conversations' must be turns with texts")
    said = said[1:] if said and not is_human(said[0]) else said
    if not said or [is_human(turn) for turn in said] != [number % 2 == 0 for number in range(len(said))]:
        raise SampleError("broken_record", f"record {record.get('id')}: human and gpt must take turns")
    answers = [(turn["value"], turn.get("label")) for turn in said[1::2]] + [(None, None)] * (len(said) % 2)
    return [Turn(asked["value"], *answer) for asked, answer in zip(said[::2], answers, strict=True)]


def is_turn(turn: Any) -> bool:
    """Whether it says who says what; `label` is SteerLM's."""
    if not isinstance(turn, dict) or not isinstance(turn.get("label"), str | None):
        return False
    return isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)


def is_human(turn: Mapping[str, Any]) -> bool:
    return turn["from"].lower() in HUMANS


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
