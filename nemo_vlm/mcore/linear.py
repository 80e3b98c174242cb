"""Megatron's linear layers, of which no more than the product is left where nothing is to be differentiated.

What they prepare for their backward pass costs a step of generation more than the products of small tensors do.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

Output = tuple[Tensor, Tensor | None]
ROWS = 2048  # of a weight: of a few tokens' product with more of them MKL makes up to 1.6 times the work


class ColumnLinear(ColumnParallelLinear):
    """Whose output stays split over the tensor-parallel ranks."""

    def forward(self, input_: Tensor) -> Output:
        """[s, b, in] -> [s, b, out / tp], and the bias where it is added later."""
        if torch.is_grad_enabled() or self.sequence_parallel:
            return super().forward(input_)
        return with_bias(self, multiply(input_, self.weight))


class RowLinear(RowParallelLinear):
    """Whose input is split over the tensor-parallel ranks."""

    def forward(self, input_: Tensor) -> Output:
        """[s, b, in / tp] -> [s, b, out], and the bias where it is added later."""
        if torch.is_grad_enabled() or self.sequence_parallel:
            return super().forward(input_)
        product = multiply(input_, self.weight)
        if self.tp_group.size() > 1 and not self.explicit_expert_comm:  # what gathers the experts' tokens sums them
            product = reduce_from_tensor_model_parallel_region(product, group=self.tp_group)
        return with_bias(self, product)


def multiply(hidden: Tensor, weight: Tensor) -> Tensor:
    """[..., in] and [out, in] -> [..., out]."""
    if weight.device.type != "cpu" or len(weight) <= ROWS:
        return torch.matmul(hidden, weight.t())
    return torch.cat([torch.matmul(hidden, part.t()) for part in weight.split(ROWS)], -1)


def with_bias(linear: ColumnParallelLinear | RowParallelLinear, product: Tensor) -> Output:
    if linear.skip_bias_add:
        return product, linear.bias
    return product if linear.bias is None else product + linear.bias, None
