"""Multiple-choice records as a TSV of VLMEvalKit's, which scores a model by its letters.

A question is what stands before its first option; the harness lists the options again, and asks in its own words. Its
images come first. The harness keeps them as PNG, without EXIF and transparency: what would look otherwise then is made
upright, and white where transparent, before; so do Qwen's models see it in training (LLaVA's, which see neither, will
not see here what they were trained with, where images are so).
"""

from __future__ import annotations

import base64
import csv
import hashlib
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from string import ascii_uppercase  # the columns that VLMEvalKit takes for options
from typing import Any

from PIL import Image
from rich.progress import track

from nemo_vlm.data.media import Source
from nemo_vlm.data.records import RecordFile
from nemo_vlm.data.skipped import Skipped, made
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.files import remove_partial, written_whole
from nemo_vlm.models.conversation import options, turns
from nemo_vlm.models.images import TURNS, decoding, load_image, orientation
from nemo_vlm.models.templates import PLACEHOLDERS

# Texts that pandas takes for other things: pandas._libs.parsers.STR_NA_VALUES, as far as they are words, and truths
WORDS = {"n/a", "na", "null", "none", "<na>", "#n/a", "#na", "true", "false"}
NO_BREAK = "\u00a0"  # a space that pandas does not strip; behind a number or such a word it makes it a text


def prepare(file: RecordFile, output: Path) -> str:
    """Write a row for each record whose first question offers choices, and has images.

    Returns:
        what was done.
    Raises:
        ConfigError: the output cannot be written, or VLMEvalKit would not find it.
        RuntimeError: there is no such record; nothing is written.
    """
    if output.suffix != ".tsv":
        raise ConfigError(f"--output={output}: must end in .tsv")
    skipped = Skipped("records", 1.0)
    rows = list(made(lambda number: row_of(file[number], number), len(file), skipped, "reading"))
    skipped.check(finished=True)
    letters = [letter for letter in ascii_uppercase if any(letter in row for row in rows)]
    for letter in letters:
        keep_texts(rows, letter)
    header = ["index", "question", *letters, "answer", "category", "image", "image_path"]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_partial(output)
        with written_whole(output) as written:
            table = csv.DictWriter(written, header, delimiter="\t", lineterminator="\n")
            table.writeheader()
            for row in track(rows, output.name):
                table.writerow({**row, **embedded(row["image"], row["index"])})
    except OSError as error:
        raise ConfigError(f"--output={output}: cannot be written ({error.strerror})") from None
    return f"{output}: {skipped.kept} questions of up to {len(letters)} options; {skipped}"


def row_of(record: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Its cells but for the pixels; its number is its index, by which the harness tells rows apart.

    Raises:
        SampleError: no_options; missing_image or broken_image, as load_image; or it has none, or a video.
    """
    called, images = f"record {record['id']}", record["image"]
    if record["video"] or not images:
        raise SampleError("no_image", f"{called}: a TSV's questions are about images, one or several")
    for image in images:
        load_image(image)
    first = turns(record)[0]
    question, offered = options(first.question)
    if isinstance(choices := record.get("choices"), list):
        few = choices if len(choices) <= len(ascii_uppercase) else []
        offered = dict(zip(ascii_uppercase[: len(few)], map(str, few), strict=True))
    letters = {text: letter for letter, text in offered.items()} | {letter: letter for letter in offered}
    question, answer = PLACEHOLDERS.sub("", question).strip(), (first.answer or "").strip()
    if len(offered) < 2 or not question or answer not in letters:
        raise SampleError("no_options", f"{called}: asks nothing, or its answer is none of two options or more")
    rest = {"answer": letters[answer], "category": record.get("category", ""), "image": images}
    return {"index": number, "question": question, **offered, **rest}


def keep_texts(rows: Sequence[dict[str, Any]], letter: str) -> None:
    """Let pandas read a column's options as they are: whole numbers in every row are, beside others 2 becomes 2.0."""
    if all(re.fullmatch(r"0|[1-9][0-9]{0,17}", row.get(letter, "")) for row in rows):
        return
    for row in rows:
        if letter in row and is_no_text(row[letter]):
            row[letter] += NO_BREAK


def is_no_text(option: str) -> bool:
    """Whether pandas may read it as something else."""
    try:
        float(option)
    except ValueError:
        return option.lower() in WORDS
    return True


def embedded(images: Sequence[Source], number: int) -> dict[str, str]:
    """Files in base64, and what the harness keeps each as: another one never goes by the name of an old one."""
    contents = [content_of(image) for image in images]
    coded = [base64.b64encode(content).decode() for content in contents]
    names = [f"{number}_{place}_{hashlib.sha256(found).hexdigest()[:16]}.png" for place, found in enumerate(contents)]
    return {"image": cell(coded), "image_path": cell(names)}


def content_of(image: Source) -> bytes:
    """An image's file, or a PNG of what is seen where the harness would show it otherwise, or could not."""
    with decoding(image) as file:
        header = Image.open(file)
        plain = header.format in ("JPEG", "PNG") and header.mode in ("L", "RGB") and "transparency" not in header.info
        if plain and TURNS.get(orientation(header)) is None:
            file.seek(0)
            return file.read()
    made = BytesIO()
    load_image(image, upright=True).save(made, "png")
    return made.getvalue()


def cell(texts: list[str]) -> str:
    """One alone, or several as a list of Python's, which is how the harness reads them."""
    return texts[0] if len(texts) == 1 else str(texts)
