"""Learning-rate schedules with NeMo's formulas (nemo/core/optim/lr_scheduler.py)."""

from __future__ import annotations

import logging
import math

from nemo_vlm.config import OptimConfig, SchedConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.parallel import rank

log = logging.getLogger(__name__)


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
    ratio, warmup = sched.warmup_ratio, warmup_steps(sched, max_steps)
    if sched.warmup_steps is None and ratio is not None and not 0 <= ratio <= 1:
        raise ConfigError(f"model.optim.sched.warmup_ratio={ratio}: must lie between 0 and 1")
    if warmup < 0:
        raise ConfigError(f"model.optim.sched.warmup_steps={warmup}: must be 0 or more")
    if warmup > max_steps and not rank.supervised():  # a short trial of a long recipe
        log.warning(
            "model.optim.sched.warmup_steps=%d: the run ends after %d steps, before the learning rate is %g",
            warmup,
            max_steps,
            optim.lr,
        )
    if sched.constant_steps > 0 and sched.constant_steps > max_steps - warmup:
        raise ConfigError(
            f"model.optim.sched.constant_steps={sched.constant_steps}: warm-up and max_steps={max_steps} "
            f"leave {max_steps - warmup}"
        )


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """The learning rate of step 0, 1, ...; `max_steps` is the run's, which the schedule may override with its own."""
    sched, max_steps = optim.sched, optim.sched.max_steps or max_steps
    warmup = warmup_steps(sched, max_steps)
    if warmup and step <= warmup:
        return optim.lr * (step / warmup if sched.constant_steps else (step + 1) / (warmup + 1))
    if sched.name == "constant":
        return optim.lr
    if step > max_steps - sched.constant_steps:
        return sched.min_lr
    return decayed(step, optim, warmup, max_steps - sched.constant_steps)


def decayed(step: int, optim: OptimConfig, warmup: int, last_step: int) -> float:
    """The learning rate after the warm-up and up to the last step of the decay."""
    sched, lr = optim.sched, optim.lr
    left = 1 - (step - warmup) / max(last_step - warmup, 1)
    if sched.name == "CosineAnnealing":
        return sched.min_lr + (lr - sched.min_lr) * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    if sched.name == "WarmupAnnealing":
        return sched.min_lr + (lr - sched.min_lr) * left
    if sched.name == "PolynomialDecayAnnealing":
        return sched.min_lr + (lr - sched.min_lr) * left**sched.power
    if sched.name == "SquareAnnealing":
        return max(lr * left**2, sched.min_lr)
    if sched.name == "SquareRootAnnealing":  # counts from the beginning of the warm-up, as NeMo's
        return max(lr * (1 - step / last_step) ** 0.5, sched.min_lr)
    if sched.name == "InverseSquareRootAnnealing":
        return lr / ((step + 1) / (warmup + 1)) ** 0.5
    return lr  # WarmupPolicy
