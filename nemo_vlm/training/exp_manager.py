"""What is kept of a run: its folder, settings, command line and metrics; and from where it goes on.

<exp_dir>/<name>/  config.yaml  cmd-args.log  git-info.log  nemo_log_globalrank-0_localrank-0.txt  metrics.csv
                   tensorboard/  loss.png  experts.png  checkpoints/  run_0/ ...

A run that starts from zero under a name that exists moves what the earlier one left into run_0, run_1, ...
"""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from nemo_vlm import checkpoints
from nemo_vlm.config import ExpManagerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import remove_partial, written_whole
from nemo_vlm.training import step_times
from nemo_vlm.typed import plain

log = logging.getLogger(__name__)

COLUMNS = (
    "global_step",
    "consumed_samples",
    "world_size",
    "reduced_train_loss",
    "val_loss",
    "val_accuracy",
    "lr",
    "grad_norm",
    *step_times.COLUMNS,
    "tokens_per_sec",
    "tflops_per_gpu",
    "mfu",
    "padding_fraction",
    "visual_tokens",
    "visual_tokens_max_rank",
    "vision_imbalance",
    "aux_loss",
    "expert_load_max",
    "skipped_steps",
    "loss_scale",
)
OF_ONE_RUN = (
    *("metrics.csv", "skipped_samples.jsonl", "checkpoints", "loss.png", "experts.png", "tensorboard/*", "profile"),
    *("val_answers.jsonl", "val_answers.png"),
)
ABOUT = ("config.yaml", "git-info.log")  # written anew by each start
RESERVED = (*OF_ONE_RUN, *ABOUT, "cmd-args.log", "nemo_log_*", "tensorboard", "mlruns", "wandb", "run_*")


@dataclass(frozen=True)
class Opened:
    """What a run finds in its folder: the checkpoint that it goes on from, and an earlier run's files.

    Attributes:
        settings: the run's own, to be written beside them.
    """

    checkpoint: Path | None
    left: list[Path]
    settings: dict[str, Any]


def archive_version(config: ExpManagerConfig) -> tuple[int, int] | None:
    """What tells the archive from one that takes its place; None: there is none."""
    try:
        found = checkpoints.archive_path(config).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


@rank_zero_only
def open_run(config: ExpManagerConfig, settings: dict[str, Any]) -> Opened:
    """Make the run's folder ready and write down the command; nothing of an earlier run is touched yet."""
    folder = checkpoints.make_run_folder(config)
    for name in checkpoints.clean(checkpoints.folder_of(config)):
        log.warning("removed the unfinished checkpoint %s", name)
    remove_partial(checkpoints.archive_path(config))
    with open(folder / "cmd-args.log", "a") as file:
        file.write(shlex.join(sys.argv) + "\n")
    left = [path for name in OF_ONE_RUN for path in folder.glob(name)]
    if left:  # else nothing has come of the earlier run
        about = [folder / name for name in (*ABOUT, *copied_names(config))]
        left += [path for path in about if path.exists()]
    return Opened(checkpoints.choose(config), left, settings)


def write_down(config: ExpManagerConfig, settings: dict[str, Any]) -> None:
    """What was asked for, of which code, and copies of the files that are to be kept."""
    folder = checkpoints.run_folder(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    write_git_info(folder / "git-info.log")
    for name in config.files_to_copy or ():
        shutil.copy(name, folder)


def write_git_info(path: Path) -> None:
    """Commit and changes of the code that runs, where it stands in a git repository."""
    git = shutil.which("git")
    if git is None:
        return
    told = [
        subprocess.run([git, *what], cwd=Path(__file__).parent, capture_output=True, text=True, errors="replace")
        for what in (["rev-parse", "HEAD"], ["diff", "HEAD"])
    ]
    if not any(each.returncode for each in told):
        path.write_text(f"commit hash: {told[0].stdout}{told[1].stdout}")


def copied_names(config: ExpManagerConfig) -> list[str]:
    """The files of exp_manager.files_to_copy in the run's folder."""
    return [Path(name).name for name in config.files_to_copy or ()]


def check_copies(config: ExpManagerConfig) -> None:
    """Whether exp_manager.files_to_copy can be kept in the run's folder.

    Raises:
        ConfigError: one cannot be read, stands there already, or would replace another file.
    """
    names = copied_names(config)
    for name, path in zip(names, map(Path, config.files_to_copy or ()), strict=True):
        try:
            open(path, "rb").close()
        except OSError as error:
            raise ConfigError(f"exp_manager.files_to_copy={path}: cannot be copied ({error.strerror})") from None
        inside = path.resolve().parent == checkpoints.run_folder(config).resolve()
        if inside or names.count(name) > 1 or any(fnmatch(name, reserved) for reserved in RESERVED):
            raise ConfigError(f"exp_manager.files_to_copy={path}: the run's folder has another {name}; rename it")


@rank_zero_only
def begin(config: ExpManagerConfig, opened: Opened) -> None:
    """Drop or move what an earlier run of this name left; only now, when all ranks stand where they should."""
    checkpoint, folder = opened.checkpoint, checkpoints.folder_of(config)
    if checkpoint is not None and checkpoint.parent.resolve() == folder.resolve():
        go_on(checkpoints.run_folder(config), checkpoint)
    else:
        start = "STARTING FROM ZERO" if checkpoint is None else f"starting from {checkpoint}"
        set_aside(checkpoints.run_folder(config), opened.left, start)
        archive = checkpoints.archive_path(config)
        set_aside(folder, checkpoints.complete(folder) + [archive] * archive.exists(), start)  # of a dirpath elsewhere
    write_down(config, opened.settings)
    if checkpoint is not None:
        log.info("going on from step %d (%s)", checkpoints.step_of(checkpoint), checkpoint)


def set_aside(folder: Path, left: list[Path], start: str) -> None:
    """An earlier run's files make room, and nothing of them is lost."""
    if not left:
        return
    number = next(n for n in range(sys.maxsize) if not (folder / f"run_{n}").exists())
    log.warning(
        "%s: a run of this name exists in %s; its %s are moved to run_%d "
        "(exp_manager.resume_if_exists=true goes on from its last checkpoint)",
        start,
        folder,
        ", ".join(str(path.relative_to(folder)) for path in left if path.parent == folder),
        number,
    )
    for path in left:
        target = folder / f"run_{number}" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def go_on(folder: Path, checkpoint: Path) -> None:
    """Drop what lies beyond the checkpoint: later ones, rows of metrics.csv, and answers."""
    step = checkpoints.step_of(checkpoint)
    later = [path for path in checkpoints.complete(checkpoint.parent) if checkpoints.step_of(path) > step]
    if later:
        log.warning("removing what is later than step %d: %s", step, ", ".join(path.name for path in later))
    for path in later:
        checkpoints.remove(path)
    metrics = folder / "metrics.csv"
    answers = folder / "val_answers.jsonl"
    if answers.exists() and json.loads(answers.read_bytes().splitlines()[0])["global_step"] > step:
        for path in folder.glob("val_answers.*"):
            path.unlink()
    rows = [row for row in read_rows(metrics) if int(row["global_step"]) <= step]
    with written_whole(metrics) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


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
    """CSV always; TensorBoard, W&B and MLflow as configured."""
    folder = checkpoints.run_folder(config)
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    chosen: list[Logger] = [MetricsFile(folder / "metrics.csv")]
    if config.create_tensorboard_logger:
        settings = plain(config.summary_writer_kwargs)
        chosen.append(TensorBoardLogger(folder, name="", version="tensorboard", **settings))
    if config.create_wandb_logger:
        require("wandb")
        settings = {"name": config.name, **given(config.wandb_logger_kwargs)}
        chosen.append(WandbLogger(**settings, save_dir=folder))
    if config.create_mlflow_logger:
        require("mlflow")
        settings = {"experiment_name": config.name, **given(config.mlflow_logger_kwargs)}
        chosen.append(MLFlowLogger(**settings, save_dir=str(folder / "mlruns")))
    return chosen


def given(settings: Any) -> dict[str, Any]:
    """Those of a logger's settings that are not left to its library."""
    return {key: value for key, value in plain(settings).items() if value is not None}


def require(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ConfigError(
            f"exp_manager.create_{library}_logger=true: {library} is not installed; pip install {library}"
        )
