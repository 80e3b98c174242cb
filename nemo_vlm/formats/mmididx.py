"""Megatron-Core's pairs of a .bin and an .idx of token ids (MMIDIDX, version 1): their names and their header.

Sizes are checked before anybody maps a file: what was cut off is an error of one line, not a crash in mid-run.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from nemo_vlm.errors import ConfigError

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents + 1
ITEMSIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # bytes, by code: uint8, int8, int16, int32, int64, uint16
SUFFIX = "_text_document"  # what Megatron's preprocessing adds to the name that it is given


def find(prefix: str, key: str) -> Path:
    """The prefix of the pair that is meant, both of whose files are there and whole.

    Args:
        prefix: the name without its suffix; with .bin or .idx, or without _text_document, it is found too.
        key: the setting that named it, for messages.
    Raises:
        ConfigError: one of the two files is missing, cut off, or of another format or version.
    """
    if not Path(prefix).name:
        raise ConfigError(f"{key}={prefix}: must be the beginning of the names of a .bin and an .idx")
    if Path(prefix).suffix in (".json", ".jsonl"):
        how = "scripts/prepare_mmap.py, or prepare_sft_idxmap.py for conversations"
        raise ConfigError(f"{key}={prefix}: is not tokenized; see {how}, or take model.data.data_impl=json")
    whole = located(prefix)
    try:
        check(suffixed(whole, ".bin"), suffixed(whole, ".idx"))
    except OSError as error:
        raise ConfigError(f"{key}={prefix}: {error.filename}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{key}={prefix}: {error}") from None
    return whole


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
    if code not in ITEMSIZES:
        raise ValueError(f"{index.name} is of dtype {code}; token ids are whole numbers")
    if not sequences:
        raise ValueError(f"{index.name} has no documents")
    return sequences, documents, ITEMSIZES[code]
