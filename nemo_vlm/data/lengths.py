"""How long each sample will be, known before it is made: what grouping and packing plan with. Found out once, and kept.

It depends on the tokenizer, the template and the model; the table of one combination takes the place of another's.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from rich.progress import track

from nemo_vlm.data.cached import cached
from nemo_vlm.data.pool import mapped
from nemo_vlm.data.records import Records
from nemo_vlm.errors import SampleError

FORMAT = 4  # of the table; tables of another are measured anew
AT_ONCE = 10_000  # records that a process takes at a time; a file of fewer is not worth starting any
UNKNOWN = 0  # tokens of a sample that its images or videos kept from being measured


def of_file(file: Records, processor: Any) -> numpy.ndarray:
    """[records, 2] int32: the tokens of each sample, and how many of them stand for images and videos.

    A record of which no sample can be made counts as one token: the empty one that takes its place. Where that is for
    its images or videos, it is measured again each time.
    """
    every = numpy.arange(len(file))
    settings = fingerprint(file, processor)
    table = cached(file.about, file.lengths_kind, settings, lambda: measured(file, processor, every))
    unknown = numpy.flatnonzero(table[:, 0] == UNKNOWN)
    if not len(unknown):
        return table
    table = numpy.array(table)
    table[unknown] = measured(file, processor, unknown)
    return numpy.maximum(table, (1, 0)).astype(numpy.int32)


def fingerprint(file: Records, processor: Any) -> str:
    """Equal where samples have the same lengths; images in a folder may change unnoticed, see loader.fitting."""
    settings = (FORMAT, processor.length_settings, file.media_version)
    found = hashlib.sha256(repr(settings).encode())
    with tempfile.TemporaryDirectory() as scratch:
        processor.tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            found.update(path.read_bytes())
    return found.hexdigest()


def measured(file: Records, processor: Any, numbers: numpy.ndarray) -> numpy.ndarray:
    """Over all CPU cores, with a progress bar."""
    runs = [numbers[first : first + AT_ONCE] for first in range(0, len(numbers), AT_ONCE)]
    found = mapped(partial(lengths, file, processor), runs, len(os.sched_getaffinity(0)))
    told = f"lengths of {file.path.name}"
    return numpy.concatenate(list(track(found, told, len(runs), disable=len(runs) == 1)))


def lengths(file: Records, processor: Any, numbers: numpy.ndarray) -> numpy.ndarray:
    """[n, 2] int32 of these records, see of_file; UNKNOWN tokens where images or videos are the reason."""
    found = numpy.zeros((len(numbers), 2), numpy.int32)
    for row, number in zip(found, numbers.tolist(), strict=True):
        try:
            row[:] = processor.length(file[number])
        except SampleError as error:
            row[:] = UNKNOWN if error.of_media else 1, 0
    return found
