"""Rotary positions that have several axes: M-RoPE in the decoder, height and width in a vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

VISION_BASE = 10000.0


class MultimodalRotary(torch.nn.Module):
    """Stands in GPTModel for Megatron's MultimodalRotaryEmbedding and is called as that is.

    Megatron's takes the angles from a matrix product, which TF32 and autocast would round, and wants the positions of
    all context-parallel ranks; here they are those of this rank.
    """

    def __init__(self, base: float, interleaved: bool = False) -> None:
        super().__init__()
        self.base, self.axes = base, interleaved_axes if interleaved else chunked_axes

    def forward(self, position_ids: Tensor, mrope_section: Sequence[int], **unused: Any) -> Tensor:
        """Angles [s, b, 1, d] fp32 of positions [3, b, s].

        Args:
            mrope_section: frequencies that each axis gets; d / 2 in all.
        """
        axes = self.axes(mrope_section).to(position_ids.device)
        half = position_ids.permute(2, 1, 0)[..., axes] * frequencies(len(axes), self.base, position_ids.device)
        return torch.cat([half, half], -1)[:, :, None]


def chunked_axes(sections: Sequence[int]) -> Tensor:
    """The axis of each frequency where an axis has a run of them: Qwen2-VL's."""
    return torch.arange(3).repeat_interleave(torch.tensor(sections))


def interleaved_axes(sections: Sequence[int]) -> Tensor:
    """Where they take turns, and time has what height and width leave: Qwen3-VL's."""
    axes = torch.zeros(sum(sections), dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


class RotatedAttention(SelfAttention):
    """Megatron's self-attention, whose angles [s, b or 1, 1, d] are those of the very tokens that come, packed or not.

    Megatron cuts the angles of packed samples apart by their borders, which it asks the device for, one by one and in
    each layer.

    Attributes:
        angles: of the forward pass that is under way; None: a Cache has them.
        rotates_in: None: in the dtype of the layer, as the decoders of Hugging Face.
    """

    angles: Tensor | None = None
    rotates_in: torch.dtype | None = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Any, rotary_pos_emb: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        self.angles = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, **rest)
        finally:
            self.angles = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [s, b, heads, d], the first two rotated where there are angles."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        if self.angles is None:  # a cache rotates them
            return query, key, value
        dtype = self.rotates_in or query.dtype
        cosine, sine = self.angles.cos().to(dtype), self.angles.sin().to(dtype)
        query, key = (rotate(heads.to(dtype), cosine, sine).to(heads.dtype) for heads in (query, key))
        return query, key, value


class TowerAttention(RotatedAttention):
    """That of a vision tower, rotated as by HF's apply_rotary_pos_emb_vision."""

    rotates_in = torch.float32


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As Megatron's and HF's: the halves of a head are the two coordinates."""
    first, second = heads.chunk(2, -1)
    return heads * cosine + torch.cat([-second, first], -1) * sine


def frequencies(count: int, base: float, device: torch.device) -> Tensor:
    """[count] fp32, from 1 down towards 1 / base."""
    return 1.0 / base ** (torch.arange(count, dtype=torch.float32, device=device) / count)


def grid_angles(height: int, width: int, merge_size: int, head_size: int, device: torch.device) -> Tensor:
    """Angles [height * width, d] of a frame's patches, as HF's Qwen2VisionTransformerPretrainedModel has them.

    Patches come block by block of `merge_size` x `merge_size`; a quarter of a head goes by row, a quarter by column.
    """
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    positions = block_by_block(torch.stack([rows, columns], -1), merge_size)[..., None]
    half = (positions * frequencies(head_size // 4, VISION_BASE, device)).flatten(1)
    return torch.cat([half, half], -1)


def block_by_block(grid: Tensor, merge_size: int) -> Tensor:
    """Values [rows, columns, n] of a frame's patches -> [rows * columns, n], in the order of their blocks."""
    blocks = grid.unflatten(1, (-1, merge_size)).unflatten(0, (-1, merge_size))
    return blocks.transpose(1, 2).flatten(0, 3)
