"""Pretraining text: documents of .bin/.idx files, joined and cut into samples of one length, as Megatron's GPTDataset.

The documents follow each other in an order that belongs to the seed; sample k has the tokens from k * length on, and
one more for its last label. Each epoch shuffles the samples (data.orders), so nothing here depends on where a run is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy
import torch

from nemo_vlm.batch import IGNORE_INDEX, Sample
from nemo_vlm.config import DataConfig, RunConfig
from nemo_vlm.data.cached import cached
from nemo_vlm.data.dataset import Datasets
from nemo_vlm.data.indexed import check_ids, open_indexed
from nemo_vlm.data.orders import generator
from nemo_vlm.errors import ConfigError
from nemo_vlm.mcore.indexed import IndexedFile

DOCUMENTS = 2**32 + 1  # where an epoch would stand among the seeds, see opening.NOT_AN_EPOCH
FORMAT = 1  # of the table of the order
LOOKED_AT = 2**22  # tokens of a file that are checked before a run starts; the others are when they are drawn


def open_text(run: RunConfig, tokenizer: Any) -> Datasets:
    """The files of a run, see indexed.open_indexed, with their entropy."""
    datasets = open_indexed(run, partial(Text, tokenizer=tokenizer))
    return replace(datasets, unigram_entropy=unigram_entropy(run.data))


def unigram_entropy(data: DataConfig) -> float:
    """In nats a token, of the files' first tokens, mixed as they are drawn."""
    files = [IndexedFile(path) for path in data.files]
    heads = [file.first(LOOKED_AT) for file in files]
    size = max(int(head.max()) for head in heads) + 1
    weights = data.weights or [int(file.lengths.sum(dtype=numpy.int64)) for file in files]
    of_files = [numpy.bincount(head, minlength=size) / len(head) for head in heads]
    shares = numpy.average(of_files, axis=0, weights=weights)
    shares = shares[shares > 0]
    return float(-(shares * numpy.log(shares)).sum())


class Text:
    """Some documents of a file as samples of model.encoder_seq_length tokens, what is left at their end left out.

    With reset_attention_mask each document of a sample is a sample of its own, and sees only itself. The last token of
    a document still has the next one's first as its label, as in Megatron; eod_mask_loss takes that away.

    Raises:
        ConfigError: the file has ids beyond the vocabulary, or no EOD where eod_mask_loss looks for it.
    """

    def __init__(self, file: IndexedFile, documents: range, run: RunConfig, tokenizer: Any) -> None:
        self.file, self.documents = file, documents
        assert run.model.vocab_size is not None
        self.length, self.vocab_size = run.model.encoder_seq_length, run.model.vocab_size
        self.seed, self.shuffle = run.step.seed, run.data.dataloader_type == "cyclic"
        self.packed = run.data.reset_attention_mask
        self.masked = tokenizer.eos_token_id if run.data.eod_mask_loss else None
        self._check(file.first(LOOKED_AT))
        if self.masked is not None:
            self._check_eod(tokenizer.eos_token)

    def _check(self, ids: numpy.ndarray) -> None:
        if len(ids) and ids.min() < 0:
            raise ConfigError(
                f"{self.file.called}: has the token id {ids.min()}, which no text has; instruction data that were "
                "packed beforehand are read with model.data.data_impl=sft_idxmap"
            )
        check_ids(ids, self.vocab_size, self.file.called)

    def _check_eod(self, eod: str) -> None:
        last = int(self.file.read(int(numpy.argmax(self.file.lengths > 0)))[-1])
        if last != self.masked:
            raise ConfigError(
                f"model.data.eod_mask_loss=true: the first document of {self.file.path} ends with token {last}, not "
                f"with the tokenizer's EOD {eod} ({self.masked}); it was made with another, or without --append-eod"
            )

    @cached_property
    def order(self) -> numpy.ndarray:
        """[2, documents] int64, mapped: the documents in their order, and the tokens up to the end of each."""
        kind = "heldout" if self.documents.start else "order"  # those of one kind replace each other
        settings = f"{FORMAT} {self.documents} {self.seed if self.shuffle else None}"
        return cached(self.file.index_path, kind, settings, self._ordered)

    def _ordered(self) -> numpy.ndarray:
        count = len(self.documents)
        order = (
            torch.randperm(count, generator=generator(self.seed, DOCUMENTS)) if self.shuffle else torch.arange(count)
        )
        documents = order.numpy() + self.documents.start
        return numpy.stack([documents, numpy.cumsum(self.file.lengths[documents], dtype=numpy.int64)])

    def __getstate__(self) -> dict[str, Any]:
        """For a worker: what is mapped here is mapped anew there."""
        return {name: value for name, value in vars(self).items() if name != "order"}

    def __len__(self) -> int:
        if not len(self.documents):
            return 0
        return max(int(self.order[1, -1]) - 1, 0) // self.length

    def samples(self, number: int) -> list[Sample]:
        """The sample, or with reset_attention_mask its documents.

        Raises:
            ConfigError: an id is beyond the vocabulary.
        """
        pieces = [torch.from_numpy(piece) for piece in self._pieces(number * self.length, self.length + 1)]
        text = torch.cat(pieces)
        self._check(text.numpy())
        tokens, labels = text[:-1], text[1:].clone()
        if self.masked is not None:
            labels[tokens == self.masked] = IGNORE_INDEX
        if not self.packed:
            return [Sample(tokens, labels)]
        sizes = [len(piece) for piece in pieces]
        sizes[-1] -= 1  # a label only
        sizes = [size for size in sizes if size]
        return [Sample(*part) for part in zip(tokens.split(sizes), labels.split(sizes), strict=True)]

    def _pieces(self, start: int, count: int) -> Iterator[numpy.ndarray]:
        """So many tokens of the joined text, document by document."""
        order, ends = self.order
        place = int(numpy.searchsorted(ends, start, side="right"))
        while count:
            document, end = int(order[place]), int(ends[place])
            taken = min(end - start, count)
            if taken:
                inside = int(self.file.lengths[document]) - (end - start)
                yield self.file.read(document, inside, taken)
            start, count, place = start + taken, count - taken, place + 1
