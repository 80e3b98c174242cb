"""What a run of VLMEvalKit came to: its status file as scores, a table and the datasets that failed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_vlm.errors import ConfigError

SCORES = "scores.json"
PRIMARY = "*"
MAX_LENGTH = 300  # of what a dataset's failure says

Scores = Mapping[str, Mapping[str, float]]  # {dataset: {metric: value}}


@dataclass(frozen=True)
class Outcome:
    """What became of a dataset.

    Attributes:
        metrics: the primary ones first.
        primary: how many of them are.
        failure: why its scores are none, or not to be trusted; empty: they are.
    """

    dataset: str
    metrics: Mapping[str, float]
    primary: int
    failure: str


@dataclass(frozen=True)
class Row:
    """What VLMEvalKit's own summary has of a dataset beside its metrics.

    Attributes:
        answers, judgements: how many failed, the model's and the judge's.
        primary: the metrics that it goes by, which may be none of the others.
    """

    answers: int = 0
    judgements: int = 0
    primary: Mapping[str, float] = field(default_factory=dict)


def outcomes(status: Mapping[str, Any], asked: Sequence[str], rows: Mapping[str, Row]) -> list[Outcome]:
    """Args:
    status: a status.json of VLMEvalKit's.
    asked: the datasets that were to be scored.
    """
    found = status["datasets"]
    return [outcome(name, found.get(name), rows.get(name), status["mode"]) for name in asked]


def outcome(dataset: str, entry: Mapping[str, Any] | None, row: Row | None, mode: str) -> Outcome:
    if entry is None or row is None:
        return Outcome(dataset, {}, 0, f"VLMEvalKit's {'status file' if entry is None else 'report'} does not name it")
    metrics = {**row.primary, **(entry.get("metrics") or {})}
    values = {name: float(value) for name, value in metrics.items()}
    return Outcome(dataset, values, len(row.primary), failure(entry, row, mode))


def failure(entry: Mapping[str, Any], row: Row, mode: str) -> str:
    """Why a dataset's scores cannot be used, in one line; empty: they can."""
    inferred = mode == "infer" and entry.get("skip_reason") == "mode_infer"
    if entry.get("error_message") is not None:
        reason = " ".join(str(entry["error_message"]).split())[:MAX_LENGTH]
        return reason or "failed without a reason; VLMEvalKit's log may have one"
    if entry.get("skip_reason") and not inferred:
        return f"skipped ({entry['skip_reason']})"
    if entry.get("status") != "done":
        return f"did not end (status: {entry.get('status')})"
    if row.answers or row.judgements:
        return f"{row.answers} answers and {row.judgements} judgements failed"
    return "" if entry.get("metrics") or inferred else "has no metrics"


def table(found: Sequence[Outcome], baseline: Scores | None) -> Iterator[str]:
    """Lines of datasets, metrics and scores; with another run's, and the differences."""
    compared = ["baseline", "difference"] if baseline is not None else []
    rows = [["dataset", "metric", "score", *compared]]
    for one in found:
        for place, (metric, score) in enumerate(one.metrics.items()):
            rows.append([one.dataset, metric + f" {PRIMARY}" * (place < one.primary), f"{score:.4f}"])
            if baseline is not None:
                before = baseline.get(one.dataset, {}).get(metric)
                rows[-1] += ["-", "-"] if before is None else [f"{before:.4f}", f"{score - before:+.4f}"]
    if len(rows) == 1:  # answers alone, or failures
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        texts = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join([*texts, *numbers])
    if any(one.primary for one in found):
        yield f"{PRIMARY} the dataset's primary metric"


def scores(found: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    return {one.dataset: dict(one.metrics) for one in found if one.metrics}


def read_scores(folder: Path, key: str) -> Scores:
    """Another run's scores.

    Args:
        folder: with scores.json, or another such file.
        key: the flag that named it, for messages.
    Raises:
        ConfigError: it has none.
    """
    file = folder / SCORES if folder.is_dir() else folder
    try:
        read = json.loads(file.read_text())
        return {dataset: {metric: float(value) for metric, value in of.items()} for dataset, of in read.items()}
    except OSError as error:
        raise ConfigError(f"{key}={folder}: {file} cannot be read ({error.strerror}); a run writes it") from None
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(f"{key}={folder}: {file} must hold {{dataset: {{metric: number}}}}") from None
