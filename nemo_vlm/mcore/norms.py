"""Norms without Transformer Engine, under sequence parallelism too."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient is summed over the tensor-parallel ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # read by Megatron's finalize_model_grads

    def forward(self, x: Tensor) -> Tensor:
        """torch has a kernel on GPUs alone; elsewhere it keeps every step on the way, where gradients are wanted."""
        kept = torch.is_grad_enabled() and not x.is_cuda
        return Normalization.apply(x, self.weight, self.eps) if kept else super().forward(x)


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm, as RMSNorm above."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias.sequence_parallel = config.sequence_parallel


class Normalization(torch.autograd.Function):
    """x / rms(x) * weight, computed in fp32; it keeps x and the reciprocals of its root mean squares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x.float()
        scale = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normal, exact, weighed = x.float() * scale, gradient.float(), weight.float()
        both = exact * normal
        of_weight, along = both.flatten(0, -2).sum(0), torch.matmul(both, weighed / -x.shape[-1])
        of_x = torch.mul(exact, weighed, out=both).addcmul_(normal, along[..., None]).mul_(scale)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None
