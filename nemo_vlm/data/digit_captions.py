"""Qwen3-VL's captions: pictures of one to three handwritten digits, and what stands there in a few words.

The digits are data.digits', and the tokenizer is that of digit_pairs, beside which the folder stands: a model that was
trained on the one goes on with the other.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_vlm.data import digit_pairs
from nemo_vlm.data.digits import NUM_TRAIN, digits, named, record, shuffled
from nemo_vlm.files import made_once

FILES = ("train.json", "heldout.json")
OWN, BESIDE = "digit_captions", "digit_pairs"  # the folder, and that of the tokenizer
TOKENIZER, NUM_TOKENS = f"../{BESIDE}/{digit_pairs.TOKENIZER}", digit_pairs.NUM_TOKENS
PIXELS = 64  # of a digit: 4 tokens of Qwen3-VL
CATEGORIES = ("one", "two", "three")  # by the number of digits in a picture

REQUEST = "<image>Describe this image."  # without a break, as Qwen's chat templates write an image before a text

Digit = tuple[Any, int]  # its image and its value


def write(folder: Path) -> None:
    """Write train.json, heldout.json and images/, and digit_pairs beside them; what is there already stays.

    In a folder of another name that is there already they are somebody else's, and it has no digit_pairs beside it.
    """
    if folder.exists() and folder.name != OWN:
        return
    digit_pairs.write(folder.parent / BESIDE)
    made_once(folder, _write)


def _write(folder: Path) -> None:
    (folder / "images").mkdir()
    chance, found = random.Random(0), list(digits(PIXELS))
    order = [found[number] for number in shuffled(len(found))]
    for name, some in zip(FILES, (order[:NUM_TRAIN], order[NUM_TRAIN:]), strict=True):
        records = list(captioned(some, folder, chance, name.removesuffix(".json")))
        chance.shuffle(records)
        (folder / name).write_text(json.dumps(records, indent=1))


def captioned(some: Sequence[Digit], folder: Path, chance: random.Random, name: str) -> Iterator[dict[str, Any]]:
    """Records about these digits, each of which begins one picture of every category; the pictures are written.

    Args:
        name: what those of the pictures begin with.
    """
    for number, digit in enumerate(some):
        for count, category in enumerate(CATEGORIES):
            shown = [digit, *chance.choices(some, k=count)]
            path = f"images/{name}-{number:04d}-{category}.png"
            in_a_row([image for image, _ in shown]).save(folder / path)
            yield record(Path(path).stem, {"images": [path]}, REQUEST, caption([v for _, v in shown]), category)


def in_a_row(images: Sequence[Any]) -> Any:
    """One image of several, from left to right."""
    from PIL import Image

    row = Image.new("L", (PIXELS * len(images), PIXELS))
    for place, image in enumerate(images):
        row.paste(image, (PIXELS * place, 0))
    return row


def caption(values: Sequence[int]) -> str:
    """ "A three.", "A three and an eight.", "A three, an eight and a one." """
    *others, last = map(named, values)
    said = f"{', '.join(others)} and {last}" if others else last
    return f"{said}.".capitalize()
