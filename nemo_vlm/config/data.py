"""`model.data.*` and `model.tokenizer.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_vlm.config.checks import demand


@dataclass(frozen=True)
class DataConfig:
    """`model.data.*`."""

    data_path: str | None = None  # LLaVA JSON
    image_folder: str | None = None
    prepare: Literal["digits"] | None = None  # a demo data set that is written on first use
    conv_template: Literal["plain", "v1"] = "v1"
    system_message: str | None = None  # null: the template's own
    image_aspect_ratio: Literal["square", "pad"] = "square"
    dataloader_type: Literal["cyclic", "single"] = "cyclic"  # shuffled by epoch; in file order
    num_workers: int = 2

    def __post_init__(self) -> None:
        demand(self.num_workers >= 0, "model.data.num_workers", self.num_workers, "0 or more")


@dataclass(frozen=True)
class TokenizerConfig:
    """`model.tokenizer.*`."""

    type: str | None = None  # a directory in Hugging Face's layout, or a name in its local cache
