"""Megatron-Core's .bin/.idx files of token ids (MMIDIDX, version 1), by its own IndexedDataset and builder.

Sizes are checked before Megatron maps a file: what was cut off is an error of one line, not a crash in mid-run.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from nemo_vlm.errors import ConfigError
from nemo_vlm.files import partial_of, sync

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents + 1
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
SUFFIX = "_text_document"  # what Megatron's preprocessing adds to the name that it is given


class IndexedFile:
    """The documents of PREFIX.bin and PREFIX.idx, by number, mapped from disk.

    A document is what Megatron calls a sequence: its GPTDataset, too, knows no other.

    Args:
        prefix: the name without its suffix; with .bin or .idx, or without _text_document, it is found too.
        key: the setting that named it, for messages.
    Attributes:
        path: the .bin.
        called: key and prefix, as messages begin.
        lengths: [documents] int32, tokens of each.
    Raises:
        ConfigError: one of the two files is missing, cut off, or of another format or version.
    """

    def __init__(self, prefix: str, key: str = "model.data.data_path") -> None:
        self.called = f"{key}={prefix}"
        if not Path(prefix).name:
            raise ConfigError(f"{self.called}: must be the beginning of the names of a .bin and an .idx")
        if Path(prefix).suffix in (".json", ".jsonl"):
            how = "scripts/prepare_mmap.py, or prepare_sft_idxmap.py for conversations"
            raise ConfigError(f"{self.called}: is not tokenized; see {how}, or take model.data.data_impl=json")
        whole = located(prefix)
        self.path, self.index_path = suffixed(whole, ".bin"), suffixed(whole, ".idx")
        try:
            check(self.path, self.index_path)
        except OSError as error:
            raise ConfigError(f"{self.called}: {error.filename}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ConfigError(f"{self.called}: {error}") from None
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


def located(prefix: str) -> Path:
    """The prefix of the files that are meant, one of which exists; the prefix itself where none does."""
    bare = prefix.removesuffix(".bin").removesuffix(".idx")
    for candidate in (bare, bare + SUFFIX):
        if any(suffixed(Path(candidate), suffix).exists() for suffix in (".bin", ".idx")):
            return Path(candidate)
    return Path(bare)


def suffixed(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def check(tokens: Path, index: Path) -> None:
    """Raises:
    OSError: one of the files cannot be read.
    ValueError: the index is none of Megatron's version 1, or a file has not the size that the index says.
    """
    size = tokens.stat().st_size
    with open(index, "rb") as file:
        sequences, documents, itemsize = read_header(file.read(HEADER.size), index)
        of_pointers = HEADER.size + 4 * sequences
        of_documents = of_pointers + 8 * sequences
        end = of_documents + 8 * documents
        if index.stat().st_size not in (end, end + sequences):
            raise ValueError(f"{index.name} has {index.stat().st_size} bytes, but {end} by its header: it was cut off")
        (length,) = struct.unpack("<i", os.pread(file.fileno(), 4, of_pointers - 4))
        (pointer,) = struct.unpack("<q", os.pread(file.fileno(), 8, of_documents - 8))
        (last,) = struct.unpack("<q", os.pread(file.fileno(), 8, end - 8))
    expected = pointer + length * itemsize
    if not expected:
        raise ValueError(f"{tokens.name} has no tokens")
    if last != sequences:
        raise ValueError(f"{index.name} is damaged: {sequences} sequences, {last} of them in documents")
    if size != expected:
        raise ValueError(f"{tokens.name} has {size} bytes, but {expected} by {index.name}: cut off, or of another pair")


def read_header(header: bytes, index: Path) -> tuple[int, int, int]:
    """The numbers of sequences and of documents, the 0 in front of them counted, and the bytes of a token.

    Raises:
        ValueError: it is none of Megatron's version 1.
    """
    if header[: len(MAGIC)] != MAGIC[: len(header)]:
        raise ValueError(f"{index.name} is no index of Megatron's (it does not begin with MMIDIDX)")
    if len(header) < HEADER.size:
        raise ValueError(f"{index.name} was cut off after {len(header)} bytes")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"{index.name} is of version {version}; Megatron's version {VERSION} is read here")
    if code not in DTYPES:
        raise ValueError(f"{index.name} is of dtype {code}; token ids are whole numbers")
    if not sequences:
        raise ValueError(f"{index.name} has no documents")
    return sequences, documents, numpy.dtype(DTYPES[code]).itemsize


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
