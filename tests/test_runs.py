"""A run from its start to its end: killed, stopped, resumed, poisoned; what its folder holds then."""

from __future__ import annotations

import csv
import logging
import math
import signal
import time
from pathlib import Path

import pytest
from commands import Command, run
from test_cli import ROOT, TRAIN, metrics

from nemo_vlm import checkpoints
from nemo_vlm.checkpoints import Position
from nemo_vlm.config import ExpManagerConfig, seconds
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import partial_of
from nemo_vlm.training import exp_manager

QUIET = ("trainer.enable_progress_bar=false", "model.data.num_workers=0")


def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    """A short form of the script; --while-saving kills are at work while a checkpoint is written."""
    command = (str(ROOT / "scripts/chaos.py"), "--kills", "3", "--while-saving", "2", "--steps", "16")
    result = run(*command, "--folder", "runs", "--", *QUIET, cwd=tmp_path, ranks=5)
    assert result.returncode == 0, result.stderr
    assert "3 kills" in result.stdout and "of 16 steps" in result.stdout


def test_a_signal_and_the_clock_save_and_end_the_run(tmp_path: Path) -> None:
    """SIGTERM first; the run then goes on in another layout until its time is over."""
    where = ("exp_manager.name=stopped", "exp_manager.resume_if_exists=true", "trainer.max_steps=100000", *QUIET)
    where += ("model.optim.sched.warmup_steps=0",)
    process = Command(str(TRAIN), *where, cwd=tmp_path)
    file, until = tmp_path / "nemo_experiments/stopped/metrics.csv", time.monotonic() + 120
    while not (file.exists() and file.read_text().count("\n") > 3) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "SIGTERM" in printed
    first = len(metrics(tmp_path, "stopped"))
    (saved,) = checkpoints.complete(file.parent / "checkpoints")
    assert checkpoints.step_of(saved) == first
    assert not list(file.parent.glob("checkpoints/*.nemo"))  # it is not done

    result = run(str(TRAIN), *where, "parallel=fsdp", "trainer.max_time=00:00:00:03", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"going on from step {first}" in result.stdout and "its time is over" in result.stdout
    rows = metrics(tmp_path, "stopped")
    assert [row["global_step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > first
    assert [row["world_size"] for row in rows] == [1] * first + [2] * (len(rows) - first)
    assert rows[first]["reduced_train_loss"] < rows[0]["reduced_train_loss"] / 1.5


def test_steps_that_are_not_finite_are_counted_and_end_the_run(tmp_path: Path) -> None:
    """A learning rate that throws the weights out of range; nothing of it is kept."""
    settings = ("exp_manager.name=out", "model.optim.lr=1e25", "model.max_skipped_steps=1", "trainer.max_steps=9")
    result = run(str(TRAIN), *settings, *QUIET, cwd=tmp_path)
    assert result.returncode == 1
    assert "2 steps with gradients that are not finite" in result.stderr and "; records " in result.stderr
    assert [row["skipped_steps"] for row in metrics(tmp_path, "out")] == [0, 1, 2]
    assert not list((tmp_path / "nemo_experiments/out").glob("checkpoints/*"))


def test_half_precision_ramp_up_and_a_run_that_is_done(tmp_path: Path) -> None:
    """The command again after the last step only replaces what is missing of the end. 24 samples make no batch."""
    settings = ("exp_manager.name=done", "trainer.precision=16-mixed", "model.data.train_samples=240", *QUIET)
    ramp = ("model.rampup_batch_size=[16,8,48]", "exp_manager.checkpoint_callback_params.every_n_train_steps=6")
    result = run(str(TRAIN), *settings, *ramp, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = metrics(tmp_path, "done")
    assert [row["consumed_samples"] for row in rows] == [16, 32, 56, 88, 120, 152, 184, 216]
    warmup = 12  # samples: a twentieth
    angles = [math.pi * (before - warmup) / (240 - warmup) for before in (16, 32, 56, 88, 120, 152, 184)]
    assert [row["lr"] for row in rows] == pytest.approx([0.0, *(1e-3 * (1 + math.cos(angle)) / 2 for angle in angles)])
    assert rows[-1]["loss_scale"] <= 2**10 and rows[-1]["grad_norm"] < 1e4
    archive = tmp_path / "nemo_experiments/done/checkpoints/done.nemo"
    table = tmp_path / "nemo_experiments/done/metrics.csv"
    content, text = archive.read_bytes(), table.read_text()
    archive.unlink()
    again = ("exp_manager.resume_if_exists=true", "trainer.enable_progress_bar=true")
    result = run(str(TRAIN), *settings, *ramp, *again, cwd=tmp_path)
    assert result.returncode == 0 and "nothing is left to do: step 8 was the last" in result.stdout, result.stderr
    assert archive.read_bytes() == content and table.read_text() == text


def leave(folder: Path, *steps: int) -> ExpManagerConfig:
    """What a run of some steps leaves, its last row half written."""
    config = ExpManagerConfig(name="old", exp_dir=str(folder))
    for step in steps:
        path = checkpoints.path_of(checkpoints.folder_of(config), step)
        checkpoints.begin(path)
        checkpoints.finish(path, Position(step), {})
    columns = ",".join(exp_manager.COLUMNS)
    lines = [f"{step},{32 * step}" + "," * 12 for step in range(1, max(steps) + 3)]
    (folder / "old" / "metrics.csv").write_text("\n".join([columns, *lines]) + f"\n{max(steps) + 3},3")
    return config


def steps_in(file: Path) -> list[int]:
    with open(file, newline="") as opened:
        return [int(row["global_step"]) for row in csv.DictReader(opened)]


def changed(config: ExpManagerConfig, **settings) -> ExpManagerConfig:
    return ExpManagerConfig(**{"name": config.name, "exp_dir": config.exp_dir, **settings})


def go_on(config: ExpManagerConfig) -> Path | None:
    opened = exp_manager.open_run(config, {})
    exp_manager.begin(config, opened)
    return opened.checkpoint


def test_resuming_drops_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    config = leave(tmp_path, 2, 4, 6)
    answers = [tmp_path / "old" / name for name in ("val_answers.jsonl", "val_answers.png")]
    for path in answers:
        path.write_text('{"global_step": 6}\n{"global_step": 6}\n')
    chosen = go_on(changed(config, resume_if_exists=True))
    assert all(path.exists() for path in answers)
    assert chosen.name == "step_000006" and steps_in(tmp_path / "old/metrics.csv") == [1, 2, 3, 4, 5, 6]
    assert exp_manager.open_run(changed(config, resume_from_step=4), {}).checkpoint.name == "step_000004"
    assert len(checkpoints.complete(chosen.parent)) == 3  # nothing goes before the run stands
    chosen = go_on(changed(config, resume_from_step=4))
    assert not any(path.exists() for path in answers)
    assert chosen.name == "step_000004" and steps_in(tmp_path / "old/metrics.csv") == [1, 2, 3, 4]
    assert [path.name for path in checkpoints.complete(chosen.parent)] == ["step_000002", "step_000004"]
    with pytest.raises(ConfigError, match=r"resume_from_step=6: no complete .* there are: 2, 4"):
        exp_manager.open_run(changed(config, resume_from_step=6), {})


def test_starting_from_zero_says_so_and_loses_nothing(tmp_path: Path, caplog) -> None:
    config = leave(tmp_path, 3)
    with caplog.at_level(logging.WARNING):
        assert go_on(config) is None
    assert "STARTING FROM ZERO" in caplog.text
    assert steps_in(tmp_path / "old/run_0/metrics.csv")[:2] == [1, 2]
    assert checkpoints.complete(tmp_path / "old/run_0/checkpoints") and not (tmp_path / "old/metrics.csv").exists()
    caplog.clear()
    assert go_on(changed(config, resume_if_exists=True)) is None
    assert "STARTING" not in caplog.text  # nothing of a run is there any more
    with pytest.raises(ConfigError, match="resume_if_exists=true: no complete checkpoint"):
        exp_manager.open_run(changed(config, resume_if_exists=True, resume_ignore_no_checkpoint=False), {})


def test_what_a_killed_process_left_of_an_archive_goes(tmp_path: Path) -> None:
    config = leave(tmp_path, 3)
    partial = partial_of(checkpoints.folder_of(config) / "old.nemo")
    partial.touch()
    exp_manager.open_run(config, {})
    assert not partial.exists()


def test_durations() -> None:
    assert seconds("key", "01:02:03:04") == ((24 + 2) * 60 + 3) * 60 + 4
    with pytest.raises(ConfigError, match="key=10m: must be DD:HH:MM:SS"):
        seconds("key", "10m")
