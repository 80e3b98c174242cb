"""Our own .nemo archives, as a file or extracted, and our training checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_vlm import checkpoints
from nemo_vlm.archive import INSIDE, Archive, read_config
from nemo_vlm.config import TokenizerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import Renamed
from nemo_vlm.formats.store import Folder, Span, Store
from nemo_vlm.formats.torch_dist import TorchDist
from nemo_vlm.sources.source import Source
from nemo_vlm.typed import read

STATE = ("optimizer.", "rng.")  # what a training checkpoint holds beside the model


def open_archive(path: Path) -> Source:
    archive = Archive(path)
    return Source(path, archive.config, archive, files_of(archive.store, archive.config))


def files_of(store: Store, tree: dict[str, Any]) -> dict[str, Span]:
    """The tokenizer's folder of an archive."""
    kind = tokenizer_settings(tree).type or ""
    folder = kind.removeprefix(INSIDE) + "/"
    if not kind.startswith(INSIDE):
        return {}
    return {name.removeprefix(folder): store.span(name) for name in sorted(store.names()) if name.startswith(folder)}


def tokenizer_settings(tree: dict[str, Any]) -> TokenizerConfig:
    """Raises:
    ConfigError: they are damaged.
    """
    return read(TokenizerConfig, tree["tokenizer"], "model.tokenizer") if "tokenizer" in tree else TokenizerConfig()


def is_training_checkpoint(path: Path) -> bool:
    return (path / checkpoints.STATE).is_file() or checkpoints.marker(path).exists()


def open_training_checkpoint(path: Path) -> Source:
    """A step_NNNNNN directory, whose tokenizer stands where the run found it.

    Raises:
        ConfigError: it is unfinished.
    """
    if checkpoints.marker(path).exists():
        raise ConfigError(f"{path}: this checkpoint is unfinished; take another")
    store = Folder(path)
    tree, reader = read_config(store), TorchDist(store)
    names = {name: name for name in reader.names() if not name.startswith(STATE)}
    return Source(path, tree, Renamed(reader, names))
