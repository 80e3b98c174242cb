"""The Lightning module of every family. It does not know which layout it runs under: the engine's schedule does."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from nemo_vlm.batch import Batch
from nemo_vlm.config import RunConfig
from nemo_vlm.data.loader import Order, StepSampler, make_loader
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import weights
from nemo_vlm.mcore.config import context
from nemo_vlm.mcore.engine import Engine, StepResult, materialize
from nemo_vlm.models.base import family
from nemo_vlm.planning.flops import peak_tflops, step_flops
from nemo_vlm.training.exp_manager import log_step
from nemo_vlm.training.loss import REDUCTIONS
from nemo_vlm.training.schedules import learning_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run was resolved to: settled settings, layout, data."""

    run: RunConfig
    layout: Layout
    accelerator: Literal["cpu", "cuda"]
    dataset: Dataset


class TrainingModule(pl.LightningModule):
    """Builds the model on its rank, and takes one optimizer step for each item of the loader."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.plan, self.run = plan, plan.run
        self.latest: dict[str, float] = {}
        self.last_time = 0.0

    def configure_model(self) -> None:
        """Build this rank's part of the model, draw its weights, and hand it to the engine."""
        run, layout = self.run, self.plan.layout
        build = context(layout, run.trainer.precision, run.step)
        model = family(run.family, "model").Model(run.model, build, self.trainer.strategy.stage)
        materialize(model, build.dtype)
        weights.draw(
            weights.parts(model, run.model.vocab_size), run.step.seed, run.model.init_method_std, run.model.num_layers
        )
        reduction = REDUCTIONS[run.step.loss_reduction]
        self.engine = Engine(model, run.optim, reduction, run.trainer.gradient_clip_val)

    def parts(self) -> list[weights.Part]:
        """This rank's parameters as they are now; the distributed optimizer moves them when the engine is made."""
        return weights.parts(self.engine.model, self.run.model.vocab_size)

    def configure_optimizers(self) -> None:
        """The engine owns the optimizer."""

    def train_dataloader(self) -> DataLoader:
        data, layout = self.run.data, self.plan.layout
        order = Order(len(self.plan.dataset), self.run.step.seed, shuffle=data.dataloader_type == "cyclic")  # type: ignore[arg-type]
        sampler = StepSampler(order, self.run.trainer.max_steps, layout, self.trainer.strategy.data_parallel_rank)
        return make_loader(self.plan.dataset, sampler, layout, data.num_workers)

    def on_train_start(self) -> None:
        self.last_time = time.perf_counter()

    def transfer_batch_to_device(self, batch: list[Batch], device: torch.device, dataloader_idx: int) -> list[Batch]:
        """Left where they are: the schedule moves each micro-batch when its turn comes."""
        return batch

    def training_step(self, micro_batches: list[Batch], step: int) -> None:
        lr = learning_rate(step, self.run.optim, self.run.trainer.max_steps)
        result = self.engine.step(micro_batches, lr)
        now = time.perf_counter()
        self.latest = self._row(result, step, lr, now - self.last_time)
        self.last_time = now
        log_step(self.trainer.loggers, self.latest, step)

    def _row(self, result: StepResult, step: int, lr: float, seconds: float) -> dict[str, float]:
        """The columns of metrics.csv; mfu only where the device's peak is known."""
        tokens, positions, squares, images = result.counts
        layout = self.plan.layout
        global_batch_size = layout.samples_per_rank * layout.data
        tflops = step_flops(self.run.model, tokens, squares, images) / seconds / layout.world_size / 1e12
        row: dict[str, float] = {
            "global_step": step + 1,
            "consumed_samples": (step + 1) * global_batch_size,
            "world_size": layout.world_size,
            "reduced_train_loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "train_step_timing in s": seconds,
            "tokens_per_sec": tokens / seconds,
            "tflops_per_gpu": tflops,
            "padding_fraction": 1 - tokens / positions,
        }
        peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        return row | ({"mfu": tflops / peak} if peak else {})
