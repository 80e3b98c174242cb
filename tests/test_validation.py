"""val_loss under every layout against one process, when it is due, and what it decides: checkpoints and the end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from distributed import run_ranks
from test_families import TINY, build_all, make_layout, run_of, sharded, steps_of, whole

from nemo_vlm import checkpoints
from nemo_vlm.batch import Sample, empty_sample
from nemo_vlm.checkpoints import Position
from nemo_vlm.config import (
    CheckpointConfig,
    EarlyStoppingConfig,
    ExpManagerConfig,
    OptimConfig,
    RunConfig,
    StepConfig,
    TrainerConfig,
)
from nemo_vlm.data.loader import Share
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.models.base import family
from nemo_vlm.training import durations, early_stopping
from nemo_vlm.training.build import make_engine
from nemo_vlm.training.module import Plan, TrainingModule
from nemo_vlm.training.validation import Validation, check

HELD_OUT = 13  # samples: a global batch of 8, and one that must be filled
OVERLAPPED = OptimConfig(
    name="distributed_fused_adam", lr=1e-2, overlap_grad_sync=True, overlap_param_sync=True, eps=1e-6
)


def llava(**settings) -> RunConfig:
    run = run_of("llava", TINY["llava"], **settings)
    return replace(run, data=replace(run.data, num_workers=0))


class HeldOut:
    """Samples as data.records gives them."""

    packed, lengths = False, None

    def __init__(self, run: RunConfig) -> None:
        self.held = family("llava", "tiny").samples(run.model, HELD_OUT, torch.Generator().manual_seed(99))
        self.parts = [numpy.arange(HELD_OUT)]

    def __len__(self) -> int:
        return HELD_OUT

    def samples(self, number: int) -> list[Sample]:
        return [self.held[number] if number >= 0 else empty_sample()]


def validated(run: RunConfig, layout: Layout):
    """Two steps with validations between them and around, and the same steps without."""
    groups.initialize(layout, seed=1)
    share = Share(groups.data_parallel_rank(), layout.data)
    validation = Validation(run, layout, share, HeldOut(run), epoch=100)  # type: ignore[arg-type]
    outcomes = []
    for validates in (True, False):
        engine = make_engine(run, layout, build_all(run, layout)[0])
        losses, steps = [], []
        for number in range(3):
            losses += [validation.loss(engine)] if validates else []
            steps += steps_of(engine, run, layout, number, 1) if number < 2 else []
        outcomes.append((losses, steps, whole(engine.parts())))
    groups.shut_down()
    return outcomes


@pytest.fixture(scope="module")
def one_process():
    run = llava()
    (losses, _, _), _ = run_ranks(validated, 1, run, make_layout(run, 1))[0]
    return losses


@pytest.mark.parametrize("layout", ["overlapped", "tp2_sp", "pp2_vpp2", "fsdp_grad"])
def test_every_layout_validates_as_one_process_and_trains_on_as_if_nothing_had_been(layout, one_process) -> None:
    run = llava(optim=OVERLAPPED) if layout == "overlapped" else llava()
    run, where = sharded(run, "ddp" if layout == "overlapped" else layout)
    for with_validation, without in run_ranks(validated, where.world_size, run, where):
        losses, steps, weights = with_validation
        assert losses[0] == pytest.approx(one_process[0], rel=1e-6)
        assert losses == pytest.approx(one_process, rel=1e-5)
        assert steps == without[1]
        assert all(torch.equal(value, without[2][name]) for name, value in weights.items())


def test_the_loss_is_the_mean_over_all_tokens(one_process) -> None:
    """However many samples a batch of the validation holds; a limit takes the first ones."""
    run = llava(step=StepConfig(micro_batch_size=1, global_batch_size=2))
    (losses, _, _), _ = run_ranks(validated, 1, run, make_layout(run, 1))[0]
    assert losses[0] == pytest.approx(one_process[0], rel=1e-6)
    limited = replace(run, trainer=replace(run.trainer, limit_val_batches=1))
    (losses, _, _), _ = run_ranks(validated, 1, limited, make_layout(run, 1))[0]
    assert losses[0] != pytest.approx(one_process[0], rel=1e-4)


def validation_of(epoch: int, **trainer) -> Validation:
    run = replace(llava(), trainer=TrainerConfig(**trainer))
    return Validation(run, make_layout(run, 1), Share(0, 1), HeldOut(run), epoch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"val_check_interval": 3}, [3, 6, 9, 12]),
        ({"val_check_interval": 1.0}, [5, 10]),
        ({"val_check_interval": 0.5}, [2, 4, 6, 8, 10, 12]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": 2}, [6, 9]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": -1}, [3, 6, 9, 12]),
    ],
)
def test_when_it_is_due(trainer: dict, steps: list[int]) -> None:
    """Five steps of eight samples an epoch."""
    validation = validation_of(40, **trainer)
    assert [step for step in range(1, 13) if validation.due(Position(step, 8 * step))] == steps


@pytest.mark.parametrize(
    ("limit", "batches"), [(1.0, 2), (0.5, 1), (1, 1), (7, 2), (0.1, 1), (0, 0), (0.0, 0)], ids=str
)
def test_how_much_is_validated(limit: float, batches: int) -> None:
    assert durations.validation_batches(limit, HELD_OUT, StepConfig(global_batch_size=8)) == batches


def test_an_interval_longer_than_the_run_is_said(caplog) -> None:
    validation_of(8000, max_steps=10)
    assert "no validation: trainer.val_check_interval=1.0 is 1000 steps, trainer.max_steps=10" in caplog.text


@pytest.mark.parametrize(
    ("trainer", "step", "steps"),
    [
        ({"max_epochs": 2, "max_steps": -1}, {}, 25),
        ({"max_epochs": 2, "max_steps": 7}, {}, 7),
        ({"max_epochs": 2, "max_steps": 70}, {}, 25),
        ({"max_steps": 70}, {}, 70),
        ({"max_epochs": 1, "max_steps": -1}, {"rampup_batch_size": (2, 2, 12)}, 14),  # 2 2 4 6, then 8s
        ({"max_epochs": 1, "max_steps": -1}, {"global_batch_size": 200}, 1),
    ],
)
def test_epochs_end_a_run(trainer: dict, step: dict, steps: int) -> None:
    """101 samples an epoch."""
    run = llava(step=StepConfig(**{"micro_batch_size": 2, "global_batch_size": 8} | step))
    assert durations.settle(replace(run, trainer=TrainerConfig(**trainer)), 101).trainer.max_steps == steps


def judged(metrics: list[float], **config) -> int | None:
    """The number of the metric that ends the run."""
    settings, stopping = EarlyStoppingConfig(**config), {}
    for number, metric in enumerate(metrics, 1):
        stopping = early_stopping.judge(stopping, metric, settings)
        if early_stopping.verdict(stopping, settings):
            return number
    return None


def lightnings(metrics: list[float], **config) -> int | None:
    from pytorch_lightning.callbacks import EarlyStopping

    callback = EarlyStopping(**{"monitor": "val_loss", "min_delta": 0.001, "patience": 10} | config)
    for number, metric in enumerate(metrics, 1):
        if callback._evaluate_stopping_criteria(torch.tensor(metric))[0]:
            return number
    return None


STANDSTILL = [3.0, 2.0, 1.9995, 2.1, 2.0, 1.5, 1.4995, 1.6, 1.7, 1.8]


@pytest.mark.parametrize(
    ("metrics", "config"),
    [
        (STANDSTILL, {"patience": 3}),
        (STANDSTILL, {"patience": 4}),
        (STANDSTILL, {"patience": 5}),
        (STANDSTILL, {"patience": 3, "min_delta": 0.0}),
        ([-value for value in STANDSTILL], {"patience": 4, "mode": "max"}),
        (STANDSTILL, {"stopping_threshold": 1.9}),
        (STANDSTILL, {"divergence_threshold": 2.05}),
        ([1.0, math.nan, 0.5], {}),
        ([1.0, math.nan, 0.5, 0.4], {"check_finite": False}),
    ],
)
def test_early_stopping_is_lightnings(metrics: list[float], config: dict) -> None:
    assert judged(metrics, **config) == lightnings(metrics, **config)


def test_a_run_led_by_val_loss_needs_validation_data() -> None:
    run = llava()
    led = replace(run, exp_manager=ExpManagerConfig(checkpoint_callback_params=CheckpointConfig(monitor="val_loss")))
    with pytest.raises(ConfigError, match=r"checkpoint_callback_params.monitor=val_loss: there is no validation data"):
        check(led, None)
    check(led, HeldOut(run))
    with pytest.raises(ConfigError, match="trainer.limit_val_batches is 0"):
        check(replace(led, trainer=TrainerConfig(limit_val_batches=0.0)), HeldOut(run))
    stops = replace(run, exp_manager=ExpManagerConfig(create_early_stopping_callback=True))
    with pytest.raises(ConfigError, match=r"early_stopping_callback_params.monitor=val_loss"):
        check(stops, None)
    check(run, None)


def test_the_best_checkpoints_by_val_loss_are_kept(tmp_path: Path) -> None:
    """A checkpoint of a step without validation is worse than any other, and the newest stays."""
    params = CheckpointConfig(monitor="val_loss", save_top_k=2)
    config = ExpManagerConfig(name="top", exp_dir=str(tmp_path), checkpoint_callback_params=params)
    folder = checkpoints.folder_of(config)
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, math.nan), (4, 2.0), (5, None), (6, 2.5)):
        path = checkpoints.path_of(folder, step)
        checkpoints.begin(path)
        checkpoints.finish(path, Position(step, metrics={} if val_loss is None else {"val_loss": val_loss}), {})
        checkpoints.prune(folder, params)
    assert [checkpoints.step_of(path) for path in checkpoints.complete(folder)] == [2, 4, 6]
    assert checkpoints.step_of(checkpoints.best(config)) == 2


def test_checkpoints_by_epochs(tmp_path: Path) -> None:
    """Twenty samples an epoch, eight a step."""
    run = llava()
    module = TrainingModule(Plan(run, make_layout(run, 1), "cpu", range(20)), None)  # type: ignore[arg-type]
    module.batch_size = 8
    ended = {1: [], 2: []}
    for step in range(1, 16):
        module.position = Position(step, 8 * step)
        for count, steps in ended.items():
            steps += [step] if module.epochs_ended(count) else []
    assert ended == {1: [3, 5, 8, 10, 13, 15], 2: [5, 10, 15]}
