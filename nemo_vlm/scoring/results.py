"""WORK_DIR/NAME, where VLMEvalKit keeps a model's answers: whose they are, for it knows a checkpoint by its name alone.

WORK_DIR/NAME/checkpoints.json  {key: {dataset: {metric: value}}}, each checkpoint that was asked under that name
WORK_DIR/NAME/scores.json       the last one's scores, of this and earlier runs
WORK_DIR/scores.json            the same, of the last model
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from nemo_vlm.errors import ConfigError
from nemo_vlm.files import written_whole
from nemo_vlm.scoring.report import SCORES, Scores

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints.json"
UNKNOWN = "unknown"  # whose answers are there, and no file says so


def make_folder(work_dir: Path, name: str) -> Path:
    """Raises ConfigError where it cannot be made."""
    folder = work_dir / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--work-dir={work_dir}: {folder} cannot be made ({error.strerror})") from None
    return folder


def claim(folder: Path, key: str, reused: bool) -> None:
    """Note that answers of a checkpoint are about to come.

    Args:
        reused: those that are there will be taken for its own.
    Raises:
        ConfigError: they will, and some are another's.
    """
    held = read(folder)
    if set(held) - {key}:
        problem = f"{folder} holds answers of another checkpoint; give --name or --work-dir to keep them apart"
        if reused:
            raise ConfigError(f"--reuse, --mode=eval: {problem}")
        log.info("%s, else --reuse is refused there", problem)
    write(folder / CHECKPOINTS, {**held, key: held.pop(key, {})})


def keep(folder: Path, key: str, found: Scores) -> None:
    """Add a run's scores to those that earlier runs have of the same checkpoint."""
    if not found:  # answers alone, or failures
        return
    held = read(folder)
    held[key].update(found)
    write(folder / CHECKPOINTS, held)
    for place in (folder, folder.parent):
        write(place / SCORES, held[key])


def read(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / CHECKPOINTS
    if file.is_file():
        return dict(json.loads(file.read_text()))
    return {UNKNOWN: {}} if any(place.is_dir() for place in folder.iterdir()) else {}


def write(file: Path, content: Any) -> None:
    with written_whole(file) as stream:
        json.dump(content, stream, indent=1)
