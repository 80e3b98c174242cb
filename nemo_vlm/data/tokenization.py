"""Records to the token ids of their texts, in a process of its own if need be; Megatron is not imported here."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from nemo_vlm.data.codec import Codec
from nemo_vlm.errors import ConfigError

Ids = list[numpy.ndarray]  # of one record: of each of its keys
EMPTY = "an empty"  # how the reason begins why a record without text has no ids
Piece = tuple[Path, numpy.ndarray]  # a file, and [records, 2] where they begin and end


@dataclass(frozen=True)
class Tokenization:
    """How a record becomes documents: one for each of its texts.

    Attributes:
        keys: of the texts; each goes into files of its own.
        append_eod: whether a document ends with `eod`, the tokenizer's EOS if that is None.
    """

    tokenizer: Any
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    eod: str | None = None

    def __post_init__(self) -> None:
        if self.eod is not None and self.eod not in self.tokenizer.get_vocab():
            raise ConfigError(f"--eod-token={self.eod}: the tokenizer {self.tokenizer.name_or_path} has no such token")

    @cached_property
    def codec(self) -> Codec:
        return Codec(self.tokenizer)

    @cached_property
    def ends(self) -> list[int]:
        return [self.tokenizer.get_vocab()[self.eod or self.tokenizer.eos_token]] if self.append_eod else []

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which makes its own codec."""
        return {name: value for name, value in vars(self).items() if name != "codec"}

    def of_piece(self, piece: Piece) -> list[Ids | str]:
        """Of each record its ids, or the reason why there are none, which begins with EMPTY where that is no fault."""
        path, places = piece
        with open(path, "rb") as file:
            return [self.of_record(os.pread(file.fileno(), end - start, start)) for start, end in places.tolist()]

    def of_record(self, line: bytes) -> Ids | str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return "not JSON"
        texts = [record.get(key) if isinstance(record, dict) else None for key in self.keys]
        for key, text in zip(self.keys, texts, strict=True):
            if not isinstance(text, str):
                return f"no text '{key}'"
            if not text:
                return f"{EMPTY} '{key}'"
        try:
            return [numpy.array(self.codec.ids(text, first=True) + self.ends) for text in texts]
        except UnicodeEncodeError:
            return "half of a surrogate pair in a text"
