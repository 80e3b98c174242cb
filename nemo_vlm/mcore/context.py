"""Context parallelism: each rank runs the layers on its part of every sample, and attends to all of it.

A sample is cut into 2 * ranks chunks of which rank r holds numbers r and 2 * ranks - 1 - r: causal attention then costs
all ranks the same. That is Megatron's split (get_batch_on_this_cp_rank), and Transformer Engine's of packed samples,
whose own context parallelism works on it as the attention here does. The padding that the split needs is put in and
taken out again here: batches, labels and losses know nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_vlm.batch import Batch, round_up
from nemo_vlm.mcore.attention import CoreAttention
from nemo_vlm.mcore.packed import PackedSamples, row_lengths
from nemo_vlm.options import token_multiple


@dataclass(frozen=True)
class Split:
    """Where the positions of a micro-batch's rows are, seen from one context-parallel rank.

    Attributes:
        lengths: of the samples, padding included: multiples of 2 * ranks.
        held: [part] positions in the row that this rank holds; padding repeats the position in front of it.
        padding: [part] whether each of them is padding.
        places: [s] where each position of the row is among those of all ranks, one rank's behind another's.
    """

    lengths: list[int]
    held: Tensor
    padding: Tensor
    places: Tensor

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's positions of a tensor whose dimension `dim` is the row."""
        return whole.index_select(dim, self.held)

    def whole(self, part: Tensor) -> Tensor:
        """[b, part, ...] of each rank -> [b, s, ...] on all; backward, a rank gets the gradient of its own part."""
        group = parallel_state.get_context_parallel_group()
        parts = gather_from_sequence_parallel_region(part.transpose(0, 1).contiguous(), False, group)
        return parts.index_select(0, self.places).transpose(0, 1)


def split_batch(batch: Batch, config: TransformerConfig) -> Split:
    """How this rank sees a micro-batch. Padded rows are split alike, each as one sample."""
    lengths = row_lengths(batch) if batch.packed else [batch.tokens.shape[1]]
    ranks, rank = config.context_parallel_size, parallel_state.get_context_parallel_rank()
    tensor = config.tensor_model_parallel_size
    multiple = token_multiple(tensor, config.sequence_parallel, ranks, config.fp8 is not None)
    return split(lengths, ranks, rank, multiple, batch.tokens.device)


def split(lengths: list[int], ranks: int, rank: int, multiple: int, device: torch.device) -> Split:
    """The split of a row of samples.

    Args:
        lengths: of the samples, which fill the row.
        multiple: the row is padded to one of this, which is one of 2 * ranks.
    """
    padded = [round_up(length, 2 * ranks) for length in lengths]
    padded[-1] += -sum(padded) % multiple
    real, full = torch.tensor(lengths), torch.tensor(padded)
    sample = torch.arange(len(lengths)).repeat_interleave(full)
    within = torch.arange(len(sample)) - (full.cumsum(0) - full)[sample]
    position = (real.cumsum(0) - real)[sample] + torch.minimum(within, real[sample] - 1)
    chunk = within * (2 * ranks) // full[sample]
    order = torch.minimum(chunk, 2 * ranks - 1 - chunk).argsort(stable=True)  # one rank's behind another's
    places = order.argsort()[within < real[sample]]
    held, padding = (
        each[order].chunk(ranks)[rank].to(device, non_blocking=True) for each in (position, within >= real[sample])
    )
    return Split(padded, held, padding, places.to(device, non_blocking=True))


class ContextParallelAttention(CoreAttention):
    """Causal attention of this rank's positions to those of all ranks, without Transformer Engine.

    Keys and values are gathered, as for Llama 3 (arXiv:2407.21783, section 3.3.2); their gradients are summed and
    scattered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type)
        self.group, self.ranks, self.rank = pg_collection.cp, pg_collection.cp.size(), pg_collection.cp.rank()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        packed_seq_params: PackedSamples | None = None,
        **unused: Any,
    ) -> Tensor:
        """As CoreAttention's, of this rank's part."""
        if packed_seq_params is None:
            return self.attend_split(query, key, value, [len(query)])
        lengths = [length // self.ranks for length in packed_seq_params.lengths]
        return self.attend_split(query[:, None], key[:, None], value[:, None], lengths)[:, 0]

    def attend_split(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """Query [part, b, heads, d], key and value [part, b, groups, d] -> [part, b, heads * d].

        Args:
            lengths: of this rank's part of each sample.
        """
        gathered = gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=self.group)
        samples = zip(query.split(lengths), gathered.unflatten(0, (self.ranks, -1)).split(lengths, 1), strict=True)
        return torch.cat([self.attend_sample(*sample) for sample in samples]).flatten(2)

    def attend_sample(self, query: Tensor, both: Tensor) -> Tensor:
        """Of one sample, query [part, b, heads, d], all keys and values [ranks, part, b, groups, 2 * d] -> as query."""
        front, back = both.chunk(2, 1)
        key, value = torch.cat([front.flatten(0, 1), back.flip(0).flatten(0, 1)]).chunk(2, -1)  # in order
        chunks = zip((self.rank, 2 * self.ranks - 1 - self.rank), query.chunk(2), strict=True)
        ends = [(part, len(part) * (number + 1)) for number, part in chunks]
        return torch.cat([attend_before(part, key[:end], value[:end]) for part, end in ends])


def attend_before(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Query [n, b, heads, d] of the last n positions, key and value [s, b, groups, d] of all -> as query."""
    repeats = query.shape[2] // key.shape[2]  # the kernels that take a mask take no groups
    key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    n, s = len(query), len(key)
    mask = torch.ones(n, s, dtype=torch.bool, device=query.device).tril(s - n)  # is_causal: the first n of all
    query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).permute(2, 0, 1, 3)
