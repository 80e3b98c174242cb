"""Keys and values of tokens that were seen already, so that each new token costs one step and not the whole sequence.

Rows are padded on the right: the next token of a row stands behind its last one, over the padding, and at the position
that it would have without other rows. (Megatron's static context gives all rows one position, its dynamic one is for
CUDA.) That position is its place in the row, but behind images or videos whose tokens share positions, as with M-RoPE.
Queries and keys come as they are and are rotated here, by sines that all layers share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_vlm.mcore.rotary import turned_at_once


class Cache:
    """What the layers of this pipeline stage keep of a batch.

    Args:
        lengths: [b] int64 on the CPU, tokens of each prompt.
        capacity: the most tokens that a row may have, its answer included.
    """

    def __init__(self, lengths: Tensor, capacity: int, device: torch.device) -> None:
        self.lengths, self.capacity, self.device = lengths, capacity, device
        self.filled = False  # whether the prompts have passed
        self.offsets = torch.zeros_like(lengths, device=device)  # [b]: from a new token's place to its position
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows = torch.arange(len(lengths), device=device)
        self._settle()

    def _settle(self) -> None:
        """Where the next token of each row goes, and what it sees: itself and all before it; None: all there is."""
        lengths = self.lengths.tolist()
        self.ends, self.width = self.lengths.to(self.device), max(lengths) + 1
        self.visible: Tensor | None = None
        if min(lengths) + 1 < self.width:
            self.visible = (torch.arange(self.width, device=self.device) <= self.ends[:, None])[:, None, None]

    def rotate_by(self, turns: Tensor, dtype: torch.dtype) -> None:
        """The turns [s, b or 1, 1, 2 d] of this pass's tokens; layers rotate in their own dtype."""
        self.cosine, self.sine = turns.permute(1, 2, 0, 3).to(dtype).chunk(2, -1)

    def positions(self, width: int) -> Tensor:
        """[s, b or 1]: of the tokens of this pass; of prompts without images and videos."""
        return (self.ends + self.offsets)[None] if self.filled else torch.arange(width, device=self.device)[:, None]

    def count_on(self, positions: Tensor) -> None:
        """Let answers begin behind the highest of their prompts' M-RoPE positions [3, b, s] (rope_deltas in HF)."""
        padding = torch.arange(positions.shape[-1], device=self.device) >= self.ends[:, None]
        self.offsets = positions.amax(0).masked_fill(padding, -1).amax(1) + 1 - self.ends

    def last(self, hidden: Tensor) -> Tensor:
        """[1, b, h] of the last token of each row, from the hidden states [s, b, h] of this pass."""
        return hidden if self.filled else hidden[self.ends - 1, self.rows][None]

    def fill(self) -> None:
        """The prompts have passed all layers."""
        self.filled = True

    def grow(self, longer: Tensor) -> None:
        """A step has passed all layers, and has made those rows [b] bool longer."""
        self.lengths = self.lengths + longer
        self._settle()

    def repeated(self, counts: list[int]) -> Cache:
        """Row i as often as counts[i] says, each copy to be continued on its own."""
        repeats = torch.tensor(counts)
        made = Cache(self.lengths.repeat_interleave(repeats), self.capacity, self.device)
        made.filled, made.offsets = self.filled, self.offsets.repeat_interleave(repeats.to(self.device))
        for layer, parts in self.layers.items():
            keys, values = (part.repeat_interleave(repeats.to(self.device), 0) for part in parts)
            made.layers[layer] = keys, values
        return made

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of this pass's tokens to themselves and to all before them.

        Args:
            query: [b, heads, s, d]; s is 1 in a step.
            key, value: [b, groups, s, d].
        """
        query, key = (turned_at_once(heads, self.cosine, self.sine) for heads in (query, key))
        grouped = query.shape[1] != key.shape[1]
        if not self.filled:
            room = (0, 0, 0, self.capacity - key.shape[2])
            self.layers[layer] = F.pad(key, room), F.pad(value, room)
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        keys, values = self.layers[layer]
        keys[self.rows, :, self.ends], values[self.rows, :, self.ends] = key[:, :, 0], value[:, :, 0]
        seen = keys[:, :, : self.width], values[:, :, : self.width]
        return F.scaled_dot_product_attention(query, *seen, self.visible, enable_gqa=grouped)
