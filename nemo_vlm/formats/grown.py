"""Embeddings with more rows than a checkpoint has: for tokens that a tokenizer got later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_vlm.formats.reader import Reader, Shape, Slices

CHUNK = 4096  # rows that are averaged at a time, in double precision


@dataclass(frozen=True)
class Grown:
    """A reader's tensors, some with more rows than it has, each the mean of its old ones.

    A row of zeros or of noise would give the new token a logit near 0, where those of trained tokens are often far
    below: it would take probability from all of them. The mean of all rows is never much more likely than they are.
    """

    reader: Reader
    shapes: Mapping[str, Shape]  # of those that grow

    def __str__(self) -> str:
        return str(self.reader)

    def names(self) -> set[str]:
        return self.reader.names()

    def shape(self, name: str) -> Shape:
        return self.shapes[name] if name in self.shapes else self.reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(name)

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        if name not in self.shapes:
            return self.reader.read(name, slices)
        old = self.reader.read(name)
        new = mean_row(old).expand(self.shapes[name][0] - len(old), -1)
        return torch.cat([old, new])[slices]


def mean_row(rows: Tensor) -> Tensor:
    """[n, h] -> [1, h]"""
    total = sum(chunk.double().sum(0, keepdim=True) for chunk in rows.split(CHUNK))
    return (total / len(rows)).to(rows.dtype)


def grown(reader: Reader, names: Iterable[str], num_rows: int) -> Reader:
    """The reader, those of its tensors that have fewer rows brought to `num_rows`."""
    shapes = {name: reader.shape(name) for name in names if name in reader.names()}
    more = {name: (num_rows, *shape[1:]) for name, shape in shapes.items() if shape[0] < num_rows}
    return Grown(reader, more) if more else reader
