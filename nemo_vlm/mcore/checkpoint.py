"""Parts of whole tensors to and from a sharded directory, in torch's distributed format (Megatron's `torch_dist`).

Every rank writes what it holds, each piece once, and reads what it needs, whatever the layout that wrote it.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, checkpoint
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_vlm.errors import ConfigError
from nemo_vlm.mcore.weights import Part

# All that the table of contents of such a directory, a pickle, is made of.
PLAIN_CLASSES = {
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
}


Pieces = dict[str, dict[torch.Size, Part]]  # what a rank holds, by name and by place in the whole tensor


class SavePlanner(checkpoint.DefaultSavePlanner):
    """torch's planner, which drops what several ranks hold, for parts."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, offset),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(offset, part.data.size()),
                        properties=TensorProperties.create_from_tensor(part.data),
                        size=torch.Size(part.shape),
                    ),
                )
                for name, parts in self.pieces.items()
                for offset, part in parts.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn][index.offset].data  # type: ignore[index]


class LoadPlanner(checkpoint.DefaultLoadPlanner):
    """torch's planner, which finds what overlaps, for parts."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, parts in self.pieces.items():
            chunks = [ChunkStorageMetadata(offset, part.data.size()) for offset, part in parts.items()]
            stored: Any = self.metadata.state_dict_metadata[name]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn][index.offset].data  # type: ignore[index]


def by_name(parts: Iterable[Part]) -> Pieces:
    found: Pieces = defaultdict(dict)
    for part in parts:
        if part.data.numel():
            found[part.name][torch.Size(start for start, _ in part.bounds)] = part
    return found


def save(parts: Iterable[Part], folder: Path, group: ProcessGroup | None = None) -> None:
    """Write all ranks' parts; complete and on disk when this returns on rank 0.

    Args:
        group: for the exchange of plans, where this runs beside the training.
    """
    planner = SavePlanner(by_name(part for part in parts if part.primary))
    writer = checkpoint.FileSystemWriter(folder, sync_files=True)
    checkpoint.save({}, storage_writer=writer, planner=planner, process_group=group)


def load(parts: Iterable[Part], folder: Path) -> None:
    """Fill this rank's parts in place.

    Raises:
        ConfigError: a tensor is missing or has another shape.
    """
    pieces = by_name(parts)
    reader = SafeReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    for name, piece in pieces.items():
        entry, shape = stored.get(name), next(iter(piece.values())).shape
        if not isinstance(entry, TensorStorageMetadata):
            raise ConfigError(f"{folder}: the tensor '{name}' is missing")
        if tuple(entry.size) != shape:
            raise ConfigError(
                f"{folder}: the tensor '{name}' has shape {tuple(entry.size)}, this run's model needs {shape}"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said of no_dist: each rank reads alone
        checkpoint.load({}, storage_reader=reader, planner=LoadPlanner(pieces), no_dist=True)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a directory."""
    stored = SafeReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


class SafeReader(checkpoint.FileSystemReader):
    """torch's reader, but its table of contents can name no other classes than its own."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = PlainUnpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in PLAIN_CLASSES.get(module, ()):
            raise ConfigError(f"the checkpoint's .metadata names {module}.{name}: refused, it is no part of its format")
        return super().find_class(module, name)
