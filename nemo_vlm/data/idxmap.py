"""Instruction data that were tokenized and packed beforehand, a part of data.indexed; their layout: data.sequences."""

from __future__ import annotations

import numpy
import torch

from nemo_vlm.batch import IGNORE_INDEX, Sample, empty_sample
from nemo_vlm.config import RunConfig
from nemo_vlm.data.indexed import check_ids
from nemo_vlm.data.sequences import sequences
from nemo_vlm.errors import ConfigError
from nemo_vlm.mcore.indexed import IndexedFile


class PackedDocuments:
    """Some documents of a file, each with all the samples of its pack.

    Raises:
        ConfigError: they are not made for model.encoder_seq_length.
    """

    packed = True

    def __init__(self, file: IndexedFile, documents: range, run: RunConfig) -> None:
        self.file, self.documents = file, documents
        assert run.model.vocab_size is not None
        self.vocab_size = run.model.vocab_size
        check_lengths(file, run.model.encoder_seq_length)

    def __len__(self) -> int:
        return len(self.documents)

    def samples(self, number: int) -> list[Sample]:
        """The sequences of a pack, each without its last token, which is only a label.

        Raises:
            ConfigError: the document is of another format, or a token is beyond the vocabulary.
        """
        document = self.documents[number]
        tokens, labels = self.file.read(document).reshape(2, -1)
        try:
            found = list(sequences(tokens, labels))
        except ValueError as error:
            raise ConfigError(f"{self.file.called}: document {document}: {error}") from None
        for ids, targets in found:
            check_ids(ids, self.vocab_size, self.file.called)
            check_ids(targets[targets != IGNORE_INDEX], self.vocab_size, self.file.called)
        samples = [Sample(torch.from_numpy(ids), torch.from_numpy(targets)) for ids, targets in found]
        return samples or [empty_sample()]


def check_lengths(file: IndexedFile, seq_length: int) -> None:
    """Raises ConfigError where a document is not of twice so many numbers."""
    lengths = numpy.unique(file.lengths)
    if len(lengths) > 1 or lengths[0] % 2:
        some = ", ".join(map(str, lengths[:3].tolist()))
        raise ConfigError(f"{file.called}: documents of {some} numbers; an SFT idxmap has 2 * SEQ_LEN in each")
    if lengths[0] != 2 * seq_length:
        made = int(lengths[0]) // 2
        raise ConfigError(f"model.encoder_seq_length={seq_length}: {file.called} is made for {made}; give that number")
