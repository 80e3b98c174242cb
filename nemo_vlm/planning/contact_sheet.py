"""A picture of samples: what the model sees, and beside it the text, the trained part in colour."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
from PIL import Image, ImageDraw, ImageFont, ImageOps

from nemo_vlm.files import written_whole

WIDTH, THUMBNAIL, MARGIN, LINE, SIZE = 1400, 160, 12, 20, 15  # pixels
MAX_IMAGES, MAX_LINES = 3, 14  # of a sample
MAX_FRAMES = 4  # of a video, one behind the other
WORD = re.compile(r"\n|[^\S\n]+|\S{1,80}")  # or so much of one, as of a file's name, that it has room on a line
TRAINED, PLAIN, OF_IMAGES, HEAD = "#117733", "#222222", "#999999", "#004488"


class Run(Protocol):
    """Text of one kind."""

    text: str
    trained: bool
    image: bool


Row = tuple[str, Sequence[Any], list[list[Image.Image]]]  # headline, Runs, the frames of each view


def contact_sheet(rows: Sequence[Row], path: str) -> None:
    """Draw a PNG.

    Raises:
        OSError: it cannot be written.
    """
    font: Any = ImageFont.load_default(SIZE)
    drawn = [row_image(row, font) for row in rows]
    sheet = Image.new("RGB", (WIDTH, max(sum(image.height for image in drawn), 1)), "white")
    top = 0
    for image in drawn:
        sheet.paste(image, (0, top))
        top += image.height
    Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
    with written_whole(Path(path), "wb") as file:
        sheet.save(file, "PNG")


def row_image(row: Row, font: Any) -> Image.Image:
    headline, runs, views = row
    thumbnails = [thumbnail(frames) for frames in views[:MAX_IMAGES]]
    left = 2 * MARGIN + max(len(thumbnails), 1) * (THUMBNAIL + MARGIN)
    texts = [(f"{headline}\n", HEAD), *((run.text, colour_of(run)) for run in runs)]
    words = [(word, colour) for text, colour in texts for word in WORD.findall(text)]
    lines = wrapped(words, WIDTH - left - MARGIN, font)[:MAX_LINES]
    image = Image.new("RGB", (WIDTH, max(THUMBNAIL, LINE * len(lines)) + 2 * MARGIN), "white")
    for number, picture in enumerate(thumbnails):
        image.paste(picture, (MARGIN + number * (THUMBNAIL + MARGIN), MARGIN))
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        at = float(left)
        for word, colour in line:
            draw.text((at, MARGIN + number * LINE), word, colour, font)
            at += font.getlength(word)
    draw.line((0, image.height - 1, WIDTH, image.height - 1), OF_IMAGES)
    return image


def colour_of(run: Run) -> str:
    return TRAINED if run.trained else OF_IMAGES if run.image else PLAIN


def thumbnail(frames: Sequence[Image.Image]) -> Image.Image:
    """An image; of a video some frames in its order, two in a row."""
    chosen = [frames[round(at)] for at in numpy.linspace(0, len(frames) - 1, min(len(frames), MAX_FRAMES))]
    if len(chosen) == 1:
        return ImageOps.contain(chosen[0], (THUMBNAIL, THUMBNAIL))
    half = THUMBNAIL // 2
    tile = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    for number, frame in enumerate(chosen):
        tile.paste(ImageOps.contain(frame, (half - 1, half - 1)), (half * (number % 2), half * (number // 2)))
    return tile


def wrapped(words: Sequence[tuple[str, str]], width: float, font: Any) -> list[list[tuple[str, str]]]:
    """Words with their colours, line by line."""
    lines: list[list[tuple[str, str]]] = [[]]
    at = 0.0
    for word, colour in words:
        length = 0 if word == "\n" else font.getlength(word)
        if word == "\n" or at + length > width:
            lines.append([])
            at = 0.0
        if word != "\n":
            lines[-1].append((word, colour))
            at += length
    return lines
