"""The forms in which records hold a conversation, each turned into LLaVA's: `conversations`, and `system` beside them.

Which one a record has is seen from its fields: `conversations` (from, value) as LLaVA and ShareGPT have it, `messages`
(role, content) as chats have it, or Alpaca's `instruction` with `input` and `output`. Files are named under `image` and
`video`, as LLaVA has it, or under `images` and `videos`, as ShareGPT and MindSpeed-MM's mllm do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nemo_vlm.batch import HUMANS
from nemo_vlm.errors import SampleError

ANSWERERS = ("gpt", "assistant", "chatgpt", "bard", "bing", "bot", "model")
SYSTEM = "system"
SPEAKERS = (*HUMANS, *ANSWERERS, SYSTEM)
ASKED, ANSWERED = ("instruction", "query"), ("output", "content", "response")
MEDIA = {"image": "images", "video": "videos"}  # LLaVA's field, and the other name of it
FORMS = "must have 'conversations', 'messages' or 'instruction'"

Turns = list[dict[str, Any]]


def parsed(content: bytes | str, called: str) -> Any:
    """What JSON says.

    Args:
        called: what messages call it.
    Raises:
        SampleError: broken_record: it is none, or its texts are not Unicode.
    """
    try:
        found = json.loads(content)
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is legal JSON, but no text
        return found
    except UnicodeEncodeError:
        problem = "half of a surrogate pair in a text"
    except ValueError as error:
        problem = f"not JSON ({error})"
    except RecursionError:
        problem = "nested too deeply"
    raise SampleError("broken_record", f"{called}: {problem}")


def as_llava(record: Any) -> dict[str, Any]:
    """A record in LLaVA's form, the files of which are lists of names; its other fields stay as they are.

    Raises:
        ValueError: it has none of the forms; the message says why.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{FORMS}; it is {json.dumps(record)[:40]}")
    turns, system = turns_of(record), record.get(SYSTEM)
    if not isinstance(system, str | None):
        raise ValueError("'system' must be a text")
    if turns and turns[0]["from"].lower() == SYSTEM:
        if system:
            raise ValueError("two system messages, one of them beside the turns")
        system, turns = turns[0]["value"], turns[1:]
    if any(turn["from"].lower() == SYSTEM for turn in turns):
        raise ValueError("a system message must come first")
    files = {kind: files_of(record, kind) for kind in MEDIA}
    rest = {name: value for name, value in record.items() if name not in MEDIA.values()}
    return {**rest, **files, "conversations": turns, SYSTEM: system}


def files_of(record: dict[str, Any], kind: str) -> list[str]:
    """The names that a record gives under one of MEDIA, or its other name; empty ones are none."""
    given = {name: record.get(name) or None for name in (kind, MEDIA[kind])}
    field = only_one(given, tuple(given)) or kind
    entry = given[field] or []
    if not isinstance(entry, str | list) or not all(map(is_name, entry)):
        raise ValueError(f"'{field}' must be a file's name or a list of them")
    return [name for name in ([entry] if isinstance(entry, str) else entry) if name]


def is_name(name: Any) -> bool:
    return isinstance(name, str) and "\0" not in name


def is_llava(record: dict[str, Any]) -> bool:
    """Whether a record has LLaVA's form; a column of nulls is none."""
    return record.get("conversations") is not None


def turns_of(record: dict[str, Any]) -> Turns:
    """What is said in a record, the system message included where it is a turn."""
    if is_llava(record):
        return renamed(record["conversations"], "conversations", ("from", "value"))
    if record.get("messages") is not None:
        return renamed(record["messages"], "messages", ("role", "content"))
    return instruction(record)


def renamed(turns: Any, field: str, keys: tuple[str, str]) -> Turns:
    """Turns of either chat form, with LLaVA's names."""
    who, what = keys
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"must have '{field}', a list of turns")
    if not all(isinstance(turn.get(key), str) for turn in turns for key in keys):
        raise ValueError(f"each turn needs '{who}' and '{what}', both text")
    for turn in turns:
        if turn[who].lower() not in SPEAKERS:
            raise ValueError(f"unknown role '{turn[who]}'; known are {', '.join(SPEAKERS)}")
    return [{**turn, "from": turn[who], "value": turn[what]} for turn in turns]


def instruction(record: dict[str, Any]) -> Turns:
    """An instruction and its answer; an `input` stands behind the instruction, on a line of its own."""
    asked, answered = only_one(record, ASKED), only_one(record, ANSWERED)
    if asked is None:
        raise ValueError(FORMS)
    said = [record[asked], record.get("input") or "", record[answered] if answered else ""]
    if not all(isinstance(text, str) for text in said):
        raise ValueError(f"'{asked}', 'input' and '{answered}' must be texts")
    if record.get("history"):
        raise ValueError("has a 'history'; give all its turns as 'messages'")
    question = "\n".join(text for text in said[:2] if text)
    return [{"from": HUMANS[0], "value": question}, {"from": ANSWERERS[0], "value": said[2]}]


def only_one(record: dict[str, Any], names: Sequence[str]) -> str | None:
    """The field that a record has of several that say the same; None: it has none of them."""
    found = [name for name in names if record.get(name) is not None]
    if len(found) > 1:
        raise ValueError(f"has both '{found[0]}' and '{found[1]}'")
    return found[0] if found else None


def has_answer(turns: Turns) -> bool:
    """Whether somebody answers, and says something."""
    return any(turn["from"].lower() in ANSWERERS and turn["value"].strip() for turn in turns)
