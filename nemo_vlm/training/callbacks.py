"""What happens beside the steps: progress bar, checkpoints, the end on request, the archive and the curves."""

from __future__ import annotations

import logging
import math
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.utilities import rank_zero_only

from nemo_vlm import heartbeat
from nemo_vlm.archive import TOKENIZER, self_contained, write_archive
from nemo_vlm.checkpoints import archive_path, run_folder
from nemo_vlm.config import RunConfig, seconds
from nemo_vlm.config.exp_manager import OF_VALIDATION
from nemo_vlm.formats.safetensors import TensorSpec
from nemo_vlm.mcore import groups, weights
from nemo_vlm.parallel import rank
from nemo_vlm.training import early_stopping, saving
from nemo_vlm.training.exp_manager import read_rows
from nemo_vlm.training.module import TrainingModule
from nemo_vlm.training.saving import Saver
from nemo_vlm.typed import model_tree

log = logging.getLogger(__name__)


class Progress(TQDMProgressBar):
    """Lightning's bar (steps, time left, steps/s) with loss, seconds a step and samples/s."""

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        assert isinstance(module, TrainingModule)
        latest = module.position.metrics
        if not latest:
            return {}
        seconds = latest["train_step_timing in s"]
        samples = module.batch_size / seconds
        return {
            "loss": f"{latest['reduced_train_loss']:.4f}",
            "s/step": f"{seconds:.3f}",
            "samples/s": f"{samples:.1f}",
        } | {name: f"{latest[name]:.4f}" for name in OF_VALIDATION if name in latest}


class EndAtOnce(Callback):
    """Where a checkpoint leaves no step to take, Lightning leaves out the end as well; the archive may be missing."""

    def __init__(self, *last_acts: Callback) -> None:
        self.last_acts = last_acts

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        if module.finished:
            log.info("nothing is left to do: step %d was the last", module.position.global_step)
            for callback in self.last_acts:
                callback.on_train_end(trainer, module)


class FailFast(Callback):
    """Lets a supervisor know of an error at once."""

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        rank.fail(exception, trainer.world_size)


class Stop:
    """Whether the run should end after this step: a signal came, or its time is over."""

    OF_SUBMITIT = signal.SIGUSR2  # what it lets Slurm send before the time is over; a supervisor has another use for it

    def __init__(self, run: RunConfig) -> None:
        limits = [
            seconds("trainer.max_time", run.trainer.max_time),
            seconds("exp_manager.max_time_per_run", run.exp_manager.max_time_per_run),
        ]
        self.limit = min((limit for limit in limits if limit is not None), default=math.inf)
        self.started = time.monotonic()
        self.reason: str | None = None
        self.signalled = False

    def listen(self) -> None:
        for number in rank.ENDING if rank.supervised() else (*rank.ENDING, self.OF_SUBMITIT):
            signal.signal(number, self.hear)

    def hear(self, number: int, frame: Any) -> None:
        if self.signalled and number == signal.SIGINT:
            raise KeyboardInterrupt  # whoever presses Ctrl-C twice does not want to wait
        self.reason, self.signalled = signal.Signals(number).name, True

    def asked(self) -> bool:
        if time.monotonic() - self.started > self.limit:
            self.reason = self.reason or "its time is over"
        return self.reason is not None


class StopEarly(Callback):
    """Ends the run when the monitored metric no longer gets better; all ranks know the same metric."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *unused: Any) -> None:
        config, position = module.run.exp_manager.early_stopping_callback_params, module.position
        position.stopping = early_stopping.after_step(position.stopping, position.metrics, module.skipped, config)
        if module.stopped_early:
            log.info("stopped early, after step %d: %s", position.global_step, module.stopped_early)
            trainer.should_stop = True


class SaveCheckpoints(Callback):
    """Writes training checkpoints by steps, epochs and time, and the last one; ends the run when it is asked to.

    The ranks agree on it after every step, since signals and clocks reach them at different moments.
    """

    def __init__(self, run: RunConfig) -> None:
        self.run, self.config = run, run.exp_manager.checkpoint_callback_params
        key = "exp_manager.checkpoint_callback_params.train_time_interval"
        self.interval = seconds(key, self.config.train_time_interval) or math.inf
        self.stop, self.saved_at = Stop(run), time.monotonic()
        self.saver: Saver | None = None

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        if self.run.exp_manager.create_checkpoint_callback:
            self.saver = Saver(self.run, module.plan.layout)
            self.saver.last_step = module.position.global_step

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.stop.listen()  # here, because Lightning sets its own handlers shortly before

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *unused: Any) -> None:
        step = module.position.global_step
        stop, due = groups.any_rank(self.stop.asked(), time.monotonic() - self.saved_at > self.interval)
        if self.saver and (stop or due or self.due(module)):
            with module.times.saving():
                self.saver.save(module.engine, module.position)
            self.saved_at = time.monotonic()
        heartbeat.at("data", step + 1)
        if stop:
            kept = f"saved in {self.saver.folder}" if self.saver else "nothing is saved"
            reasons = [reason for reason in groups.from_every_rank(self.stop.reason) if reason]
            log.info("stopped after step %d (%s), %s", step, reasons[0], kept)
            trainer.should_stop = True

    def due(self, module: TrainingModule) -> bool:
        """By steps, epochs or validations."""
        position, steps, epochs = module.position, self.config.every_n_train_steps, self.config.every_n_epochs
        if (steps and position.global_step % steps == 0) or (epochs and module.epochs_ended(epochs)):
            return True
        return self.config.at_validations and "val_loss" in position.metrics

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        if self.saver:
            if self.saver.last_step != module.position.global_step:
                self.saver.save(module.engine, module.position)
            self.saver.wait()


class SaveArchive(Callback):
    """Writes <name>.nemo when training is done: weights gathered one by one from all ranks, config, tokenizer.

    Args:
        checkpoints: with always_save_nemo one is written after each of them, too.
    """

    def __init__(self, run: RunConfig, tokenizer: Any, checkpoints: SaveCheckpoints) -> None:
        self.config, self.tokenizer = run.exp_manager.checkpoint_callback_params, tokenizer
        self.checkpoints = checkpoints
        self.written: int | None = None  # the step that the archive is of

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *unused: Any) -> None:
        saver = self.checkpoints.saver
        if self.config.always_save_nemo and saver and saver.last_step == module.position.global_step:
            with module.times.saving():
                self.write(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        done = module.finished and self.config.save_nemo_on_train_end
        if done and self.config.save_best_model:
            saving.load_best(module.engine, module.run.exp_manager)
            self.written = None
        if (done or self.config.always_save_nemo) and self.written != module.position.global_step:
            self.write(trainer, module)

    def write(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        heartbeat.at("archive")
        self.written = module.position.global_step
        parts = module.engine.saved_parts()
        placed = weights.placements(parts)
        tensors = weights.gather(parts, placed)
        if not trainer.is_global_zero:
            for _ in tensors:
                raise AssertionError("only rank 0 receives tensors")
            return
        config = self_contained(model_tree(module.run), has_base=module.run.peft.lora is not None)
        specs = [TensorSpec(name, placement.shape, placement.dtype) for name, placement in placed.items()]
        path = archive_path(module.run.exp_manager)
        with tempfile.TemporaryDirectory() as scratch:
            self.tokenizer.save_pretrained(scratch)
            write_archive(path, config, {TOKENIZER: Path(scratch)}, specs, tensors)
        log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)


class Curves(Callback):
    """Draws loss.png when training ends."""

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TrainingModule)
        draw_curves(run_folder(module.run.exp_manager))


@rank_zero_only
def draw_curves(folder: Path) -> None:
    """loss.png from metrics.csv: losses, learning rate and gradient norm over the steps, and accuracy where it is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows(folder / "metrics.csv")
    titles = {"reduced_train_loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm"}
    answered = any(row["val_accuracy"] for row in rows)
    count = len(titles) + answered
    figure, axes = pyplot.subplots(count, 1, figsize=(8, 3 * count), sharex=True, constrained_layout=True)
    for axis, (column, title) in zip(axes[: len(titles)], titles.items(), strict=True):
        axis.plot(*points(rows, column), linewidth=1)
        axis.set_ylabel(title)
        if column != "lr":
            axis.set_yscale("log")
    validated = points(rows, "val_loss")
    if validated[0]:
        axes[0].plot(*validated, "o-", markersize=3, label="validation")
        axes[0].legend()
    if answered:
        axes[-1].plot(*points(rows, "val_accuracy"), "o-", markersize=3)
        axes[-1].set_ylabel("validation's accuracy")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].set_title(folder.name)
    axes[-1].set_xlabel("step")
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)


def points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    """The steps that have such a value, and the values."""
    found = [row for row in rows if row[column]]
    return [int(row["global_step"]) for row in found], [float(row[column]) for row in found]
