"""Whether the data of a run are there, or a demo writes them; known before anything that takes seconds to import."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from nemo_vlm.config import DataConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import mmididx

WANTED = {  # by model.data.data_impl
    "json": "a JSON or JSONL of conversations, or choose a demo's by data=: digits_vqa (LLaVA), digit_pairs or "
    "digit_captions (Qwen), docstring_questions (text)",
    "energon": "a folder of tars of scripts/prepare_wds.py or of Megatron-Energon",
    "mmap": "the prefix of a .bin and .idx, or choose data=docstrings",
    "sft_idxmap": "the prefix of a .bin and .idx of scripts/prepare_sft_idxmap.py",
}


def check(data: DataConfig) -> None:
    """Of records no more than that they are there; of tokens the header too.

    Raises:
        ConfigError: no data are given, or a file or folder is missing that no demo writes.
    """
    if not data.files:
        raise ConfigError(f"model.data.data_path=null: give {WANTED[data.data_impl]}")
    find, made = find_records if data.has_records else mmididx.find, of_demo(data)
    for key, paths in (("data_path", data.files), ("validation_path", data.validation_files)):
        for path in paths:
            if Path(path) not in made:
                find(path, f"model.data.{key}")


def find_records(path: str, key: str) -> None:
    try:
        os.stat(path)
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be read ({error.strerror})") from None


def of_demo(data: DataConfig) -> list[Path]:
    """What the demo data set that is wanted, if one is, writes where it is missing."""
    first, names = Path(data.files[0]), () if data.prepare is None else demo(data).FILES
    return [first.parent / name for name in names] if first.name in names else []


def write_demo(data: DataConfig) -> None:
    if of_demo(data):
        demo(data).write(Path(data.files[0]).parent)


def demo(data: DataConfig) -> Any:
    """The module of model.data.prepare."""
    return importlib.import_module(f"nemo_vlm.data.{data.prepare}")
