"""How long each sample will be, known before it is made: what grouping and packing plan with. Found out once, and kept.

It depends on the tokenizer, the template and the model, so there is one table for each of their combinations.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy
from rich.progress import track

from nemo_vlm.data.cached import cached
from nemo_vlm.data.records import RecordFile
from nemo_vlm.errors import SampleError

AT_ONCE = 10_000  # records that a process takes at a time; a file of fewer is not worth starting any
# Settings that say which records are drawn and how they are put together, and nothing about one sample.
NOT_OF_A_SAMPLE = {
    "data_path",
    "concat_sampling_probabilities",
    "datasets_exclude",
    "validation_split",
    "validation_path",
    "max_skip_fraction",
    "prepare",
    "dataloader_type",
    "packing",
    "pad_to",
    "num_workers",
}


def of_file(file: RecordFile, processor: Any) -> numpy.ndarray:
    """[records, 2] int32, mapped: the tokens of each sample, and whether it has images or videos (1) or not (0).

    A record of which no sample can be made counts as one token: the empty one that takes its place.
    """
    return cached(file.path, "lengths", fingerprint(processor), lambda: measured(file, processor))


def fingerprint(processor: Any) -> str:
    """Equal for processors that make samples of the same lengths."""
    data = {f.name: getattr(processor.data, f.name) for f in fields(processor.data) if f.name not in NOT_OF_A_SAMPLE}
    found = hashlib.sha256(repr((processor.config, data)).encode())
    with tempfile.TemporaryDirectory() as scratch:
        processor.tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            found.update(path.read_bytes())
    return found.hexdigest()


def measured(file: RecordFile, processor: Any) -> numpy.ndarray:
    """Over all CPU cores, with a progress bar."""
    runs = [range(first, min(first + AT_ONCE, len(file))) for first in range(0, len(file), AT_ONCE)]
    if len(runs) == 1:
        return lengths(file, processor, runs[0])
    cores = len(os.sched_getaffinity(0))
    # spawned, not forked: the tokenizer and torch have threads by now
    with ProcessPoolExecutor(cores, get_context("spawn"), prepare, (file, processor)) as pool:
        found = track(pool.map(of_prepared, runs), f"lengths of {file.path.name}", len(runs))
        return numpy.concatenate(list(found))


prepared: tuple[RecordFile, Any]  # in a process that measures


def prepare(file: RecordFile, processor: Any) -> None:
    global prepared
    prepared = file, processor


def of_prepared(numbers: range) -> numpy.ndarray:
    return lengths(*prepared, numbers)


def lengths(file: RecordFile, processor: Any, numbers: range) -> numpy.ndarray:
    found = numpy.zeros((len(numbers), 2), numpy.int32)
    for row, number in zip(found, numbers, strict=True):
        try:
            record = file[number]
            row[:] = processor.length(record), bool(record["image"] or record["video"])
        except SampleError:
            row[:] = 1, 0
    return found
