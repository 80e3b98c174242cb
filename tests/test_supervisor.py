"""Several ranks as one run: they start everywhere alike, and when one dies or hangs, all end and one line says why."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from test_families import TINY, run_of

from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import resolve
from nemo_vlm.parallel.supervisor import common_environment, waits_for_others

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "examples" / "neva_finetune.py"
SHORT = ("trainer.max_steps=4", "trainer.enable_progress_bar=false")
MINUTE = 60

Start = Callable[..., Command]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Start the demo's command in the background; what a failed test leaves running is killed."""
    started: list[Command] = []

    def run(name: str, *overrides: str, **more: Any) -> Command:
        started.append(Command(str(TRAIN), *overrides, f"exp_manager.name={name}", cwd=folder, **more))
        return started[-1]

    yield run
    for command in started:
        command.end()


def long(folder: Path, start: Start, name: str, *overrides: str, **more: Any) -> Command:
    """A run that is far from its end, when its third step is done."""
    run = start(name, "trainer.max_steps=100000", "trainer.enable_progress_bar=false", *overrides, **more)
    wait_for(lambda: run.returncode is not None or len(metrics(folder, name)) > 2, 4 * MINUTE)
    assert run.returncode is None, run.communicate()[1]
    return run


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


def rank(supervisor: Command, number: int) -> int:
    """The process of a rank that a supervisor has started, on a node alone: they start in their order."""
    listing = subprocess.run(["pgrep", "-P", str(supervisor.pid)], capture_output=True, text=True)
    return sorted(int(pid) for pid in listing.stdout.split())[number]


def message(run: Command, code: int) -> str:
    """The one line that a failed run says, when all its processes are gone."""
    errors = run.communicate(timeout=MINUTE)[1]
    assert run.returncode == code, errors
    wait_for(lambda: not run.processes())
    (line,) = filter(None, errors.splitlines())
    return line


@pytest.mark.parametrize(("layout", "number"), [("tp2_pp2", 2), ("ddp", 0)])
def test_a_killed_rank_takes_the_run_down(folder: Path, start: Start, layout: str, number: int) -> None:
    """The second as its command line is typed."""
    size = {"tp2_pp2": 4, "ddp": 2}[layout]
    run = long(folder, start, f"killed{number}", f"parallel={layout}", ranks=size, forked=layout != "ddp")
    assert len(run.processes()) > size
    os.kill(rank(run, number), signal.SIGKILL)
    said = rf"rank {number} was killed by SIGKILL .*the run is stopped \(step \d+ was running\)$"
    assert re.match(said, message(run, 1))


def test_a_killed_supervisor_leaves_nothing(folder: Path, start: Start) -> None:
    run = long(folder, start, "orphans", "parallel=ddp", "model.data.num_workers=1", ranks=2)
    assert len(run.processes()) > 3
    os.kill(run.pid, signal.SIGKILL)
    wait_for(lambda: not run.processes())


def test_a_rank_that_does_not_answer_is_named(folder: Path, start: Start) -> None:
    run = long(folder, start, "stopped", "parallel=tp2", "trainer.hang_timeout=20", ranks=2)
    os.kill(rank(run, 1), signal.SIGSTOP)
    assert re.match(r"rank 1 does not answer, .* still for 20 s; .* step \d+, ", message(run, 1))


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
    line = message(start("raises", *one_bad_image), 1)
    assert re.match(r"rank [01] \(step \d.*\): the run failed: OSError: .*bad.png.*", line), line


def test_a_rank_that_hangs_is_told_from_those_that_wait(
    folder: Path, start: Start, one_bad_image: tuple[str, ...]
) -> None:
    bad = folder / "datasets/digits_vqa/images/bad.png"
    bad.unlink()
    os.mkfifo(bad)  # reading it waits for ever
    run = start("hangs", *one_bad_image, "trainer.hang_timeout=20")
    wait_for(lambda: run.returncode is not None or len(metrics(folder, "hangs")) == 1, 2 * MINUTE)
    line = message(run, 1)
    assert re.match(r"rank [01] has stood still for 20 s at: .*step \d.*; in .*images.py:\d+", line), line


def free_port() -> str:
    """None of those that the system gives to other tests' ranks meanwhile: Linux takes them from 32768 on."""
    for port in random.sample(range(20000, 30000), 20):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return str(port)
    raise OSError("no port is free")


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
    other = start("lost", *overrides, "trainer.max_steps=100000", ranks=1, **second)
    run = long(folder, start, "lost", *overrides, ranks=1, **first)
    os.kill(rank(other, 0), signal.SIGKILL)
    assert message(run, 1).startswith("contact to another node was lost, the run is stopped; rank 0 ")
    assert "rank 1 was killed by SIGKILL" in other.communicate(timeout=MINUTE)[1]


@pytest.mark.parametrize(
    ("place", "waits"),
    [
        ("torch/distributed/distributed_c10d.py:3012 all_reduce", True),
        ("nemo_vlm/mcore/groups.py:101 sum_over_data", True),
        ("megatron/core/optimizer/clip_grads.py:120 get_grad_norm_fp32", True),
        ("nemo_vlm/data/loader.py:90 __iter__", False),
        ("nemo_vlm/mcore/engine.py:180 _run", False),
    ],
)
def test_where_a_rank_waits_for_others(place: str, waits: bool) -> None:
    assert waits_for_others([f"/somewhere/{place}", "/somewhere/nemo_vlm/mcore/engine.py:150 step"]) == waits


@pytest.mark.parametrize(
    ("sizes", "given", "expected"),
    [
        ({"tensor": 2}, {}, "1"),
        ({"tensor": 2}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "8"),
        ({"tensor": 2}, {"CUDA_DEVICE_MAX_CONNECTIONS": ""}, "1"),
        ({"tensor": 1}, {}, None),
        ({"tensor": 1, "context": 2}, {}, "1"),
        ({"tensor": 1}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, "1"),
        ({"tensor": 2, "fsdp": "full"}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, None),
        ({"tensor": 1, "fsdp": "full"}, {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, "32"),
    ],
)
def test_a_gpu_has_as_many_queues_as_the_layout_wants(sizes: dict, given: dict[str, str], expected: str | None) -> None:
    run = run_of("gpt", TINY["gpt"])
    layout = replace(resolve(replace(run, trainer=replace(run.trainer, devices=2)), 0, {}), **sizes)
    found = common_environment(layout, "unused", given)
    assert found.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected and found["WORLD_SIZE"] == "2"


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
