"""Megatron-Core's .bin/.idx files of token ids (MMIDIDX, version 1), by its own IndexedDataset and builder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from nemo_vlm.errors import ConfigError
from nemo_vlm.files import partial_of, sync
from nemo_vlm.formats import mmididx
from nemo_vlm.formats.mmididx import suffixed


class IndexedFile:
    """The documents of PREFIX.bin and PREFIX.idx, by number, mapped from disk.

    A document is what Megatron calls a sequence: its GPTDataset, too, knows no other.

    Args:
        prefix, key: as of mmididx.find.
    Attributes:
        path: the .bin.
        called: key and prefix, as messages begin.
        lengths: [documents] int32, tokens of each.
    Raises:
        ConfigError: as mmididx.find.
    """

    def __init__(self, prefix: str, key: str = "model.data.data_path") -> None:
        whole = mmididx.find(prefix, key)
        self.called = f"{key}={prefix}"
        self.path, self.index_path = suffixed(whole, ".bin"), suffixed(whole, ".idx")
        self._documents = IndexedDataset(str(whole))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def lengths(self) -> numpy.ndarray:
        return self._documents.sequence_lengths

    def read(self, document: int, start: int = 0, count: int | None = None) -> numpy.ndarray:
        """[count] int64: tokens of a document; None: all from `start` on."""
        return self._documents.get(document, start, count).astype(numpy.int64)

    def first(self, count: int) -> numpy.ndarray:
        """The first tokens of the file, at most so many, as they are stored."""
        dtype = self._documents.index.dtype
        return numpy.memmap(self.path, dtype, "r")[:count]


class Builder:
    """Takes documents one after another; see `written`.

    Attributes:
        count, tokens: how many it has taken.
    """

    def __init__(self, path: Path, dtype: Any) -> None:
        self.megatron, self.count, self.tokens = IndexedDatasetBuilder(str(path), dtype), 0, 0

    def add(self, ids: numpy.ndarray | Sequence[int]) -> None:
        """A document's token ids."""
        tokens = torch.as_tensor(numpy.asarray(ids))
        self.megatron.add_document(tokens, [len(tokens)])
        self.count += 1
        self.tokens += len(tokens)


@contextmanager
def written(prefix: Path, dtype: Any) -> Iterator[Builder]:
    """A builder of PREFIX.bin and PREFIX.idx, which appear, replacing what bore their names, when all is on disk.

    Args:
        dtype: of the ids on disk, as dtype_for.
    """
    with written_together([prefix], dtype) as (builder,):
        yield builder


@contextmanager
def written_together(prefixes: Sequence[Path], dtype: Any) -> Iterator[list[Builder]]:
    """A builder for each; none of their files appears before all are on disk."""
    names = {partial_of(prefix): prefix for prefix in prefixes}
    halves = {suffixed(one, end): suffixed(prefix, end) for one, prefix in names.items() for end in (".bin", ".idx")}
    try:
        builders = {partial: Builder(suffixed(partial, ".bin"), dtype) for partial in names}
        yield list(builders.values())
        for partial, builder in builders.items():
            builder.megatron.finalize(str(suffixed(partial, ".idx")))
        for half in halves:
            sync(half)
        for prefix in prefixes:
            suffixed(prefix, ".idx").unlink(missing_ok=True)  # beside another's tokens it would be worse than none
        for half, name in halves.items():
            os.replace(half, name)
    finally:
        for half in halves:
            half.unlink(missing_ok=True)


def output_prefix(prefix: Path) -> Path:
    """What a script was given to write to, in a folder that is there now.

    Raises:
        ConfigError: it names no file, or the folder cannot be made.
    """
    if not prefix.name:
        raise ConfigError(f"--output={prefix}: must be the beginning of the files' names")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output={prefix}: {error.filename}: cannot be a folder ({error.strerror})") from None
    return prefix


def dtype_for(vocab_size: int) -> Any:
    """The dtype in which Megatron stores ids below this: 16 bits where that is enough."""
    return DType.optimal_dtype(vocab_size)
