"""exp_manager's keys: where a run's folder is, what is kept in it, from where it goes on, what is refused."""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import ROOT, TRAIN, metrics, run
from test_families import TINY, build_all, one_rank, run_of, whole

from nemo_vlm import checkpoints
from nemo_vlm.checkpoints import Position
from nemo_vlm.config import CheckpointConfig, EarlyStoppingConfig, ExpManagerConfig, TrainerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout, one_process
from nemo_vlm.training import early_stopping, exp_manager, log_file, saving, versions
from nemo_vlm.training.build import make_engine
from nemo_vlm.typed import plain_defaults, read


def manager(**settings) -> ExpManagerConfig:
    return read(ExpManagerConfig, settings, "exp_manager")


def leave(config: ExpManagerConfig, *steps: int) -> None:
    for step in steps:
        path = checkpoints.path_of(checkpoints.folder_of(config), step)
        checkpoints.begin(path)
        checkpoints.finish(path, Position(step), {})


def start(config: ExpManagerConfig) -> Path | None:
    opened = exp_manager.open_run(config, {})
    exp_manager.begin(config, opened)
    return opened.checkpoint


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"name": "a"}, "nemo_experiments/a"),
        ({"name": "a", "exp_dir": None}, "nemo_experiments/a"),
        ({"name": "a", "exp_dir": "out", "version": 3}, "out/a/3"),
        ({"name": "a", "exp_dir": "out", "explicit_log_dir": "here/it"}, "here/it"),
    ],
)
def test_where_a_run_is_kept(settings: dict, folder: str) -> None:
    config = manager(**settings)
    assert checkpoints.run_folder(config) == Path(folder)
    assert checkpoints.archive_path(config) == Path(folder, "checkpoints/a.nemo")
    named = replace(config, checkpoint_callback_params=CheckpointConfig(dirpath="kept", prefix="m", postfix="-x.nemo"))
    assert checkpoints.archive_path(named) == Path("kept/m-x.nemo")


def test_the_time_of_the_start_as_version() -> None:
    one, two = (Layout(1, ranks, 1, 1, False, (2,), 1, 1) for ranks in (1, 2))
    config = manager(use_datetime_version=True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", versions.dated(config, one, {}).version)
    assert versions.dated(manager(use_datetime_version=True, resume_if_exists=True), one, {}).version is None
    parent = versions.dated(config, two, {})
    told = versions.told(parent, {"HOME": "/"}) | {"LOCAL_RANK": "1"}
    assert told["HOME"] == "/" and versions.dated(config, two, told) == parent
    with pytest.raises(ConfigError, match=r"use_datetime_version=true: .* export NEMO_EXPM_VERSION=\$\(date"):
        versions.dated(config, two, {"LOCAL_RANK": "1"})


def test_what_is_kept_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text("run it")
    config = manager(exp_dir=str(tmp_path), name="kept", files_to_copy=[str(tmp_path / "script.sh")])
    with pytest.raises(OSError), log_file.kept(config, {"RANK": "4", "LOCAL_RANK": "0"}):
        exp_manager.begin(config, exp_manager.open_run(config, {"model": {}}))
        logging.getLogger("nemo_vlm").error("a line")
        raise OSError("the end")
    with log_file.kept(config, {"RANK": "5", "LOCAL_RANK": "1"}):
        pass
    folder = tmp_path / "kept"
    found = {path.name for path in folder.iterdir()}
    assert found - {"git-info.log"} == {
        "config.yaml",
        "cmd-args.log",
        "script.sh",
        "nemo_log_globalrank-4_localrank-0.txt",
    }
    assert (folder / "script.sh").read_text() == "run it"
    lines = (folder / "nemo_log_globalrank-4_localrank-0.txt").read_text().splitlines()
    assert lines[0].endswith("ERROR] a line") and "OSError: the end" in lines[1]
    if (ROOT / ".git").exists():
        assert re.match("commit hash: [0-9a-f]{40}\n", (folder / "git-info.log").read_text())
    with pytest.raises(ConfigError, match=r"files_to_copy=nothing: cannot be copied \(No such file"):
        exp_manager.check_copies(replace(config, files_to_copy=("nothing",)))
    exp_manager.check_copies(config)
    (tmp_path / "metrics.csv").touch()
    for name in ("metrics.csv", "kept/script.sh"):
        with pytest.raises(ConfigError, match=rf"files_to_copy={tmp_path}/{name}: the run's folder has another"):
            exp_manager.check_copies(replace(config, files_to_copy=(str(tmp_path / name),)))


def test_nothing_of_an_earlier_run_is_written_over(tmp_path: Path) -> None:
    """Neither what says how it was made nor its archive on another disk."""
    (tmp_path / "script.sh").write_text("first")
    params = CheckpointConfig(dirpath=str(tmp_path / "fast_disk"))
    config = replace(manager(exp_dir=str(tmp_path), name="a"), checkpoint_callback_params=params)
    config = replace(config, files_to_copy=(str(tmp_path / "script.sh"),))
    exp_manager.begin(config, exp_manager.open_run(config, {"run": 1}))
    (tmp_path / "a/metrics.csv").touch()
    leave(config, 2)
    checkpoints.archive_path(config).write_text("first")
    (tmp_path / "script.sh").write_text("second")
    opened = exp_manager.open_run(config, {"run": 2})
    assert (tmp_path / "a/config.yaml").read_text() == "run: 1\n"  # untouched until all ranks stand
    exp_manager.begin(config, opened)
    assert [(tmp_path / place).read_text() for place in ("a/run_0/config.yaml", "a/config.yaml")] == [
        *("run: 1\n", "run: 2\n"),
    ]
    assert [(tmp_path / place).read_text() for place in ("a/run_0/script.sh", "a/script.sh")] == ["first", "second"]
    assert (tmp_path / "fast_disk/run_0/a.nemo").read_text() == "first"
    assert not checkpoints.archive_path(config).exists()


def test_a_checkpoint_of_another_run_is_a_beginning(tmp_path: Path, caplog) -> None:
    """resume_if_exists prefers the run's own, so that the same command goes on after a break."""
    other, config = (manager(exp_dir=str(tmp_path), name=name) for name in ("other", "mine"))
    leave(other, 2, 4)
    leave(config, 1)
    path = checkpoints.folder_of(other) / "step_000002"
    config = replace(config, resume_from_checkpoint=str(path))
    with caplog.at_level(logging.INFO):
        assert start(config) == path
    assert f"starting from {path}: a run of this name exists" in caplog.text
    assert "going on from step 2" in caplog.text
    assert len(checkpoints.complete(checkpoints.folder_of(other))) == 2  # nothing of the other run goes
    assert checkpoints.complete(tmp_path / "mine/run_0/checkpoints") and not checkpoints.folder_of(config).exists()
    leave(config, 3)
    assert start(replace(config, resume_if_exists=True)).name == "step_000003"
    folder = str(checkpoints.folder_of(other))
    assert start(replace(config, resume_from_checkpoint=folder)).name == "step_000004"
    with pytest.raises(ConfigError, match="resume_from_checkpoint=nowhere: no complete checkpoint of a run"):
        checkpoints.choose(replace(config, resume_from_checkpoint="nowhere"))


def test_an_earlier_runs_checkpoints_elsewhere_are_not_lost(tmp_path: Path, caplog) -> None:
    params = CheckpointConfig(dirpath=str(tmp_path / "fast_disk"))
    config = replace(manager(exp_dir=str(tmp_path), name="run"), checkpoint_callback_params=params)
    leave(config, 5)
    assert start(config) is None and "STARTING FROM ZERO" in caplog.text
    assert [path.name for path in checkpoints.complete(tmp_path / "fast_disk/run_0")] == ["step_000005"]


def test_what_is_removed_is_named(tmp_path: Path, caplog) -> None:
    config = manager(exp_dir=str(tmp_path), name="back")
    leave(config, 1, 2, 3)
    checkpoint = checkpoints.folder_of(config) / "step_000001"
    assert start(replace(config, resume_from_checkpoint=str(checkpoint))) == checkpoint
    assert "removing what is later than step 1: step_000002, step_000003" in caplog.text


def test_without_a_checkpoint_the_best_weights_are_the_last(tmp_path: Path, caplog) -> None:
    config, model = manager(exp_dir=str(tmp_path), name="best"), TINY["gpt"]
    with one_rank(model):
        settings, layout = run_of("gpt", model), one_process(model, 4)
        engine = make_engine(settings, layout, build_all(settings, layout)[0])
        before = whole(engine.parts())
        saving.load_best(engine, config)
        assert all(torch.equal(value, before[name]) for name, value in whole(engine.parts()).items())
    assert f"no checkpoint is left in {checkpoints.folder_of(config)}" in caplog.text
    leave(config, 1, 2)
    assert checkpoints.best(config) == checkpoints.folder_of(config) / "step_000002"


def test_an_overflow_does_not_end_a_run() -> None:
    for monitor in ("grad_norm", "val_loss"):
        config = EarlyStoppingConfig(monitor=monitor)
        row = {"grad_norm": math.inf, "val_loss": math.inf}
        skipped = early_stopping.after_step({}, row, True, config)
        assert (early_stopping.verdict(skipped, config) is None) == (monitor == "grad_norm")
        assert early_stopping.verdict(early_stopping.after_step({}, row, False, config), config)
    assert early_stopping.after_step({}, {"lr": 1.0}, False, config) == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"name": ".."},
        {"name": ""},
        {"version": "../../x"},
        {"version": "a/b"},
        {"checkpoint_callback_params": {"prefix": "../x"}},
        {"checkpoint_callback_params": {"postfix": "/x.nemo"}},
    ],
    ids=str,
)
def test_names_that_lead_elsewhere(settings: dict) -> None:
    with pytest.raises(ConfigError, match=r"^exp_manager\.\S+=\S*: must be the plain name of a file or folder"):
        manager(**settings)


REFUSED = {
    "create_neptune_logger": (True, "there are create_tensorboard_logger, create_wandb_logger and"),
    "create_preemption_callback": (False, "SIGTERM always saves"),
    "log_step_timing": (False, "train_step_timing in metrics.csv"),
    "step_timing_kwargs": ({"buffer_size": 5}, "train_step_timing in metrics.csv"),
    "ema": ({"enable": True}, "averages of the weights are not kept"),
    "checkpoint_callback_params": ({"save_last": False}, "a run goes on from its newest checkpoint"),
    "early_stopping_callback_params": ({"patience": 0}, "must be 1 or more"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_has_one_value_here_says_so(key: str) -> None:
    value, message = REFUSED[key]
    with pytest.raises(ConfigError, match=rf"exp_manager\.{key}[.=].*{message}"):
        manager(**{key: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 4}, "trainer.accumulate_grad_batches=4: model.global_batch_size over"),
        ({"logger": True}, "trainer.logger=true: the loggers are exp_manager's"),
        ({"max_steps": -2}, "trainer.max_steps=-2: must be 1 or more, or -1 for no limit"),
        ({"limit_val_batches": 1.5}, "trainer.limit_val_batches=1.5: must be a whole number"),
        ({"val_check_interval": 0}, "trainer.val_check_interval=0: must be more than 0"),
    ],
)
def test_trainers_mistakes(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(TrainerConfig, settings, "trainer")


def test_what_nemo_writes_is_read() -> None:
    """A whole number of batches is not the same as a part, and names that NeMo has for things mean the things."""
    written = {"precision": 16, "max_epochs": -1, "check_val_every_n_epoch": -1, "limit_val_batches": 1.0}
    trainer = read(TrainerConfig, plain_defaults(TrainerConfig) | written, "trainer")
    assert (trainer.precision, trainer.max_epochs, trainer.check_val_every_n_epoch) == ("16-mixed", None, None)
    assert type(trainer.limit_val_batches) is float
    assert type(read(TrainerConfig, {"limit_val_batches": 1}, "trainer").limit_val_batches) is int
    params = {"monitor": "step", "save_weights_only": True, "filename": "llava-{step}-{consumed_samples}"}
    config = manager(checkpoint_callback_params=params).checkpoint_callback_params
    assert (config.monitor, config.mode) == ("global_step", "max")
    assert not config.save_optimizer and not config.save_rng


@pytest.mark.parametrize("library", ["wandb", "mlflow"])
def test_a_logger_needs_its_library(library: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    config = manager(exp_dir=str(tmp_path), **{f"create_{library}_logger": True})
    with pytest.raises(ConfigError, match=f"create_{library}_logger=true: {library} is not installed"):
        exp_manager.loggers(config)


def test_a_run_that_stands_still_ends_and_its_best_is_kept(tmp_path: Path) -> None:
    """The second command has more patience, and goes on as if the run had never ended."""
    stop = "exp_manager.early_stopping_callback_params"
    save = "exp_manager.checkpoint_callback_params"
    settings = ("exp_manager.name=still", "trainer.max_steps=14", "model.optim.sched.warmup_steps=0", "parallel=ddp")
    settings += ("trainer.val_check_interval=2", "trainer.limit_val_batches=1", "model.data.validation_split=0.1")
    settings += ("exp_manager.create_early_stopping_callback=true", f"{stop}.min_delta=0.5", f"{stop}.patience=2")
    settings += (f"{save}.monitor=val_loss", f"{save}.save_top_k=1", f"{save}.save_best_model=true")
    settings += (f"{save}.always_save_nemo=true", "exp_manager.resume_if_exists=true", "model.data.num_workers=0")
    result = run(str(TRAIN), *settings, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "stopped early, after step" in result.stdout and "2 times in a row not better than" in result.stdout
    rows = metrics(tmp_path, "still")
    assert len(rows) < 14 and [("val_loss" in row) for row in rows] == [False, True] * (len(rows) // 2)
    losses = {row["global_step"]: row["val_loss"] for row in rows if "val_loss" in row}
    folder = tmp_path / "nemo_experiments/still/checkpoints"
    best = min(losses, key=losses.__getitem__)
    assert {checkpoints.step_of(path) for path in checkpoints.complete(folder)} == {best, len(rows)}
    assert f"the archive has the weights of nemo_experiments/still/checkpoints/step_{int(best):06d}" in result.stdout
    assert (folder / "still.nemo").exists()

    result = run(str(TRAIN), *settings, f"{stop}.patience=99", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"going on from step {len(rows)}" in result.stdout
    more = metrics(tmp_path, "still")
    assert len(more) == 14 and more[: len(rows)] == rows
