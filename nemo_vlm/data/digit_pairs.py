"""The demo data of Qwen2-VL and Qwen3-VL: questions about one handwritten digit, about two, and about short videos.

They are ShareGPT records with images of several sizes and videos as folders of frames; the digits are data.digits'.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_vlm.data.digits import NUM_TRAIN, TOKENIZER, answer, digits, named, record, shuffled
from nemo_vlm.data.tokenizer import VISION_TOKENS, train_chat_tokenizer
from nemo_vlm.files import made_once

FILES = ("train.json", "heldout.json")
PIXELS, STEP = 56, 28  # of a digit, and by which it is moved on its canvas: 4 tokens of Qwen2-VL, and one
CANVASES = ((56, 56), (84, 56), (56, 84), (84, 84))  # width and height
PAIRS = 2  # questions about two digits for each of them
FPS, FRAMES = 2.0, 2  # of a video, which shows each of its digits for so many frames
NUM_TOKENS = 320  # of the tokenizer, at most

ONE = "<image>\nWhich digit is this?"
TWO = "<image><image>\nWhich is larger, the first or the second?"
LAST = "<video>\nWhich digit comes last?"
TREND = "<video>\nDoes the number grow or shrink?"
TEMPLATE = "system\nYou are a helpful assistant.\nuser\nassistant\n"


@dataclass(frozen=True)
class Digit:
    """A digit, and the file of its image."""

    image: Any
    value: int
    path: str


def write(folder: Path) -> None:
    """Write train.json, heldout.json, images/, videos/ and tokenizer/, unless the folder is there already."""
    made_once(folder, _write)


def _write(folder: Path) -> None:
    for name in ("images", "videos"):
        (folder / name).mkdir()
    chance, found = random.Random(0), []
    for number, (image, value) in enumerate(digits(PIXELS)):
        found.append(Digit(image, value, f"images/{number:04d}.png"))
        on_canvas(image, chance.choice(CANVASES), chance).save(folder / found[-1].path)
    order = [found[number] for number in shuffled(len(found))]
    texts = [TEMPLATE]
    for name, some in zip(FILES, (order[:NUM_TRAIN], order[NUM_TRAIN:]), strict=True):
        records = list(questions(some, folder, chance))
        chance.shuffle(records)
        (folder / name).write_text(json.dumps(records, indent=1))
        texts += [turn["value"] for one in records for turn in one["conversations"]]
    tokenizer = train_chat_tokenizer(texts, NUM_TOKENS, VISION_TOKENS)
    tokenizer.chat_template = None  # model.data.conv_template decides: Qwen3-VL has no system message of its own
    tokenizer.save_pretrained(folder / TOKENIZER)


def on_canvas(digit: Any, size: tuple[int, int], chance: random.Random) -> Any:
    """The digit somewhere on a black image."""
    from PIL import Image

    canvas = Image.new("L", size)
    left, top = (STEP * chance.randint(0, (edge - PIXELS) // STEP) for edge in size)
    canvas.paste(digit, (left, top))
    return canvas


def questions(some: Sequence[Digit], folder: Path, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Records about these digits; videos are written."""
    for digit in some:
        name = Path(digit.path).stem
        yield record(f"{name}-one", {"images": [digit.path]}, ONE, answer(digit.value), "open")
        for number in range(PAIRS):
            pair = different(digit, some, chance)
            reply = larger(*(one.value for one in pair))
            yield record(f"{name}-two-{number}", {"images": [one.path for one in pair]}, TWO, reply, "pair")
        shown, path = different(digit, some, chance), f"videos/{name}.mp4"
        write_frames(shown, folder / path)
        reply = trend(*(one.value for one in shown))
        yield record(f"{name}-last", {"videos": [path]}, LAST, answer(shown[1].value), "last")
        yield record(f"{name}-trend", {"videos": [path]}, TREND, reply, "trend")


def larger(first: int, second: int) -> str:
    """The answer to TWO: what is seen, and then what follows from it."""
    return f"{named(first)} and {named(second)}: the {'first' if first > second else 'second'}.".capitalize()


def trend(first: int, second: int) -> str:
    """The answer to TREND."""
    return f"From {named(first)} to {named(second)}: it {'shrinks' if first > second else 'grows'}."


def different(digit: Digit, some: Sequence[Digit], chance: random.Random) -> list[Digit]:
    """The digit and one of another value, in any order."""
    other = chance.choice([one for one in some if one.value != digit.value])
    return chance.sample([digit, other], 2)


def write_frames(shown: Sequence[Digit], video: Path) -> None:
    """A folder in place of the video, and its rate beside it, see data.media."""
    frames = video.with_suffix("")
    frames.mkdir()
    for number, digit in enumerate(digit for digit in shown for _ in range(FRAMES)):
        digit.image.save(frames / f"{number:02d}.png")
    video.with_suffix(".json").write_text(json.dumps({"fps": FPS}))
