"""Directories of torch.distributed.checkpoint (Megatron's `torch_dist`) written: pieces of whole tensors one by one."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, checkpoint
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from nemo_vlm.formats.reader import Reader, Shape

LAYER = re.compile(r"(?P<front>(?:|.*\.)layers\.)(?P<number>\d+)\.(?P<rest>.*)")
# Modules whose `_extra_state` Megatron's reader insists on; Transformer Engine keeps its scales there, if it has any.
WITH_STATE = re.compile(r"(?P<module>.*\.(?:linear_qkv|linear_proj|linear_fc1|linear_fc2))\.weight")


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

    Args:
        group: for the exchange of plans; without any process group, this process writes alone.
    """
    writer = checkpoint.FileSystemWriter(folder, sync_files=True)
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
    pieces, objects = [], []
    for name in layers:
        key, number, count = name, 0, 1
        if layer := equal.get(name):
            key, number = layer["front"] + layer["rest"], int(layer["number"])
            count = counts[key]
        pieces.append(piece_of(reader, name, key, (number, count) if layer else None))
        if state := WITH_STATE.fullmatch(key):
            objects.append(f"{state['module']}._extra_state/shard_{number}_{count}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")  # this process writes alone
        save(pieces, folder, objects=objects)
    write_common(folder, common)


def piece_of(reader: Reader, name: str, key: str, layer: tuple[int, int] | None) -> Piece:
    """A whole tensor, or one layer (number, of how many) of a stacked one."""
    shape, dtype = reader.shape(name), reader.dtype(name)
    start = (0,) * len(shape)
    if layer is None:
        return Piece(key, shape, start, shape, dtype, lambda: reader.read(name))
    number, count = layer
    return Piece(key, (count, *shape), (number, *start), (1, *shape), dtype, lambda: reader.read(name).unsqueeze(0))
