"""The folder of a run's training checkpoints: which are complete, which are kept, what is known of each.

    checkpoints/step_000020/             tensors (formats.torch_dist), state.json, model_config.yaml
    checkpoints/step_000020-unfinished   stands while that folder is written or removed

A folder beside its marker is never read, and cleaned up when the run starts again.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nemo_vlm.config import CheckpointConfig, ExpManagerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import sync

MARK = "-unfinished"
STATE = "state.json"


@dataclass
class Position:
    """How far a run has come: state.json.

    Attributes:
        global_step: steps taken, skipped ones included.
        consumed_samples: the sampler's position.
        optimizer: Engine.optimizer_state.
        layout: the layout it was saved under; random number generators go on in the same one only.
        metrics: the row of metrics.csv of the last step.
        skipped_samples: records that no sample could be made of, counted by reason.
        stopping: what early stopping remembers, training.early_stopping.Watch.
    """

    global_step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    skipped_samples: dict[str, int] = field(default_factory=dict)
    stopping: dict[str, Any] = field(default_factory=dict)


def run_folder(config: ExpManagerConfig) -> Path:
    if config.explicit_log_dir is not None:
        return Path(config.explicit_log_dir)
    assert config.exp_dir is not None
    version = () if config.version is None else (str(config.version),)
    return Path(config.exp_dir, config.name, *version)


def make_run_folder(config: ExpManagerConfig) -> Path:
    """The run's folder, made where it is missing.

    Raises:
        ConfigError: it cannot be made.
    """
    folder = run_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"exp_manager.exp_dir={config.exp_dir}: {folder} cannot be made ({error.strerror})") from None
    return folder


def folder_of(config: ExpManagerConfig) -> Path:
    return Path(config.checkpoint_callback_params.dirpath or run_folder(config) / "checkpoints")


def archive_path(config: ExpManagerConfig) -> Path:
    """Where a run writes its .nemo."""
    params = config.checkpoint_callback_params
    return folder_of(config) / f"{params.prefix or config.name}{params.postfix}"


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def marker(path: Path) -> Path:
    return path.with_name(path.name + MARK)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, the oldest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted((path for path in found if (path / STATE).exists() and not marker(path).exists()), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def choose(config: ExpManagerConfig) -> Path | None:
    """The checkpoint that the run goes on from.

    Raises:
        ConfigError: the one that is asked for does not exist.
    """
    found = complete(folder_of(config))
    if config.resume_from_step is not None:
        return at_step(config.resume_from_step, found, folder_of(config))
    if config.resume_if_exists and found:
        return found[-1]
    if config.resume_from_checkpoint is not None:
        return given(Path(config.resume_from_checkpoint))
    if config.resume_if_exists and not config.resume_ignore_no_checkpoint:
        raise ConfigError(
            f"exp_manager.resume_if_exists=true: no complete checkpoint in {folder_of(config)}; "
            "resume_ignore_no_checkpoint=true starts from zero"
        )
    return None


def at_step(step: int, found: list[Path], folder: Path) -> Path:
    for path in found:
        if step_of(path) == step:
            return path
    steps = ", ".join(str(step_of(path)) for path in found) or "none"
    raise ConfigError(
        f"exp_manager.resume_from_step={step}: no complete checkpoint of that step in {folder}; there are: {steps}"
    )


def given(path: Path) -> Path:
    """A checkpoint, or the newest of a folder of them."""
    found = complete(path) or [each for each in complete(path.parent) if each.name == path.name]
    if not found:
        raise ConfigError(
            f"exp_manager.resume_from_checkpoint={path}: no complete checkpoint of a run, such as step_000020, nor a "
            "folder of them; weights alone are taken by model.restore_from_path"
        )
    return found[-1]


def begin(path: Path) -> None:
    """From here on the checkpoint counts as unfinished, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    marker(path).touch()
    sync(path.parent)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()


def finish(path: Path, position: Position, model_tree: dict[str, Any]) -> None:
    """Add what is not tensors, and take the marker away."""
    (path / "model_config.yaml").write_text(yaml.safe_dump(model_tree, sort_keys=False))
    from nemo_vlm.formats.torch_dist_writer import write_common  # takes most of a second, and readers need none of it

    write_common(path, {"iteration": position.global_step, "consumed_train_samples": position.consumed_samples})
    (path / STATE).write_text(json.dumps(asdict(position)))
    for file in path.iterdir():
        sync(file)
    sync(path)
    marker(path).unlink()
    sync(path.parent)


def read(path: Path) -> Position:
    try:
        return Position(**json.loads((path / STATE).read_text()))
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{path / STATE}: cannot be read ({error})") from None


def remove(path: Path) -> None:
    """Marked first, and until nothing is left: half a checkpoint must not look whole.

    Raises:
        OSError: the file system refuses; the marker stays.
    """
    marker(path).touch()
    sync(path.parent)
    if path.exists():
        shutil.rmtree(path)
    marker(path).unlink()


def clean(folder: Path) -> list[str]:
    """Remove what was left unfinished; the names of it."""
    left = sorted(folder.glob(f"step_*{MARK}"))
    for mark in left:
        remove(mark.with_name(mark.name.removesuffix(MARK)))
    return [mark.name.removesuffix(MARK) for mark in left]


def prune(folder: Path, config: CheckpointConfig) -> None:
    """Keep the newest and the best save_top_k by the monitored metric."""
    *others, _ = found = complete(folder)
    if config.save_top_k < 0:
        return
    kept = ranked(found, config)[: config.save_top_k]
    for path in others:
        if path not in kept:
            remove(path)


def best(config: ExpManagerConfig) -> Path | None:
    """The best complete checkpoint of a run, by the monitored metric; None where there is none."""
    return next(iter(ranked(complete(folder_of(config)), config.checkpoint_callback_params)), None)


def ranked(found: list[Path], config: CheckpointConfig) -> list[Path]:
    """Checkpoints by the monitored metric, the best first; of equals the newer."""
    return sorted(found, key=lambda path: (merit(path, config), step_of(path)), reverse=True)


def merit(path: Path, config: CheckpointConfig) -> float:
    """The monitored metric, more is better; a step that was skipped, or not validated, had none."""
    metrics = read(path).metrics
    if config.monitor not in metrics or not math.isfinite(metrics[config.monitor]):
        return -math.inf
    return metrics[config.monitor] if config.mode == "max" else -metrics[config.monitor]
