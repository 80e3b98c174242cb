"""`exp_manager.*`: what is kept of a run, where, and from where it goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_vlm.config.checks import demand, fill, seconds
from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class WandbConfig:
    """`exp_manager.wandb_logger_kwargs.*`."""

    project: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """`exp_manager.checkpoint_callback_params.*`: when a training checkpoint is written, and which are kept."""

    every_n_train_steps: int | None = None  # null: only the last
    train_time_interval: str | None = None  # DD:HH:MM:SS between two checkpoints, beside the steps
    monitor: Literal["global_step", "reduced_train_loss", "grad_norm"] = "global_step"  # a column of metrics.csv
    mode: Literal["min", "max"] | None = None  # null: max of global_step, min of the others
    save_top_k: int = 3  # the best by `monitor` are kept, the newest always; -1: all
    save_optimizer: bool = True
    save_rng: bool = True
    async_save: bool = False  # written in the background while the next steps run
    save_nemo_on_train_end: bool = True

    def __post_init__(self) -> None:
        key = "exp_manager.checkpoint_callback_params"
        every = self.every_n_train_steps
        demand(every is None or every > 0, f"{key}.every_n_train_steps", every, "1 or more, or null")
        fill(self, mode="max" if self.monitor == "global_step" else "min")
        demand(self.save_top_k >= -1, f"{key}.save_top_k", self.save_top_k, "-1 (all) or more")
        seconds(f"{key}.train_time_interval", self.train_time_interval)


@dataclass(frozen=True)
class ExpManagerConfig:
    """`exp_manager.*`: what is kept of the run, where, and from where it goes on."""

    name: str = "default"
    exp_dir: str = "./nemo_experiments"
    create_checkpoint_callback: bool = True
    checkpoint_callback_params: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume_if_exists: bool = False  # go on from the newest complete checkpoint of this name
    resume_ignore_no_checkpoint: bool = True  # false: to find none is an error
    resume_from_step: int | None = None  # go on from this checkpoint; later ones are removed
    resume_optimizer: bool = True  # false: weights only, the optimizer starts anew
    resume_rng: bool = True
    max_time_per_run: str | None = None  # as trainer.max_time
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ConfigError(f"exp_manager.name={self.name}: must be the name of a folder, which is made in exp_dir")
        seconds("exp_manager.max_time_per_run", self.max_time_per_run)
