"""Text that was tokenized beforehand, in Megatron's .bin/.idx files: opened, split by documents, drawn by numbers.

What a number of a file stands for is its part's business: see data.mmap (text that goes on and on, cut into pieces of
one length) and data.idxmap (conversations that were packed beforehand).
"""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy
from torch import Tensor

from nemo_vlm.batch import Sample, empty_sample
from nemo_vlm.config import RunConfig
from nemo_vlm.data.dataset import Datasets, Origin
from nemo_vlm.errors import ConfigError
from nemo_vlm.mcore.indexed import IndexedFile


class Part(Protocol):
    """Some documents of a file, as samples by numbers from 0 on."""

    packed: bool  # see data.dataset.Samples

    def __len__(self) -> int: ...

    def samples(self, number: int) -> list[Sample]: ...


MakePart = Callable[[IndexedFile, range, RunConfig], Part]  # of these documents
log = logging.getLogger(__name__)


class IndexedSamples:
    """The parts of several files, by one row of numbers; see data.dataset.Samples."""

    lengths: numpy.ndarray | None = None  # neither packing nor grouping is for them

    def __init__(self, files: Sequence[IndexedFile], parts: Sequence[Part]) -> None:
        self.paths, self._parts = [file.path for file in files], parts
        self.packed = parts[0].packed
        self.first = [0, *itertools.accumulate(len(part) for part in parts)]

    @property
    def parts(self) -> list[range]:
        return [range(first, last) for first, last in itertools.pairwise(self.first)]

    def __len__(self) -> int:
        return self.first[-1]

    def samples(self, number: int) -> list[Sample]:
        if number < 0:
            return [empty_sample()]
        file, inside = self._where(number)
        return [replace(sample, record=number) for sample in self._parts[file].samples(inside)]

    def origin(self, number: int) -> Origin:
        file, inside = self._where(number)
        return Origin(self.paths[file], inside)

    def _where(self, number: int) -> tuple[int, int]:
        file = bisect.bisect_right(self.first, number) - 1
        return file, number - self.first[file]


def open_indexed(run: RunConfig, make: MakePart) -> Datasets:
    """The files of a run; splits_string shares the documents of each out, unless others validate.

    Raises:
        ConfigError: a file cannot be read, or is too short for a sample of what it is there for.
    """
    data = run.data
    files = [IndexedFile(path) for path in data.files]
    shares = [split(len(file), data.splits) for file in files]
    train = [make(file, documents, run) for file, (documents, _) in zip(files, shares, strict=True)]
    for file, (documents, _), part in zip(files, shares, train, strict=True):
        if not len(part):
            raise ConfigError(f"{file.called}: {too_little(run, file, documents, 'train on')}")
    apart = [IndexedFile(path, "model.data.validation_path") for path in data.validation_files]
    held_out = [(file, range(len(file))) for file in apart] or [
        (file, documents) for file, (_, documents) in zip(files, shares, strict=True) if len(documents)
    ]
    return Datasets(IndexedSamples(files, train), validation(run, held_out, make))


def validation(run: RunConfig, held_out: Sequence[tuple[IndexedFile, range]], make: MakePart) -> IndexedSamples | None:
    """The documents that validate; None: no file has any, or enough of them.

    Raises:
        ConfigError: a file of validation_path is too short for a sample.
    """
    kept = []
    for file, documents in held_out:
        part = make(file, documents, run)
        if len(part):
            kept.append((file, part))
            continue
        told = f"{file.called}: {too_little(run, file, documents, 'validate')}"
        if run.data.validation_files:
            raise ConfigError(told)
        log.warning("%s; they are not used", told)
    return IndexedSamples(*zip(*kept, strict=True)) if kept else None


def too_little(run: RunConfig, file: IndexedFile, documents: range, use: str) -> str:
    tokens = int(file.lengths[documents.start : documents.stop].sum(dtype=numpy.int64))
    return (
        f"{len(documents)} of its documents are to {use}, with {tokens} tokens in all, too few for one sample of "
        f"model.encoder_seq_length={run.model.encoder_seq_length}"
    )


def split(count: int, shares: tuple[float, ...]) -> tuple[range, range]:
    """The documents to train on and those to validate on, as Megatron's splits: in the file's order, rounded."""
    ends = [0.0, *itertools.accumulate(share / sum(shares) for share in shares)]
    places = [int(round(end * float(count))) for end in ends]
    return range(places[0], places[1]), range(places[1], places[2])


def check_ids(ids: numpy.ndarray | Tensor, vocab_size: int, called: str) -> None:
    """Raises ConfigError where ids are none of a vocabulary.

    Args:
        called: the file, see IndexedFile.
    """
    if not len(ids):
        return
    for found in (int(ids.max()), int(ids.min())):
        if not 0 <= found < vocab_size:
            raise ConfigError(
                f"{called}: has the token id {found}, the model's vocabulary {vocab_size} tokens; "
                "the file was made with another tokenizer"
            )
