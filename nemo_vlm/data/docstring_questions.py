"""The demo's instruction data: "What does shutil.copy do?", answered by the first sentence of its docstring."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_vlm.data import docstrings
from nemo_vlm.files import made_once

FILES = ("train.json", "held_out.json")
OWN, CORPUS = "docstring_questions", "docstrings"  # the folder, and that beside it
TOKENIZER, NUM_TOKENS = f"../{CORPUS}/{docstrings.TOKENIZER}", docstrings.NUM_TOKENS
SHORTEST, LONGEST = 16, 200  # characters of an answer
HELD_OUT_EVERY = 20
NO_SENTENCE = ("***", ">>>", "::", "|")


def write(folder: Path) -> None:
    """Write train.json and held_out.json, and the corpus beside them; what is there already stays.

    In a folder of another name that is there already they are somebody else's, and it has no corpus beside it.
    """
    if folder.exists() and folder.name != OWN:
        return
    docstrings.write(folder.parent / CORPUS)
    made_once(folder, lambda partial: _write(partial, folder.parent / CORPUS / docstrings.TEXTS))


def _write(folder: Path, texts: Path) -> None:
    with open(texts, encoding="utf-8") as file:
        found = list(records(map(json.loads, file)))
    random.Random(0).shuffle(found)
    parts = [one for place, one in enumerate(found) if place % HELD_OUT_EVERY], found[::HELD_OUT_EVERY]
    for name, part in zip(FILES, parts, strict=True):
        (folder / name).write_text(json.dumps(part, indent=1, ensure_ascii=False), encoding="utf-8")


def records(described: Iterable[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """A question about everything public whose docstring begins with a sentence.

    Args:
        described: docstrings.Docstring, as the corpus has them.
    """
    for one in described:
        name, answer = one["name"], first_sentence(one["docstring"])
        if answer is not None and not any(part.startswith("_") for part in name.split(".")):
            question = f"What does {name} do?" if one["heading"] != name else f"What is {name}?"
            yield {"id": name, "instruction": question, "output": answer}


def first_sentence(text: str) -> str | None:
    """None: it begins with something else, or is too short or long to be an answer."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    sentence += stop.strip()
    fits = SHORTEST <= len(sentence) <= LONGEST and sentence.endswith(".") and sentence[0].isupper()
    return sentence if fits and not any(mark in sentence for mark in NO_SENTENCE) else None
