"""Which format a path is of."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from nemo_vlm.archive import CONFIG, open_store, read_config
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.store import Folder, Span
from nemo_vlm.sources import huggingface, megatron, nemo, nemo1
from nemo_vlm.sources.huggingface import companions
from nemo_vlm.sources.source import Source

log = logging.getLogger(__name__)


def open_source(path: str | Path, key: str) -> Source:
    """Open a checkpoint of any format, without loading it.

    Args:
        path: Hugging Face's directory or the name of a repository in its cache, a .nemo of ours or of NeMo 1.x or the
            directory that it was extracted to, a training checkpoint, or Megatron's directory.
        key: the setting or flag that named it, for messages.
    Raises:
        ConfigError: there is nothing, or nothing that is known.
    """
    found = located(str(path))
    if found is None:
        raise ConfigError(f"{key}={path}: there is no such file or directory")
    if nemo.is_training_checkpoint(found):
        return with_tokenizer(nemo.open_training_checkpoint(found))
    if found.is_file() or (found / CONFIG).is_file():
        return open_nemo(found)
    if megatron.is_megatron(found):
        return megatron.open_megatron(found)
    if huggingface.is_huggingface(found):
        return huggingface.open_huggingface(found)
    raise ConfigError(
        f"{key}={path}: neither a .nemo nor a directory of Hugging Face (config.json), of an extracted .nemo "
        f"({CONFIG}), of a training checkpoint (state.json) or of Megatron (latest_checkpointed_iteration.txt)"
    )


def open_nemo(path: Path) -> Source:
    """Ours says its family; NeMo 1.x's has a `target`."""
    return nemo.open_archive(path) if "family" in read_config(open_store(path)) else nemo1.open_nemo1(path)


def with_tokenizer(source: Source) -> Source:
    """A training checkpoint with the tokenizer that its run had, if that is still there."""
    named = nemo.named_tokenizer(source.tree)
    if named is None or located(named) is None:
        log.warning("%s: its tokenizer %s is not here any more", source, named)
        return source
    return replace(source, files=tokenizer_files(named))


def tokenizer_files(place: str) -> dict[str, Span]:
    """What a tokenizer consists of that stands in a directory, in a checkpoint, or in the cache.

    Raises:
        ConfigError: there is none.
    """
    found = located(place)
    if found is None:
        raise ConfigError(f"model.tokenizer.type={place}: no tokenizer there, nor one of that name in the cache")
    files = companions(Folder(found)) if found.is_dir() else {}
    if not any(name.startswith("tokenizer") for name in files):
        files = open_source(found, "model.tokenizer.type").files
    return files


def located(place: str) -> Path | None:
    """A file or directory, or the directory of a repository in Hugging Face's cache; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if Path(place).exists():
            return Path(os.path.abspath(place))
        found = [try_to_load_from_cache(place, name) for name in ("config.json", "tokenizer_config.json")]
    except (HFValidationError, OSError):  # neither a path nor the name of a repository
        return None
    return next((Path(file).parent for file in found if isinstance(file, str)), None)
