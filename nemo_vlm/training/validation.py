"""The loss on samples that a run does not train on: val_loss, the mean over all their trained tokens."""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any, cast

import torch

from nemo_vlm import heartbeat
from nemo_vlm.checkpoints import Position, run_folder
from nemo_vlm.config import RunConfig
from nemo_vlm.config.exp_manager import OF_VALIDATION
from nemo_vlm.data.dataset import Samples
from nemo_vlm.data.loader import Share, validation_loader
from nemo_vlm.data.records import RecordDataset
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout
from nemo_vlm.mcore.engine import Engine
from nemo_vlm.training import skips
from nemo_vlm.training.durations import validation_batches, validation_interval
from nemo_vlm.training.loss import token_mean
from nemo_vlm.training.val_answers import chosen

log = logging.getLogger(__name__)


class Validation:
    """When a run validates, and on what.

    Args:
        epoch: samples of the training data.
    """

    def __init__(self, run: RunConfig, layout: Layout, share: Share, dataset: Samples, epoch: int) -> None:
        self.trainer, self.epoch, self.dataset, self.share = run.trainer, epoch, dataset, share
        self.folder = run_folder(run.exp_manager)
        self.every, self.skipped = validation_interval(run, epoch), 0.0
        batches = validation_batches(run.trainer.limit_val_batches, len(dataset), run.step)
        self.loader = validation_loader(dataset, layout, share, run, batches)
        if self.every > run.trainer.max_steps:
            log.warning(
                "no validation: trainer.val_check_interval=%s is %d steps, trainer.max_steps=%d",
                run.trainer.val_check_interval,
                self.every,
                run.trainer.max_steps,
            )

    def due(self, position: Position) -> bool:
        """After the step that led to this position."""
        epochs = self.trainer.check_val_every_n_epoch
        in_epoch = epochs is None or math.ceil(position.consumed_samples / self.epoch) % epochs == 0
        return in_epoch and position.global_step % self.every == 0

    def loss(self, engine: Engine) -> float:
        """Equal on every rank; NaN where no validation sample has a trained token."""
        sums, lines = [], []
        for micro_batches in self.loader:
            heartbeat.at("validation")
            sums.append(engine.evaluate(micro_batches, token_mean))
            lines += skips.details(micro_batches, self.dataset, skips.VALIDATION)
        total, weight, *_, skipped = (sum(values) for values in zip(*sums, strict=True))
        if skipped != self.skipped:
            self.skipped = skipped
            self._list(skips.of_all_ranks(lines, self.share.rank))
        return total / weight if weight else math.nan

    def _list(self, lines: list[dict[str, Any]]) -> None:
        """Say and list what was left out."""
        reasons = skips.reasons(Counter(each["reason"] for each in lines))
        log.warning("%d samples of the validation data are left out (%s); see %s", len(lines), reasons, skips.FILE)
        if torch.distributed.get_rank() == 0:
            skips.list_validation(lines, self.folder)


def validates(run: RunConfig, dataset: Samples | None) -> bool:
    return hindrance(run, dataset) is None


def hindrance(run: RunConfig, dataset: Samples | None) -> str | None:
    """Why nothing will be validated, and what would change that."""
    if dataset is None:
        return "there is no validation data; give model.data.validation_split or validation_path"
    return None if run.trainer.limit_val_batches > 0 else "trainer.limit_val_batches is 0; it must be more"


def check(run: RunConfig, dataset: Samples | None) -> None:
    """Whether there will be a val_loss or val_accuracy, where the run is led by it, and held-out records to answer.

    Raises:
        ConfigError: there will be none.
    """
    manager, reason = run.exp_manager, hindrance(run, dataset)
    if run.data.eval_samples:
        if reason is None and not chosen(cast(RecordDataset, dataset), 1, run.step.seed):
            reason = "no record of the validation data begins with a question and its answer"
        if reason is not None:
            raise ConfigError(f"model.data.eval_samples={run.data.eval_samples}: {reason}")
    users = {
        "checkpoint_callback_params": manager.create_checkpoint_callback,
        "early_stopping_callback_params": manager.create_early_stopping_callback,
    }
    for key, used in users.items():
        monitor = getattr(manager, key).monitor
        if not used or monitor not in OF_VALIDATION:
            continue
        if reason is not None:
            raise ConfigError(f"exp_manager.{key}.monitor={monitor}: {reason}, or give another monitor")
        if monitor == "val_accuracy" and not run.data.eval_samples:
            raise ConfigError(f"exp_manager.{key}.monitor=val_accuracy: give model.data.eval_samples, 100 say")
