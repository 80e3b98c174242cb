"""LLaVA JSON: a list of records, each a conversation and the images it speaks of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from nemo_vlm.batch import HUMANS, IMAGE_TAG, Sample
from nemo_vlm.errors import ConfigError


def read_records(data_path: str, image_folder: str | None, key: str = "model.data.data_path") -> list[dict[str, Any]]:
    """The records of a file, `image` always a list of paths, which stand below `image_folder` or beside the file.

    Args:
        key: the setting that named the file, for messages.
    Raises:
        ConfigError: there is no such file, or it is no list of conversations.
    """
    path = Path(data_path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{key}={data_path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{key}={data_path}: not JSON ({error})") from None
    if not isinstance(records, list) or not records:
        raise ConfigError(f"{key}={data_path}: must be a list of records with 'conversations'")
    folder = Path(image_folder) if image_folder else path.parent
    for number, record in enumerate(records):
        if problem := fault(record):
            name = record.get("id", number) if isinstance(record, dict) else number
            raise ConfigError(f"{key}={data_path}: record {name}: {problem}")
    return [{**record, "image": image_paths(record.get("image"), folder)} for record in records]


def fault(record: Any) -> str | None:
    """What is wrong with a record, as far as that shows without opening its images."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return "must have 'conversations', a list of turns"
    if not all(isinstance(turn.get(part), str) for turn in turns for part in ("from", "value")):
        return "each turn needs 'from' and 'value', both text"
    if not any(turn["from"] not in HUMANS for turn in turns):
        return "has no answer"
    tags, images = sum(turn["value"].count(IMAGE_TAG) for turn in turns), len(image_paths(record.get("image"), Path()))
    return None if tags == images else f"{tags} {IMAGE_TAG} in the text, {images} images"


def image_paths(entry: str | list[str] | None, folder: Path) -> list[Path]:
    names = [entry] if isinstance(entry, str) else entry or []
    return [folder / name for name in names if name]


class RecordDataset(Dataset):
    """Records as samples, made by a family's processor when they are asked for."""

    def __init__(self, records: list[dict[str, Any]], processor: Any) -> None:
        self.records, self.processor = records, processor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.processor.sample(self.records[index]), record=index)
