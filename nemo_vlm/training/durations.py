"""Epochs as steps: where trainer.max_epochs ends a run, and how often it validates.

Samples go on from one epoch into the next, so that every global batch is full; an epoch is the data's length.
"""

from __future__ import annotations

from dataclasses import replace

from nemo_vlm.config import RunConfig, StepConfig
from nemo_vlm.data.orders import batch_size_at
from nemo_vlm.training import schedules


def settle(run: RunConfig, epoch: int) -> RunConfig:
    """trainer.max_steps where trainer.max_epochs is what ends the run; `epoch` is its samples."""
    trainer = run.trainer
    if trainer.max_epochs is None:
        return run
    steps = steps_within(trainer.max_epochs * epoch, run.step)
    if trainer.max_steps != -1:
        steps = min(steps, trainer.max_steps)
    schedules.check(run.optim, steps)
    return replace(run, trainer=replace(trainer, max_steps=steps))


def steps_within(samples: int, step: StepConfig) -> int:
    """The full global batches among so many samples, and one where there is none."""
    consumed = steps = 0
    while step.rampup_batch_size is not None and consumed <= step.rampup_batch_size[2]:
        size = batch_size_at(consumed, step)
        if consumed + size > samples:
            return max(steps, 1)
        consumed, steps = consumed + size, steps + 1
    return max(steps + (samples - consumed) // step.global_batch_size, 1)


def validation_interval(run: RunConfig, epoch: int) -> int:
    """Steps from one validation to the next; one of a run's own steps is a full global batch here."""
    every = run.trainer.val_check_interval
    if isinstance(every, int):
        return every
    return max(int(every * epoch / run.step.global_batch_size), 1)


def validation_batches(limit: int | float, samples: int, step: StepConfig) -> int:
    """The global batches of one validation, the last of which need not be full."""
    batches = -(-samples // step.global_batch_size)
    if isinstance(limit, int):
        return min(limit, batches)
    return max(int(limit * batches), 1) if limit else 0
