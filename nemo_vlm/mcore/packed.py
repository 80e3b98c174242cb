"""Samples that stand one behind the other in a row, as Megatron's modules and ours are told of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_vlm.batch import Batch


@dataclass
class PackedSamples(PackedSeqParams):
    """Megatron's description, whose lengths need not be asked of the device.

    Attributes:
        lengths: of the samples, as cu_seqlens_q has them.
    """

    lengths: tuple[int, ...] = ()


def packed_sequences(lengths: list[int], device: torch.device) -> PackedSamples:
    borders = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32, non_blocking=True)
    return PackedSamples(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=tuple(lengths),
    )


def packed_batch(batch: Batch, lengths: list[int] | None = None) -> PackedSamples | None:
    """None of a padded batch.

    Args:
        lengths: of its samples, where they are padded to be split.
    """
    return packed_sequences(lengths or row_lengths(batch), batch.tokens.device) if batch.packed else None


def row_lengths(batch: Batch) -> list[int]:
    """Of the samples of a packed batch; what they leave of the row is padding, and counts as one more."""
    lengths = batch.lengths.tolist()
    rest = batch.tokens.shape[1] - sum(lengths)
    return [*lengths, rest] if rest else lengths
