"""Where the time of a run goes: columns of metrics.csv by hand counts and by how they are made, and the profile."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import run_ranks
from PIL import Image
from test_families import TINY, build_all, micro_batches, run_of, samples_of_step, sharded

from nemo_vlm.config import RunConfig, TrainerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.planning.hardware import peak_tflops
from nemo_vlm.training.build import make_engine
from nemo_vlm.training.exp_manager import COLUMNS
from nemo_vlm.training.profiling import FIRST, LAST, Profile
from nemo_vlm.training.step_times import STALL, STEP, WITHIN, StepTimes, Timed, mfu_peak

PHASES = {"forward_backward": 2.0, "grad_reduction": 0.5, "checkpoint_stall": 0.25, "optimizer": 1.0}


def test_the_rank_that_the_others_wait_for_is_told() -> None:
    """Its own seconds, all of them: the longest of each rank would be more than any rank's step."""
    times = StepTimes()
    waiting, slow = [9.0, 1.0, 3.0, 4.0, 0.5, 0.0], [9.0, 2.0, 5.0, 1.0, 0.5, 0.25]
    row = times.tell([waiting, slow])
    assert row == dict(zip((STEP, *WITHIN, STALL), slow, strict=True)) and row.keys() <= set(COLUMNS)
    for _ in range(2):
        times.tell([[10.0, 1.0, 5.0, 2.0, 1.0, 3.0]])
    shares = "data wait 10.0%, forward and backward 50.0%, gradient reduction 20.0%, optimizer 10.0%, other 10.0%"
    assert times.summary() == f"10 s a step, the mean of 2: {shares}; and 3 s for checkpoints"
    for stall, told in ((5.767e-6, "0"), (0.0123456, "0.012"), (12.3456, "12.35")):
        times.totals[STALL] = 2 * stall
        assert times.summary().endswith(f"; and {told} s for checkpoints")


def test_profiled_steps_do_not_count(tmp_path: Path) -> None:
    """A run that ends with them tells of them."""
    module = SimpleNamespace(times=StepTimes())
    Profile(tmp_path).on_train_start(None, module)
    for seconds, told in ((7.0, f"7 s a step, the mean of {LAST}"), (3.0, "3 s a step, the mean of 2")):
        for _ in range(LAST if seconds == 7.0 else 2):
            module.times.tell([[seconds, 0.0, 0.0, 0.0, 0.0, 0.0]])
        assert module.times.summary().startswith(f"{told}:")


def test_what_a_step_waits_for(monkeypatch) -> None:
    """By a clock that the test moves: data, then the phases, a save on top; validation nowhere."""
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    times = StepTimes()

    def load():
        nonlocal now
        for _ in range(2):
            now += 4.0
            yield "item"

    class Loader:
        def __len__(self) -> int:
            return 2

        def __iter__(self):
            return load()

    items = iter(Timed(Loader(), times))
    next(items)
    now += 3.75  # the phases
    assert times.end_step(PHASES) == [7.5, 4.0, 2.0, 0.5, 1.0, 0.25]
    now += 50.0
    times.restart()  # behind a validation
    with times.saving():
        now += 30.0
    next(items)
    now += 4.75  # the phases, and a second of something else
    assert times.end_step(PHASES) == [8.5, 4.0, 2.0, 0.5, 1.0, 30.25]


def test_the_peak_that_mfu_is_taken_against(monkeypatch) -> None:
    given = "MFU is taken against trainer.peak_tflops=0.5 of each rank"
    assert mfu_peak(TrainerConfig(peak_tflops=0.5)) == (0.5, given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    unknown = "no MFU: there is no GPU whose peak is known; trainer.peak_tflops=N tells it"
    assert mfu_peak(TrainerConfig()) == (None, unknown)
    with pytest.raises(ConfigError, match="trainer.peak_tflops=0: must be more than 0, or null"):
        TrainerConfig(peak_tflops=0)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L40S", None),
    ],
)
def test_peaks_are_of_the_card_at_hand(device: str, peak: float | None) -> None:
    assert peak_tflops(device) == peak


def trained(jobs: list[tuple[RunConfig, Layout]], folder: Path | None) -> list[list[tuple[float, float]]]:
    """Losses and norms of some steps under each layout, whose phases are all told and no longer than the step is."""
    found = []
    for run, layout in jobs:
        groups.initialize(layout, seed=1)
        engine, module = make_engine(run, layout, build_all(run, layout)[0]), SimpleNamespace(times=StepTimes())
        profile, steps = Profile(folder) if folder else None, []
        for number in range(LAST + 1):
            batches, began = micro_batches(layout, samples_of_step(run, number)), time.perf_counter()
            result = engine.step(batches, 1e-2)
            assert result.seconds.keys() == PHASES.keys() and min(result.seconds.values()) >= 0
            assert 0 < sum(result.seconds.values()) <= time.perf_counter() - began
            steps.append((result.loss, result.grad_norm))
            if profile:
                profile.on_train_batch_end(None, module)
        if profile:
            profile.on_train_end(None, module)
        found.append(steps)
        groups.shut_down()
    return found


def test_phases_and_profile(tmp_path: Path) -> None:
    """The profile is of each rank, and changes nothing of what is trained."""
    run = run_of("llava", TINY["llava"])
    jobs = [sharded(run, name, 2) for name in ("ddp", "pp2_vpp2", "fsdp")]
    expected = run_ranks(trained, 2, jobs, None)
    assert run_ranks(trained, 2, jobs[:1], tmp_path) == [steps[:1] for steps in expected]
    names = [f"{name}_rank_0000{rank}" for name in ("memory", "operators", "trace") for rank in (0, 1)]
    assert sorted(path.stem for path in (tmp_path / "profile").iterdir()) == names
    for rank in (0, 1):
        trace = json.loads((tmp_path / f"profile/trace_rank_0000{rank}.json").read_text())
        found = {event["name"] for event in trace["traceEvents"]}
        assert {"aten::mm", "MmBackward0", "Optimizer.step#AdamW.step", "[memory]"} <= found
        assert sum(name.startswith("ProfilerStep#") for name in found) == LAST - FIRST + 1
        tables = (tmp_path / f"profile/operators_rank_0000{rank}.txt").read_text()
        assert tables.startswith("By time\n") and "\nBy memory\n" in tables and "aten::mm" in tables
        assert Image.open(tmp_path / f"profile/memory_rank_0000{rank}.png").size > (600, 200)


def test_a_run_too_short_for_a_profile_says_so(tmp_path: Path, caplog) -> None:
    module = SimpleNamespace(times=StepTimes())
    profile = Profile(tmp_path)
    for _ in range(FIRST - 1):
        profile.on_train_batch_end(None, module)
    profile.on_train_end(None, module)
    assert f"no profile, the run ended before step {FIRST}" in caplog.text and not list(tmp_path.iterdir())
