"""Which format a path is of."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nemo_vlm.archive import CONFIG, open_store, read_config
from nemo_vlm.config import TokenizerConfig
from nemo_vlm.data.tokenizer import open_with
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.store import Folder, Span
from nemo_vlm.sources import huggingface, megatron, nemo, nemo1, projector
from nemo_vlm.sources.chat_templates import with_template_of_training
from nemo_vlm.sources.huggingface import companions
from nemo_vlm.sources.source import Source, save_files

log = logging.getLogger(__name__)


def open_source(path: str | Path, key: str) -> Source:
    """Open a checkpoint with a model, as open_any.

    Raises:
        ConfigError: as open_any, or it holds adapters without their model.
    """
    source = open_any(path, key)
    if source.has_adapters:
        base = " ".join(source.bases) or "its base"
        raise ConfigError(
            f"{key}={path}: holds LoRA adapters without the model they belong to; merge them into one first: "
            f"scripts/merge_lora.py --base {base} --adapter {path} --output MERGED.nemo"
        )
    return source


def open_adapter(path: str | Path, key: str) -> Source:
    """Open a checkpoint with adapters: of a run with model.peft.peft_scheme=lora.

    Raises:
        ConfigError: as open_any, or it holds none.
    """
    source = open_any(path, key)
    if not source.has_adapters:
        raise ConfigError(f"{key}={path}: holds no LoRA adapters, but {', '.join(sorted(source.parts))}")
    return source


def open_any(path: str | Path, key: str) -> Source:
    """Open a checkpoint of any format, without loading it.

    Args:
        path: Hugging Face's directory or the name of a repository in its cache, a .nemo of ours or of NeMo 1.x or the
            directory that it was extracted to, a training checkpoint, Megatron's directory, or a projector's file.
        key: the setting or flag that named it, for messages.
    Raises:
        ConfigError: there is nothing, or nothing that is known.
    """
    found = located(str(path))
    if found is None:
        raise ConfigError(f"{key}={path}: there is no such file or directory")
    if nemo.is_training_checkpoint(found):
        return with_tokenizer(nemo.open_training_checkpoint(found))
    if projector.is_projector(found):
        return projector.open_projector(found)
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
    """A training checkpoint with the tokenizer that its run had, if that is still there; as archives have it."""
    config = nemo.tokenizer_settings(source.tree)
    if config.place is None or located(config.place) is None:
        log.warning("%s: its tokenizer %s is not here any more", source, config.place)
        return source
    files = tokenizer_files(config.type) if config.type is not None else {}
    found = replace(source, files=files if config == TokenizerConfig(config.type) else saved(config, files))
    return with_template_of_training(found)


def saved(config: TokenizerConfig, files: Mapping[str, Span]) -> dict[str, Span]:
    """What a tokenizer consists of that is changed by its settings when it is opened."""
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch, "given"), Path(scratch, "made")
        open_with(config, save_files(files, given)).save_pretrained(made)
        return companions(Folder(made))  # what is mapped outlives the folder


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
        files = open_any(found, "model.tokenizer.type").files
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
