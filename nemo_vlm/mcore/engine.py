"""One rank's share of training: a step through Megatron's schedule, and what a checkpoint holds of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from nemo_vlm import heartbeat
from nemo_vlm.batch import NUM_COUNTS, Batch
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import cpu, groups, weights
from nemo_vlm.mcore.cache import Cache
from nemo_vlm.mcore.clock import Clock
from nemo_vlm.mcore.experts import ExpertLoads, take_loads
from nemo_vlm.mcore.fsdp import FullySharded
from nemo_vlm.mcore.replicated import Replicated
from nemo_vlm.mcore.updates import UpdateConfig, Updater

LossFunction = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, equal on every rank: all of it was summed over the run.

    Attributes:
        loss: reduced over the global batch.
        grad_norm: global, before clipping; where it is not finite, the step changed nothing.
        counts: Batch.counts of the global batch.
        experts: what the routers did; None of a model without experts.
        seconds: by phase, on this rank: forward_backward, grad_reduction (what of it, and of the loss's, did not
            overlap with the backward pass), checkpoint_stall (see Engine.reader), optimizer.
    """

    loss: float
    grad_norm: float
    counts: tuple[float, ...]
    experts: ExpertLoads | None = None
    seconds: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def skipped(self) -> bool:
        return not math.isfinite(self.grad_norm)


class StageModule(MegatronModule):
    """A family's model as Megatron's schedule and gradient reduction want to see it."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: nn.Module) -> None:
        language_model: Any = model.language_model
        super().__init__(language_model.config)
        self.model: Any = model
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.vp_stage = language_model.vp_stage
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        self.model.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.model.language_model.shared_embedding_or_output_weight()

    def forward(self, batch: Batch, labels: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return self.model(batch, labels, cache)


class Engine:
    """Runs optimizer steps of a model.

    Args:
        chunks: the stages that this rank holds, freshly built; their weights may be set before or after.
        loss_function: (losses [b, s], batch) -> (weighted sum, weight); the reported and differentiated loss is
            the sum over the global batch divided by the weight over the global batch.
        reduce_dtype: dtype in which FSDP reduces gradients.
        has_adapters: what is frozen belongs to another checkpoint, and is not kept.
    """

    def __init__(
        self,
        chunks: list[nn.Module],
        layout: Layout,
        updates: UpdateConfig,
        loss_function: LossFunction,
        vocab_size: int,
        reduce_dtype: torch.dtype = torch.float32,
        has_adapters: bool = False,
    ) -> None:
        self.loss_function, self.vocab_size = loss_function, vocab_size
        self.regions = [weights.regions(chunk, vocab_size) for chunk in chunks]  # before they are moved
        self.kept = [
            {name: self.regions[i][name] for name, p in chunk.named_parameters() if p.requires_grad or not has_adapters}
            for i, chunk in enumerate(chunks)
        ]
        stages = [StageModule(chunk) for chunk in chunks]
        self.updater: Updater = (
            FullySharded(stages, updates, layout, reduce_dtype) if layout.fsdp else Replicated(stages, updates)
        )
        self.config = stages[0].config
        self.config.finalize_model_grads_func = self._finalize
        self.config.grad_scale_func = self.updater.scale_loss
        self.clock = Clock()  # of the step
        self.reader: Future | None = None  # copies weights and moments; until it is done, no step changes them

    def step(self, micro_batches: list[Batch], lr: float) -> StepResult:
        """Forward, backward, reduction, clipping and update on this rank's micro-batches of a global batch."""
        for group in self.updater.param_groups:
            group["lr"] = lr * group["lr_mult"]
        self.clock = Clock()
        self.updater.start()
        heartbeat.at("forward and backward pass")
        loss_sum, weight, *counts = self._run(micro_batches, self.loss_function)
        loss = loss_sum / weight if weight else float("nan")
        loads = take_loads(self.updater.modules, self.config, weight)
        self.clock.end("grad_reduction")
        self._wait_for_reader()
        self.clock.end("checkpoint_stall")
        heartbeat.at("optimizer")
        norm = self.updater.update()
        self.clock.end("optimizer")
        return StepResult(loss, norm, tuple(counts), loads, self.clock.seconds())

    def _finalize(self, *modules: Any, **groups: Any) -> None:
        """The schedule calls this behind the last backward pass."""
        self.clock.end("forward_backward")
        self.updater.finalize(*modules, **groups)

    def _wait_for_reader(self) -> None:
        """Its errors are raised here."""
        if self.reader is not None:
            heartbeat.at("copy for the checkpoint")
            self.reader.result()
            self.reader = None

    def evaluate(self, micro_batches: list[Batch], loss_function: LossFunction) -> tuple[float, ...]:
        """A loss function's two sums over a global batch, and Batch.counts of it."""
        with self.evaluation():
            return self._run(micro_batches, loss_function, forward_only=True)

    def logits(self, micro_batches: list[Batch]) -> Tensor:
        """Of what follows each row of padded micro-batches, [rows, vocab_size] float32, on every rank of the copy.

        To be called inside `evaluation`.
        """
        outputs = self._schedule(self._forward_last, micro_batches, forward_only=True)
        count = sum(len(batch.tokens) for batch in micro_batches)
        logits = torch.empty(count, self.vocab_size, device=cpu.device())
        if outputs:
            whole = gather_from_tensor_model_parallel_region(torch.cat(outputs).float())
            logits.copy_(whole[:, : self.vocab_size])
        return groups.from_last_stage(logits)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around forward passes by which nothing changes: no weight, gradient or random state."""
        modules = [module for stage in self.updater.modules for module in stage.modules() if module.training]
        for module in modules:
            module.training = False
        try:
            with torch.no_grad(), self.updater.evaluation():
                yield
        finally:
            for module in modules:
                module.training = True

    def _run(
        self, micro_batches: list[Batch], loss_function: LossFunction, forward_only: bool = False
    ) -> tuple[float, ...]:
        """The loss function's two sums over the global batch, and Batch.counts of it."""
        reports = self._schedule(partial(self._forward, loss_function), micro_batches, forward_only)
        none = torch.zeros(2 + NUM_COUNTS, dtype=torch.float64, device=cpu.device())
        return tuple(groups.sum_over_data(sum(reports, none)))

    def _schedule(self, forward_step: Callable, micro_batches: list[Batch], forward_only: bool) -> list[Tensor]:
        """What the last stage has made of each micro-batch; nothing on the others."""
        modules = self.updater.modules
        batches = [iter(micro_batches) for _ in modules]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if len(modules) > 1 else batches[0],
            model=modules,
            num_microbatches=len(micro_batches),
            seq_length=1,  # the pipeline's shapes are sent along (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward_last(self, micro_batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, None]:
        batch = next(micro_batches).to(cpu.device())
        output = model(batch)
        if get_attr_wrapped_model(model, "post_process"):
            rows = torch.arange(len(batch.tokens), device=output.device)
            output = output[rows, batch.lengths.to(output.device) - 1]
        return output, None

    def _forward(
        self, loss_function: LossFunction, micro_batches: Iterator[Batch], model: nn.Module
    ) -> tuple[Tensor, Callable]:
        batch = next(micro_batches)
        batch = self._weighed(loss_function, batch) if torch.is_grad_enabled() else batch.to(cpu.device())

        def reduce(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, weight = loss_function(losses, batch)
            counts = batch.counts().to(total.device, non_blocking=True)
            report = torch.cat([torch.stack([total.detach().double(), weight.double()]), counts])
            # Megatron sums weights over the context-parallel ranks too
            once = weight if groups.first_of_context() else torch.zeros_like(weight)
            return total, once.int(), report

        return model(batch, batch.labels), reduce

    def _weighed(self, loss_function: LossFunction, batch: Batch) -> Batch:
        """The batch on this rank's device, with what each position's loss weighs, as the model wants to know."""
        losses = torch.ones(batch.labels.shape, requires_grad=True)
        total, weight = loss_function(losses, batch)
        (token_weights,) = torch.autograd.grad(total, losses)
        assert torch.isclose(total, token_weights.sum(), rtol=1e-3), "a loss function is a weighted sum of the losses"
        loss_weight = weight if self.config.num_moe_experts else None
        batch = replace(batch, token_weights=token_weights, loss_weight=loss_weight).to(cpu.device())
        if self.updater.scaler is None:
            return batch
        return replace(batch, token_weights=self.updater.scale_loss(batch.token_weights))  # for fp16's small numbers

    def parts(self) -> list[weights.Part]:
        """This rank's weights as they are now, in place."""
        return self._view(self.regions)

    def kept_parts(self) -> list[weights.Part]:
        """Those of them that a checkpoint holds: all, or beside adapters only what trains."""
        return self._view(self.kept)

    def _view(self, regions: list[weights.Regions]) -> list[weights.Part]:
        return [
            part
            for chunk, places in enumerate(regions)
            for name, first, values in self.updater.local_weights(chunk)
            if name in places
            for part in weights.view(places[name], values, first)
        ]

    def saved_parts(self) -> list[weights.Part]:
        """What is kept of this rank's weights in the precision of the model; FSDP keeps them in fp32."""
        return [replace(part, data=part.data.to(self.config.params_dtype)) for part in self.kept_parts()]

    def optimizer_state(self) -> dict[str, Any]:
        """What the optimizer keeps beside tensors: Adam's count of updates, the loss scale."""
        scaler = self.updater.scaler
        scale = {key: float(value) for key, value in scaler.state_dict().items()} if scaler else None
        return {"step": self.updater.get_step(), "scaler": scale}

    def set_optimizer_state(self, state: dict[str, Any]) -> None:
        """To be called after optimizer_parts were loaded."""
        self.updater.main_weights_loaded()
        self.updater.set_step(state["step"])
        if self.updater.scaler and state["scaler"]:
            scale = torch.tensor([state["scaler"]["scale"]], device=cpu.device())
            self.updater.scaler.load_state_dict(
                {"scale": scale} | {key: int(value) for key, value in state["scaler"].items() if key != "scale"}
            )

    @property
    def loss_scale(self) -> float | None:
        """Of 16-mixed precision."""
        return float(self.updater.scaler.scale) if self.updater.scaler else None

    def optimizer_parts(self) -> list[weights.Part]:
        """This rank's part of the optimizer, named as in Megatron's fully reshardable format."""
        return [
            replace(part, name=f"optimizer.state.{key}.{part.name}")
            for shard in self.updater.shards()
            for key, values in shard.tensors.items()
            for part in weights.view(self.regions[shard.chunk][shard.name], values, shard.first)
        ]


def materialize(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Move freshly built parameters to this rank's device and dtype, keeping Megatron's marks on them.

    They are zero: nobody sets the rows that pad the vocabulary.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(cpu.device(), dtype).zero_()
    return model
