"""Learning-rate schedules with NeMo's formulas (nemo/core/optim/lr_scheduler.py)."""

from __future__ import annotations

import math

from nemo_vlm.config import OptimConfig
from nemo_vlm.errors import ConfigError


def warmup_steps(optim: OptimConfig, max_steps: int) -> int:
    """The length of the warm-up.

    Raises:
        ConfigError: given twice, or not shorter than the run.
    """
    sched = optim.sched
    if sched.warmup_steps is not None and sched.warmup_ratio is not None:
        raise ConfigError(
            f"model.optim.sched.warmup_steps={sched.warmup_steps}: "
            f"warmup_ratio={sched.warmup_ratio} is given too; give one"
        )
    return sched.warmup_steps if sched.warmup_steps is not None else int((sched.warmup_ratio or 0) * max_steps)


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """The learning rate of step 0, 1, ...; `max_steps` is the run's, which the schedule may override with its own."""
    sched, max_steps = optim.sched, optim.sched.max_steps or max_steps
    warmup = warmup_steps(optim, max_steps)
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
