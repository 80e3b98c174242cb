"""Weights sharded over the data- and context-parallel ranks: torch's FSDP2, alone or together with tensor parallelism.

Each layer of the decoder and of the vision tower is gathered when it is used; what stands outside layers is gathered
with the whole. Sharded weights are fp32 whatever the precision; they are cast when they are gathered.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core import parallel_state
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nemo_vlm.layout import Layout
from nemo_vlm.mcore import cpu
from nemo_vlm.mcore.updates import (
    MOMENTS,
    Shard,
    UpdateConfig,
    apply_weight_decay,
    optimizer_config,
    overrides,
)

HEAD_NORMS = ("q_layernorm.weight", "k_layernorm.weight")


class FullySharded:
    """An Updater (mcore.updates) on FSDP2 and torch's AdamW."""

    def __init__(self, stages: list[Any], updates: UpdateConfig, layout: Layout, reduce_dtype: torch.dtype) -> None:
        (stage,) = stages
        self.stage, self.num_copies = stage, layout.replicas // layout.shards
        dtype = stage.config.params_dtype
        self.keeps_main_weights = dtype is not torch.float32
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        original = dict(stage.named_parameters())  # sharding drops Megatron's marks
        once = {name for name, p in original.items() if first or param_is_not_tensor_parallel_duplicate(p)}
        # Each tensor-parallel rank has the gradient of its part of the sequence, or of its heads.
        partial = {
            name for name, p in original.items() if getattr(p, "sequence_parallel", False) or name.endswith(HEAD_NORMS)
        }
        # Inputs stay as they are: in half precision the angles of rotary positions would be rounded to each other.
        precision = MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False)
        shard(stage, layout, precision, reshard=layout.fsdp != "grad")
        if next(stage.parameters()).is_meta:
            stage.to(torch.float32).to_empty(device=cpu.device())
            for parameter in stage.parameters():
                nn.init.zeros_(parameter)
        self.modules: list[nn.Module] = [stage]
        trained = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
        self.trained = list(trained.values())
        self.counted = [parameter for name, parameter in trained.items() if name in once]
        self.to_reduce = [parameter for name, parameter in trained.items() if name in partial]
        settings = optimizer_config(updates, dtype)
        groups = megatron_optimizer._get_param_groups(stages, settings, overrides(settings, updates.lr_ratios))
        fused = cpu.device().type != "npu"  # torch has no such kernel there
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, betas=updates.optim.betas, eps=settings.adam_eps, fused=fused
        )
        self.param_groups = self.optimizer.param_groups
        apply_weight_decay(self.param_groups, settings.weight_decay)
        self.max_norm = settings.clip_grad
        self.scaler = make_scaler(settings) if dtype is torch.float16 else None
        for parameter in self.trained:  # state from the start, so that it can be loaded
            zeros = {key: torch.zeros_like(parameter) for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=cpu.device()), **zeros}

    def start(self) -> None:
        self.optimizer.zero_grad()

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss * self.scaler.scale if self.scaler else loss

    def finalize(self, modules: list[nn.Module], num_tokens: Tensor | None, **unused: Any) -> None:
        """FSDP has summed over its ranks; what sequence parallelism leaves, and the division, remain."""
        assert num_tokens is not None
        torch.distributed.all_reduce(
            num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        scale = float(self.scaler.scale) if self.scaler else 1.0
        for parameter in self.trained:
            if parameter.grad is None:
                raise RuntimeError("a trained parameter took no part in the step; every part must run on every rank")
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            for parameter in self.to_reduce:
                torch.distributed.all_reduce(
                    local(parameter.grad), group=parallel_state.get_tensor_model_parallel_group()
                )
        torch._foreach_mul_([local(p.grad) for p in self.trained], 1.0 / (max(int(num_tokens), 1) * scale))

    def update(self) -> float:
        squares = local_squares([local(parameter.grad) for parameter in self.counted])
        torch.distributed.all_reduce(squares)
        norm = float((squares / self.num_copies).sqrt())
        if self.scaler:
            self.scaler.update(not math.isfinite(norm))
        if not math.isfinite(norm):
            return norm
        if norm > self.max_norm:
            coefficient = self.max_norm / (norm + 1e-6)  # as Megatron's clip_grad_by_total_norm_fp32
            torch._foreach_mul_([local(parameter.grad) for parameter in self.trained], coefficient)
        self.optimizer.step()
        return norm

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Frees gathered weights behind it, as a backward pass would."""
        try:
            yield
        finally:
            for module in self.stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def local_weights(self, chunk: int) -> list[tuple[str, int, Tensor]]:
        return [(name, first_element(p), local(p.data)) for name, p in self.stage.model.named_parameters()]

    def shards(self) -> list[Shard]:
        found = []
        for name, parameter in self.stage.model.named_parameters():
            if parameter.requires_grad:
                state = {key: local(self.optimizer.state[parameter][key]) for key in MOMENTS}
                main = {"param": local(parameter.data)} if self.keeps_main_weights else {}
                found.append(Shard(0, name, first_element(parameter), main | state))
        return found

    def get_step(self) -> int:
        return int(self.optimizer.state[self.trained[0]]["step"])

    def set_step(self, step: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def model_weights_loaded(self) -> None:
        """The sharded weights are the main weights."""

    def main_weights_loaded(self) -> None:
        """Nothing is offloaded."""


def shard(stage: Any, layout: Layout, precision: MixedPrecisionPolicy, reshard: bool) -> None:
    """Each layer a unit, the embedding and the output layer too unless they are tied, the rest with the whole."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # losses are not changed in place
    mesh = shard_mesh(layout)
    units = [module for module in stage.modules() if isinstance(module, TransformerLayer)]
    language_model = stage.model.language_model
    if not stage.share_embeddings_and_output_weights:
        units += [language_model.embedding, language_model.output_layer]
    for unit in (*units, stage):
        fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)  # gradients are of sums over tokens; finalize divides
        unit.set_force_sum_reduction_for_comms(True)


def shard_mesh(layout: Layout) -> DeviceMesh:
    """Megatron's order of ranks: tensor parallelism innermost, then context parallelism."""
    sizes = (layout.replicas // layout.shards, layout.shards, layout.tensor)
    mesh = init_device_mesh(cpu.device().type, sizes, mesh_dim_names=("copy", "shard", "tensor"))
    return mesh["copy", "shard"] if sizes[0] > 1 else mesh["shard"]


def make_scaler(settings: megatron_optimizer.OptimizerConfig) -> DynamicGradScaler:
    """As Megatron makes its own."""
    return DynamicGradScaler(
        settings.initial_loss_scale,
        settings.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=int(settings.loss_scale_window),
        hysteresis=settings.hysteresis,
    )


def local_squares(tensors: list[Tensor]) -> Tensor:
    """[] fp32, the sum of their squares; with tensor parallelism a rank may have none to count."""
    if cpu.device().type == "cpu":
        return cpu.sum_of_squares(tensors)
    norms = torch._foreach_norm(tensors) if tensors else []
    return torch.zeros((), device=cpu.device()) + sum(each.square() for each in norms)


def local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local()


def first_element(parameter: Any) -> int:
    """Where this rank's part begins in the flattened parameter: FSDP gives each rank a run of rows."""
    rows, ranks = parameter.shape[0], parameter.device_mesh.size(-1)
    each = -(-rows // ranks)
    return min(each * parameter.device_mesh.get_local_rank(-1), rows) * (parameter.numel() // max(rows, 1))
