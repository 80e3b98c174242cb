"""What is kept of a run: its folder, settings, command line and metrics.

<exp_dir>/<name>/  config.yaml  cmd-args.log  metrics.csv  tensorboard/  loss.png  checkpoints/<name>.nemo
"""

from __future__ import annotations

import importlib.util
import logging
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from nemo_vlm.config import ExpManagerConfig
from nemo_vlm.errors import ConfigError

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
)


def run_folder(config: ExpManagerConfig) -> Path:
    return Path(config.exp_dir) / config.name


def archive_path(config: ExpManagerConfig) -> Path:
    return run_folder(config) / "checkpoints" / f"{config.name}.nemo"


@rank_zero_only
def open_run(config: ExpManagerConfig, settings: dict[str, Any]) -> None:
    """Make the run's folder and write down what was asked for."""
    folder = run_folder(config)
    if (folder / "metrics.csv").exists():
        log.warning(
            "STARTING FROM ZERO: a run named %s exists in %s, its metrics are replaced",
            config.name,
            folder,
        )
        (folder / "metrics.csv").unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"exp_manager.exp_dir={config.exp_dir}: {folder} cannot be made ({error.strerror})") from None
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    with open(folder / "cmd-args.log", "a") as file:
        file.write(shlex.join(sys.argv) + "\n")


def loggers(config: ExpManagerConfig) -> list[Logger]:
    """CSV always; TensorBoard and W&B as configured."""
    folder = run_folder(config)
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    csv = CSVLogger(folder.parent, name=config.name, version="", flush_logs_every_n_steps=1)
    chosen: list[Logger] = [csv]
    if config.create_tensorboard_logger:
        chosen.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    if config.create_wandb_logger:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("exp_manager.create_wandb_logger=true: wandb is not installed; pip install wandb")
        kwargs = config.wandb_logger_kwargs
        chosen.append(WandbLogger(project=kwargs.project, name=kwargs.name or config.name, save_dir=folder))
    return chosen


@rank_zero_only
def log_step(run_loggers: list[Logger], row: dict[str, float], step: int) -> None:
    """One row a step, on disk when this returns. Values go past Lightning's own log(), which rounds to float32."""
    for logger in run_loggers:
        if isinstance(logger, CSVLogger):
            logger.experiment.metrics_keys = sorted({*COLUMNS, "step"})
        logger.log_metrics(row, step)
        if isinstance(logger, CSVLogger):
            logger.save()
