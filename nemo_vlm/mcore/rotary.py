"""Rotary positions: of text, M-RoPE's three axes, height and width in a vision tower.

Cosines and sines are made once for all layers, and travel through Megatron's layers in the place of its angles as
`turns` [s, b or 1, 1, 2 d] fp32: of each token that comes, its cosines and then its sines, those of the first half of a
head negated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from nemo_vlm.mcore.packed import PackedSamples

VISION_BASE = 10000.0


class TextRotary(RotaryEmbedding):
    """Megatron's, whose angles it keeps, but for what comes of them: turns."""

    def get_rotary_seq_len(self, *about: Any) -> tuple[int, PackedSamples | None]:  # type: ignore[override]
        """What GPTModel hands on to `forward`; the last that it is asked with are the packed samples."""
        return super().get_rotary_seq_len(*about), about[-1]

    def forward(self, rows: tuple[int, PackedSamples | None], **unused: Any) -> Tensor:  # type: ignore[override]
        """Turns [s, 1, 1, 2 d] of this rank's part of rows, each of them one sample or all of the same samples."""
        length, packed = rows
        angles = super().forward(length, packed_seq=True)[..., : len(self.inv_freq)]  # so called it leaves them whole
        lengths = (length,) if packed is None else packed.lengths
        ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        if ranks == 1:
            return turns(torch.cat([angles[:length] for length in lengths]))
        chunks = [angles[:length].chunk(2 * ranks) for length in lengths]
        return turns(torch.cat([sample[number] for sample in chunks for number in (rank, 2 * ranks - 1 - rank)]))


class MultimodalRotary(torch.nn.Module):
    """Stands in GPTModel for Megatron's MultimodalRotaryEmbedding and is called as that is; it gives turns.

    Megatron's takes the angles from a matrix product, which TF32 and autocast would round, and wants the positions of
    all context-parallel ranks; here they are those of this rank.
    """

    def __init__(self, base: float, interleaved: bool = False) -> None:
        super().__init__()
        self.base, self.axes = base, interleaved_axes if interleaved else chunked_axes

    def forward(self, position_ids: Tensor, mrope_section: Sequence[int], **unused: Any) -> Tensor:
        """Turns [s, b, 1, 2 d] of positions [3, b, s].

        Args:
            mrope_section: frequencies that each axis gets; d / 2 in all.
        """
        axes = self.axes(mrope_section).to(position_ids.device, non_blocking=True)
        half = position_ids.permute(2, 1, 0)[..., axes] * frequencies(len(axes), self.base, position_ids.device)
        return turns(half)[:, :, None]


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
    """Megatron's self-attention, which is given turns of the very tokens that come, packed or not, for its angles.

    Megatron cuts the angles of packed samples apart by their borders, which it asks the device for, one by one and in
    each layer.

    Attributes:
        turns: of the forward pass that is under way; None: a Cache has them.
        rotates_in: None: in the dtype of the layer, as the decoders of Hugging Face.
    """

    turns: Tensor | None = None
    rotates_in: torch.dtype | None = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Any, rotary_pos_emb: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        self.turns = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, **rest)
        finally:
            self.turns = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [s, b, heads, d], the first two rotated where there are turns."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        if self.turns is None:  # a cache rotates them
            return query, key, value
        dtype = self.rotates_in or query.dtype
        exact = self.turns.to(dtype)
        query, key = (rotate(heads.to(dtype), exact).to(heads.dtype) for heads in (query, key))
        return query, key, value


class TowerAttention(RotatedAttention):
    """That of a vision tower, rotated as by HF's apply_rotary_pos_emb_vision."""

    rotates_in = torch.float32


def turns(half: Tensor) -> Tensor:
    """Angles [..., d / 2] of the pairs of a head, to what `rotate` takes, [..., 2 d]."""
    cosine, sine = half.cos(), half.sin()
    return torch.cat([cosine, cosine, -sine, sine], -1)


def rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """Heads [..., d] as Megatron's apply_rotary_pos_emb and HF's turn them: their halves are the two coordinates."""
    return Rotation.apply(heads, *turns.chunk(2, -1))


class Rotation(torch.autograd.Function):
    """Keeps the turns alone for its backward pass, which turns the gradient back."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return turned(heads, cosine, sine)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        return turned(gradient, cosine, -sine), None, None


def turned(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    out = heads * cosine
    for mine, other, sines in zip(out.chunk(2, -1), heads.chunk(2, -1)[::-1], sine.chunk(2, -1), strict=True):
        mine.add_(other * sines)  # rounded as by Hugging Face, which addcmul_ would not
    return out


def turned_at_once(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As `turned`, in few calls, which weigh more than the numbers of a few tokens; of many it would copy too much."""
    return heads * cosine + heads.roll(heads.shape[-1] // 2, -1) * sine


def frequencies(count: int, base: float, device: torch.device) -> Tensor:
    """[count] fp32, from 1 down towards 1 / base."""
    return 1.0 / base ** (torch.arange(count, dtype=torch.float32, device=device) / count)


def grid_angles(height: int, width: int, merge_size: int, head_size: int, device: torch.device) -> Tensor:
    """Angles [height * width, d / 2] of a frame's patches, as HF's Qwen2VisionTransformerPretrainedModel has them.

    Patches come block by block of `merge_size` x `merge_size`; a quarter of a head goes by row, a quarter by column.
    """
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    positions = block_by_block(torch.stack([rows, columns], -1), merge_size)[..., None]
    return (positions * frequencies(head_size // 4, VISION_BASE, device)).flatten(1)


def block_by_block(grid: Tensor, merge_size: int) -> Tensor:
    """Values [rows, columns, n] of a frame's patches -> [rows * columns, n], in the order of their blocks."""
    blocks = grid.unflatten(1, (-1, merge_size)).unflatten(0, (-1, merge_size))
    return blocks.transpose(1, 2).flatten(0, 3)
