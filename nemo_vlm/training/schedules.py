"""Learning-rate schedules with NeMo's formulas (nemo/core/optim/lr_scheduler.py)."""

from __future__ import annotations

import math

from nemo_vlm.config import OptimConfig, SchedConfig
from nemo_vlm.errors import ConfigError


def warmup_steps(sched: SchedConfig, max_steps: int) -> int:
    """The length of the warm-up; warmup_steps goes before warmup_ratio."""
    return sched.warmup_steps if sched.warmup_steps is not None else int((sched.warmup_ratio or 0) * max_steps)


def check(optim: OptimConfig, max_steps: int) -> None:
    """What can be said of a schedule before it runs.

    Raises:
        ConfigError: a rate or a length that makes no sense.
    """
    sched, max_steps = optim.sched, optim.sched.max_steps or max_steps
    if not 0 <= sched.min_lr <= optim.lr < math.inf:
        raise ConfigError(f"model.optim.sched.min_lr={sched.min_lr}: must lie between 0 and model.optim.lr={optim.lr}")
    if not 0 <= warmup_steps(sched, max_steps) <= max_steps:
        by_steps = sched.warmup_steps is not None
        key, value = ("warmup_steps", sched.warmup_steps) if by_steps else ("warmup_ratio", sched.warmup_ratio)
        limit = f"max_steps={max_steps}" if by_steps else "1"
        raise ConfigError(f"model.optim.sched.{key}={value}: must lie between 0 and {limit}")


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """The learning rate of step 0, 1, ...; `max_steps` is the run's, which the schedule may override with its own."""
    sched, max_steps = optim.sched, optim.sched.max_steps or max_steps
    warmup = warmup_steps(sched, max_steps)
    if warmup and step <= warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    if sched.name == "constant":
        return optim.lr
    if step > max_steps:
        return sched.min_lr
    done = (step - warmup) / max(max_steps - warmup, 1)
    if sched.name == "CosineAnnealing":
        return sched.min_lr + (optim.lr - sched.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    return optim.lr * max(1 - done, 0.0)  # WarmupAnnealing: linear to 0, whatever min_lr
