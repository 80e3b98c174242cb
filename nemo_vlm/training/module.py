"""The Lightning module of every family. It does not know which layout it runs under: the engine's schedule does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch

from nemo_vlm import heartbeat
from nemo_vlm.batch import Batch
from nemo_vlm.checkpoints import Position, run_folder
from nemo_vlm.config import RunConfig
from nemo_vlm.data.dataset import Samples
from nemo_vlm.data.loader import Share, training_loader
from nemo_vlm.data.orders import batch_size_at
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.cpu import DeviceType
from nemo_vlm.mcore.engine import StepResult
from nemo_vlm.mcore.experts import ExpertLoads
from nemo_vlm.planning.flops import step_flops
from nemo_vlm.training import durations, early_stopping, expert_loads, saving, skips, step_times
from nemo_vlm.training.build import build_engine
from nemo_vlm.training.exp_manager import MetricsFile, Opened, begin
from nemo_vlm.training.feature_cache import FeatureCache
from nemo_vlm.training.schedules import learning_rate
from nemo_vlm.training.step_times import StepTimes, Timed
from nemo_vlm.training.val_answers import Questions
from nemo_vlm.training.validation import Validation, validates

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run was resolved to: settled settings, layout, data."""

    run: RunConfig
    layout: Layout
    accelerator: DeviceType
    dataset: Samples
    validation: Samples | None = None
    unigram_entropy: float | None = None  # see data.dataset.Datasets


class TrainingModule(pl.LightningModule):
    """Builds the model on its rank, and takes one optimizer step for each item of the loader.

    Args:
        opened: what rank 0 found in the run's folder.
    """

    def __init__(self, plan: Plan, opened: Opened | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.plan, self.run, self.opened = plan, plan.run, opened
        self.position = Position()
        self.batch_size, self.times, self.skipped = 0, StepTimes(), False
        self.validation: Validation | None = None
        self.questions: Questions | None = None  # of the validation
        self.features: FeatureCache | None = None  # of a frozen tower
        self.experts: ExpertLoads | None = None  # the last step's
        self.faults: list[str] = []

    def configure_model(self) -> None:
        """Build this rank's part of the model, and put it where the checkpoint was."""
        path = groups.from_first_rank(self.opened.checkpoint if self.opened else None)
        self.engine = build_engine(self.run, self.plan.layout, first_weights=path is None)
        if path is not None:
            self.position = saving.load(self.engine, path, self.run.exp_manager, self.plan.layout)
        self.run = durations.settle(self.run, len(self.plan.dataset), self.position)  # type: ignore[arg-type]
        if self.run.data.cache_vision_features:
            self.features = FeatureCache(self.engine, self.run, self.plan.layout, self.plan.dataset)
        groups.barrier()  # a rank that could not load ends the run before anything of an earlier one is touched
        begin(self.run.exp_manager, self.opened)
        if self.trainer.is_global_zero:
            skips.cut_back(run_folder(self.run.exp_manager), self.position)

    def configure_optimizers(self) -> None:
        """The engine owns the optimizer."""

    def train_dataloader(self) -> Timed:
        run, layout, position = self.run, self.plan.layout, self.position
        left = 0 if self.finished else run.trainer.max_steps - position.global_step
        share = Share(self.trainer.strategy.data_parallel_rank, layout.data)
        loader = training_loader(self._reading(self.plan.dataset), layout, share, run, left, position.consumed_samples)
        return Timed(loader, self.times)

    def _reading(self, dataset: Samples) -> Samples:
        return dataset if self.features is None else self.features.reading(dataset)

    @property
    def stopped_early(self) -> str | None:
        """Why, if so."""
        manager = self.run.exp_manager
        if not manager.create_early_stopping_callback:
            return None
        return early_stopping.verdict(self.position.stopping, manager.early_stopping_callback_params)

    @property
    def finished(self) -> bool:
        return self.position.global_step >= self.run.trainer.max_steps or self.stopped_early is not None

    def epochs_ended(self, count: int) -> bool:
        """Whether the last step has ended an epoch, or the count-th since the one before."""
        samples = count * len(self.plan.dataset)
        now = self.position.consumed_samples
        return now // samples > (now - self.batch_size) // samples

    def on_train_start(self) -> None:
        plan, share = self.plan, Share(self.trainer.strategy.data_parallel_rank, self.plan.layout.data)  # type: ignore[attr-defined]
        if plan.validation is not None and validates(self.run, plan.validation):
            epoch = len(plan.dataset)
            self.validation = Validation(self.run, plan.layout, share, self._reading(plan.validation), epoch)
            if self.run.data.eval_samples:
                self.questions = Questions(self.run, plan.layout, share, plan.validation, self.trainer.loggers)
        self.peak, told = step_times.mfu_peak(self.run.trainer)
        log.info("%s", told)
        self.times.restart()

    def transfer_batch_to_device(self, batch: list[Batch], device: torch.device, dataloader_idx: int) -> list[Batch]:
        """Left where they are: the schedule moves each micro-batch when its turn comes."""
        return batch

    def training_step(self, micro_batches: list[Batch], index: int) -> None:
        position = self.position
        lr = learning_rate(durations.at(self.run, position), self.run.optim, self.run.length, self.run.unit)
        heartbeat.at("step", position.global_step + 1)
        result = self.engine.step(micro_batches, lr)
        self.batch_size = batch_size_at(position.consumed_samples, self.run.step)
        position.consumed_samples += self.batch_size
        position.global_step += 1
        self.skipped, self.experts = result.skipped, result.experts
        position.skipped_steps += result.skipped
        position.metrics = self._row(result, lr, micro_batches)
        if self.validation is not None and self.validation.due(position):
            position.metrics["val_loss"] = self.validation.loss(self.engine)
            if self.questions is not None:
                position.metrics["val_accuracy"] = self.questions.accuracy(self.engine, position.global_step)
            self.times.restart()
        self._log()
        self._leave_out(int(result.counts[-1]), micro_batches)
        if result.skipped:
            self._report_skip(result, micro_batches)
        heartbeat.at("data", position.global_step + 1)

    def _leave_out(self, count: int, micro_batches: Sequence[Batch]) -> None:
        """Count and list the records of the step that no sample could be made of."""
        position = self.position
        if count:
            mine = skips.details(micro_batches, self.plan.dataset)
            lines = skips.of_all_ranks(mine, self.trainer.strategy.data_parallel_rank)  # type: ignore[attr-defined]
            skips.count(lines, position)
            if self.trainer.is_global_zero:
                skips.append(lines, run_folder(self.run.exp_manager))
        if position.skipped_samples:
            skips.check(position, self.run.data.max_skip_fraction, self.finished)

    def on_train_end(self) -> None:
        if self.position.skipped_samples:
            log.warning("%s; see %s", skips.report(self.position), skips.FILE)
        if self.features is not None:
            self.features.end()
        if self.times.steps:
            log.info("%s", self.times.summary())

    def _log(self) -> None:
        """Every step into metrics.csv; some, and those that were validated, into the other loggers, layer by layer."""
        row, step = self.position.metrics, self.position.global_step
        layers = expert_loads.by_layer(self.experts) if self.experts else {}
        grouped = {f"time/{name}" if name in step_times.COLUMNS else name: value for name, value in row.items()}
        due = step % self.run.trainer.log_every_n_steps == 0 or "val_loss" in row
        for logger in self.trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.log_metrics(row, step)
            elif due:
                logger.log_metrics(grouped | layers, step)

    def _row(self, result: StepResult, lr: float, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """The columns of metrics.csv; mfu only where the device's peak is known."""
        tokens, positions, squares, patches, squared_frames, kept_patches, _ = result.counts
        world_size, position = self.plan.layout.world_size, self.position
        adapters = self.run.peft.lora is not None
        load = sum(self.run.model.visual_tokens(batch.images.grids) for batch in micro_batches)
        ranks = groups.of_every_rank([load, *self.times.end_step(result.seconds)])
        times = self.times.tell(seconds for _, *seconds in ranks)
        seconds = times[step_times.STEP]
        flops = step_flops(self.run.model, tokens, squares, patches, squared_frames, adapters, kept_patches)
        tflops = flops / seconds / world_size / 1e12
        row: dict[str, float] = {
            "global_step": position.global_step,
            "consumed_samples": position.consumed_samples,
            "world_size": world_size,
            "reduced_train_loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_sec": tokens / seconds,
            "tflops_per_gpu": tflops,
            "padding_fraction": 1 - tokens / positions,
            "skipped_steps": position.skipped_steps,
        }
        if self.engine.loss_scale is not None:
            row["loss_scale"] = self.engine.loss_scale
        if result.experts is not None:
            row |= expert_loads.columns(result.experts)
        if self.run.model.reads_media:
            row |= self._visual_load([load for load, *_ in ranks])
        return row | times | ({"mfu": tflops / self.peak} if self.peak else {})

    def _visual_load(self, ranks: list[float]) -> dict[str, float]:
        """Tokens of the step's images and videos: of the global batch, the most of a rank, and that over the mean.

        Args:
            ranks: of each; those of one copy of the model have the same.
        """
        mean, most = sum(ranks) / len(ranks), max(ranks)
        load = {"visual_tokens": mean * self.plan.layout.data, "visual_tokens_max_rank": most}
        return load | {"vision_imbalance": most / mean if mean else 1.0}

    def _report_skip(self, result: StepResult, micro_batches: Sequence[Batch]) -> None:
        """Say which records a skipped step had; give up when there were too many.

        Raises:
            RuntimeError: more than model.max_skipped_steps; steps that only lower the loss scale do not count.
        """
        mine = [record for batch in micro_batches for record in batch.records.tolist()]
        records = sorted(set().union(*groups.from_every_rank(mine)))
        scale = self.engine.loss_scale
        text = (
            f"step {self.position.global_step}: loss {result.loss}, gradient norm {result.grad_norm}; no weight changed"
        )
        if scale is not None and scale > 1:
            log.info("%s; the loss scale is %g", text, scale)
            return
        self.faults.append(f"{text}; records {', '.join(map(str, records))}")
        log.warning("%s", self.faults[-1])
        if len(self.faults) > self.run.step.max_skipped_steps:
            raise RuntimeError(
                f"{len(self.faults)} steps with gradients that are not finite, more than "
                f"model.max_skipped_steps={self.run.step.max_skipped_steps}; {self.faults[-1]}"
            )
