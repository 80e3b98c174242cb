"""Answers of a model while it trains: each new token costs a pass over all that is before it, as in training.

That needs no cache and no second copy of the weights, so it holds wherever a run trains: split sequences and contexts,
virtual stages, sharded weights, kernels that know no cache of ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_vlm import heartbeat
from nemo_vlm.batch import IGNORE_INDEX, Batch, collate, empty_sample, round_up
from nemo_vlm.config import RunConfig
from nemo_vlm.data.loader import pad_multiple
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.engine import Engine
from nemo_vlm.options import row_length


@dataclass
class Said:
    """What stands in the place of a cache: prompts and answers so far.

    Attributes:
        running: [b] bool: rows that go on; `batch` holds these alone.
    """

    batch: Batch
    running: Tensor


class Rereader:
    """A Decoder (inference.generate) on a run's own engine, inside whose `evaluation` it is to be used.

    Ranks of other samples make as many passes, since they may have to gather weights or to exchange tokens together:
    who is done must `wait`.
    """

    def __init__(self, engine: Engine, run: RunConfig, layout: Layout) -> None:
        self.engine, self.multiple, longest = engine, pad_multiple(run, layout, packed=False), row_length(run, layout)
        self.of_one_size = self.multiple == longest  # then micro-batches have as many rows, too
        self.micro_batch_size, self.tokens = layout.micro_batch_size, layout.micro_batch_size * longest
        self.visual_tokens = run.data.max_visual_tokens_per_micro_batch or math.inf
        self.beside = layout.pipeline - 1 if layout.virtual > 1 else 0  # virtual stages take no fewer micro-batches
        self.empty = self._padded(collate([empty_sample()]))

    def in_groups(self, lengths: Mapping[int, int], visual: Mapping[int, int]) -> list[list[int]]:
        """Rows by number, the longest first, in groups of which none has more tokens than a micro-batch of training.

        Args:
            lengths: the most tokens that each may come to have.
            visual: how many of them stand for images and videos.
        """
        left, made = sorted(lengths, key=lambda number: (-lengths[number], number)), []
        while left:
            count = max(self.tokens // round_up(lengths[left[0]], self.multiple), 1)
            sums = accumulate(visual[number] for number in left[:count])
            count = max(sum(total <= self.visual_tokens for total in sums), 1)
            made.append(left[:count])
            left = left[count:]
        return made

    def start(self, batch: Batch, capacity: int) -> tuple[Said, Tensor]:
        """See Decoder."""
        said = Said(batch, torch.ones(len(batch.tokens), dtype=torch.bool))
        return said, self._read(said)

    def step(self, said: Said, tokens: Tensor, longer: Tensor) -> Tensor:
        """See Decoder; rows that are not longer have ended, and are read no more."""
        batch = said.batch.rows(longer[said.running])
        room = int(batch.lengths.max()) + 1 - batch.tokens.shape[1]
        grown = F.pad(batch.tokens, (0, max(room, 0)))
        grown[torch.arange(len(grown)), batch.lengths] = tokens.cpu()[longer]
        said.batch, said.running = replace(batch, tokens=grown, lengths=batch.lengths + 1), longer
        return self._read(said)

    def wait(self) -> None:
        """Until no rank reads any more."""
        while groups.any_rank(False)[0]:
            heartbeat.at("answering")
            self._logits(self.empty)

    def _read(self, said: Said) -> Tensor:
        groups.any_rank(True)
        logits = self._logits(self._padded(said.batch))[: len(said.batch.tokens)]
        every = logits.new_zeros(len(said.running), logits.shape[1])
        every[said.running.to(logits.device)] = logits
        return every

    def _logits(self, batch: Batch) -> Tensor:
        return self.engine.logits([batch, *[self.empty] * self.beside])

    def _padded(self, batch: Batch) -> Batch:
        """As training pads; with empty rows where micro-batches are of one size."""
        rows = self.micro_batch_size - len(batch.tokens) if self.of_one_size else 0
        width = round_up(int(batch.lengths.max()), self.multiple)
        tokens = F.pad(batch.tokens, (0, width - batch.tokens.shape[1], 0, rows))  # narrower where long rows have ended
        labels, lengths = torch.full_like(tokens, IGNORE_INDEX), F.pad(batch.lengths, (0, rows), value=1)
        records, views = F.pad(batch.records, (0, rows), value=-1), F.pad(batch.views, (0, rows))
        return replace(batch, tokens=tokens, labels=labels, lengths=lengths, records=records, views=views)
