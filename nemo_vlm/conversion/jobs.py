"""What each conversion script does, once its flags are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_vlm.conversion.convert import Check, Target, dtype_of, to_huggingface, to_nemo
from nemo_vlm.conversion.huggingface import TEMPLATES
from nemo_vlm.conversion.settings import merged, with_settings
from nemo_vlm.conversion.verify import check_tensors, verify
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import Joined, chosen
from nemo_vlm.formats.store import Folder
from nemo_vlm.script import choose_device
from nemo_vlm.sources.huggingface import PROCESSOR_FILES, companions, is_huggingface
from nemo_vlm.sources.megatron import is_megatron
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source

PROCESSOR = (*PROCESSOR_FILES, "generation_config.json")


@dataclass(frozen=True)
class Run:
    """How a conversion is to be made, by the flags that all scripts have."""

    precision: str
    device: str
    verify: bool


def import_huggingface(source: Source, output: Path, run: Run) -> None:
    """Hugging Face's directory to a .nemo."""
    choose_device(run.device)
    to_nemo(source, Target(output, dtype_of(run.precision), check_of(source, run)))


def export_huggingface(source: Source, output: Path, run: Run) -> None:
    """A .nemo, or what else can be opened, to Hugging Face's directory."""
    choose_device(run.device)
    to_huggingface(source, Target(output, dtype_of(run.precision), check_of(source, run)))


def check_of(source: Source, run: Run) -> Check | None:
    """What an output must pass: all tensors read back as they were, and transformers' model says the same as ours.

    Transformers reads the directory of Hugging Face where one of the two is one, else the tensors under its names.
    """
    dtype = dtype_of(run.precision)

    def check(made: Path) -> None:
        written = open_source(made, "output")
        if not is_megatron(made):  # which to_megatron always reads back
            check_tensors(source.reader, written.reader, dtype)
        if of_huggingface(made):
            verify(source, made, dtype)
        else:
            verify(written, source.path if of_huggingface(source.path) else None, dtype)

    return check if run.verify else None


def of_huggingface(path: Path) -> bool:
    """Whether transformers reads it; Megatron's directories have a config.json, too."""
    return is_huggingface(path) and not is_megatron(path)


def open_huggingface(path: str, key: str, families: Sequence[str] = ()) -> Source:
    """A directory of Hugging Face, of one of these families where any are named.

    Raises:
        ConfigError: it is something else.
    """
    source = open_source(path, key)
    if not is_huggingface(source.path):
        raise ConfigError(f"{key}={path}: must be a directory of Hugging Face, with a config.json")
    return of_family(source, key, families)


def of_family(source: Source, key: str, families: Sequence[str]) -> Source:
    if families and source.family not in families:
        raise ConfigError(f"{key}={source}: holds a model of the family {source.family}, not {' or '.join(families)}")
    return source


def with_tokenizer(source: Source, path: str, key: str) -> Source:
    """The source with the tokenizer of a directory instead of its own.

    Args:
        path: the directory, or a file in it.
    Raises:
        ConfigError: there is none.
    """
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    files = companions(Folder(folder)) if folder.is_dir() else {}
    if not any(name.startswith("tokenizer") for name in files):
        raise ConfigError(f"{key}={path}: there is no tokenizer; give the directory of its files")
    kept = {name: span for name, span in source.files.items() if name in PROCESSOR}
    taken = {name: span for name, span in files.items() if name not in PROCESSOR}
    return replace(source, files=kept | taken)


def with_tower(source: Source, path: str | None) -> Source:
    """The source with the vision tower of another checkpoint, where its own was left out as frozen.

    Raises:
        ConfigError: it has one of its own, and that is another.
    """
    if path is None:
        return source
    key = "--vision_encoder_path"
    tower = open_source(path, key)
    reader = chosen(tower.reader, ["vision_model."])
    if not reader.names():
        raise ConfigError(f"{key}={path}: holds no vision tower, but {', '.join(sorted(tower.parts))}")
    if "vision_model" in source.parts:
        check_same_tower(source, tower, key)
        return source
    settings = {"mm_cfg": {"vision_encoder": known_of(tower)}}
    return replace(source, tree=merged(source.tree, settings), reader=Joined([source.reader, reader]))


def known_of(tower: Source) -> dict[str, Any]:
    """The tower's architecture; which of its layers is used, and how files call it, is the whole model's affair."""
    fields = tower.tree["mm_cfg"]["vision_encoder"]
    return {key: value for key, value in fields.items() if key not in ("vision_select_layer", "hf_prefix")}


def check_same_tower(source: Source, tower: Source, key: str) -> None:
    """Raises ConfigError where two towers are not equal, but for rounding to the source's dtype."""
    for name in sorted(tower.reader.names()):
        if not name.startswith("vision_model."):
            continue
        if name not in source.reader.names() or source.reader.shape(name) != tower.reader.shape(name):
            here = source.reader.shape(name) if name in source.reader.names() else "no such tensor"
            raise ConfigError(f"{key}={tower}: '{name}' has shape {tower.reader.shape(name)}, {source} has {here}")
        own = source.reader.read(name)
        if not torch.equal(own, tower.reader.read(name).to(own.dtype)):
            raise ConfigError(
                f"{key}={tower}: '{name}' differs from that in {source}, which holds a trained vision tower; "
                "leave the flag out"
            )


def check_tower_type(source: Source, given: dict[str, str | None]) -> None:
    """Raises ConfigError where a flag names another kind of tower than the source has."""
    kind = source.model.mm_cfg.vision_encoder.model_type
    for key, value in given.items():
        if value not in (None, kind):
            raise ConfigError(f"{key}={value}: the vision tower of {source} is {kind}")


def import_llava(source: Source, output: Path, run: Run, settings: dict[str, Any], tokenizer: str | None) -> None:
    """A LLaVA or Llama with settings from elsewhere, and perhaps another tokenizer."""
    if settings:
        source = with_settings(source, settings, "--hparams_file or --conv_template")
        if "conv_template" in settings.get("data", {}):  # the export makes that one's
            source = replace(source, files={name: span for name, span in source.files.items() if name not in TEMPLATES})
    if tokenizer is not None:
        source = with_tokenizer(source, tokenizer, "--tokenizer_path")
    import_huggingface(source, output, run)
