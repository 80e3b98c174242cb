"""What is kept of a run: its folder, settings, command line and metrics; and from where it goes on.

<exp_dir>/<name>/  config.yaml  cmd-args.log  metrics.csv  tensorboard/  loss.png  checkpoints/  run_0/ ...

A run that starts from zero under a name that exists moves what the earlier one left into run_0, run_1, ...
"""

from __future__ import annotations

import csv
import importlib.util
import logging
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from nemo_vlm import checkpoints
from nemo_vlm.config import ExpManagerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import remove_partial, written_whole

log = logging.getLogger(__name__)

COLUMNS = (
    "global_step",
    "consumed_samples",
    "world_size",
    "reduced_train_loss",
    "val_loss",
    "lr",
    "grad_norm",
    "train_step_timing in s",
    "tokens_per_sec",
    "tflops_per_gpu",
    "mfu",
    "padding_fraction",
    "skipped_steps",
    "loss_scale",
)
OF_ONE_RUN = ("metrics.csv", "checkpoints", "loss.png", "tensorboard/*")


@dataclass(frozen=True)
class Opened:
    """What a run finds in its folder: the checkpoint that it goes on from, and an earlier run's files."""

    checkpoint: Path | None
    left: list[Path]


def archive_path(config: ExpManagerConfig) -> Path:
    return checkpoints.folder_of(config) / f"{config.name}.nemo"


@rank_zero_only
def open_run(config: ExpManagerConfig, settings: dict[str, Any]) -> Opened:
    """Make the run's folder ready and write down what was asked for; nothing of an earlier run is touched yet."""
    folder = checkpoints.run_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"exp_manager.exp_dir={config.exp_dir}: {folder} cannot be made ({error.strerror})") from None
    for name in checkpoints.clean(checkpoints.folder_of(config)):
        log.warning("removed the unfinished checkpoint %s", name)
    remove_partial(archive_path(config))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    with open(folder / "cmd-args.log", "a") as file:
        file.write(shlex.join(sys.argv) + "\n")
    return Opened(checkpoints.choose(config), [path for name in OF_ONE_RUN for path in folder.glob(name)])


@rank_zero_only
def begin(config: ExpManagerConfig, opened: Opened) -> None:
    """Drop or move what an earlier run of this name left; only now, when all ranks stand where they should."""
    if opened.checkpoint is not None:
        go_on(checkpoints.run_folder(config), opened.checkpoint)
    elif opened.left:
        set_aside(checkpoints.run_folder(config), opened.left)


def set_aside(folder: Path, left: list[Path]) -> None:
    """An earlier run's files make room, and nothing of them is lost."""
    number = next(n for n in range(sys.maxsize) if not (folder / f"run_{n}").exists())
    log.warning(
        "STARTING FROM ZERO: a run of this name exists in %s; its %s are moved to run_%d "
        "(exp_manager.resume_if_exists=true goes on from its last checkpoint)",
        folder,
        ", ".join(str(path.relative_to(folder)) for path in left if path.parent == folder),
        number,
    )
    for path in left:
        target = folder / f"run_{number}" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def go_on(folder: Path, checkpoint: Path) -> None:
    """Drop what lies beyond the checkpoint: later ones, and rows of metrics.csv."""
    step = checkpoints.step_of(checkpoint)
    for path in checkpoints.complete(checkpoint.parent):
        if checkpoints.step_of(path) > step:
            checkpoints.remove(path)
    metrics = folder / "metrics.csv"
    rows = [row for row in read_rows(metrics) if int(row["global_step"]) <= step]
    with written_whole(metrics) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    log.info("going on from step %d (%s)", step, checkpoint)


def read_rows(metrics: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; a last one that a killed process left unfinished is none."""
    if not metrics.exists():
        return []
    text = metrics.read_text()
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(whole.splitlines()))


class MetricsFile(Logger):
    """metrics.csv: one row a step, written out when log_metrics returns, appended to across restarts.

    Lightning's own writes every hundredth step, and deletes the file of a folder that is used again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They stand in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(metrics)


def loggers(config: ExpManagerConfig) -> list[Logger]:
    """CSV always; TensorBoard and W&B as configured."""
    folder = checkpoints.run_folder(config)
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    chosen: list[Logger] = [MetricsFile(folder / "metrics.csv")]
    if config.create_tensorboard_logger:
        chosen.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    if config.create_wandb_logger:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("exp_manager.create_wandb_logger=true: wandb is not installed; pip install wandb")
        kwargs = config.wandb_logger_kwargs
        chosen.append(WandbLogger(project=kwargs.project, name=kwargs.name or config.name, save_dir=folder))
    return chosen
