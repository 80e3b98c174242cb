"""Scores of a model's answers to the questions of a LLaVA JSON: exact matches, and the likeliest of several choices."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

from nemo_vlm.batch import IGNORE_INDEX, Sample
from nemo_vlm.data.records import RecordFile
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.files import written_whole
from nemo_vlm.inference.answers import answer, probabilities, sample_of, tell_of_cut, with_bos, write
from nemo_vlm.inference.laid_out import LaidOut, lay_out, make_folder, share, writing
from nemo_vlm.inference.likelihood import choices, log_likelihoods
from nemo_vlm.inference.restore import Restored, restore, terminators
from nemo_vlm.inference.settings import EvaluateConfig
from nemo_vlm.inference.speed import Speed, in_words
from nemo_vlm.models.conversation import turns
from nemo_vlm.models.images import load_image
from nemo_vlm.models.templates import PLACEHOLDERS
from nemo_vlm.models.video import FrameSampling, Video

log = logging.getLogger(__name__)
OPEN = "open"  # category of records that name none
FRAMES, GAP, LINE = FrameSampling(4, None), 6, 28  # of a video in the picture; pixels between two; letters of a title
EDGE = 512  # pixels of what is shown, at most
MOST = 600  # letters of a message about records that are left out


@dataclass(frozen=True)
class Evaluation:
    """What was settled before a rank starts."""

    config: EvaluateConfig
    model: LaidOut

    def make_ready(self, env: Mapping[str, str]) -> None:
        """Raises ConfigError where the questions, the folder of the results or the machine is missing."""
        self.records()
        self.model.check_machine(env)
        make_folder(Path(self.config.output_folder), f"output_folder={self.config.output_folder}")

    def records(self) -> RecordFile:
        config, folder = self.config, self.config.inference.media_folder
        folders = config.image_folder or folder, config.video_folder or folder
        return RecordFile(Path(str(config.data_path)), *folders, "data_path", self.model.run.model.reads_media)

    def run(self) -> None:
        """Write predictions.jsonl, its picture and scores.json, and print the accuracy of every category of records.

        Raises:
            ConfigError: on the first rank: no record can be asked.
        """
        records, settings, speed = self.records(), self.config.inference, Speed()
        with restore(self.model.source, self.model.run.trainer.precision, self.model.layout) as restored:
            ends = settings.end_strings + terminators(restored.config, restored.data)

            def work(batch: range) -> list[dict[str, Any] | str]:
                given, prompts, rows = self.asked(records, batch, restored)
                speed.begin()
                answers = answer(prompts, restored, settings, ends, speed.hear)
                chosen = choose(list(given.values()), list(prompts.values()), restored, settings.batch_size)
                for (number, record), choice in zip(given.items(), chosen, strict=True):
                    one = answers[number]
                    row = prediction(record, one.text(restored.tokenizer).strip())
                    rows[number] = row | {"finish_reason": one.finish_reason} | probabilities(one) | choice
                return [rows[number] for number in batch]

            made = share(len(records), settings.batch_size, work, self.model.layout, "answering")
            told, first = in_words(speed, self.model.layout), torch.distributed.get_rank() == 0
        if first:
            self.report(made, records)
            sys.stderr.write(f"{told}\n")
            tell_of_cut([row for row in made if not isinstance(row, str)], settings, restored.config.encoder_seq_length)

    def asked(
        self, records: RecordFile, batch: range, restored: Restored
    ) -> tuple[dict[int, dict[str, Any]], dict[int, Sample], dict[int, dict[str, Any] | str]]:
        """Records and their prompts, by number; and why there are none of some, which all ranks find alike."""
        given, prompts = {}, {}
        left_out: dict[int, dict[str, Any] | str] = {}
        for number in batch:
            try:
                record = records[number]
                ids, media = restored.processor.asked(record)
                prompts[number] = sample_of(with_bos(ids, restored, self.config.inference), media, restored)
                given[number] = record
            except SampleError as error:
                left_out[number] = str(error)
        return given, prompts, left_out

    def report(self, made: list[dict[str, Any] | str], records: RecordFile) -> None:
        """Args:
        made: for each record its row, or why there is none.
        """
        folder = Path(self.config.output_folder)
        rows = {number: row for number, row in enumerate(made) if not isinstance(row, str)}
        if left_out := {number: why for number, why in enumerate(made) if isinstance(why, str)}:
            reasons = textwrap.shorten("; ".join(f"record {number}: {why}" for number, why in left_out.items()), MOST)
            if not rows:
                raise ConfigError(f"data_path={self.config.data_path}: no record can be asked; {reasons}")
            log.warning("%d of %d records are left out; %s", len(left_out), len(made), reasons)
        found, key = scores(rows.values()), f"output_folder={folder}"
        write(list(rows.values()), folder / "predictions.jsonl", key)
        with writing(key), written_whole(folder / "predictions.png", "wb") as picture:
            draw(rows, records, picture)
        with writing(key), written_whole(folder / "scores.json") as file:
            file.write(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        sys.stdout.writelines(f"{line}\n" for category, score in found.items() for line in in_lines(category, score))


def prepare(config: EvaluateConfig, env: Mapping[str, str]) -> Evaluation:
    """Open the checkpoint and lay it out.

    Raises:
        ConfigError: there is none, or it cannot be laid out so.
    """
    return Evaluation(config, lay_out(config, env))


def prediction(record: dict[str, Any], text: str) -> dict[str, Any]:
    first = turns(record)[0]
    return {
        "id": record.get("id"),
        "category": record.get("category", OPEN),
        "image": [str(file) for file in record["image"]],
        "video": [str(file) for file in record["video"]],
        "prompt": first.question,
        "text": text,
        "expected": first.answer,
        "correct": text == expected(record),
    }


def choose(
    records: list[dict[str, Any]], prompts: list[Sample], restored: Restored, batch_size: int
) -> list[dict[str, Any]]:
    """For each record that offers choices the likeliest, and whether it is the right one."""
    offered = [choices(record) for record in records]
    found: list[dict[str, Any]] = [{} for _ in records]
    for group in in_groups([len(choice) for choice in offered], batch_size):
        options = [[answer_tokens(one, restored) for one in offered[place]] for place in group]
        likelihoods = log_likelihoods(restored.forward, [prompts[place] for place in group], options)
        for place, scores in zip(group, likelihoods, strict=True):
            likeliest = offered[place][int(scores.argmax())]
            found[place] = {
                "log_likelihoods": dict(zip(offered[place], scores.tolist(), strict=True)),
                "likeliest": likeliest,
                "likeliest_correct": likeliest.strip() == expected(records[place]),
            }
    return found


def in_groups(counts: list[int], most: int) -> list[list[int]]:
    """Places whose counts, where they have one, add up to `most` in each group, or are above it alone."""
    groups: list[list[int]] = []
    for place, count in enumerate(counts):
        if count and groups and sum(counts[other] for other in groups[-1]) + count <= most:
            groups[-1].append(place)
        elif count:
            groups.append([place])
    return groups


def answer_tokens(choice: str, restored: Restored) -> Tensor:
    """What a model is trained on where this is the answer: it, and its end, whatever was asked."""
    said = [{"from": "human", "value": "?"}, {"from": "gpt", "value": choice}]
    labels = restored.processor.sample({"conversations": said, "image": []}).labels
    return labels[labels != IGNORE_INDEX]


def expected(record: dict[str, Any]) -> str:
    return (turns(record)[0].answer or "").strip()


def scores(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The scores of each category, the open questions first."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[str(row["category"])].append(row)
    return {name: score(kinds[name]) for name in sorted(kinds, key=lambda name: (name != OPEN, name))}


def score(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Exact matches, what always giving the answer that most questions have would score; of choices, the likeliest."""
    wanted = Counter((row["expected"] or "").strip() for row in rows)
    likeliest = [row["likeliest_correct"] for row in rows if "likeliest" in row]
    return {
        "accuracy": sum(row["correct"] for row in rows) / len(rows),
        "most_frequent": max(wanted.values()) / len(rows),
        **({"likeliest_accuracy": sum(likeliest) / len(likeliest)} if likeliest else {}),
        "records": len(rows),
    }


def in_lines(category: str, score: Mapping[str, float]) -> list[str]:
    """As the terminal has them."""
    kind = "" if category == OPEN else f" ({category})"
    beside = f"(the most frequent answer: {score['most_frequent']:.3f})"
    lines = [f"held-out accuracy{kind}: {score['accuracy']:.3f} {beside}"]
    if "likeliest_accuracy" in score:
        lines.append(f"held-out accuracy ({category}, likeliest): {score['likeliest_accuracy']:.3f}")
    return lines


def draw(
    rows: Mapping[int, dict[str, Any]],
    records: RecordFile | Mapping[int, dict[str, Any]],
    file: IO[bytes],
    columns: int = 6,
    lines: int = 4,
) -> None:
    """Some questions without options, with their images and answers: mistakes, in red, then right ones.

    The mistakes fill a line, and what right ones leave. Where they are not all the same question, it is told too.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    opened = [(row, number) for number, row in rows.items() if "likeliest" not in row]
    several = len({asked_of(row) for row, _ in opened}) > 1
    right = [pair for pair in opened if pair[0]["correct"]]
    wrong = [pair for pair in opened if not pair[0]["correct"]][: max(columns, lines * columns - len(right))]
    shown = (wrong + right)[: lines * columns]
    lines = max(-(-len(shown) // columns), 1)
    figure, axes = pyplot.subplots(lines, columns, figsize=(2.1 * columns, 2.4 * lines), constrained_layout=True)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (row, number) in zip(axes.flat[: len(shown)], shown, strict=True):
        with contextlib.suppress(SampleError):  # a file may belong to a later question
            if (image := picture(records[number])) is not None:
                image.thumbnail((EDGE, EDGE))
                axis.imshow(image)
        told = [asked_of(row)] * several + [row["text"]] + [f"(expected: {row['expected']})"] * (not row["correct"])
        title = "\n".join(textwrap.fill(shortened(text, 3 * LINE), LINE) for text in told)
        axis.set_title(title, fontsize=9, color="black" if row["correct"] else "crimson", parse_math=False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def shortened(text: str, letters: int) -> str:
    """On one line; textwrap.shorten would leave nothing of a text without spaces."""
    text = " ".join(text.split())
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def asked_of(row: dict[str, Any]) -> str:
    """A row's question, without the places of its images and videos."""
    return PLACEHOLDERS.sub("", str(row["prompt"])).strip()


def picture(record: dict[str, Any]) -> Image.Image | None:
    """Images, and some frames of videos, side by side; None: there are none.

    Raises:
        SampleError: one cannot be read.
    """
    parts = [load_image(image) for image in record["image"]]
    parts += [frame for video in record["video"] for frame in FRAMES.frames(Video(video))]
    if not parts:
        return None
    whole = Image.new(
        "RGB", (sum(part.width + GAP for part in parts) - GAP, max(part.height for part in parts)), "white"
    )
    left = 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width + GAP
    return whole
