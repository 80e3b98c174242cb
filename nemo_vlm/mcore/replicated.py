"""Weights held whole by each data-parallel rank: Megatron's gradient buffers and its (distributed) optimizer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MixedPrecisionOptimizer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from nemo_vlm.mcore import cpu, groups
from nemo_vlm.mcore.cross_entropy import OutputLayer
from nemo_vlm.mcore.linear import ColumnLinear, RowLinear, alone
from nemo_vlm.mcore.updates import (
    MOMENTS,
    Shard,
    UpdateConfig,
    apply_weight_decay,
    optimizer_config,
    overrides,
)
from nemo_vlm.mcore.vit import VisionTransformer


class Replicated:
    """An Updater (mcore.updates) on Megatron's DistributedDataParallel."""

    def __init__(self, stages: list[Any], updates: UpdateConfig) -> None:
        self.config, optim = stages[0].config, updates.optim
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=optim.distributed,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=optim.overlap_grad_sync,
            overlap_param_gather=optim.overlap_param_sync,
        )
        self.modules: list[Any] = [
            DistributedDataParallel(self.config, ddp, stage, disable_bucketing=number > 0)
            for number, stage in enumerate(stages)
        ]
        self.replaced: list[nn.Parameter] = []
        for module in self.modules:
            if cpu.device().type == "cpu":
                add_to_buffers(module)
                self.replaced += keep_unzeroed(module)
            if ddp.overlap_param_gather:
                wait_for_patches(module)
        settings = optimizer_config(updates, self.config.params_dtype)
        self.optimizer = get_megatron_optimizer(
            settings, self.modules, overrides(settings, updates.lr_ratios), use_gloo_process_groups=False
        )
        self.optimizers = [each for each in self.optimizer.chained_optimizers if not each.is_stub_optimizer]
        self.param_groups = self.optimizer.param_groups
        apply_weight_decay(self.param_groups, optim.weight_decay)
        self.max_norm, self.num_tokens = settings.clip_grad, torch.zeros((), dtype=torch.int)
        self.scaler = getattr(self.optimizer.chained_optimizers[0], "grad_scaler", None)
        if ddp.overlap_grad_reduce:  # the schedule starts reductions behind the last micro-batch
            hooks = [module.no_sync for module in self.modules]
            self.config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
        self._make_state()

    def _make_state(self) -> None:
        """Adam's state from the start, so that it can be loaded; torch's takes a step in one kernel a parameter."""
        fused = cpu.device().type != "npu"  # torch has no such kernel there
        for optimizer in self._adams():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = {key: torch.zeros_like(parameter.data) for key in MOMENTS}
                    if isinstance(optimizer, torch.optim.AdamW):  # torch wants the count where its kernel looks for it
                        where = parameter.device if fused else None
                        optimizer.state[parameter]["step"] = torch.zeros((), device=where)
                if isinstance(optimizer, torch.optim.AdamW):
                    group["fused"] = fused
        for each in self.optimizers:
            if isinstance(each.optimizer, HybridDeviceOptimizer):
                each.optimizer._sync_sub_optimizers_state_to_hdo()

    def _adams(self) -> list[Any]:
        """The optimizers that hold state: those of offloaded and other parameters, or Megatron's one."""
        return [
            adam
            for each in self.optimizers
            for adam in (
                each.optimizer.sub_optimizers if isinstance(each.optimizer, HybridDeviceOptimizer) else [each.optimizer]
            )
        ]

    def start(self) -> None:
        for module in self.modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()

    def scale_loss(self, loss: Tensor) -> Tensor:
        return self.optimizer.scale_loss(loss)

    def finalize(self, modules: list[nn.Module], num_tokens: Tensor | None, **unused: Any) -> None:
        """The division waits for `update`, which clips in the same pass over the gradients."""
        assert num_tokens is not None
        for weight in self.replaced:
            if not weight.grad_added_to_main_grad:
                weight.main_grad.zero_()
        finalize_model_grads(modules, None, **unused)
        self.num_tokens = groups.from_last_stage(num_tokens)
        every = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(self.num_tokens, group=every)

    def _prepare_grads(self) -> bool:
        """As ChainedOptimizer.prepare_grads, but that of experts apart overflows and is scaled with the others'."""
        if self.scaler is None:
            return self.optimizer.prepare_grads()
        overflow = False
        for each in self.optimizer.chained_optimizers:
            each.grad_scaler = self.scaler
            if not each.is_stub_optimizer:
                each._copy_model_grads_to_main_grads()
            overflow |= each._unscale_main_grads_and_check_for_nan()
        self.scaler.update(overflow)
        return overflow

    def update(self) -> float:
        overflow = self._prepare_grads()
        scale = 1.0 / max(int(self.num_tokens), 1)
        norm = float(self.optimizer.get_grad_norm()) * scale
        if overflow or not math.isfinite(norm):
            return float("inf") if math.isfinite(norm) else norm
        scale *= min(1.0, self.max_norm / (norm + 1e-6))  # as Megatron's clip_grad_by_total_norm_fp32
        for each in self.optimizers:
            scale_grads(each.optimizer, scale)
        with cpu.without_redirection():
            *others, last = self.optimizer.chained_optimizers
            for each in others:
                step_ungathered(each)
            last.step_with_ready_grads()  # which gathers a chunk's weights together, experts' and the others'
        return norm

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """With overlap_param_sync the first forward pass of a step gathers the weights; here all are, before it."""
        gathering = [module for module in self.modules if module.ddp_config.overlap_param_gather]
        for module in gathering:
            module.disable_forward_pre_hook()
        try:
            yield
        finally:
            for module in gathering:
                module.enable_forward_pre_hook()

    def local_weights(self, chunk: int) -> list[tuple[str, int, Tensor]]:
        module = self.modules[chunk]
        if module.ddp_config.overlap_param_gather:  # what the last step changed is gathered by the next forward pass
            module.start_param_sync(force_sync=True)
        return [(name, 0, parameter.data) for name, parameter in module.module.model.named_parameters()]

    def shards(self) -> list[Shard]:
        names = {
            parameter: (chunk, name)
            for chunk, module in enumerate(self.modules)
            for name, parameter in module.module.model.named_parameters()
        }
        return [
            Shard(*names[parameter], first, tensors)
            for each in self.optimizers
            for parameter, first, tensors in kept(each)
        ]

    def get_step(self) -> int:
        for adam in self._adams():
            for state in adam.state.values():
                if "step" in state:
                    return int(state["step"])
            for group in adam.param_groups:  # Transformer Engine's and Apex's FusedAdam count by group
                if "step" in group:
                    return int(group["step"])
        return 0

    def set_step(self, step: int) -> None:
        for adam in self._adams():
            if isinstance(adam, torch.optim.AdamW):
                for state in adam.state.values():
                    state["step"].fill_(step)
            else:
                for group in adam.param_groups:
                    group["step"] = step

    def model_weights_loaded(self) -> None:
        self.optimizer.reload_model_params()
        self.main_weights_loaded()

    def main_weights_loaded(self) -> None:
        for each in self.optimizers:
            if isinstance(each.optimizer, HybridDeviceOptimizer):
                for parameter, copy in each.optimizer.gpu_params_map_cpu_copy.items():
                    copy.data.copy_(parameter.data)


def add_to_buffers(module: DistributedDataParallel) -> None:
    """Let the linear layers add their weights' gradients to the buffers, instead of making them first.

    Not by the model's config, as on GPUs (mcore.config): on a CPU models are differentiated without buffers as well,
    where there would be nothing to add to. The output layer makes its gradients itself.
    """
    for linear in module.modules():
        if isinstance(linear, ColumnParallelLinear | RowParallelLinear) and not isinstance(linear, OutputLayer):
            linear.gradient_accumulation_fusion = True


def keep_unzeroed(module: DistributedDataParallel) -> list[nn.Parameter]:
    """Spare a step a pass over its gradients: a weight's first one overwrites the last step's.

    So where mcore.linear.Product makes all of a weight's gradient: nothing else may read such a weight while gradients
    are taken. Megatron zeroes a buffer as a whole; here its `reset` zeroes the other parameters alone.

    Returns:
        These weights, of which those that a step does not reach are still to be zeroed.
    """
    linears = [each for each in module.modules() if isinstance(each, ColumnLinear | RowLinear) and alone(each)]
    weights = {linear.weight: None for linear in linears if linear.weight.requires_grad}
    for buffer in module.buffers + module.expert_parallel_buffers:
        others = [parameter.main_grad for parameter in buffer.params if parameter not in weights]
        buffer.reset = partial(zero, others)
    return list(weights)


def zero(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.zero_()


def scale_grads(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """For the optimizer's next step: torch's fused kernel does it then and spares a pass; others' are scaled here."""
    if isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["fused"]:
        optimizer.grad_scale = torch.tensor(1.0 / scale, device=cpu.device())  # type: ignore[attr-defined]
        return
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, scale)


def step_ungathered(optimizer: Any) -> None:
    """A sharded optimizer's step but for its end, for which Megatron has no switch: each gathers all weights anew."""
    if isinstance(optimizer, DistributedOptimizer):
        MixedPrecisionOptimizer.step_with_ready_grads(optimizer)
    else:
        optimizer.step_with_ready_grads()


def wait_for_patches(module: DistributedDataParallel) -> None:
    """Megatron waits for gathered weights where the module that holds them is called; a tower reads some itself."""

    def wait(tower: VisionTransformer, unused: Any) -> None:
        gathers = module.remove_forward_pre_hook_handles  # not in an evaluation, which has gathered them all
        for name, parameter in tower.named_parameters() if gathers else ():
            if name.startswith(VisionTransformer.READ) and parameter in module.param_to_bucket_group:
                module.param_to_bucket_group[parameter].finish_param_sync()

    for tower in module.modules():
        if isinstance(tower, VisionTransformer):
            tower.register_forward_pre_hook(wait)


def kept(optimizer: Any) -> list[tuple[nn.Parameter, int, dict[str, Tensor]]]:
    """Each parameter of one of Megatron's optimizers, the first element that this rank updates, and its state."""
    if isinstance(optimizer, DistributedOptimizer):
        found = []
        for parameter in optimizer.model_param_group_index_map:
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
            wanted = MOMENTS if parameter.dtype is torch.float32 else (*MOMENTS, "param")
            first = optimizer._get_model_param_range_map(parameter)["param"].start
            found.append((parameter, first, {key: tensors[key] for key in wanted}))
        return found
    state = optimizer.optimizer.state
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        pairs = [
            (parameter, main)
            for parameters, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
            for parameter, main in zip(parameters, mains, strict=True)
        ]
        return [(p, 0, {"param": main.data} | {key: state[main][key] for key in MOMENTS}) for p, main in pairs]
    return [(p, 0, {key: state[p][key] for key in MOMENTS}) for p in optimizer.get_parameters()]
