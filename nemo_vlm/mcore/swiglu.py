"""The gated MLP of a decoder layer, which keeps for its backward pass what it needs, and no product in between."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_vlm.mcore.linear import ColumnLinear, RowLinear


class GatedMLP(MLP):
    """Megatron's with SwiGLU (arXiv:2002.05202) as one function of autograd; Megatron's own pieces keep three times as
    much.
    """

    def __init__(self, config: TransformerConfig) -> None:
        parts = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
        super().__init__(config, parts, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h], and the bias that is added later."""
        inner, bias = self.linear_fc1(hidden_states)
        both = inner if bias is None else inner + bias
        return self.linear_fc2(SwiGLU.apply(both) if torch.is_grad_enabled() else swiglu(both))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of both side by side, [..., 2 f] -> [..., f]."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return swiglu(both)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        of_both = torch.empty_like(both)
        of_gate, of_up = of_both.chunk(2, -1)
        opened = F.silu(gate)
        torch.mul(gradient, opened, out=of_up)
        torch.mul(gradient, up, out=opened)
        torch.ops.aten.silu_backward.grad_input(opened, gate, grad_input=of_gate)
        return of_both


def swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate).mul_(up)
