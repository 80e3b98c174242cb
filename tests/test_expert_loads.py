"""What is told of a mixture of experts' loads: by hand counts, under several layouts, and in a run's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from distributed import run_ranks
from PIL import Image
from test_families import TINY, build_all, make_layout, micro_batches, run_of, samples_of_step

from nemo_vlm.checkpoints import Position, make_run_folder
from nemo_vlm.config import ExpManagerConfig, ParallelConfig, RunConfig, StepConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.experts import ExpertLoads
from nemo_vlm.training.build import make_engine
from nemo_vlm.training.exp_manager import COLUMNS
from nemo_vlm.training.expert_loads import ExpertPicture, by_layer, columns
from nemo_vlm.training.module import Plan, TrainingModule

LOADS = ExpertLoads(torch.tensor([[30.0, 10.0], [20.0, 20.0]]).double(), torch.tensor([1.5, 1.0]).double())
MOE = replace(TINY["gpt"], num_moe_experts=4, moe_ffn_hidden_size=24, moe_aux_loss_coeff=0.01)
STEP = StepConfig(micro_batch_size=2, global_batch_size=8)
LAYOUTS = [
    ParallelConfig(expert_model_parallel_size=2),
    ParallelConfig(tensor_model_parallel_size=2),
    ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
    ParallelConfig(pipeline_model_parallel_size=2),
    ParallelConfig(context_parallel_size=2),
    ParallelConfig(fsdp=True),
]


def test_the_numbers_by_hand() -> None:
    assert columns(LOADS) == {"aux_loss": 1.25, "expert_load_max": 1.5}
    assert columns(LOADS).keys() < set(COLUMNS)  # of metrics.csv
    assert by_layer(LOADS) == {
        "experts/aux_loss/layer_00": 1.5,
        "experts/aux_loss/layer_01": 1.0,
        "experts/load_max/layer_00": 1.5,
        "experts/load_max/layer_01": 1.0,
    }


def told(runs: list[tuple[RunConfig, Layout]]) -> list[dict[str, float]]:
    """What one step under each layout logs on this rank."""
    found = []
    for run, layout in runs:
        groups.initialize(layout, seed=1)
        engine = make_engine(run, layout, build_all(run, layout)[0])
        loads = engine.step(micro_batches(layout, samples_of_step(run, 0)), lr=1e-2).experts
        assert loads is not None
        found.append(columns(loads) | by_layer(loads))
        groups.shut_down()
    return found


def test_every_layout_tells_the_same() -> None:
    single = run_of("gpt", MOE, step=STEP)
    (expected,) = run_ranks(told, 1, [(single, make_layout(single, 1))])[0]
    assert 1 < expected["expert_load_max"] <= 2  # top 2 of 4
    runs = [replace(single, parallel=parallel) for parallel in LAYOUTS]
    for rank in run_ranks(told, 2, [(run, make_layout(run, 2)) for run in runs]):
        for parallel, found in zip(LAYOUTS, rank, strict=True):
            assert found == pytest.approx(expected, rel=1e-5), parallel


def module_of(folder: Path) -> TrainingModule:
    """Before a run, which will be called `x`."""
    run = replace(run_of("gpt", TINY["gpt"]), exp_manager=ExpManagerConfig(name="x", exp_dir=str(folder)))
    make_run_folder(run.exp_manager)
    return TrainingModule(Plan(run, make_layout(run, 1), "cpu", range(8)), None)  # type: ignore[arg-type]


def test_the_picture_shows_who_is_busy(tmp_path: Path) -> None:
    """Two layers of two experts: red, blue, and below them two of the colour of an even share."""
    module, picture = module_of(tmp_path), ExpertPicture()
    for step in (1, 2):
        module.experts, module.position = LOADS, Position(step)
        picture.on_train_batch_end(None, module)  # type: ignore[arg-type]
    picture.on_train_end(None, module)  # type: ignore[arg-type]
    with Image.open(tmp_path / "x/experts.png") as drawn:
        pixels = numpy.asarray(drawn.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    map_part = pixels[height // 8 : height * 7 // 8, width // 8 : width * 3 // 4]  # without title, labels and scale
    top, bottom = numpy.array_split(map_part, 2)
    for part, side in ((top[:, -40:], 2), (top[:, :40], 0)):
        red_over_blue = numpy.median(part[..., 0]) - numpy.median(part[..., 2])
        assert red_over_blue > 50 if side == 0 else red_over_blue < -50
    assert numpy.ptp(numpy.median(bottom, axis=(0, 1))) < 12


def test_there_is_no_picture_without_experts(tmp_path: Path) -> None:
    module, picture = module_of(tmp_path), ExpertPicture()
    picture.on_train_batch_end(None, module)  # type: ignore[arg-type]
    picture.on_train_end(None, module)  # type: ignore[arg-type]
    assert not (tmp_path / "x/experts.png").exists()
