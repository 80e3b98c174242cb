"""The benchmarks' own parts: the table, the document of all, and the GPU's at sizes for a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run

from nemo_vlm.batch import collate
from nemo_vlm.layout import one_process
from nemo_vlm.planning import plan as planning
from nemo_vlm.planning.hardware import named

SCRIPTS = Path(__file__).parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    before = set(sys.modules)
    yield
    for name in {"side_by_side", "all", "settled", "gpu"} - before:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("ours", "peer", "goal", "ratio", "ok"),
    [
        ([1.0, 2.0, 9.0], [2.0, 2.0, 2.0], "<= 1.0", 1.0, True),
        ([3.0, 3.0, 3.0], [2.0, 2.0, 2.0], "<= 1.0", 1.5, False),
        (8.0, 10.0, ">= 0.9", 0.8, False),
        (0.95, 1.0, "+-0.08", 0.95, True),
        (5.0, None, "<= 4", None, False),
        (5.0, None, "", None, True),
    ],
)
def test_a_row_judges_the_medians(scripts, ours: Any, peer: Any, goal: str, ratio: float | None, ok: bool) -> None:
    import side_by_side

    found = side_by_side.row("one", ours, peer, "s", goal)
    assert (found["ratio"], found["ok"]) == (ratio, ok)
    if isinstance(ours, list):
        assert found["spread"] == [min(ours) / 2, max(ours) / 2]


def test_the_document_tells_what_was_measured_and_what_was_missed(scripts, tmp_path: Path, capsys) -> None:
    import all as benchmarks
    import side_by_side

    rows = [
        side_by_side.row("a step", [3.0, 3.0], [2.0, 2.0], "s", "<= 1.0"),
        side_by_side.row("memory", 12345.0, None, "MB"),
    ]
    side_by_side.report(rows, tmp_path / "figures.json", {"threads": 2})
    assert "MISSED" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text()) | {"seconds": 7, "date": "2026-01-01"}
    assert benchmarks.missed({"train": figures}) == ["- train: a step: 1.5, goal <= 1.0"]
    (machine,) = benchmarks.machines({"train": figures, "loss": figures})
    assert machine == f"{figures['machine']}\n"
    lines = "\n".join(benchmarks.section("train", figures)).splitlines()
    assert lines[0] == "## train"
    assert "`python scripts/benchmarks/train.py`, 7 s on 2026-01-01" in lines
    assert "- threads: 2" in lines
    assert "| a step | 3 | 2 | s | 1.5 (1.50 to 1.50) | <= 1.0 | **missed** |" in lines
    assert "| memory | 12,345 |  | MB |  |  |  |" in lines


def test_all_benchmarks_are_found_that_need_no_gpu(scripts) -> None:
    import all as benchmarks

    found = set(benchmarks.benchmarks())
    assert {"convert", "experts", "generate", "train"} <= found
    assert not found & {"all", "gpu", "side_by_side"}


def test_the_gpu_s_peer_is_the_plan(scripts) -> None:
    """On rows as long as the plan assumes them; where the device is not known, memory alone is."""
    import gpu

    some = gpu.SLICES["text"]
    run = gpu.settled(some.recipe, f"{some.tiny} trainer.precision=bf16")
    batch = collate(gpu.made(run.model, ((0, 128), (0, 128))))
    plan = planning.describe(planning.Planned(run, one_process(run.model, 2), True, []))
    speed, held = gpu.planned(run, batch, named("h100"))
    assert speed == pytest.approx(plan["step_time"]["tokens_per_sec"])
    assert held == sum(plan["stages"][0]["bytes"].values())
    assert gpu.planned(run, batch, None) == (None, held)


def test_the_gpu_s_benchmark_runs_in_tiny(tmp_path: Path) -> None:
    """Every slice, padded and packed; the kernels and the allocator's figures are a GPU's business."""
    command = (str(SCRIPTS / "gpu.py"), "--rounds", "1", "--json", str(tmp_path / "gpu.json"))
    refused = run(*command, "--only", "text", cwd=tmp_path)
    if not torch.cuda.is_available():
        assert refused.returncode == 2
        assert refused.stderr == "there is no GPU that torch can use; --tiny tries this script without one\n"
    result = run(*command, "--tiny", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    speeds = {row["name"]: row["ours"] for row in rows if row["unit"] == "tokens/s"}
    assert {f"{name}, bf16, {kind}" for name in ("llava", "text", "experts") for kind in ("padded", "packed")} <= set(
        speeds
    )
    assert all(speed > 0 for speed in speeds.values())
