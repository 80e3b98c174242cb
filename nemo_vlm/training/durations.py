"""Epochs, samples and tokens as steps: where a run ends, and how often it validates.

Samples go on from one epoch into the next, so that every global batch is full; an epoch is the data's length.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemo_vlm.archive import read_config
from nemo_vlm.checkpoints import Position
from nemo_vlm.config import RunConfig, StepConfig, demand
from nemo_vlm.data.orders import batch_size_at
from nemo_vlm.formats.store import Folder
from nemo_vlm.training import schedules


def settle(run: RunConfig, epoch: int, position: Position | None = None) -> RunConfig:
    """The run with the step that ends it as trainer.max_steps.

    Args:
        epoch: samples of one.
        position: where the run goes on from, perhaps with other global batches than it had.
    """
    trainer, begin = run.trainer, position or Position()
    limits = [run.samples_limit] if run.samples_limit is not None else []
    if trainer.max_epochs is not None:
        limits.append(trainer.max_epochs * epoch)
    if not limits:
        return run
    steps = begin.global_step + steps_within(min(limits), run.step, begin.consumed_samples)
    if trainer.max_steps != -1:
        steps = min(steps, trainer.max_steps)
    return replace(run, trainer=replace(trainer, max_steps=steps))


def check(run: RunConfig, epoch: int) -> None:
    """A schedule in steps of a run in epochs, which nobody could check before their length was known.

    Raises:
        ConfigError: as schedules.check.
    """
    if run.trainer.max_epochs is not None and run.unit == "steps":
        schedules.check(run.optim, settle(run, epoch).length)


def check_past(run: RunConfig, checkpoint: Path | None) -> None:
    """A run that counts tokens, by samples of one length, goes on with that length.

    Args:
        checkpoint: which it goes on from, if any.
    Raises:
        ConfigError: that was trained with another.
    """
    if run.unit != "tokens" or checkpoint is None:
        return
    given, past = run.model.encoder_seq_length, read_config(Folder(checkpoint))["encoder_seq_length"]
    right = f"{past}, as in {checkpoint}: what is behind it counts for model.data.train_tokens"
    demand(given == past, "model.encoder_seq_length", given, right)


def in_words(run: RunConfig, epoch: int) -> list[str]:
    """What a length that is not given in steps comes to."""
    given = [] if run.unit == "steps" else [f"{schedules.LENGTHS[run.unit]}={run.length}"]
    given += [] if run.trainer.max_epochs is None else [f"trainer.max_epochs={run.trainer.max_epochs}"]
    steps = settle(run, epoch).trainer.max_steps
    return [f"{', '.join(given)}: trainer.max_steps={steps}"] if given else []


def at(run: RunConfig, position: Position) -> int:
    """Where a run stands, in the unit of its length and schedule."""
    samples = position.consumed_samples
    counts = {"steps": position.global_step, "samples": samples, "tokens": samples * run.model.encoder_seq_length}
    return counts[run.unit]


def steps_within(samples: int, step: StepConfig, consumed: int = 0) -> int:
    """The full global batches among so many samples; of a run that begins, one where there is none.

    Args:
        consumed: how many of the samples are behind the run.
    """
    steps, least = 0, 0 if consumed else 1
    while step.rampup_batch_size is not None and consumed <= step.rampup_batch_size[2]:
        size = batch_size_at(consumed, step)
        if consumed + size > samples:
            return max(steps, least)
        consumed, steps = consumed + size, steps + 1
    return max(steps + (samples - consumed) // step.global_batch_size, least)


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
