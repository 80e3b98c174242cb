"""Tensors that a file holds stacked: Megatron's torch_dist keeps equal layers as one tensor with an axis of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_vlm.formats.reader import Reader, Shape, Slices, whole

LAYERS = re.compile(r"(?:^|.*\.)layers\.(?!\d)")  # not followed by a layer's number
MAX_LAYERS = 10_000  # an axis longer than that is none of layers: a flat optimizer state, or damage
# All experts of a layer, which Megatron stacks whatever parallelism shares them out.
EXPERTS = re.compile(r"(?P<front>(?:|.*\.)mlp\.experts\.)experts\.(?P<module>linear_fc[12])\.weight")


@dataclass(frozen=True)
class Unstacked:
    """A reader's tensors, some of which are an entry along the first axis of what it has.

    Attributes:
        places: the reader's tensor, and which entry of it; None: all of it.
    """

    reader: Reader
    places: Mapping[str, tuple[str, int | None]]

    def __str__(self) -> str:
        return str(self.reader)

    def names(self) -> set[str]:
        return set(self.places)

    def shape(self, name: str) -> Shape:
        stacked, entry = self.places[name]
        shape = self.reader.shape(stacked)
        return shape if entry is None else shape[1:]

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(self.places[name][0])

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        stacked, entry = self.places[name]
        if entry is None:
            return self.reader.read(stacked, slices)
        rest = slices or whole(self.shape(name))
        return self.reader.read(stacked, (slice(entry, entry + 1), *rest))[0]


def single_layers(reader: Reader) -> Unstacked:
    """Each layer's tensors under names with the layer's number; what is not stacked stays as it is."""
    places: dict[str, tuple[str, int | None]] = {}
    for name in reader.names():
        front, shape = LAYERS.match(name), reader.shape(name)
        if front is None or not shape or shape[0] > MAX_LAYERS:
            places[name] = (name, None)
        else:
            for layer in range(shape[0]):
                places[f"{front[0]}{layer}.{name.removeprefix(front[0])}"] = (name, layer)
    return Unstacked(reader, places)
