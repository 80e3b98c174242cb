"""What the loader, training and show_data need of any data: numbers, and the samples that each stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy

from nemo_vlm.batch import Sample

Numbers = numpy.ndarray | range  # of records; a range takes no memory


@dataclass(frozen=True)
class Origin:
    """Where what a number stands for comes from.

    Attributes:
        number: in its file.
        id: its name there, where it has one.
    """

    path: Path
    number: int
    id: Any = None


class Samples(Protocol):
    """Data that a run draws from by numbers: records (data.records), or pieces of tokenized text (data.indexed).

    Attributes:
        parts: the numbers of each file.
        lengths: [numbers, 2] as lengths.of_file, where packing or the order needs it; else None.
        packed: whether a number may stand for several samples, which then share a row; else it stands for one.
    """

    lengths: numpy.ndarray | None
    packed: bool

    @property
    def parts(self) -> Sequence[Numbers]: ...

    def __len__(self) -> int: ...

    def samples(self, number: int) -> list[Sample]:
        """What a number stands for; -1: one empty sample."""
        ...

    def origin(self, number: int) -> Origin: ...


@dataclass(frozen=True)
class Datasets:
    """What a run trains on, and what it validates on, if anything.

    Attributes:
        unigram_entropy: of plain text, in nats a token: the loss of a model that knows only how frequent each token is.
    """

    train: Samples
    validation: Samples | None
    unigram_entropy: float | None = None
