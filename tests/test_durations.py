"""How long a run is and what its schedule counts: steps, samples, tokens or epochs, against counts by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from test_families import TINY, run_of

from nemo_vlm import checkpoints
from nemo_vlm.checkpoints import Position
from nemo_vlm.config import DataConfig, ExpManagerConfig, OptimConfig, RunConfig, SchedConfig, StepConfig, TrainerConfig
from nemo_vlm.data.orders import batch_size_at
from nemo_vlm.errors import ConfigError
from nemo_vlm.training import durations
from nemo_vlm.training.schedules import learning_rate, settle_length
from nemo_vlm.typed import model_tree

GROWING = StepConfig(micro_batch_size=2, global_batch_size=32, rampup_batch_size=(8, 8, 100))
LENGTH = 128  # tokens of a sample


def run_with(
    data: dict | None = None, sched: dict | None = None, step: StepConfig | None = None, **trainer
) -> RunConfig:
    run = run_of("gpt", TINY["gpt"], step=step or StepConfig(micro_batch_size=2, global_batch_size=8))
    impl = "mmap" if "train_tokens" in (data or {}) else "json"
    return replace(
        run,
        model=replace(run.model, encoder_seq_length=LENGTH),
        data=DataConfig(**{"data_impl": impl} | (data or {})),
        optim=OptimConfig(lr=2.0, sched=SchedConfig(**sched or {})),
        trainer=TrainerConfig(**trainer),
    )


def rates(run: RunConfig) -> list[float]:
    """Of all steps of a run, as the training module asks for them."""
    run, position, found = durations.settle(settle_length(run, ()), 0), Position(), []
    for _ in range(run.trainer.max_steps):
        found.append(learning_rate(durations.at(run, position), run.optim, run.length, run.unit))
        position.global_step += 1
        position.consumed_samples += batch_size_at(position.consumed_samples, run.step)
    return found


def test_samples_and_tokens_are_scheduled_as_megatrons_while_the_batch_grows() -> None:
    samples, warmup = 1000, 150
    weight = torch.optim.SGD([torch.zeros(1)], 1.0)
    theirs = OptimizerParamScheduler(weight, 0.0, 2.0, 0.5, warmup, samples, "cosine", 0.0, 0.0, 1, "constant")
    in_samples = run_with({"train_samples": samples}, {"warmup_samples": warmup, "min_lr": 0.5}, GROWING)
    sched = {"warmup_tokens": LENGTH * warmup, "min_lr": 0.5}
    in_tokens = run_with({"train_tokens": LENGTH * samples}, sched, GROWING)
    consumed, expected = 0, []
    while consumed + (size := batch_size_at(consumed, GROWING)) <= samples:
        expected.append(weight.param_groups[0]["lr"])
        theirs.step(size)
        consumed += size
    assert len(expected) > 30 and len(set(expected)) > 30
    assert rates(in_samples) == pytest.approx(expected, rel=1e-12)
    assert rates(in_tokens) == pytest.approx(expected, rel=1e-12)


def test_a_ratio_and_a_constant_end_are_of_the_same_unit() -> None:
    sched = {"warmup_ratio": 0.25, "constant_samples": 16, "min_lr": 0.5}
    found = rates(run_with({"train_samples": 64}, sched))
    assert found[:3] == pytest.approx([0.0, 1.0, 2.0])  # 16 samples
    assert found[4] == pytest.approx(0.5 + 1.5 * 0.5)  # half of the 32 between
    assert found[6:] == pytest.approx([0.5, 0.5])
    decay_ends_early = rates(run_with({"train_samples": 64}, {"max_samples": 32, "min_lr": 0.5}))
    assert decay_ends_early[4:] == pytest.approx([0.5] * 4)


LENGTHS = [
    ({"data": {"train_samples": 100}}, 12),  # of 8; a recipe's 100 steps do not matter
    ({"data": {"train_tokens": 10_000}}, 9),  # 78 samples
    ({"data": {"train_samples": 100}, "max_epochs": 1}, 5),
    ({"data": {"train_samples": 32}, "max_epochs": 1}, 4),
    ({"data": {"train_samples": 100}, "step": GROWING}, 8),  # 8 8 8 8 8 16 16 24
    ({"max_epochs": 2, "max_steps": -1}, 10),
    ({"max_steps": 7}, 7),
]


@pytest.mark.parametrize(("settings", "steps"), LENGTHS, ids=[str(sorted(settings)) for settings, _ in LENGTHS])
def test_what_ends_a_run(settings: dict, steps: int) -> None:
    """41 samples an epoch."""
    assert durations.settle(settle_length(run_with(**settings), ()), 41).trainer.max_steps == steps


def test_steps_on_the_command_line_end_a_run_in_samples_too() -> None:
    run = run_with({"train_samples": 100}, max_steps=3)
    given = settle_length(run, {"trainer.max_steps"})
    assert durations.settle(given, 0).trainer.max_steps == 3
    assert given.length == 100  # the schedule stays that of the whole run
    assert durations.settle(settle_length(run, {"model.data.train_samples"}), 0).trainer.max_steps == 12


@pytest.mark.parametrize(("size", "last"), [(8, 12), (4, 20), (16, 8), (32, 6)])
def test_a_run_in_samples_goes_on_with_another_batch_to_the_same_end(size: int, last: int) -> None:
    """Five steps of eight are behind it, sixty samples in front."""
    run = settle_length(run_with({"train_samples": 100}, step=StepConfig(2, size)), ())
    behind = Position(global_step=5, consumed_samples=40)
    assert durations.settle(run, 0, behind).trainer.max_steps == last
    ended = Position(global_step=25, consumed_samples=100)
    assert durations.settle(run, 0, ended).trainer.max_steps == 25


def test_tokens_are_counted_by_samples_of_one_length(tmp_path: Path) -> None:
    run, path = run_with({"train_tokens": 10_000}), tmp_path / "step_000005"
    checkpoints.begin(path)
    checkpoints.finish(path, Position(global_step=5, consumed_samples=40), model_tree(run))
    chosen = checkpoints.choose(ExpManagerConfig(resume_from_checkpoint=str(tmp_path)))
    durations.check_past(run, chosen)
    durations.check_past(run, None)
    longer = replace(run, model=replace(run.model, encoder_seq_length=2 * LENGTH))
    with pytest.raises(ConfigError, match=f"^model.encoder_seq_length=256: must be 128, as in {path}: "):
        durations.check_past(longer, chosen)
    durations.check_past(replace(longer, data=DataConfig(train_samples=100)), chosen)


MISTAKES = [
    (
        {"data": {"train_samples": 100}, "sched": {"warmup_steps": 5}},
        "model.optim.sched.warmup_steps=5: the run is counted in samples (model.data.train_samples); "
        "give warmup_samples, and warmup_steps=null",
    ),
    (
        {"data": {"train_tokens": 10_000}, "sched": {"constant_samples": 5}},
        "model.optim.sched.constant_samples=5: the run is counted in tokens (model.data.train_tokens); "
        "give constant_tokens, and constant_samples=0",
    ),
    (
        {"sched": {"warmup_tokens": 5}},
        "model.optim.sched.warmup_tokens=5: the run is counted in steps (trainer.max_steps); give warmup_steps",
    ),
    ({"data": {"train_samples": 7}}, "model.data.train_samples=7: must be 8 or more, which a global batch has"),
    ({"data": {"train_tokens": 1000}}, "model.data.train_tokens=1000: must be 1024 or more"),
    (
        {"data": {"train_tokens": 10_000, "data_impl": "json"}},
        "train_tokens=10000: only with model.data.data_impl=mmap",
    ),
    ({"data": {"train_samples": 0}}, "model.data.train_samples=0: must be 1 or more, or null"),
    ({"data": {"train_samples": 8, "train_tokens": 8}}, "model.data.train_samples=8: train_tokens is given too"),
    ({"max_steps": -1}, "trainer.max_steps=-1: needs trainer.max_epochs, model.data.train_samples or train_tokens"),
    (
        {"data": {"train_samples": 80}, "sched": {"warmup_samples": 50, "constant_samples": 40}},
        "max_samples=80 leave 30",
    ),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=[message[:60] for _, message in MISTAKES])
def test_mistakes_are_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        settle_length(run_with(**settings), ())
    assert message in str(error.value) and "\n" not in str(error.value)
