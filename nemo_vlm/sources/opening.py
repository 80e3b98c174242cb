"""Which format a path is of."""

from __future__ import annotations

from pathlib import Path

from nemo_vlm.archive import CONFIG, open_store, read_config
from nemo_vlm.errors import ConfigError
from nemo_vlm.sources import huggingface, megatron, nemo, nemo1
from nemo_vlm.sources.source import Source


def open_source(path: str | Path, key: str) -> Source:
    """Open a checkpoint of any format, without loading it.

    Args:
        path: Hugging Face's directory or the name of a repository in its cache, a .nemo of ours or of NeMo 1.x or the
            directory that it was extracted to, a training checkpoint, or Megatron's directory.
        key: the setting or flag that named it, for messages.
    Raises:
        ConfigError: there is nothing, or nothing that is known.
    """
    found = Path(path)
    if not found.exists():
        found = cached(str(path))
        if found is None:
            raise ConfigError(f"{key}={path}: there is no such file or directory")
    if found.is_file() or (found / CONFIG).is_file() and not nemo.is_training_checkpoint(found):
        return open_nemo(found)
    if nemo.is_training_checkpoint(found):
        return nemo.open_training_checkpoint(found)
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


def cached(name: str) -> Path | None:
    """The directory of a repository in Hugging Face's cache; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # not the name of a repository
        return None
    return Path(config).parent if isinstance(config, str) else None
