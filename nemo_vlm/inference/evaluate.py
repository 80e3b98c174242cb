"""Scores of a model's answers to the questions of a LLaVA JSON: exact matches, and the likeliest of several choices."""

from __future__ import annotations

import contextlib
import logging
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nemo_vlm.batch import IGNORE_INDEX, Sample
from nemo_vlm.data.records import RecordFile
from nemo_vlm.errors import SampleError
from nemo_vlm.inference.answers import answer, sample_of, with_bos, write
from nemo_vlm.inference.laid_out import LaidOut, lay_out, make_folder, share
from nemo_vlm.inference.likelihood import choices, log_likelihoods
from nemo_vlm.inference.restore import Restored, restore
from nemo_vlm.inference.settings import EvaluateConfig
from nemo_vlm.models.conversation import turns
from nemo_vlm.models.images import load_image
from nemo_vlm.models.templates import PLACEHOLDERS
from nemo_vlm.models.video import FrameSampling, Video

log = logging.getLogger(__name__)
OPEN = "open"  # category of records that name none
FRAMES, GAP, LINE = FrameSampling(4, None), 6, 28  # of a video in the picture; pixels between two; letters of a title


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
        """Write predictions.jsonl and predictions.png, and print the accuracy of every category of records."""
        records, settings = self.records(), self.config.inference
        with restore(self.model.source, self.model.run.trainer.precision, self.model.layout) as restored:

            def work(batch: range) -> list[dict[str, Any] | str]:
                given, prompts, rows = self.asked(records, batch, restored)
                answers = answer(prompts, restored, settings, settings.end_strings + restored.terminators)
                chosen = choose(list(given.values()), list(prompts.values()), restored, settings.batch_size)
                for (number, record), choice in zip(given.items(), chosen, strict=True):
                    rows[number] = prediction(record, answers[number].text(restored.tokenizer).strip()) | choice
                return [rows[number] for number in batch]

            made = share(len(records), settings.batch_size, work, self.model.layout, "answering")
            first = torch.distributed.get_rank() == 0
        if first:
            self.report(made, records)

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
        if left_out := [why for why in made if isinstance(why, str)]:
            log.warning("%d of %d records are left out; the first: %s", len(left_out), len(made), left_out[0])
        write(list(rows.values()), folder / "predictions.jsonl", f"output_folder={folder}")
        draw(rows, records, folder / "predictions.png")
        commonest = shares_of_commonest(rows.values())
        for category, accuracy in accuracies(rows.values()).items():
            kind = "" if category == OPEN else f" ({category})"
            beside = f" (the most frequent answer: {commonest[category]:.3f})" if category in commonest else ""
            sys.stdout.write(f"held-out accuracy{kind}: {accuracy:.3f}{beside}\n")


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


def accuracies(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Exact matches in each category, the open questions first; and of the likeliest choices."""
    correct: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        correct[row["category"]].append(row["correct"])
        if "likeliest" in row:
            correct[f"{row['category']}, likeliest"].append(row["likeliest_correct"])
    return {
        name: sum(correct[name]) / len(correct[name]) for name in sorted(correct, key=lambda name: (name != OPEN, name))
    }


def shares_of_commonest(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What always giving the answer that most questions of a category have would score."""
    expected: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        expected[row["category"]][(row["expected"] or "").strip()] += 1
    return {name: max(answers.values()) / answers.total() for name, answers in expected.items()}


def draw(
    rows: Mapping[int, dict[str, Any]],
    records: RecordFile,
    path: Path,
    columns: int = 6,
    lines: int = 4,
) -> None:
    """Some questions without options, with their images and answers: up to a line of mistakes, in red, then right ones.

    Where they are not all the same question, it is told too.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    opened = [(row, number) for number, row in rows.items() if "likeliest" not in row]
    several = len({asked_of(row) for row, _ in opened}) > 1
    wrong = [pair for pair in opened if not pair[0]["correct"]][:columns]
    shown = wrong + [pair for pair in opened if pair[0]["correct"]]
    figure, axes = pyplot.subplots(lines, columns, figsize=(2.1 * columns, 2.4 * lines), constrained_layout=True)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (row, number) in zip(axes.flat[: len(shown)], shown[: axes.size], strict=True):
        with contextlib.suppress(SampleError):  # a file may belong to a later question
            if (image := picture(records[number])) is not None:
                axis.imshow(image)
        told = [asked_of(row)] * several + [row["text"]] + [f"(expected: {row['expected']})"] * (not row["correct"])
        title = "\n".join(textwrap.fill(textwrap.shorten(text, 3 * LINE), LINE) for text in told)
        axis.set_title(title, fontsize=9, color="black" if row["correct"] else "crimson")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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
