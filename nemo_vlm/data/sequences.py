"""Conversations as sequences, and packs of them as the idxmap files of Pai-Megatron-Patch hold them.

A document is a pack, 2 * SEQ_LEN numbers: its tokens, padded, and behind them their labels, already shifted, and
IGNORE_INDEX where nothing is trained on (Pai's toolkits/sft_data_preprocessing/build_idxmap_sft_dataset.py). The last
token of each sequence stands as -1 - id, which tells where it ends; it has no label.

Processes that only encode import this module, and Megatron is slow to import: so it does without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy

from nemo_vlm.batch import IGNORE_INDEX, Sample
from nemo_vlm.data.records import JsonFile, conversation
from nemo_vlm.errors import SampleError

Shifted = tuple[numpy.ndarray, numpy.ndarray]  # tokens and labels, both [s]
Line = list[Shifted | tuple[str, str]]  # of an input: sequences, and in place of others the reason and the message


def sequences(tokens: numpy.ndarray, labels: numpy.ndarray) -> Iterator[Shifted]:
    """Tokens and labels [s] of each sequence of a pack [SEQ_LEN], the last token taken away.

    Raises:
        ValueError: labels stand where there can be none.
    """
    ends = numpy.flatnonzero(tokens < 0)
    behind = ends[-1] + 1 if len(ends) else 0
    if (labels[ends] != IGNORE_INDEX).any() or (labels[behind:] != IGNORE_INDEX).any():
        raise ValueError("the last token of a sequence, and padding, can have no labels; not an SFT idxmap")
    start = 0
    for end in ends.tolist():
        if end > start:
            yield tokens[start:end].copy(), labels[start:end].copy()
        start = end + 1


def sequence(sample: Sample) -> Shifted:
    """A sample that is trained on as a sequence, which ends with the last token trained on."""
    count = int((sample.labels != IGNORE_INDEX).nonzero().max()) + 1
    labels = sample.labels[:count].numpy()
    return numpy.append(sample.tokens[:count].numpy(), -1 - labels[-1]), numpy.append(labels, IGNORE_INDEX)


def cut(whole: Shifted, limit: int) -> Shifted | None:
    """What of a sequence `limit` tokens hold, up to the last token trained on; None: they hold none of those."""
    tokens, labels = whole
    if len(tokens) <= limit:
        return whole
    trained = numpy.flatnonzero(labels[: limit - 1] != IGNORE_INDEX)
    if not len(trained):
        return None
    end = int(trained[-1]) + 1
    return numpy.append(tokens[:end], -1 - labels[end - 1]), numpy.append(labels[:end], IGNORE_INDEX)


def document(pack: Iterable[Shifted], seq_length: int, padding: int) -> numpy.ndarray:
    """[2 * seq_length] int32: sequences as a pack is stored.

    Args:
        padding: the id behind them.
    """
    tokens = numpy.full(seq_length, padding, numpy.int32)
    labels = numpy.full(seq_length, IGNORE_INDEX, numpy.int32)
    start = 0
    for ids, targets in pack:
        tokens[start : start + len(ids)], labels[start : start + len(ids)] = ids, targets
        start += len(ids)
    return numpy.concatenate([tokens, labels])


def of_run(file: JsonFile, processor: Any, run: range) -> list[Line]:
    return [list(encoded(file, processor, number)) for number in run]


def encoded(file: JsonFile, processor: Any, number: int) -> Iterator[Shifted | tuple[str, str]]:
    """What a line holds: a record, or a list of records that belong together."""
    try:
        raw = file.raw(number)
    except SampleError as error:
        yield error.reason, str(error)
        return
    for record in raw if isinstance(raw, list) else [raw]:
        try:
            said = conversation(record, f"{file.path}: record", number)
            yield sequence(processor.sample(said))
        except SampleError as error:
            yield error.reason, str(error)
