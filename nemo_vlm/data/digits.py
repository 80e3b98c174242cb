"""The demo's data: the 1,797 handwritten digits that ship inside scikit-learn, as LLaVA JSON with PNG images.

E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_vlm.data.tokenizer import train_tokenizer
from nemo_vlm.files import made_once

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "ABCDEFGHIJ"
FILES = ("train.json", "heldout.json")
NUM_TRAIN = 1500
CHOICE_EVERY = 3  # each third training digit is also asked as multiple choice
PIXELS = 32
TOKENIZER = "tokenizer"
NUM_TOKENS = 363  # of the tokenizer, which runs out of pairs to merge

OPEN_QUESTION = "<image>\nWhich digit is this?"
CHOICE_QUESTION = "\n".join(
    (
        OPEN_QUESTION,
        *(f"{letter}. {name}" for letter, name in zip(LETTERS, NAMES, strict=True)),
        "Answer with the option's letter from the given choices directly.",
    )
)


def write(folder: Path) -> None:
    """Write train.json, heldout.json, images/ and tokenizer/ into `folder`; nothing happens if it is there already."""
    made_once(folder, _write)


def _write(folder: Path) -> None:
    found = list(digits(PIXELS))
    (folder / "images").mkdir()
    train: list[dict[str, Any]] = []
    heldout: list[dict[str, Any]] = []
    for place, number in enumerate(shuffled(len(found))):
        image, target = found[number]
        path = f"images/{number:04d}.png"
        image.save(folder / path)
        held_out = place >= NUM_TRAIN
        records = heldout if held_out else train
        records.append(record(f"{number:04d}-open", {"image": path}, OPEN_QUESTION, answer(target), "open"))
        if held_out or place % CHOICE_EVERY == 0:
            records.append(record(f"{number:04d}-choice", {"image": path}, CHOICE_QUESTION, LETTERS[target], "choice"))
    for name, records in zip(FILES, (train, heldout), strict=True):
        (folder / name).write_text(json.dumps(records, indent=1))
    texts = [turn["value"] for entry in train for turn in entry["conversations"]]
    train_tokenizer([*texts, "USER: ASSISTANT: "], vocab_size=512).save_pretrained(folder / TOKENIZER)


def digits(size: int) -> Iterator[tuple[Any, int]]:
    """The digits as images of size x size pixels with their values; 8 x 8 with 17 levels in the original."""
    import numpy
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for pixels, target in zip(data.images, data.target, strict=True):
        levels = (pixels * (255 / 16)).round().astype(numpy.uint8)
        yield (
            Image.fromarray(levels).resize((size, size), Image.Resampling.BICUBIC),
            int(target),
        )


def answer(digit: int) -> str:
    return f"It is {named(digit)}."


def named(digit: int) -> str:
    return f"{'an' if digit == 8 else 'a'} {NAMES[digit]}"


def shuffled(count: int) -> list[int]:
    """The original is ordered by writer; training and held-out digits come from all of them."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    return order


def record(name: str, media: dict[str, Any], question: str, reply: str, category: str) -> dict[str, Any]:
    """Args:
    media: its images and videos, by the fields that name them.
    """
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    return {"id": name, **media, "category": category, "conversations": turns}
