"""The .nemo archive: an uncompressed tar with a model's config, its whole weights and what its processor needs.

    model_config.yaml               the branch `model` of the run's settings; nemo:PATH means a path inside the archive
    model_weights/model-*.safetensors and model.safetensors.index.json
    tokenizer/...

Weights are whole and carry Megatron's names, so one archive serves every layout. Tensors are read in place: the tar is
mapped, nothing is unpacked; a directory with its members is as good. No pickle is written. An archive appears under its
name complete or not at all.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml
from torch import Tensor

from nemo_vlm.errors import ConfigError
from nemo_vlm.files import written_whole
from nemo_vlm.formats import safetensors
from nemo_vlm.formats.safetensors import Safetensors, TensorSpec
from nemo_vlm.formats.store import Folder, Store, Tar

CONFIG, WEIGHTS = "model_config.yaml", "model_weights"
INDEX = f"{WEIGHTS}/model.safetensors.index.json"
STARTS = ("restore_from_path", "from_pretrained", "pretrain_mm_mlp_adapter")  # settings that name other checkpoints
INSIDE = "nemo:"  # NeMo's mark of a path inside the archive
TOKENIZER = "tokenizer"  # the folder of tokenizer and processor files


def self_contained(tree: dict[str, Any], has_tokenizer: bool = True, has_base: bool = False) -> dict[str, Any]:
    """The branch `model` as an archive has it: no path leads outside, but that of adapters to their base."""

    def without_paths(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: None if name in STARTS else without_paths(inner) for name, inner in value.items()}

    tokenizer = {"type": f"{INSIDE}{TOKENIZER}" if has_tokenizer else None}
    return (tree if has_base else without_paths(tree)) | {"tokenizer": tokenizer}


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
        specs: every tensor, in the order in which `tensors` yields them, whole or in parts (see safetensors.write).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, "wb") as file:
        write_members(file, config, folders, specs, tensors)


def write_members(
    file: IO[bytes],
    config: dict[str, Any],
    folders: dict[str, Path],
    specs: list[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """The archive's content; arguments as write_archive's."""
    add_bytes(file, CONFIG, yaml.safe_dump(config, sort_keys=False).encode())
    for name, folder in folders.items():
        for source in sorted(p for p in folder.rglob("*") if p.is_file()):
            add_bytes(file, f"{name}/{source.relative_to(folder).as_posix()}", source.read_bytes())
    parts = safetensors.split(specs, safetensors.MAX_SHARD_BYTES)
    shards = dict(zip(safetensors.shard_names(len(parts)), parts, strict=True))
    add_bytes(file, INDEX, safetensors.index(shards))
    rest = iter(tensors)
    for name, shard in shards.items():
        with member(file, f"{WEIGHTS}/{name}", safetensors.file_size(shard)):
            safetensors.write(file, shard, rest)
    file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar


def add_bytes(file: IO[bytes], name: str, content: bytes) -> None:
    with member(file, name, len(content)):
        file.write(content)


@contextmanager
def member(file: IO[bytes], name: str, size: int) -> Iterator[None]:
    """The frame of a tar's member; inside the context its content is written to the file."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    file.write(info.tobuf(tarfile.PAX_FORMAT))
    yield
    file.write(bytes(-size % tarfile.BLOCKSIZE))


class Archive(Safetensors):
    """An archive of ours opened for reading: its config, its files, and its tensors as views of the mapped file.

    Raises:
        ConfigError: no archive of ours, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        store = open_store(Path(path))
        self.config = read_config(store)
        weights = [name for name in store.names() if name.startswith(WEIGHTS) and name.endswith(".safetensors")]
        super().__init__(store, weights)


def open_store(path: Path) -> Store:
    """An archive, or the directory that it was extracted to."""
    return Folder(path) if path.is_dir() else Tar(path)


def read_config(store: Store) -> dict[str, Any]:
    """model_config.yaml.

    Raises:
        ConfigError: there is none, or it is not plain YAML.
    """
    try:
        config = yaml.safe_load(store.span(CONFIG).bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{store}: {CONFIG} is not plain YAML ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{store}: {CONFIG} holds no settings")
    return config
