"""Embeddings with more rows than a checkpoint has: for tokens that a tokenizer got later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_vlm.formats.reader import Reader, Shape, Slices, whole

CHUNK = 4096  # rows that are averaged at a time, in double precision


@dataclass(frozen=True)
class Grown:
    """A reader's tensors, some with more rows than it has, each the mean of its old ones.

    A row of zeros or of noise would give the new token a logit near 0, where those of trained tokens are often far
    below: it would take probability from all of them. The mean of all rows is never much more likely than they are.
    """

    reader: Reader
    shapes: Mapping[str, Shape]  # of those that grow
    means: dict[str, Tensor] = field(default_factory=dict)  # what mean_row has found

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
        (rows, columns), count = slices or whole(self.shapes[name]), self.reader.shape(name)[0]
        found = []
        if rows.start < count:
            found.append(self.reader.read(name, (slice(rows.start, min(rows.stop, count)), columns)))
        if rows.stop > count:
            found.append(self.mean_row(name)[:, columns].expand(rows.stop - max(rows.start, count), -1))
        return found[0] if len(found) == 1 else torch.cat(found)

    def mean_row(self, name: str) -> Tensor:
        """[1, h], of all old rows; kept, because slices of a tensor are read one by one."""
        if name not in self.means:
            count, width = self.reader.shape(name)
            starts = range(0, count, CHUNK)
            parts = [(slice(start, min(start + CHUNK, count)), slice(0, width)) for start in starts]
            sums = [self.reader.read(name, part).double().sum(0, keepdim=True) for part in parts]
            self.means[name] = (torch.cat(sums).sum(0, keepdim=True) / count).to(self.dtype(name))
        return self.means[name]


def grown(reader: Reader, names: Iterable[str], num_rows: int) -> Reader:
    """The reader, those of its tensors that have fewer rows brought to `num_rows`."""
    shapes = {name: reader.shape(name) for name in names if name in reader.names()}
    more = {name: (num_rows, *shape[1:]) for name, shape in shapes.items() if shape[0] < num_rows}
    return Grown(reader, more) if more else reader
