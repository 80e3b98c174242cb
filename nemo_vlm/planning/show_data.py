"""What a run would be trained on: its first samples after templates, tokenization, truncation and packing.

As text with the trained part in colour, as JSON, or as a contact sheet of images beside their text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.text import Text

from nemo_vlm.batch import IGNORE_INDEX, Sample
from nemo_vlm.config import RunConfig, demand
from nemo_vlm.data.codec import Codec
from nemo_vlm.data.dataset import Samples
from nemo_vlm.data.loader import Share, order_of, shares_of
from nemo_vlm.data.records import RecordDataset
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.layout import Layout
from nemo_vlm.models.images import image_size
from nemo_vlm.models.templates import template_of
from nemo_vlm.models.tokens import trained_texts
from nemo_vlm.models.video import Video, frame_size
from nemo_vlm.planning.contact_sheet import contact_sheet

MARKS = ("«", "»")  # around the trained part where there is no colour


@dataclass(frozen=True)
class ShowConfig:
    """The settings of examples/show_data.py, beside a run's."""

    n: int = 20  # samples
    json: bool = False  # one line of JSON a sample
    picture: str | None = None  # a PNG to draw

    def __post_init__(self) -> None:
        demand(self.n > 0, "n", self.n, "1 or more")


@dataclass(frozen=True)
class Piece:
    """A run of a sample's tokens.

    Attributes:
        text: what they say; of an image or a video how many there are.
    """

    text: str
    trained: bool
    image: bool = False


@dataclass(frozen=True)
class Shown:
    """A sample in its place.

    Attributes:
        place: where in the run it is drawn.
        placeholders: what the tokens are called that stand for images and videos, by their ids.
        media: the images and videos that the model sees of it.
        before_answer: the template's own text in front of an answer, which is trained on with it.
    """

    number: int
    place: str
    id: Any
    sample: Sample
    codec: Codec
    placeholders: dict[int, str]
    media: list[Any]
    before_answer: str

    @property
    def num_image_tokens(self) -> int:
        return sum(token in self.placeholders for token in self.sample.tokens.tolist())

    @cached_property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the images and of the videos' frames that the model sees, in pixels."""
        return [frame_size(one) if isinstance(one, Video) else image_size(one) for one in self.media]

    @property
    def trained_texts(self) -> list[str]:
        """The answers as they are trained on, each with what ends it."""
        if self.sample.skipped:
            return []
        return [text.removeprefix(self.before_answer) for text in trained_texts(self.sample.labels, self.codec)]

    def pieces(self) -> Iterator[Piece]:
        """The sample's tokens, the last of which is only a label."""
        if self.sample.skipped:
            return
        tokens, labels = self.sample.tokens, self.sample.labels
        ids = torch.cat([tokens, labels[-1:].clamp(min=0)[labels[-1:] != IGNORE_INDEX]])
        trained = torch.cat([torch.tensor([False]), labels != IGNORE_INDEX])[: len(ids)]
        kinds = [self.placeholders.get(token) for token in ids.tolist()]
        runs = groupby(zip(ids.tolist(), trained.tolist(), kinds, strict=True), lambda token: token[1:])
        for (is_trained, kind), run in runs:
            found = [token for token, _, _ in run]
            text = self.codec.text(found) if kind is None else f"[{len(found)} {kind} tokens]"
            yield Piece(text, is_trained, kind is not None)

    def as_json(self) -> dict[str, Any]:
        sample, skipped = self.sample, self.sample.skipped
        return {
            "id": self.id,
            "record": self.number,
            "place": self.place,
            "input_ids": [] if skipped else sample.tokens.tolist(),
            "labels": [] if skipped else sample.labels.tolist(),
            "trained_text": self.trained_texts,
            "num_image_tokens": 0 if skipped else self.num_image_tokens,
            "image_sizes": self.image_sizes,
            "image_grid_thw": self.sample.images.grids,
            "skipped": skipped,
        }

    def headline(self) -> str:
        called = f"{self.place}, record {self.number}" + ("" if self.id is None else f", id {self.id}")
        if self.sample.skipped:
            return f"{called}: SKIPPED, {self.sample.skipped}"
        trained = int((self.sample.labels != IGNORE_INDEX).sum())
        sizes = ", ".join(f"{width} x {height}" for width, height in self.image_sizes) or "none"
        grids = ", ".join(patches(*grid) for grid in self.sample.images.grids)
        return (
            f"{called}: {len(self.sample.tokens)} tokens, {trained} trained, "
            f"{self.num_image_tokens} of images and videos; these: {sizes}" + f"; seen in {grids} patches" * bool(grids)
        )


def patches(time: int, rows: int, columns: int) -> str:
    """Those of a view, in the order of sizes: width x height, and x time of a video."""
    return f"{columns} x {rows}" + f" x {time}" * (time > 1)


def show(config: ShowConfig, run: RunConfig, layout: Layout, dataset: Samples, tokenizer: Any) -> None:
    """Print the first samples of a settled run, in the order in which it would draw them.

    Raises:
        ConfigError: the picture cannot be written.
    """
    found = list(islice(samples(run, layout, dataset, tokenizer), config.n))
    console = Console(highlight=False, soft_wrap=True)
    for shown in found:
        if config.json:
            sys.stdout.write(json.dumps(shown.as_json(), ensure_ascii=False) + "\n")
        else:
            console.print(Text(shown.headline(), "bold"))
            console.print(coloured(shown, console.is_terminal), end="\n\n")
    if not config.json:
        console.print(summary(found))
    if config.picture is not None:
        try:
            rows = [(shown.headline(), list(shown.pieces()), seen(dataset, shown.sample)) for shown in found]
            contact_sheet(rows, config.picture)
        except (OSError, ValueError) as error:
            raise ConfigError(f"picture={config.picture}: cannot be written ({error})") from None


def samples(run: RunConfig, layout: Layout, dataset: Samples, tokenizer: Any) -> Iterator[Shown]:
    """Those of the run's own numbers, each with what is known of the record that it was made of, if it can be read."""
    codec, vocabulary = Codec(tokenizer), tokenizer.get_vocab()
    called = {run.model.in_text.video_placeholder: "video", run.model.in_text.image_token: "image"}
    placeholders = {vocabulary[token]: kind for token, kind in called.items() if token in vocabulary}
    before = template_of(run.model, run.data).around_answer[0]
    for number, place in drawn(run, layout, dataset):
        record, name = record_of(dataset, number), dataset.origin(number).id
        for sample in dataset.samples(number):
            media = media_of(dataset, record) if not sample.skipped else []
            yield Shown(number, place, name, sample, codec, placeholders, media, before)


def drawn(run: RunConfig, layout: Layout, dataset: Samples) -> Iterator[tuple[int, str]]:
    """Numbers in the order in which a run draws them, with the place of each."""
    shares, packs = shares_of(dataset, layout, run), run.data.packing or dataset.packed
    for step, batch in enumerate(order_of(dataset, run).batches(0, run.step), 1):
        for rank in range(layout.data):
            for pack, numbers in enumerate(shares(batch, Share(rank, layout.data)), 1):
                place = f"step {step}" + (f", rank {rank}" if layout.data > 1 else "")
                place += f", pack {pack}" if packs else ""
                yield from ((number, place) for number in numbers if number >= 0)


def record_of(dataset: Samples, number: int) -> dict[str, Any] | None:
    """None: it cannot be read, or there are no records."""
    try:
        return dataset.record(number) if isinstance(dataset, RecordDataset) else None
    except SampleError:
        return None


def media_of(dataset: Samples, record: dict[str, Any] | None) -> list[Any]:
    return dataset.processor.media(record) if record is not None and isinstance(dataset, RecordDataset) else []


def seen(dataset: Samples, sample: Sample) -> list[list[Image.Image]]:
    """What the model sees, see Processor.seen."""
    return dataset.processor.seen(sample.images) if isinstance(dataset, RecordDataset) and len(sample.images) else []


def coloured(shown: Shown, in_colour: bool) -> Text:
    text = Text()
    for piece in shown.pieces():
        before, after = MARKS if piece.trained and not in_colour else ("", "")
        text.append(before + piece.text + after, "bold green" if piece.trained else "dim" if piece.image else "")
    return text


def summary(found: list[Shown]) -> str:
    whole = [shown for shown in found if not shown.sample.skipped]
    tokens = sum(len(shown.sample.tokens) for shown in whole)
    trained = sum(int((shown.sample.labels != IGNORE_INDEX).sum()) for shown in whole)
    images = sum(shown.num_image_tokens for shown in whole)
    tally = f"{tokens} tokens, {trained} trained, {images} of images and videos"
    return f"{len(found)} samples, {len(found) - len(whole)} skipped: {tally}"
