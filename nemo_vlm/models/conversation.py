"""Conversations as they are given: a record's turns, and messages as a chat template of Hugging Face has them."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from nemo_vlm.batch import HUMANS
from nemo_vlm.data.forms import MEDIA
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.models.templates import PLACEHOLDERS, Turn

OPTION = re.compile(r"^([A-Z])[.:)] *(.+?)[ \r]*$", re.MULTILINE)  # of a question, as in "A. zero"


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


def options(question: str) -> tuple[str, dict[str, str]]:
    """What a question says before its options, and these by their letters: the last lines A, B and so on, two or more.

    Other lines may stand between them, and begin as an option does ("Q: who is it?").
    """
    runs: list[list[re.Match[str]]] = []
    for line in OPTION.finditer(question):
        if line[1] == "A":
            runs.append([line])
        elif runs and line[1] == string.ascii_uppercase[len(runs[-1]) :][:1]:
            runs[-1].append(line)
    found: list[re.Match[str]] = next((run for run in reversed(runs) if len(run) > 1), [])
    return question[: found[0].start()] if found else question, {line[1]: line[2] for line in found}


def is_turn(turn: Any) -> bool:
    """Whether it says who says what; `label` is SteerLM's."""
    if not isinstance(turn, dict) or not isinstance(turn.get("label"), str | None):
        return False
    return isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)


def is_human(turn: Mapping[str, Any]) -> bool:
    return turn["from"].lower() in HUMANS


def chat_text(messages: Sequence[Mapping[str, Any]], tokenizer: Any, media_break: str) -> str:
    """Messages as the tokenizer's chat template has them, up to where the answer begins.

    A template takes a message as text, or as a list of its parts, or both; one that refuses or loses what a message
    says is given the other form.

    Args:
        media_break: what parts an image or a video from the text beside it.
    Raises:
        ConfigError: there is no template, or it refuses.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ConfigError("the tokenizer has no chat template for 'messages'; give 'prompt', the whole text")
    parts, texts = [in_parts(message) for message in messages], [in_text(message, media_break) for message in messages]
    found, refusals = [], []
    for form in (messages, parts, texts):
        try:
            found.append(tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError) as error:
            refusals.append(" ".join(str(error).split()))
            continue
        if not any(loses(found[-1], message) for message in messages):
            return found[-1]
    if not found:
        raise ConfigError(f"the chat template refuses the messages ({refusals[0]})")
    return found[0]


def in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of images, videos and texts."""
    content = message["content"]
    if isinstance(content, str):
        content = [part(piece) for piece in re.split(f"({PLACEHOLDERS.pattern})", content) if piece]
    return {**message, "content": content}


def part(piece: str) -> dict[str, str]:
    """A tag, or the text between two."""
    tag = PLACEHOLDERS.fullmatch(piece)
    return {"type": piece.strip("<>")} if tag else {"type": "text", "text": piece.strip("\n")}


def in_text(message: Mapping[str, Any], media_break: str) -> dict[str, Any]:
    """A message whose content is a text with tags."""
    content = message["content"]
    if not isinstance(content, str):
        kinds = [next((kind for kind in MEDIA if part.get("type") == kind or kind in part), None) for part in content]
        tags = [f"<{kind}>" if kind else "" for kind in kinds]
        breaks = [media_break if before or after else "" for before, after in pairwise(tags)]
        said = [tag or str(part.get("text", "")) for tag, part in zip(tags, content, strict=True)]
        content = "".join(text + behind for text, behind in zip(said, [*breaks, ""], strict=True))
    return {**message, "content": content}


def loses(rendered: str, message: Mapping[str, Any]) -> bool:
    """Whether what a message says is not found in a rendering of it, or its parts as Python writes a list."""
    content = message["content"]
    texts = [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
    pieces = [piece.strip() for text in texts for piece in PLACEHOLDERS.split(text)]
    shown = not isinstance(content, str) and str(content) in rendered
    return shown or any(piece not in rendered for piece in pieces)
