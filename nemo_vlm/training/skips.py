"""Records that a run could make no sample of: counted by reason, listed in skipped_samples.jsonl, and not too many.

The file has a line for each, {record, id, file, reason, message}, in the order in which they were drawn. The counts are
kept in checkpoints, and on resume the file is cut back to as many lines.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_vlm.batch import Batch
from nemo_vlm.checkpoints import Position
from nemo_vlm.data.records import RecordDataset
from nemo_vlm.files import written_whole
from nemo_vlm.mcore import groups

log = logging.getLogger(__name__)

FILE = "skipped_samples.jsonl"
JUDGED_FROM = 100  # samples drawn; before, one broken record would look like many


def details(batches: Sequence[Batch], dataset: RecordDataset) -> list[dict[str, Any]]:
    """The lines of what these batches had to leave out."""
    return [line(number, why, dataset) for batch in batches for number, why in batch.skipped]


def line(number: int, why: str, dataset: RecordDataset) -> dict[str, Any]:
    reason, _, message = why.partition(": ")
    file, inside = dataset.where(number)
    return {
        "record": inside,
        "id": dataset.files[file].name(inside),
        "file": str(dataset.files[file].path),
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
        file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in lines)


def cut_back(folder: Path, position: Position) -> None:
    """Drop what was drawn after the checkpoint that the run goes on from."""
    path, kept = folder / FILE, sum(position.skipped_samples.values())
    if path.exists():
        with open(path, encoding="utf-8") as old, written_whole(path) as new:
            new.writelines(text for number, text in enumerate(old) if number < kept)


def report(position: Position) -> str:
    """How many, and why."""
    skipped = position.skipped_samples
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items(), key=lambda item: -item[1]))
    return f"{sum(skipped.values())} of {position.consumed_samples} samples were left out ({reasons})"


def check(position: Position, fraction: float, finished: bool) -> None:
    """Raises:
    RuntimeError: too many, judged from the JUDGED_FROM-th sample on and at the end.
    """
    skipped, drawn = sum(position.skipped_samples.values()), position.consumed_samples
    if skipped > fraction * drawn and (finished or drawn >= JUDGED_FROM):
        raise RuntimeError(
            f"{report(position)}, more than model.data.max_skip_fraction={fraction}; see {FILE} in the run's folder"
        )
