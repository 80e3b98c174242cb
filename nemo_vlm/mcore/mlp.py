"""A stack of linear layers with GELU between them, the body of a projector; several such stacks side by side."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from nemo_vlm.mcore.config import BuildContext, encoder_config


class LinearStack(MegatronModule):
    """Linear layers of the given sizes, GELU between them; parts are named "0", "1", ...

    Two neighbours whose inner width divides are split over the tensor-parallel ranks, by columns and then by rows;
    what is left over is held whole on each rank.

    Args:
        sizes: widths from input to output, one more than there are layers.
        norm_size: width of a LayerNorm in front, named "norm"; None: there is none. Where it is below that of the
            input, each input is joined from so many neighbours, which are normalised one by one; else they are joined
            first.
    """

    def __init__(
        self, sizes: list[int], build: BuildContext, norm_size: int | None = None, norm_epsilon: float = 1e-5
    ) -> None:
        tp = build.layout.tensor
        config = encoder_config(
            build, True, num_layers=1, hidden_size=sizes[-1], num_attention_heads=tp
        )  # heads: it has none
        super().__init__(config)
        self.count, self.in_size, self.norm_size = len(sizes) - 1, sizes[0], norm_size or sizes[0]
        self.norm = torch.nn.LayerNorm(norm_size, norm_epsilon) if norm_size else torch.nn.Identity()
        make = dict(config=config, init_method=config.init_method, bias=True, skip_bias_add=False)
        index = 0
        while index < self.count:
            if index + 1 < self.count and sizes[index + 1] % tp == 0:
                self.add_module(
                    str(index),
                    ColumnParallelLinear(sizes[index], sizes[index + 1], gather_output=False, **make),
                )
                second = RowParallelLinear(
                    sizes[index + 1],
                    sizes[index + 2],
                    input_is_parallel=True,
                    is_expert=False,
                    **make,
                )
                self.add_module(str(index + 1), second)
                index += 2
            else:
                self.add_module(str(index), torch.nn.Linear(sizes[index], sizes[index + 1]))
                index += 1

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, sizes[0] or a part of it] -> [joined, sizes[-1]]."""
        hidden = self.norm(hidden.reshape(-1, self.norm_size)).view(-1, self.in_size)
        for index in range(self.count):
            hidden = self.get_submodule(str(index))(F.gelu(hidden) if index else hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # Megatron's layers return their bias beside
        return hidden


class Mergers(MegatronModule):
    """The main merger and DeepStack's: each makes tokens of its own features.

    Args:
        merger: of the tower's last layer.
        deepstack: of those layers that the decoder's first layers get.
    """

    def __init__(self, merger: LinearStack, deepstack: list[LinearStack]) -> None:
        super().__init__(merger.config)
        self.merger, self.deepstack = merger, ShardedList(deepstack)

    def forward(self, hidden: Tensor) -> Tensor:
        """Features of all those layers one beside the other, [patches, count * width] -> [tokens, count * out]."""
        mergers = [self.merger, *self.deepstack]
        parts = zip(mergers, hidden.chunk(len(mergers), -1), strict=True)
        return torch.cat([merger(part) for merger, part in parts], -1)


class ShardedList(torch.nn.ModuleList):
    """A list of which Megatron asks each module for its shards; a ModuleList counts for one unsharded module."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        shards = [
            sharded_state_dict_default(module, f"{prefix}{i}.", sharded_offsets, metadata)
            for i, module in enumerate(self)
        ]
        return {name: shard for found in shards for name, shard in found.items()}
