"""Learning-rate schedules with NeMo's formulas (nemo/core/optim/lr_scheduler.py).

A schedule counts what the run's length is given in: steps taken, or samples or tokens read before the step, as
Megatron's OptimizerParamScheduler does. These differ from each other where the global batch grows (rampup_batch_size).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import replace
from typing import get_args

from nemo_vlm.config import OptimConfig, RunConfig, SchedConfig, Unit, demand
from nemo_vlm.errors import ConfigError
from nemo_vlm.parallel import rank

log = logging.getLogger(__name__)

LENGTHS: dict[Unit, str] = {
    "steps": "trainer.max_steps",
    "samples": "model.data.train_samples",
    "tokens": "model.data.train_tokens",
}


def settle_length(run: RunConfig, given: Collection[str]) -> RunConfig:
    """A run whose length in samples or tokens, where it has one, takes the place of its recipe's trainer.max_steps.

    Args:
        given: the keys on the command line; a max_steps that stands there ends the run as well.
    Raises:
        ConfigError: a run without an end, or whose length or schedule makes no sense.
    """
    trainer = run.trainer
    if run.samples_limit is not None:
        check_samples(run, run.samples_limit)
        if "trainer.max_steps" not in given:
            run = replace(run, trainer=replace(trainer, max_steps=-1))
    elif trainer.max_steps == -1 and trainer.max_epochs is None:
        raise ConfigError("trainer.max_steps=-1: needs trainer.max_epochs, model.data.train_samples or train_tokens")
    if run.unit != "steps" or trainer.max_epochs is None:  # else an epoch must be known, see training.durations
        check(run.optim, run.length, run.unit)
    return run


def check_samples(run: RunConfig, samples: int) -> None:
    """Raises ConfigError where they are less than a global batch, or where tokens do not say how many they are."""
    if run.unit == "tokens" and run.data.data_impl != "mmap":
        raise ConfigError(
            f"model.data.train_tokens={run.length}: only with model.data.data_impl=mmap, where each sample has "
            "model.encoder_seq_length tokens; give model.data.train_samples"
        )
    batch = run.step.rampup_batch_size[0] if run.step.rampup_batch_size else run.step.global_batch_size
    least = batch * run.model.encoder_seq_length if run.unit == "tokens" else batch
    demand(samples >= batch, LENGTHS[run.unit], run.length, f"{least} or more, which a global batch has")


def warmup_of(sched: SchedConfig, end: int, unit: Unit) -> int:
    """The length of the warm-up; warmup_steps and its like go before warmup_ratio."""
    warmup = sched.given("warmup", unit)
    return warmup if warmup is not None else int((sched.warmup_ratio or 0) * end)


def check(optim: OptimConfig, length: int, unit: Unit = "steps") -> None:
    """What can be said of a schedule before it runs.

    Raises:
        ConfigError: a rate or a length that makes no sense, or that is counted in another unit than the run.
    """
    sched, end = optim.sched, optim.sched.given("max", unit) or length
    check_units(sched, unit)
    if not 0 <= sched.min_lr <= optim.lr < math.inf:
        raise ConfigError(f"model.optim.sched.min_lr={sched.min_lr}: must lie between 0 and model.optim.lr={optim.lr}")
    ratio, warmup = sched.warmup_ratio, warmup_of(sched, end, unit)
    if sched.given("warmup", unit) is None and ratio is not None and not 0 <= ratio <= 1:
        raise ConfigError(f"model.optim.sched.warmup_ratio={ratio}: must lie between 0 and 1")
    if warmup < 0:
        raise ConfigError(f"model.optim.sched.warmup_{unit}={warmup}: must be 0 or more")
    if warmup > end and not rank.supervised():  # a short trial of a long recipe
        log.warning(
            "model.optim.sched.warmup_%s=%d: the run ends after %d %s, before the learning rate is %g",
            unit,
            warmup,
            end,
            unit,
            optim.lr,
        )
    constant = sched.given("constant", unit)
    if constant > 0 and constant > end - warmup:
        raise ConfigError(
            f"model.optim.sched.constant_{unit}={constant}: warm-up and max_{unit}={end} leave {end - warmup}"
        )


def check_units(sched: SchedConfig, unit: Unit) -> None:
    for other in get_args(Unit):
        for what in ("warmup", "constant", "max"):
            value = sched.given(what, other)  # type: ignore[arg-type]
            if value and other != unit:
                none = "0" if what == "constant" else "null"
                raise ConfigError(
                    f"model.optim.sched.{what}_{other}={value}: the run is counted in {unit} ({LENGTHS[unit]}); "
                    f"give {what}_{unit}, and {what}_{other}={none}"
                )


def learning_rate(at: int, optim: OptimConfig, length: int, unit: Unit = "steps") -> float:
    """The learning rate of a step.

    Args:
        at: steps, samples or tokens in front of it.
        length: the run's in that unit, which the schedule may override with its own.
    """
    sched, end = optim.sched, optim.sched.given("max", unit) or length
    warmup, constant = warmup_of(sched, end, unit), sched.given("constant", unit)
    if warmup and at <= warmup:
        megatrons = constant or unit != "steps"  # from 0; NeMo's does not waste the first step
        return optim.lr * (at / warmup if megatrons else (at + 1) / (warmup + 1))
    if sched.name == "constant":
        return optim.lr
    if at > end - constant:
        return sched.min_lr
    return decayed(at, optim, warmup, end - constant)


def decayed(at: int, optim: OptimConfig, warmup: int, last: int) -> float:
    """The learning rate after the warm-up and up to the end of the decay."""
    sched, lr = optim.sched, optim.lr
    left = 1 - (at - warmup) / max(last - warmup, 1)
    if sched.name == "CosineAnnealing":
        return sched.min_lr + (lr - sched.min_lr) * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    if sched.name == "WarmupAnnealing":
        return sched.min_lr + (lr - sched.min_lr) * left
    if sched.name == "PolynomialDecayAnnealing":
        return sched.min_lr + (lr - sched.min_lr) * left**sched.power
    if sched.name == "SquareAnnealing":
        return max(lr * left**2, sched.min_lr)
    if sched.name == "SquareRootAnnealing":  # counts from the beginning of the warm-up, as NeMo's
        return max(lr * (1 - at / last) ** 0.5, sched.min_lr)
    if sched.name == "InverseSquareRootAnnealing":
        return lr / ((at + 1) / (warmup + 1)) ** 0.5
    return lr  # WarmupPolicy
