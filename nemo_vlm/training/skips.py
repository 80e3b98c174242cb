"""Records that a run could make no sample of: counted by reason, listed in skipped_samples.jsonl, and not too many.

The file has a line for each, {split, record, id, file, reason, message}: those of training step by step, within a step
by data-parallel rank; and behind or between them those of the validation, once. The counts of training are kept in
checkpoints, and on resume the file is cut back to as many of its lines.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_vlm.batch import Batch
from nemo_vlm.checkpoints import Position
from nemo_vlm.data.dataset import Samples
from nemo_vlm.data.skipped import too_many
from nemo_vlm.files import written_whole
from nemo_vlm.mcore import groups

log = logging.getLogger(__name__)

FILE = "skipped_samples.jsonl"
TRAINING, VALIDATION = "training", "validation"
SMALLER = (
    "or show less of images and videos (model.data.num_frames; in the Qwen families max_pixels, video_max_pixels, "
    "video_total_pixels too)"
)
REMEDIES = {  # where a setting is one
    "too_long": f"raise model.encoder_seq_length, {SMALLER}",
    "too_many_visual_tokens": f"raise model.data.max_visual_tokens or max_visual_tokens_per_micro_batch, {SMALLER}",
}
OF_VALIDATION = json.dumps({"split": VALIDATION})[:-1]  # how such a line begins


def details(batches: Sequence[Batch], dataset: Samples, split: str = TRAINING) -> list[dict[str, Any]]:
    """The lines of what these batches had to leave out."""
    return [line(number, why, dataset, split) for batch in batches for number, why in batch.skipped]


def line(number: int, why: str, dataset: Samples, split: str) -> dict[str, Any]:
    reason, _, message = why.partition(": ")
    origin = dataset.origin(number)
    return {
        "split": split,
        "record": origin.number,
        "id": origin.id,
        "file": str(origin.path),
        "reason": reason,
        "message": message,
    }


def of_all_ranks(mine: list[dict[str, Any]], data_parallel_rank: int) -> list[dict[str, Any]]:
    """The lines of all data-parallel ranks; each rank's are known to several that hold parts of the same model."""
    by_rank = dict(groups.from_every_rank((data_parallel_rank, mine)))
    return [each for _, lines in sorted(by_rank.items()) for each in lines]


def count(lines: Sequence[dict[str, Any]], position: Position) -> None:
    for each in lines:
        position.skipped_samples[each["reason"]] = position.skipped_samples.get(each["reason"], 0) + 1


def append(lines: Sequence[dict[str, Any]], folder: Path) -> None:
    with open(folder / FILE, "a", encoding="utf-8") as file:
        file.writelines(texts(lines))


def texts(lines: Sequence[dict[str, Any]]) -> list[str]:
    return [json.dumps(each) + "\n" for each in lines]  # ASCII: the name of a file may be no Unicode


def cut_back(folder: Path, position: Position) -> None:
    """Drop what was drawn after the checkpoint that the run goes on from."""
    training, validation = read(folder)
    rewrite(folder, training[: sum(position.skipped_samples.values())] + validation)


def list_validation(lines: Sequence[dict[str, Any]], folder: Path) -> None:
    """In place of what an earlier validation left out."""
    rewrite(folder, read(folder)[0] + texts(lines))


def read(folder: Path) -> tuple[list[str], list[str]]:
    """The lines of training, the last of which may be cut off, and those of the validation."""
    path = folder / FILE
    found: tuple[list[str], list[str]] = [], []
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for text in file:
                found[text.startswith(OF_VALIDATION)].append(text)
    return found


def rewrite(folder: Path, lines: Sequence[str]) -> None:
    if lines or (folder / FILE).exists():
        with written_whole(folder / FILE) as file:
            file.writelines(lines)


def report(position: Position) -> str:
    """How many, and why."""
    skipped = position.skipped_samples
    return f"{sum(skipped.values())} of {position.consumed_samples} samples were left out ({reasons(skipped)})"


def reasons(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items(), key=lambda item: -item[1]))


def check(position: Position, fraction: float, finished: bool) -> None:
    """Raises RuntimeError: more than `fraction` of what was drawn is left out, see data.skipped.too_many."""
    skipped, drawn = sum(position.skipped_samples.values()), position.consumed_samples
    if too_many(skipped, drawn, fraction, finished):
        told = f"{report(position)}, more than model.data.max_skip_fraction={fraction}; see {FILE} in the run's folder"
        remedies = [f"; {reason}: {REMEDIES[reason]}" for reason in position.skipped_samples if reason in REMEDIES]
        raise RuntimeError(told + "".join(remedies))
