"""A model on disk, opened without loading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_vlm.config import LanguageConfig
from nemo_vlm.config.peft import is_adapter
from nemo_vlm.data.tokenizer import name_sentencepiece
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import Reader
from nemo_vlm.formats.store import Span, is_inside
from nemo_vlm.models.base import family, starts
from nemo_vlm.typed import read_model


@dataclass(frozen=True)
class Source:
    """What a checkpoint holds.

    Attributes:
        tree: the branch `model` of the settings: `family`, the architecture, and what else the checkpoint knows. Where
            it holds only a part of a model, a vision tower say, only the settings of that.
        reader: its tensors under our names.
        files: what its tokenizer and its processor consist of, by name.
    """

    path: Path
    tree: dict[str, Any]
    reader: Reader
    files: dict[str, Span] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def family(self) -> str:
        return str(self.tree["family"])

    @property
    def parts(self) -> set[str]:
        """The top-level modules that it has tensors of: language_model, vision_model, ..."""
        return {name.split(".")[0] for name in self.reader.names()}

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings as RunConfig's fields (typed.read_model).

        Raises:
            ConfigError: they are not what this version knows.
        """
        try:
            return read_model(self.tree, family(self.family, "config").Config)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    @property
    def model(self) -> LanguageConfig:
        """Its architecture."""
        return self.settings["model"]

    @property
    def has_adapters(self) -> bool:
        """Whether it holds LoRA's adapters, which are nothing without the model that they were trained beside."""
        return any(map(is_adapter, self.reader.names()))

    @property
    def bases(self) -> list[str]:
        """The checkpoints that the run which trained its adapters started from, the later one over the earlier."""
        return [path for _, _, path in starts(self.tree)]

    @property
    def tokenizer(self) -> str | None:
        """What `model.tokenizer.type` must be to get its tokenizer."""
        return str(self.path) if any(name.startswith("tokenizer") for name in self.files) else None

    def save_files(self, folder: Path) -> Path:
        """Write tokenizer and processor files to a folder."""
        return save_files(self.files, folder)

    def read_json(self, name: str) -> dict[str, Any]:
        """One of those files.

        Raises:
            ConfigError: it is damaged.
        """
        try:
            return dict(json.loads(self.files[name].bytes()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.path}: {name} is damaged ({error!r})") from None


def save_files(files: Mapping[str, Span], folder: Path) -> Path:
    """Write tokenizer and processor files to a folder.

    Raises:
        ConfigError: a name leads outside it.
    """
    for name, span in files.items():
        if not is_inside(name):
            raise ConfigError(f"{span}: refused, the name leads outside the folder it is to be written to")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(span.bytes())
    name_sentencepiece(folder)
    return folder
