"""Texts of JSONL to Megatron's .bin/.idx files of token ids, over several processes, in the order of the input."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy
from rich.progress import track

from nemo_vlm.data import spans
from nemo_vlm.data.pool import mapped
from nemo_vlm.data.skipped import Skipped
from nemo_vlm.data.tokenization import EMPTY, Ids, Piece, Tokenization
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.mmididx import suffixed
from nemo_vlm.mcore.indexed import Builder, dtype_for, output_prefix, written_together

log = logging.getLogger(__name__)

AT_ONCE = 2**20  # bytes of records that a process takes at a time


def tokenize(
    inputs: Sequence[Path], prefix: Path, settings: Tokenization, workers: int, max_skip_fraction: float = 0.0
) -> None:
    """Write PREFIX_KEY_document.bin and .idx of each key, as Megatron's preprocess_data.py names them.

    Args:
        inputs: JSONL, or JSON lists.
        max_skip_fraction: the share of the records that may be left out; those without text are no fault, and go.
    Raises:
        ConfigError: an input cannot be read, or the folder of the output not be made.
        RuntimeError: more had to be left out; nothing is written.
    """
    prefix, read = output_prefix(prefix), list(pieces(inputs))
    outputs = [prefix.with_name(f"{prefix.name}_{key}_document") for key in settings.keys]
    skipped = Skipped("records", max_skip_fraction)
    with written_together(outputs, dtype_for(len(settings.tokenizer))) as builders:
        found = mapped(settings.of_piece, read, workers)
        for piece in track(found, "tokenizing", len(read), disable=workers == 1):
            write(piece, builders, skipped)
        skipped.check(finished=True)
    if skipped.reasons:
        log.warning("%s", skipped)
    for output, builder in zip(outputs, builders, strict=True):
        log.info("wrote %s: %d documents, %d tokens", suffixed(output, ".bin").name, builder.count, builder.tokens)


def pieces(inputs: Sequence[Path]) -> Iterator[Piece]:
    """The records of the files, in pieces.

    Raises:
        ConfigError: one cannot be read, or has no records.
    """
    for path in inputs:
        try:
            places = spans.find(path)
        except OSError as error:
            raise ConfigError(f"--input={path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ConfigError(f"--input={path}: {error}; lines are read from a .jsonl") from None
        if not len(places):
            raise ConfigError(f"--input={path}: it is empty")
        numbers = (places[:, 1] - places[0, 0]) // AT_ONCE
        for piece in numpy.split(places, numpy.flatnonzero(numpy.diff(numbers)) + 1):
            yield path, piece


def write(found: Iterable[Ids | str], builders: Sequence[Builder], skipped: Skipped) -> None:
    """Raises RuntimeError: as Skipped."""
    for one in found:
        if isinstance(one, str):
            skipped.add(one, fault=not one.startswith(EMPTY))
            continue
        skipped.kept += 1
        for ids, builder in zip(one, builders, strict=True):
            builder.add(ids)
