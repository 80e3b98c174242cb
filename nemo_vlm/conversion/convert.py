"""Any source to a .nemo or to Hugging Face's directory, holding one tensor at a time."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from nemo_vlm.archive import TOKENIZER, self_contained, write_members
from nemo_vlm.conversion.huggingface import misread, write_companions
from nemo_vlm.conversion.settings import archive_tree
from nemo_vlm.conversion.stream import Cast, Meter, check_space
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import folder_written_whole, remove_partial, sync, written_whole
from nemo_vlm.formats import safetensors
from nemo_vlm.formats.safetensors import TensorSpec
from nemo_vlm.mapping import Rule, Theirs
from nemo_vlm.models.base import family
from nemo_vlm.script import PRECISIONS
from nemo_vlm.sources.source import Source

log = logging.getLogger(__name__)

Check = Callable[[Path], None]  # looks at an output that is complete but not in place, and raises if it is wrong


@dataclass(frozen=True)
class Target:
    """What is to be made.

    Attributes:
        output: the file or folder.
        dtype: of its tensors of floating point; None: each keeps its own.
        check: run before the output takes its name.
    """

    output: Path
    dtype: torch.dtype | None = None
    check: Check | None = None


def dtype_of(precision: str) -> torch.dtype | None:
    name = PRECISIONS[precision]
    return None if name is None else getattr(torch, name)


def rules_of(source: Source) -> list[Rule]:
    """The whole model's rules.

    Raises:
        ConfigError: the source holds only a part of it.
    """
    rules = family(source.family, "mapping").rules(source.model)
    needed = {rule.ours.split(".")[0] for rule in rules}
    if missing := needed - source.parts:
        raise ConfigError(
            f"{source}: holds {', '.join(sorted(source.parts)) or 'no tensors'}, but no {', '.join(sorted(missing))}, "
            f"without which it is no whole {source.family}"
        )
    return rules


def to_nemo(source: Source, target: Target) -> None:
    """Write a .nemo; its tree is the source's, completed by every default.

    Raises:
        ConfigError: the source is damaged or not whole, or there is no room.
    """
    output = prepared(source, target.output)
    if output.is_dir():
        raise ConfigError(f"{output}: is a directory; a .nemo is a file")
    reader = Cast(source.reader, target.dtype)
    specs = reader.specs(rule.ours for rule in rules_of(source))
    check_space(output, sum(spec.num_bytes for spec in specs))
    config = self_contained(archive_tree(source), bool(source.files))
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output, "wb") as file, tempfile.TemporaryDirectory() as scratch:
        folders = {TOKENIZER: source.save_files(Path(scratch))} if source.files else {}
        meter = Meter(specs, str(output))
        write_members(file, config, folders, specs, meter.parts(reader))
        finish(file)
        report = meter.report()
        if target.check:
            target.check(Path(file.name))
    sync(output.parent)
    log.info("wrote %s", report)


def to_huggingface(source: Source, target: Target) -> None:
    """Write a directory that stock transformers loads.

    Raises:
        ConfigError: as to_nemo, or Hugging Face has no place for the model.
    """
    output = prepared(source, target.output)
    check_free(output)
    rules = rules_of(source)
    if reason := misread(rules):
        log.warning("%s: %s", output, reason)
    reader = Cast(Theirs(rules, source.reader), target.dtype)
    specs = reader.specs(name for rule in rules for name in rule.theirs)
    check_space(output, sum(spec.num_bytes for spec in specs))
    output.parent.mkdir(parents=True, exist_ok=True)
    with folder_written_whole(output) as folder:
        write_companions(source, specs, folder)
        meter = Meter(specs, str(output))
        write_shards(folder, specs, reader, meter)
        report = meter.report()
        if target.check:
            target.check(folder)
    log.info("wrote %s", report)


def write_shards(folder: Path, specs: list[TensorSpec], reader: Cast, meter: Meter) -> None:
    parts = safetensors.split(specs, safetensors.MAX_SHARD_BYTES)
    shards = dict(zip(safetensors.shard_names(len(parts)), parts, strict=True))
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_bytes(safetensors.index(shards))
    tensors = meter.parts(reader)
    for name, shard in shards.items():
        with open(folder / name, "wb") as file:
            safetensors.write(file, shard, tensors)
            finish(file)


def finish(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def prepared(source: Source, output: Path) -> Path:
    """The path in full, without what a killed conversion to it left.

    Raises:
        ConfigError: it is the source itself.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and output.samefile(source.path):
        raise ConfigError(f"{output}: is the source itself; give another name for the output")
    remove_partial(output)
    return output


def check_free(output: Path) -> None:
    """Raises ConfigError where something would be lost: a directory may hold what no export has written."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file; Hugging Face's format is a directory")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output}: is not empty; give another directory, or remove it first")
