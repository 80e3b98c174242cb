"""Several ranks as one run: they start everywhere alike, and when one dies or hangs, all end and one line says why."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_families import TINY, run_of

from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import resolve

pytestmark = pytest.mark.alone
ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "examples" / "neva_finetune.py"
FOREIGN = ("MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "NODE_RANK", "SLURM_", "TORCHELASTIC_", "NEMO_")
SHORT = ("trainer.max_steps=4", "trainer.enable_progress_bar=false")
MINUTE = 60

Start = Callable[..., subprocess.Popen]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Start the demo's command in the background; what a failed test leaves running is killed."""
    started: list[subprocess.Popen] = []

    def run(name: str, *overrides: str, **env: str) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)} | env
        command = [sys.executable, str(TRAIN), *overrides, f"exp_manager.name={name}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))  # type: ignore[call-overload]
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def long(folder: Path, start: Start, name: str, *overrides: str, **env: str) -> subprocess.Popen:
    """A run that is far from its end, when its third step is done."""
    process = start(name, "trainer.max_steps=100000", "trainer.enable_progress_bar=false", *overrides, **env)
    wait_for(lambda: process.poll() is not None or len(metrics(folder, name)) > 2, 4 * MINUTE)
    assert process.poll() is None, process.communicate()[1]
    return process


def wait_for(condition: Callable[[], bool], seconds: float = MINUTE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def metrics(folder: Path, name: str) -> list[dict[str, str]]:
    path = folder / "nemo_experiments" / name / "metrics.csv"
    with contextlib.suppress(FileNotFoundError), open(path, newline="") as file:
        return list(csv.DictReader(file))
    return []


def processes(name: str) -> list[int]:
    """All that belong to a run: its ranks and their loaders' workers have its command line."""
    listing = subprocess.run(["pgrep", "-f", f"exp_manager.name={name}( |$)"], capture_output=True, text=True)
    return [int(pid) for pid in listing.stdout.split()]


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def rank(supervisor: subprocess.Popen, number: int) -> int:
    """The process of a rank that a supervisor has started."""
    listing = subprocess.run(["pgrep", "-P", str(supervisor.pid)], capture_output=True, text=True)
    (found,) = (int(pid) for pid in listing.stdout.split() if environment(int(pid)).get("RANK") == str(number))
    return found


def message(process: subprocess.Popen, name: str, code: int) -> str:
    """The one line that a failed run says, when all its processes are gone."""
    errors = process.communicate(timeout=MINUTE)[1]
    assert process.returncode == code, errors
    wait_for(lambda: not processes(name))
    (line,) = filter(None, errors.splitlines())
    return line


@pytest.mark.parametrize(("layout", "number"), [("tp2_pp2", 2), ("ddp", 0)])
def test_a_killed_rank_takes_the_run_down(folder: Path, start: Start, layout: str, number: int) -> None:
    name = f"killed{number}"
    run = long(folder, start, name, f"parallel={layout}")
    assert len(processes(name)) > {"tp2_pp2": 4, "ddp": 2}[layout]
    os.kill(rank(run, number), signal.SIGKILL)
    assert re.match(
        rf"rank {number} was killed by SIGKILL .*the run is stopped \(step \d+ was running\)$", message(run, name, 1)
    )


def test_a_killed_supervisor_leaves_nothing(folder: Path, start: Start) -> None:
    run = long(folder, start, "orphans", "parallel=ddp")
    run.kill()
    wait_for(lambda: not processes("orphans"))


def test_a_rank_that_does_not_answer_is_named(folder: Path, start: Start) -> None:
    run = long(folder, start, "stopped", "parallel=tp2", "trainer.hang_timeout=20")
    os.kill(rank(run, 1), signal.SIGSTOP)
    assert re.match(r"rank 1 does not answer, .* still for 20 s; .* step \d+, ", message(run, "stopped", 1))


@pytest.fixture
def one_bad_image(folder: Path, start: Start) -> tuple[str, ...]:
    """Two global batches in file order, whose second has one sample that only one of two ranks reads, in vain."""
    if not (folder / "datasets/digits_vqa/train.json").exists():
        start("digits", "trainer.max_steps=1").wait(2 * MINUTE)
    records = json.loads((folder / "datasets/digits_vqa/train.json").read_text())[:64]
    records[40]["image"] = "images/bad.png"
    (folder / "datasets/digits_vqa/bad.json").write_text(json.dumps(records))
    bad = folder / "datasets/digits_vqa/images/bad.png"
    bad.unlink(missing_ok=True)
    bad.symlink_to(bad)  # the file system fails; an image that is only missing would be left out
    data = ("data_path=datasets/digits_vqa/bad.json", "num_workers=0", "dataloader_type=single")
    return "parallel=ddp", *SHORT, *(f"model.data.{setting}" for setting in data)


def test_only_the_rank_that_raises_is_heard(start: Start, one_bad_image: tuple[str, ...]) -> None:
    line = message(start("raises", *one_bad_image), "raises", 1)
    assert re.match(r"rank [01] \(step \d.*\): the run failed: OSError: .*bad.png.*", line), line


def test_a_rank_that_hangs_is_told_from_those_that_wait(
    folder: Path, start: Start, one_bad_image: tuple[str, ...]
) -> None:
    bad = folder / "datasets/digits_vqa/images/bad.png"
    bad.unlink()
    os.mkfifo(bad)  # reading it waits for ever
    run = start("hangs", *one_bad_image, "trainer.hang_timeout=20")
    wait_for(lambda: run.poll() is not None or len(metrics(folder, "hangs")) == 1, 2 * MINUTE)
    line = message(run, "hangs", 1)
    assert re.match(r"rank [01] has stood still for 20 s at: .*step \d.*; in .*images.py:\d+", line), line


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def nodes() -> list[dict[str, str]]:
    """The environment of each of two nodes."""
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    return [{**master, "NODE_RANK": str(node)} for node in range(2)]


def tasks() -> list[dict[str, str]]:
    """What srun --nodes=2 --ntasks-per-node=1 tells each process."""
    job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SLURM_LOCALID": "0"}
    return [{**job, "SLURM_PROCID": str(number), "SLURM_NODEID": str(number)} for number in range(2)]


def test_two_nodes_and_slurm_train_as_one_node(folder: Path, start: Start) -> None:
    losses = {}
    for name, places in (("one", [{}]), ("nodes", nodes()), ("slurm", tasks())):
        runs = [start(name, "parallel=ddp", f"trainer.num_nodes={len(places)}", *SHORT, **env) for env in places]
        for run in runs:
            assert run.wait(3 * MINUTE) == 0, run.communicate()[1]
        rows = metrics(folder, name)
        assert [row["world_size"] for row in rows] == ["2"] * 4
        losses[name] = [float(row["reduced_train_loss"]) for row in rows]
    assert losses["nodes"] == pytest.approx(losses["one"], rel=1e-5)
    assert losses["slurm"] == pytest.approx(losses["one"], rel=1e-5)


def test_a_lost_node_is_told_by_the_other(folder: Path, start: Start) -> None:
    first, second = nodes()
    overrides = ("parallel=ddp", "trainer.num_nodes=2", "trainer.devices=1")
    other = start("lost", *overrides, "trainer.max_steps=100000", **second)
    run = long(folder, start, "lost", *overrides, **first)
    os.kill(rank(other, 1), signal.SIGKILL)
    assert message(run, "lost", 1).startswith("contact to another node was lost, the run is stopped; rank 0 ")
    assert "rank 1 was killed by SIGKILL" in other.communicate(timeout=MINUTE)[1]


@pytest.mark.parametrize(
    ("slurm", "devices", "expected"),
    [
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"},
            4,
            "trainer.devices=4 x trainer.num_nodes=1: the launcher has set SLURM_NTASKS=2; give trainer.devices=2",
        ),
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"},
            "auto",
            "trainer.num_nodes=1: Slurm has started the run on SLURM_NNODES=2 nodes",
        ),
        ({"SLURM_NTASKS": "2"}, "auto", "SLURM_NTASKS=2: give the job --ntasks-per-node=2 too"),
    ],
    ids=["devices", "nodes", "tasks"],
)
def test_what_contradicts_slurm(slurm: dict[str, str], devices: int | str, expected: str) -> None:
    run = run_of("gpt", TINY["gpt"])
    with pytest.raises(ConfigError, match=re.escape(expected)):
        resolve(replace(run, trainer=replace(run.trainer, devices=devices)), 0, slurm)


def test_a_sweep_goes_on_after_a_failed_job(folder: Path, start: Start, one_bad_image: tuple[str, ...]) -> None:
    data = "model.data.data_path=datasets/digits_vqa/bad.json,datasets/digits_vqa/train.json"
    overrides = (setting for setting in one_bad_image if not setting.startswith("model.data.data_path"))
    run = start("sweep", "-m", data, *overrides)
    errors = run.communicate(timeout=4 * MINUTE)[1]
    assert run.returncode == 1, errors
    (line,) = filter(None, errors.splitlines())
    assert re.match(r"1 job failed: #0 .*bad.json.*: rank [01] .*OSError: .*bad.png.*", line), line
    assert len(metrics(folder, "sweep_1")) == 4
