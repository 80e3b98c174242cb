"""The data of a run: its files opened, and which records train and which validate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from nemo_vlm.config import DataConfig, RunConfig
from nemo_vlm.data import lengths
from nemo_vlm.data.cached import cached
from nemo_vlm.data.dataset import Datasets, Numbers
from nemo_vlm.data.orders import FILES_APART, generator
from nemo_vlm.data.records import RecordDataset, RecordFile, Records
from nemo_vlm.data.webdataset import WebDataset
from nemo_vlm.errors import ConfigError, SampleError

log = logging.getLogger(__name__)

NOT_AN_EPOCH = 2**32  # where an epoch would stand among the seeds


def open_datasets(run: RunConfig, processor: Any) -> Datasets:
    """Index the files of a run, and find out the lengths where grouping or packing needs them.

    Args:
        processor: of the run's family.
    Raises:
        ConfigError: a file cannot be read, is no list of conversations, or nothing of it is left to train on.
    """
    data = run.data
    files = open_files(run, data.files, "data_path")
    kept = [of_use(file, data.datasets_exclude) for file in files]
    seeds = [run.step.seed + FILES_APART * number for number in range(len(files))]
    halves = [split(part, data.validation_split, seed) for part, seed in zip(kept, seeds, strict=True)]
    for file, (trained, _) in zip(files, halves, strict=True):
        if not len(trained):
            key = "datasets_exclude" if data.datasets_exclude else "validation_split"
            raise ConfigError(f"model.data.{key}={getattr(data, key)}: leaves nothing of {file.path} to train on")
    table = lengths_of(files, data, processor)
    train = RecordDataset(files, [trained for trained, _ in halves], processor, table)
    if data.validation_path is not None or (data.data_impl == "energon" and not data.validation_split):
        return Datasets(train, validation_apart(run, processor))
    held_out = RecordDataset(files, [validating for _, validating in halves], processor, table)
    return Datasets(train, held_out if len(held_out) else None)


def open_tokenized(run: RunConfig, tokenizer: Any) -> Datasets:
    """Open Megatron's .bin/.idx files; what reads them imports Megatron, which takes seconds.

    Raises:
        ConfigError: as indexed.open_indexed.
    """
    from nemo_vlm.data.idxmap import PackedDocuments
    from nemo_vlm.data.indexed import open_indexed
    from nemo_vlm.data.mmap import open_text

    if run.data.data_impl == "mmap":
        return open_text(run, tokenizer)
    return open_indexed(run, PackedDocuments)


def validation_apart(run: RunConfig, processor: Any) -> RecordDataset | None:
    """On the files of validation_path; of tars on their val part, where one has any."""
    data, setting = run.data, "data_path" if run.data.validation_path is None else "validation_path"
    paths = data.files if run.data.validation_path is None else data.validation_files
    files = [file for file in open_files(run, paths, setting, "val") if len(file)]
    if not files and setting == "validation_path":
        raise ConfigError(f"model.data.validation_path={list(paths)}: no split.yaml there has a val part")
    parts = [of_use(file, data.datasets_exclude) for file in files]
    return RecordDataset(files, parts, processor, lengths_of(files, data, processor)) if files else None


def open_files(
    run: RunConfig, paths: Sequence[str], setting: str, part: str = "train"
) -> list[RecordFile] | list[WebDataset]:
    """Each with its own image and video folder, or all with one.

    Args:
        part: of tars.
    """
    data, key = run.data, f"model.data.{setting}"
    if data.data_impl == "energon":
        return [WebDataset(Path(path), key, part) for path in paths]
    folders = {}
    for name in ("image_folder", "video_folder"):
        given = getattr(data, name)
        folders[name] = list(given) if isinstance(given, tuple) else [given] * len(paths)
        if len(folders[name]) != len(paths):
            raise ConfigError(f"model.data.{name}={list(given)}: {key} has {len(paths)} files; give one")
    return [
        RecordFile(Path(path), images, videos, key, run.model.reads_media)
        for path, images, videos in zip(paths, *folders.values(), strict=True)
    ]


def of_use(file: RecordFile | WebDataset, datasets_exclude: tuple[str, ...]) -> Numbers:
    """Numbers of the records that are not left out, by that setting or by a split.yaml."""
    return not_excluded(file, datasets_exclude) if isinstance(file, RecordFile) else file.kept


def not_excluded(file: RecordFile, names: tuple[str, ...]) -> Numbers:
    """Numbers of the records whose `dataset` is none of these."""
    if not names:
        return range(len(file))
    mask = cached(file.path, "excluded", repr(names), lambda: excluded(file, names))
    log.info("model.data.datasets_exclude=%s: %d records of %s are left out", list(names), mask.sum(), file.path)
    return numpy.flatnonzero(~mask)


def excluded(file: RecordFile, names: tuple[str, ...]) -> numpy.ndarray:
    """[records] bool."""
    return numpy.array([of_dataset(file, number, names) for number in range(len(file))])


def of_dataset(file: RecordFile, number: int, names: tuple[str, ...]) -> bool:
    try:
        record = file.raw(number)
    except SampleError:
        return False  # it is left out, and counted, when it is drawn
    return isinstance(record, dict) and record.get("dataset") in names


def split(records: Numbers, fraction: float, seed: int) -> tuple[Numbers, Numbers]:
    """Those to train on and those to validate on, which end a permutation; both in the order of the file.

    A fraction above 0 holds out one record at least.
    """
    if not fraction:
        return records, records[:0]
    order = torch.randperm(len(records), generator=generator(seed, NOT_AN_EPOCH)).numpy()
    first, numbers = len(records) - max(round(len(records) * fraction), 1), numpy.asarray(records)
    return numbers[numpy.sort(order[:first])], numbers[numpy.sort(order[first:])]


def lengths_of(files: Sequence[Records], data: DataConfig, processor: Any) -> numpy.ndarray | None:
    """[records of all files, 2], see lengths.of_file; None where nothing needs it."""
    if not (data.packing or data.balance_visual_tokens or data.dataloader_type == "modality"):
        return None
    return numpy.concatenate([lengths.of_file(file, processor) for file in files])
