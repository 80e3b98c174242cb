"""The .nemo archive: an uncompressed tar with a model's config, its whole weights and what its processor needs.

    model_config.yaml               the branch `model` of the run's settings; nemo:PATH means a path inside the archive
    model_weights/model-*.safetensors and model.safetensors.index.json
    tokenizer/...

Weights are whole and carry Megatron's names, so one archive serves every layout. Tensors are read in place: the tar is
mapped, nothing is unpacked. No pickle is written or read. An archive appears under its name complete or not at all.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from torch import Tensor

from nemo_vlm.errors import ConfigError
from nemo_vlm.files import written_whole

CONFIG, WEIGHTS, INDEX = (
    "model_config.yaml",
    "model_weights",
    "model_weights/model.safetensors.index.json",
)
MAX_SHARD_BYTES = 5 * 10**9
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_archive(
    path: Path,
    config: dict[str, Any],
    folders: dict[str, Path],
    specs: list[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write an archive, holding one tensor at a time.

    Args:
        config: goes into model_config.yaml.
        folders: whole folders to take along, by their name in the archive.
        specs: every tensor, in the order in which `tensors` yields them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_whole(path, "wb") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        add_bytes(tar, CONFIG, yaml.safe_dump(config, sort_keys=False).encode())
        for name, folder in folders.items():
            for source in sorted(p for p in folder.rglob("*") if p.is_file()):
                add_bytes(tar, f"{name}/{source.relative_to(folder).as_posix()}", source.read_bytes())
        add_weights(tar, specs, ((name, tensor) for name, tensor in tensors if tensor.numel()))


def add_weights(tar: tarfile.TarFile, specs: list[TensorSpec], tensors: Iterator[tuple[str, Tensor]]) -> None:
    shards = split(specs, MAX_SHARD_BYTES)
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    index = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    total = sum(spec.num_bytes for spec in specs)
    add_bytes(
        tar,
        INDEX,
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1).encode(),
    )
    for name, shard in zip(names, shards, strict=True):
        header = safetensors_header(shard)
        stream = TensorStream(header, shard, tensors)
        add_member(tar, f"{WEIGHTS}/{name}", len(header) + sum(spec.num_bytes for spec in shard), stream)


def split(specs: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Consecutive groups of at most `limit` bytes each; a larger tensor stands alone."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards


def safetensors_header(specs: list[TensorSpec]) -> bytes:
    """https://huggingface.co/docs/safetensors: 8 bytes of length, then JSON, padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        entries[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorStream(io.RawIOBase):
    """A safetensors file as a stream that tarfile can copy, made tensor by tensor."""

    def __init__(self, header: bytes, specs: list[TensorSpec], tensors: Iterator[tuple[str, Tensor]]) -> None:
        self.pending, self.tensors = memoryview(header), tensors
        self.specs = iter([spec for spec in specs if spec.num_bytes])

    def read(self, size: int = -1) -> bytes:
        chunks = []
        while size > 0:
            if not self.pending:
                self.pending = self._next()
            chunk, self.pending = self.pending[:size], self.pending[size:]
            size -= len(chunk)
            chunks.append(chunk)
        return b"".join(chunks)

    def _next(self) -> memoryview:
        spec, (name, tensor) = next(self.specs), next(self.tensors)
        assert (name, tuple(tensor.shape), tensor.dtype) == (spec.name, spec.shape, spec.dtype), (
            name,
            spec,
        )
        content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
        return memoryview(content)


def add_bytes(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    add_member(tar, name, len(content), io.BytesIO(content))


def add_member(tar: tarfile.TarFile, name: str, size: int, stream: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    tar.addfile(member, stream)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the mapped file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


class Archive:
    """An archive opened for reading; tensors are views of the mapped file.

    Raises:
        ConfigError: not a .nemo archive, or one with members that point outside it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"{path}: there is no such archive")
        try:
            with tarfile.open(self.path, "r:") as tar:
                self.members = {
                    safe_name(member, self.path): (member.offset_data, member.size)
                    for member in tar
                    if not member.isdir()
                }
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(f"{path}: not a .nemo archive ({error})") from None
        with open(self.path, "rb") as file:
            # A private mapping is writable, as torch wants it; nothing is ever written to it.
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.config = self._config()
        self.entries: dict[str, Entry] = {}
        for name in self.members:
            if name.endswith(".safetensors"):
                self.entries |= self._entries(name)

    def __str__(self) -> str:
        return str(self.path)

    def file(self, name: str) -> bytes:
        """The content of a member."""
        if name not in self.members:
            raise ConfigError(f"{self.path}: has no {name}")
        offset, size = self.members[name]
        if offset + size > len(self.memory):
            raise ConfigError(f"{self.path}: cut short in {name}")
        return self.memory[offset : offset + size]

    def extract(self, folder: str, target: Path) -> Path:
        """Copy a folder of the archive to `target`."""
        for name in self.members:
            if name.startswith(f"{folder}/"):
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.file(name))
        return target / folder

    def names(self) -> set[str]:
        return set(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        """A tensor or a part of it, in place."""
        entry = self.entries[name]
        if 0 in entry.shape:
            return torch.empty(entry.shape, dtype=entry.dtype)[slices]
        flat = torch.frombuffer(self.memory, dtype=entry.dtype, count=math.prod(entry.shape), offset=entry.offset)
        return flat.view(entry.shape)[slices]

    def _config(self) -> dict[str, Any]:
        try:
            config = yaml.safe_load(self.file(CONFIG))
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.path}: {CONFIG} is not plain YAML ({' '.join(str(error).split())})") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{self.path}: {CONFIG} holds no settings")
        return config

    def _entries(self, name: str) -> dict[str, Entry]:
        """The tensors of one safetensors member.

        Raises:
            ConfigError: the header is damaged, or places a tensor outside the member.
        """
        start, size = self.members[name]
        data = start + 8 + int.from_bytes(self.memory[start : start + 8], "little")
        if start + size > len(self.memory) or data > start + size:
            raise ConfigError(f"{self.path}: cut short in {name}")
        try:
            header = json.loads(self.memory[start + 8 : data])
            header.pop("__metadata__", None)
            entries = {tensor: entry_of(info, data, start + size) for tensor, info in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.path}: the header of {name} is damaged ({error!r})") from None
        return entries


def entry_of(info: dict[str, Any], data: int, end: int) -> Entry:
    """A header's entry, if it lies between the start of the data and the end of the member."""
    shape, (first, last) = tuple(int(size) for size in info["shape"]), info["data_offsets"]
    entry = Entry(shape, DTYPES[info["dtype"]], data + first)
    if (
        min(shape, default=0) < 0
        or first < 0
        or last - first != math.prod(shape) * entry.dtype.itemsize
        or data + last > end
    ):
        raise ValueError(f"shape {shape} and offsets {first} to {last} do not fit")
    return entry


def safe_name(member: tarfile.TarInfo, path: Path) -> str:
    """The member's name, without the ./ that NeMo writes; only plain files inside the archive are allowed."""
    name = PurePosixPath(member.name)
    if not member.isfile() or name.is_absolute() or ".." in name.parts:
        raise ConfigError(f"{path}: refuses the member '{member.name}', which is not a plain file inside the archive")
    return str(name)
