"""A picture of samples: their images, and beside them their text, the trained part in colour."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageDraw, ImageFont, ImageOps

from nemo_vlm.errors import SampleError
from nemo_vlm.files import written_whole
from nemo_vlm.models.images import load_image
from nemo_vlm.models.video import FrameSampling, Video

WIDTH, THUMBNAIL, MARGIN, LINE, SIZE = 1400, 160, 12, 20, 15  # pixels
MAX_IMAGES, MAX_LINES = 3, 14  # of a sample
TRAINED, PLAIN, OF_IMAGES, HEAD = "#117733", "#222222", "#999999", "#004488"


class Run(Protocol):
    """Text of one kind."""

    text: str
    trained: bool
    image: bool


Row = tuple[str, Sequence[Any], dict[str, Any] | None]  # headline, Runs, record


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
    headline, runs, record = row
    thumbnails = list(pictures(record))[:MAX_IMAGES]
    left = 2 * MARGIN + max(len(thumbnails), 1) * (THUMBNAIL + MARGIN)
    words = [(headline, HEAD), ("\n", HEAD)]
    words += [(word, colour_of(run)) for run in runs for word in re.findall(r"\n|[^\S\n]+|\S+", run.text)]
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


def pictures(record: dict[str, Any] | None) -> Iterator[Image.Image]:
    """Thumbnails of a record's images and of its videos' first frames, those that can be read."""
    first_frame = FrameSampling(1, "first")
    for kind, read in (("image", load_image), ("video", lambda video: first_frame.frames(Video(video))[0])):
        for source in (record or {}).get(kind) or []:
            with contextlib.suppress(SampleError):
                yield ImageOps.contain(read(source), (THUMBNAIL, THUMBNAIL))


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
