"""What the ways to keep weights and optimizer have in common: settings, parameter groups, the decision to skip."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_standard_config_overrides
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from torch import Tensor, nn

from nemo_vlm.config import OptimConfig, StepConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class UpdateConfig:
    """How weights are updated.

    Attributes:
        max_grad_norm: 0 turns clipping off.
        lr_ratios: of the model's top-level modules, by name.
        offload_fraction: of the optimizer, to the host's memory.
        step: says how the loss is scaled.
    """

    optim: OptimConfig
    max_grad_norm: float
    lr_ratios: Mapping[str, float] = field(default_factory=dict)
    offload_fraction: float = 0.0
    step: StepConfig = field(default_factory=StepConfig)


@dataclass(frozen=True)
class Shard:
    """What this rank's optimizer keeps for a run of one parameter's elements.

    Attributes:
        chunk, name: the parameter.
        first: first element of the run in the flattened parameter.
        tensors: Adam's exp_avg and exp_avg_sq, and `param`, the fp32 main weights, where they are kept apart.
    """

    chunk: int
    name: str
    first: int
    tensors: dict[str, Tensor]


class Updater(Protocol):
    """Keeps weights, gradients and optimizer in one of the possible ways."""

    modules: list[nn.Module]  # the chunks, as the schedule runs them
    param_groups: list[dict[str, Any]]
    scaler: DynamicGradScaler | None

    def start(self) -> None:
        """Forget the gradients."""

    def scale_loss(self, loss: Tensor) -> Tensor: ...

    def finalize(self, modules: list[nn.Module], num_tokens: Tensor | None, **unused: Any) -> None:
        """Reduce the gradients over all ranks. Only when `update` is done need they be divided by `num_tokens`, the
        loss's weight, of all of them.
        """

    def update(self) -> float:
        """Clip and step, unless the norm of the gradients, which are then divided, is not finite; that norm."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Around forward passes without a backward pass."""

    def local_weights(self, chunk: int) -> list[tuple[str, int, Tensor]]:
        """Name, first element and values of what this rank holds of each parameter."""

    def shards(self) -> list[Shard]: ...

    def get_step(self) -> int:
        """Updates made so far, which Adam's bias correction counts."""

    def set_step(self, step: int) -> None: ...

    def model_weights_loaded(self) -> None:
        """To be called after weights were loaded: the optimizer's own follow them."""

    def main_weights_loaded(self) -> None:
        """To be called after the optimizer's weights were loaded: copies of them in the host's memory follow."""


def optimizer_config(config: UpdateConfig, dtype: torch.dtype) -> OptimizerConfig:
    optim = config.optim
    return OptimizerConfig(
        optimizer="adam",  # AdamW: decoupled_weight_decay is Megatron's default
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        initial_loss_scale=config.step.native_amp_init_scale,
        loss_scale_window=config.step.native_amp_growth_interval,
        hysteresis=config.step.hysteresis,
        use_distributed_optimizer=optim.distributed,
        overlap_param_gather=optim.overlap_param_sync,
        optimizer_cpu_offload=config.offload_fraction > 0,
        optimizer_offload_fraction=config.offload_fraction,
        clip_grad=config.max_grad_norm or float("inf"),
    )


def overrides(settings: OptimizerConfig, lr_ratios: Mapping[str, float]) -> dict[ParamKey, Any]:
    """Megatron's rule for weight decay (not of norms and biases), and a learning rate for each part of the model."""
    ratios = {name: ratio for name, ratio in lr_ratios.items() if ratio != 1.0}
    by_part: dict[ParamKey, Any] = {
        ParamKey(name=f"*model.{name}.*"): {"lr_mult": ratio} for name, ratio in ratios.items()
    }
    return {**get_standard_config_overrides(settings), **by_part}


def apply_weight_decay(param_groups: list[dict[str, Any]], weight_decay: float) -> None:
    """Norms and biases have wd_mult 0, which only Megatron's scheduler would apply."""
    for group in param_groups:
        group["weight_decay"] = weight_decay * group["wd_mult"]
