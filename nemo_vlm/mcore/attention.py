"""Attention without Transformer Engine: on torch's scaled_dot_product_attention, of padded rows and packed samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_vlm.mcore.packed import PackedSamples


class CoreAttention(torch.nn.Module):
    """Causal or bidirectional attention; as Megatron's DotProductAttention and TEDotProductAttention are called."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.is_causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        packed_seq_params: PackedSamples | None = None,
        **unused: Any,
    ) -> Tensor:
        """Query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d].

        Packed samples come without the batch: query [t, heads, d], key and value [t, groups, d] -> [t, heads * d].
        """
        if packed_seq_params is None:
            parts = [together(part.permute(1, 2, 0, 3)) for part in (query, key, value)]
            return self.attend(*parts).permute(2, 0, 1, 3).flatten(2)
        parts = [together(part.transpose(0, 1)[None]) for part in (query, key, value)]
        # split, not slices: the backward of n slices fills n tensors of the full length
        samples = zip(*(part.split(packed_seq_params.lengths, 2) for part in parts), strict=True)
        out = torch.cat([self.attend(*sample).transpose(1, 2) for sample in samples], 1)
        return out.squeeze(0).flatten(1)  # not [0], whose backward pass fills a tensor with zeros

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query [b, heads, s, d], key and value [b, groups, s, d] -> as query."""
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal, enable_gqa=grouped)


def together(heads: Tensor) -> Tensor:
    """[b, heads, s, d] as it is, on a CPU copied: rows of a head that lie far apart cost attention a tenth more."""
    return heads.contiguous() if heads.device.type == "cpu" else heads
