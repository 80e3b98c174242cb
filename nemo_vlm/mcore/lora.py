"""Low-rank adapters (LoRA, Hu et al. 2021) beside the linear layers of the language model, under every layout.

An adapter computes scale * B A x. Of a layer split by columns B is split, of one split by rows A; the other factor is
held whole by each tensor-parallel rank. Between the two there are only adapter_dim values a token to communicate. Under
sequence parallelism the whole factor sees a part of the sequence: Megatron's mark has its gradient summed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_vlm.config import LoraConfig
from nemo_vlm.config.peft import ADAPTER, BY_COLUMNS
from nemo_vlm.mcore.weights import Part, generator


def install(model: nn.Module, lora: LoraConfig) -> None:
    """Put adapters beside the linear layers of a freshly built model's decoder; their initial values come from draw."""
    gpt: Any = model.language_model
    for layer in gpt.decoder.layers:
        for block in (layer.self_attention, layer.mlp):
            for name in sorted(lora.linears & dict(block.named_children()).keys()):
                linear = block.get_submodule(name)
                adapter = Adapter(name, linear, gpt.config, lora)
                block.add_module(name + ADAPTER, adapter)
                linear.register_forward_hook(adapter.add)
    if gpt.pre_process and gpt.config.recompute_granularity == "full":
        gpt.embedding.register_forward_hook(require_gradient)


def require_gradient(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook: Megatron recomputes layers by a function of autograd, which runs where an input needs a gradient.

    That of a frozen embedding does not.
    """
    return output.requires_grad_()


class Adapter(MegatronModule):
    """A, `linear_in` [adapter_dim, in], and B, `linear_out` [out, adapter_dim], this rank's part of them.

    Args:
        name: of the linear layer in its block.
        linear: Megatron's or Transformer Engine's, weight [out, in], this rank's part.
    """

    def __init__(self, name: str, linear: Any, config: TransformerConfig, lora: LoraConfig) -> None:
        super().__init__(config)
        self.lora, self.by_columns = lora, name in BY_COLUMNS
        self.gated = name == "linear_fc1" and config.gated_linear_unit
        out_size, in_size = linear.weight.shape
        make = dict(bias=False, device=linear.weight.device, dtype=config.params_dtype)
        self.linear_in = nn.utils.skip_init(nn.Linear, in_size, lora.adapter_dim, **make)  # no random number is used
        self.linear_out = nn.utils.skip_init(nn.Linear, lora.adapter_dim, out_size, **make)
        split, whole = self.linear_in, self.linear_out
        if self.by_columns:
            split, whole = whole, split
        set_tensor_model_parallel_attributes(split.weight, True, 0 if self.by_columns else 1, 1)
        whole.weight.sequence_parallel = config.sequence_parallel  # type: ignore[assignment]

    def add(self, linear: nn.Module, args: tuple, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Forward hook of the linear layer."""
        hidden, bias = output
        return hidden + self(normalized(linear, args[0])), bias

    def forward(self, hidden: Tensor) -> Tensor:
        """What the linear layer gets, [s, b, in], to what is added to its output, [s, b, out]."""
        inner = self.linear_in(self.drop(hidden)) * self.lora.scale
        if self.by_columns:
            gather = gather_from_sequence_parallel_region
            inner = gather(inner) if self.config.sequence_parallel else copy_to_tensor_model_parallel_region(inner)
        else:
            scatter = reduce_scatter_to_sequence_parallel_region
            inner = scatter(inner) if self.config.sequence_parallel else reduce_from_tensor_model_parallel_region(inner)
        return self.linear_out(inner)

    def drop(self, hidden: Tensor) -> Tensor:
        """Dropout, alike on tensor-parallel ranks that hold the same input, and apart where each holds a part of it."""
        if not self.training or not self.lora.adapter_dropout:
            return hidden
        tracker: Any = get_cuda_rng_tracker()
        same = self.by_columns and not self.config.sequence_parallel
        with tracker.fork(get_data_parallel_rng_tracker_name()) if same else tracker.fork():
            return F.dropout(hidden, self.lora.adapter_dropout)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As Megatron's of the linear layer itself; a gated linear_fc1 holds parts of two tensors, gate and up."""
        axis = {"linear_out.weight": 0} if self.by_columns else {"linear_in.weight": 1}
        state = self.state_dict(prefix="", keep_vars=True)
        shards = make_sharded_tensors_for_checkpoint(state, prefix, axis, sharded_offsets)
        if self.gated:
            key = f"{prefix}linear_out.weight"
            shards[key] = apply_swiglu_sharded_factory(shards[key], sharded_offsets)
        return shards


def normalized(linear: Any, hidden: Tensor) -> Tensor:
    """What the weight of a linear layer is multiplied with: Transformer Engine fuses the RMSNorm in front into it."""
    scale = getattr(linear, "layer_norm_weight", None)
    return hidden if scale is None else F.rms_norm(hidden, hidden.shape[-1:], scale, linear.eps)


@torch.no_grad()
def draw(adapters: list[Part], seed: int, lora: LoraConfig) -> None:
    """Initial values for any layout, as mcore.weights.draw; the distributions are NeMo's ParallelLinearAdapter's."""
    for part in adapters:
        method = lora.row_init_method if ".linear_out." in part.name else lora.column_init_method
        whole, random = torch.zeros(part.shape), generator(seed, part.name)
        if method == "xavier":
            nn.init.xavier_normal_(whole, generator=random)
        elif method == "kaiming":
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=random)
        elif method == "normal":
            whole.normal_(0.0, 0.2, generator=random)
        part.data.copy_(whole[part.slices])
