"""One rank's share of training: model, gradients, schedule and optimizer, as Megatron-Core runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from nemo_vlm.batch import Batch
from nemo_vlm.config import OptimConfig
from nemo_vlm.mcore import cpu, groups

LossFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, equal on every rank.

    Attributes:
        loss: reduced over the global batch.
        grad_norm: global, before clipping.
        counts: Batch.counts of the global batch.
    """

    loss: float
    grad_norm: float
    counts: tuple[float, ...]


class StageModule(MegatronModule):
    """A family's model as Megatron's schedule and gradient reduction want to see it."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: nn.Module) -> None:
        language_model: Any = model.language_model
        super().__init__(language_model.config)
        self.model: Any = model
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        self.model.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.model.language_model.shared_embedding_or_output_weight()

    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch, batch.labels)


class Engine:
    """Runs optimizer steps of a model whose weights are in place.

    Args:
        loss_function: (losses [b, s], labels [b, s]) -> (weighted sum, weight); the reported and differentiated loss is
            the sum over the global batch divided by the weight over the global batch.
        max_grad_norm: 0 turns clipping off.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        loss_function: LossFunction,
        max_grad_norm: float,
    ) -> None:
        sharded = optim.name == "distributed_fused_adam"
        self.model, self.loss_function = model, loss_function
        stage = StageModule(model)
        self.config = stage.config
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=sharded, grad_reduce_in_fp32=True)
        self.wrapped = DistributedDataParallel(self.config, ddp, stage)
        settings = optimizer_config(optim, self.config, sharded, max_grad_norm)
        self.optimizer = get_megatron_optimizer(settings, [self.wrapped], use_gloo_process_groups=False)
        for (
            group
        ) in self.optimizer.param_groups:  # norms and biases: wd_mult is 0; only Megatron's scheduler applies it
            group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss

    def step(self, micro_batches: list[Batch], lr: float) -> StepResult:
        """Forward, backward, reduction, clipping and update on this rank's micro-batches of a global batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, counts = self._run(micro_batches)
        _, grad_norm, _ = self.optimizer.step()
        return StepResult(loss, float(grad_norm), counts)

    def _run(self, micro_batches: list[Batch]) -> tuple[float, tuple[float, ...]]:
        reports = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(micro_batches),
            model=[self.wrapped],
            num_microbatches=len(micro_batches),
            seq_length=1,  # the pipeline's shapes are sent along (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=False,
        )
        total = sum(reports) if reports else torch.zeros(6, dtype=torch.float64)
        loss_sum, weight, *counts = groups.sum_over_data(total.to(cpu.device())).tolist()
        return loss_sum / weight if weight else float("nan"), tuple(counts)

    def _forward(self, micro_batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable]:
        batch = next(micro_batches).to(cpu.device())

        def reduce(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, weight = self.loss_function(losses, batch.labels)
            report = torch.cat([torch.stack([total.detach().double(), weight.double()]), batch.counts()])
            return total, weight.int(), report

        return model(batch), reduce


def optimizer_config(optim: OptimConfig, config: object, sharded: bool, max_grad_norm: float) -> OptimizerConfig:
    dtype = config.params_dtype  # type: ignore[attr-defined]
    return OptimizerConfig(
        optimizer="adam",  # AdamW: decoupled_weight_decay is Megatron's default
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=sharded,
        clip_grad=max_grad_norm or float("inf"),  # the norm is reported even where nothing is clipped
    )


def materialize(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Move freshly built parameters to this rank's device and dtype, keeping Megatron's marks on them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(cpu.device(), dtype)
    return model
