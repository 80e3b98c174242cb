"""Scores of an archive's free, greedy answers to the questions of a LLaVA JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from nemo_vlm.config import Precision, demand
from nemo_vlm.data.records import read_records
from nemo_vlm.errors import ConfigError
from nemo_vlm.inference.generate import greedy
from nemo_vlm.inference.restore import Restored, restore
from nemo_vlm.models.conversation import turns
from nemo_vlm.models.images import load_image
from nemo_vlm.sources.opening import open_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of an evaluation; its defaults stand in conf/neva_evaluation.yaml."""

    neva_model_file: str
    data_path: str
    output_folder: str
    image_folder: str | None
    precision: Precision
    batch_size: int
    tokens_to_generate: int

    def __post_init__(self) -> None:
        demand(self.batch_size > 0, "batch_size", self.batch_size, "1 or more")
        demand(self.tokens_to_generate > 0, "tokens_to_generate", self.tokens_to_generate, "1 or more")


def evaluate_archive(config: EvaluateConfig) -> None:
    """Write predictions.jsonl and predictions.png, and print the accuracy of every category of records."""
    records = read_records(config.data_path, config.image_folder, key="data_path")
    folder = Path(config.output_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_folder={folder}: cannot be made ({error.strerror})") from None
    with restore(open_source(config.neva_model_file, "neva_model_file"), config.precision) as restored:
        answers = answer_all(restored, records, config)
    rows = [prediction(record, answer) for record, answer in zip(records, answers, strict=True)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    draw(rows, records, folder / "predictions.png")
    log.info("wrote %s and predictions.png", folder / "predictions.jsonl")
    for category, accuracy in accuracies(rows).items():
        kind = "" if category == "open" else f" ({category})"
        sys.stdout.write(f"held-out accuracy{kind}: {accuracy:.3f}\n")


def answer_all(restored: Restored, records: list[dict[str, Any]], config: EvaluateConfig) -> list[str]:
    answers = []
    for first in track(range(0, len(records), config.batch_size), description="answering"):
        prompts = [restored.processor.prompt(record) for record in records[first : first + config.batch_size]]
        generated = greedy(restored.forward.last, prompts, config.tokens_to_generate, restored.stop_ids)
        answers += [restored.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in generated]
    return answers


def prediction(record: dict[str, Any], answer: str) -> dict[str, Any]:
    first = turns(record)[0]
    return {
        "id": record.get("id"),
        "category": record.get("category", "open"),
        "image": [str(path) for path in record["image"]],
        "prompt": first.question,
        "text": answer,
        "expected": first.answer,
        "correct": answer == (first.answer or "").strip(),
    }


def accuracies(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Exact matches in each category, the open questions first."""
    correct: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        correct[row["category"]].append(row["correct"])
    return {
        name: sum(correct[name]) / len(correct[name])
        for name in sorted(correct, key=lambda name: (name != "open", name))
    }


def draw(
    rows: list[dict[str, Any]],
    records: list[dict[str, Any]],
    path: Path,
    columns: int = 6,
    lines: int = 4,
) -> None:
    """Some open questions' images with their answers: up to a line of mistakes, in red, then right ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = [(row, record) for row, record in zip(rows, records, strict=True) if row["category"] == "open"]
    wrong = [pair for pair in pairs if not pair[0]["correct"]][:columns]
    shown = wrong + [pair for pair in pairs if pair[0]["correct"]]
    figure, axes = pyplot.subplots(lines, columns, figsize=(2.1 * columns, 2.4 * lines), constrained_layout=True)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (row, record) in zip(axes.flat[: len(shown)], shown[: axes.size], strict=True):
        if record["image"]:
            axis.imshow(load_image(record["image"][0]))
        note = "" if row["correct"] else f"\n(expected: {row['expected']})"
        axis.set_title(row["text"] + note, fontsize=9, color="black" if row["correct"] else "crimson")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
