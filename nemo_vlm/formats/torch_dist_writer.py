"""Directories of torch.distributed.checkpoint (Megatron's `torch_dist`) written: pieces of whole tensors one by one."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, checkpoint
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.utils import serialization

from nemo_vlm.formats.reader import Reader, Shape, Slices, whole
from nemo_vlm.formats.stacked import EXPERTS

LAYER = re.compile(r"(?P<front>(?:|.*\.)layers\.)(?P<number>\d+)\.(?P<rest>.*)")
# Modules whose `_extra_state` Megatron's reader insists on; Transformer Engine keeps its scales there, if it has any.
WITH_STATE = re.compile(r"(?P<module>.*\.(?:linear_qkv|linear_proj|linear_fc1|linear_fc2))\.weight\d*")


@dataclass(frozen=True)
class Piece:
    """A box of the whole tensor `name`, which is read when it is written."""

    name: str
    shape: Shape  # of the whole
    offsets: Shape
    sizes: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def item(self) -> WriteItem:
        offsets = torch.Size(self.offsets)
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, torch.Size(self.sizes)),
            properties=TensorProperties(dtype=self.dtype),
            size=torch.Size(self.shape),
        )
        return WriteItem(MetadataIndex(self.name, offsets), WriteItemType.SHARD, tensor_data=data)


class Planner(checkpoint.DefaultSavePlanner):
    """torch's planner, which drops what several ranks hold, for pieces and for objects that say nothing."""

    def __init__(self, pieces: Iterable[Piece], objects: Iterable[str]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {piece.item.index: piece for piece in pieces}
        self.objects = tuple(objects)

    def create_local_plan(self) -> SavePlan:
        empty = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self.objects]
        self.plan = SavePlan([piece.item for piece in self.pieces.values()] + empty)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.pieces[index].read() if index in self.pieces else [None]


def save(pieces: Iterable[Piece], folder: Path, group: ProcessGroup | None = None, objects: Iterable[str] = ()) -> None:
    """Write all ranks' pieces, each once; complete and on disk when this returns on rank 0.

    Without checksums, which take most of the time and which neither torch nor we read; only unzip misses them.

    Args:
        group: for the exchange of plans; without any process group, this process writes alone.
    """
    writer = checkpoint.FileSystemWriter(folder, sync_files=True)
    with serialization.config.patch("save.compute_crc32", False):
        checkpoint.save({}, storage_writer=writer, planner=Planner(pieces, objects), process_group=group)


def write_common(folder: Path, common: Mapping[str, Any]) -> None:
    """The two files that Megatron's dist_checkpointing looks for.

    Args:
        common: what is not sharded.
    """
    torch.save(dict(common), folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(
        json.dumps(backends | {"common_backend": "torch", "common_backend_version": 1})
    )


def write(
    folder: Path, reader: Reader, common: Mapping[str, Any], stacked: Collection[str] = ("decoder.layers.",)
) -> None:
    """A directory as Megatron writes it, from this process alone.

    Args:
        reader: whole tensors under Megatron's names.
        common: what is not sharded: args, iteration.
        stacked: beginnings of the names of layers that are equal; they become one tensor with an axis of layers. All or
            no blocks of a model, since Megatron's reader asks for all of them in one way.
    """
    layers = {name: LAYER.fullmatch(name) for name in sorted(reader.names())}
    equal = {name: layer for name, layer in layers.items() if layer and layer["front"] in stacked}
    counts = Counter(layer["front"] + layer["rest"] for layer in equal.values())
    pieces: list[Piece] = []
    objects: list[str] = []
    for name in layers:
        key, places = name, []
        if layer := equal.get(name):
            key = layer["front"] + layer["rest"]
            places = [(int(layer["number"]), counts[key])]
        pieces += pieces_of(reader, name, key, places)
        if state := WITH_STATE.fullmatch(key):
            experts = range(reader.shape(name)[0]) if EXPERTS.fullmatch(name) else ()
            sharded = [[*places, (expert, len(experts))] for expert in experts] or [places or [(0, 1)]]
            objects += [f"{state['module']}._extra_state/{shard(axes)}" for axes in sharded]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")  # this process writes alone
        save(pieces, folder, objects=objects)
    write_common(folder, common)


def pieces_of(reader: Reader, name: str, key: str, places: list[tuple[int, int]]) -> Iterator[Piece]:
    """A tensor, whole, or expert by expert: as Megatron reads it, and no more than that is in memory.

    Args:
        places: its place (number, of how many) along each axis in front that stacks it with others.
    """
    shape, dtype = reader.shape(name), reader.dtype(name)
    first, counts = tuple(number for number, _ in places), tuple(count for _, count in places)
    ones = (1,) * len(places)
    runs = [(slice(e, e + 1),) for e in range(shape[0])] if EXPERTS.fullmatch(name) else [whole(shape[:1])]
    for run in runs:
        slices = (*run, *whole(shape[1:]))
        offsets, sizes = tuple(s.start for s in slices), tuple(s.stop - s.start for s in slices)
        read = partial(read_box, reader, name, slices, (*ones, *sizes))
        yield Piece(key, (*counts, *shape), (*first, *offsets), (*ones, *sizes), dtype, read)


def read_box(reader: Reader, name: str, slices: Slices, shape: Shape) -> Tensor:
    return reader.read(name, slices).contiguous().view(shape)


def shard(places: list[tuple[int, int]]) -> str:
    """How Megatron names the object at a place along axes that it is divided along."""
    numbers, counts = (".".join(map(str, values)) for values in zip(*places, strict=True))
    return f"shard_{numbers}_{counts}"
