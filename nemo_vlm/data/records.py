"""LLaVA JSON: a list of records, each a conversation and the images it speaks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from nemo_vlm.batch import Sample
from nemo_vlm.errors import ConfigError


def read_records(data_path: str, image_folder: str | None) -> list[dict[str, Any]]:
    """The records of a file, `image` always a list of paths, which stand below `image_folder` or beside the file.

    Raises:
        ConfigError: there is no such file, or it is no list of conversations.
    """
    path = Path(data_path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model.data.data_path={data_path}: the file does not exist") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.data.data_path={data_path}: not JSON ({error})") from None
    if not isinstance(records, list) or not all(
        isinstance(r, dict) and isinstance(r.get("conversations"), list) for r in records
    ):
        raise ConfigError(f"model.data.data_path={data_path}: must be a list of records with 'conversations'")
    if not records:
        raise ConfigError(f"model.data.data_path={data_path}: holds no record")
    folder = Path(image_folder) if image_folder else path.parent
    return [{**record, "image": image_paths(record.get("image"), folder)} for record in records]


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
        return self.processor.sample(self.records[index])
