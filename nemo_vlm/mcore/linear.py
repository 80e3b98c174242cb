"""Megatron's linear layers, reduced to the plain product where no gradient is taken, or a CPU rank holds all of one.

What they prepare for the rest costs more than the products of small tensors do.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from nemo_vlm.mcore.cpu import add_product

Output = tuple[Tensor, Tensor | None]
# Of so many tokens MKL makes hidden @ weight.T in up to 1.5 times the time of its transpose, where the weight has so
# many elements, more than a core's cache holds.
FEW, LARGE = range(8, 33), 2**20


class ColumnLinear(ColumnParallelLinear):
    """Whose output stays split over the tensor-parallel ranks."""

    def forward(self, input_: Tensor) -> Output:
        """[s, b, in] -> [s, b, out / tp], and the bias where it is added later."""
        if torch.is_grad_enabled() and alone(self):
            return trained(self, input_)
        if torch.is_grad_enabled() or self.sequence_parallel:
            return super().forward(input_)
        return with_bias(self, multiply(input_, self.weight))


class RowLinear(RowParallelLinear):
    """Whose input is split over the tensor-parallel ranks."""

    def forward(self, input_: Tensor) -> Output:
        """[s, b, in / tp] -> [s, b, out], and the bias where it is added later."""
        if torch.is_grad_enabled() and alone(self):
            return trained(self, input_)
        if torch.is_grad_enabled() or self.sequence_parallel:
            return super().forward(input_)
        product = multiply(input_, self.weight)
        if self.tp_group.size() > 1 and not self.explicit_expert_comm:  # what gathers the experts' tokens sums them
            product = reduce_from_tensor_model_parallel_region(product, group=self.tp_group)
        return with_bias(self, product)


class Product(torch.autograd.Function):
    """What Megatron's LinearWithGradAccumulationAndAsyncCommunication does where there is nothing to communicate.

    Of an input that needs no gradient, as a tower's patches, it takes none.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, to_buffer: bool) -> Tensor:
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight)
        ctx.buffered = weight if to_buffer else None  # what is saved may come back as another object
        return torch.matmul(hidden, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        of_hidden = torch.matmul(grad, weight) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_hidden, None, None
        grad, hidden = grad.flatten(0, -2), hidden.flatten(0, -2)
        if ctx.buffered is None:
            return of_hidden, grad.t() @ hidden, None
        add_product(hidden, grad, ctx.buffered.main_grad, first=not ctx.buffered.grad_added_to_main_grad)
        ctx.buffered.grad_added_to_main_grad = True
        return of_hidden, torch.empty_like(weight), None  # Megatron's hook waits for one, and throws it away


def trained(linear: ColumnParallelLinear | RowParallelLinear, hidden: Tensor) -> Output:
    """What `alone` layers make."""
    return with_bias(linear, Product.apply(hidden, linear.weight, linear.gradient_accumulation_fusion))


def alone(linear: ColumnParallelLinear | RowParallelLinear) -> bool:
    """Whether it is whole on this rank, and on a CPU, where Megatron's steps around a product take longer than it."""
    return linear.weight.device.type == "cpu" and linear.tp_group.size() == 1


def multiply(hidden: Tensor, weight: Tensor) -> Tensor:
    """[..., in] and [out, in] -> [..., out]."""
    if weight.device.type != "cpu" or weight.numel() < LARGE or hidden.numel() // hidden.shape[-1] not in FEW:
        return torch.matmul(hidden, weight.t())
    product = torch.matmul(weight, hidden.flatten(0, -2).t()).t()
    return product.contiguous().unflatten(0, hidden.shape[:-1])


def with_bias(linear: ColumnParallelLinear | RowParallelLinear, product: Tensor) -> Output:
    if linear.skip_bias_add:
        return product, linear.bias
    return product if linear.bias is None else product + linear.bias, None
