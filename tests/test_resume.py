"""Training checkpoints: saved in one layout, resumed in another, optimizer state included."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from megatron.core import dist_checkpointing, parallel_state
from test_families import VARIANTS, assert_same_run, build_all, make_layout, run_of, sharded, steps_of

from nemo_vlm import checkpoints, heartbeat
from nemo_vlm.checkpoints import Position
from nemo_vlm.config import CheckpointConfig, ExpManagerConfig, OptimConfig, RunConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.store import Folder
from nemo_vlm.formats.torch_dist import TorchDist
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups, weights
from nemo_vlm.training import saving, staging
from nemo_vlm.training.build import make_engine

FIRST, MORE = 2, 2  # steps before and after the checkpoint
DISTRIBUTED = OptimConfig(name="distributed_fused_adam", lr=1e-2, weight_decay=0.1)
PLAIN = OptimConfig(name="fused_adam", distributed=False, lr=1e-2, weight_decay=0.1)
OVERLAPPED = replace(DISTRIBUTED, name="mcore_distributed_optim", overlap_grad_sync=True, overlap_param_sync=True)
METRICS = {"global_step": float(FIRST)}


def run_under(name: str, layout: str, optim: OptimConfig, folder: Path, precision: str = "32", variant: str = "llava"):
    run = run_of(*VARIANTS[variant], optim=optim, precision=precision)
    run, where = (run, make_layout(run, 1)) if layout == "single" else sharded(run, layout, micro_batch_size=2)
    if where.fsdp:
        run = replace(run, optim=replace(optim, name="fused_adam"))
    return replace(run, exp_manager=ExpManagerConfig(name=name, exp_dir=str(folder))), where


def save_and_go_on(run: RunConfig, layout: Layout):
    """Losses and norms of the steps behind a checkpoint."""
    groups.initialize(layout, seed=1)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    first = 12 if run.trainer.precision == "16-mixed" else FIRST  # its first steps only lower the loss scale
    steps_of(engine, run, layout, 0, first)
    saver = saving.Saver(run, layout)
    saver.save(engine, Position(first, first * run.step.global_batch_size, metrics=METRICS))
    results = steps_of(engine, run, layout, first, MORE)
    saver.wait()
    drawn = torch.rand(3).tolist()
    groups.shut_down()
    return results, drawn


def resume(run: RunConfig, layout: Layout, path: Path):
    groups.initialize(layout, seed=5)
    torch.manual_seed(99)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    position = saving.load(engine, path, run.exp_manager, layout)
    results = steps_of(engine, run, layout, position.global_step, MORE)
    drawn = torch.rand(3).tolist()
    groups.shut_down()
    return results, drawn


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of a layout and what its run went on to, made once."""
    known = {}

    def get(layout: str, optim: OptimConfig, precision: str = "32"):
        key = (layout, optim.name, precision)
        if key not in known:
            run, where = run_under("saved", layout, optim, tmp_path_factory.mktemp("saved"), precision)
            results = run_ranks(save_and_go_on, where.world_size, run, where)
            path = checkpoints.complete(checkpoints.folder_of(run.exp_manager))[-1]
            known[key] = path, results
        return known[key]

    return get


PAIRS = [
    ("single", PLAIN, "tp2", DISTRIBUTED),
    ("single", DISTRIBUTED, "fsdp", PLAIN),
    ("ddp", DISTRIBUTED, "pp2", PLAIN),
    ("ddp", DISTRIBUTED, "tp2_dp2", DISTRIBUTED),
    ("tp2", PLAIN, "cp2", DISTRIBUTED),
    ("cp2", DISTRIBUTED, "single", PLAIN),
    ("tp2_dp2", DISTRIBUTED, "single", PLAIN),
    ("tp2_dp2", DISTRIBUTED, "hsdp", PLAIN),
    ("pp2", PLAIN, "pp2_vpp2", DISTRIBUTED),
    ("pp2_vpp2", DISTRIBUTED, "tp2_pp2", DISTRIBUTED),
    ("tp2_pp2", DISTRIBUTED, "fsdp", PLAIN),
    ("fsdp", PLAIN, "pp2_vpp2", DISTRIBUTED),
    ("fsdp", PLAIN, "tp2_dp2", DISTRIBUTED),
    ("hsdp", PLAIN, "tp2_pp2", PLAIN),
    ("hsdp", PLAIN, "single", PLAIN),
    ("fsdp_tp2", PLAIN, "ddp", DISTRIBUTED),
    ("pp2_dp2", DISTRIBUTED, "fsdp_tp2", PLAIN),
]


@pytest.mark.parametrize(("a", "optim_a", "b", "optim_b"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_resume_in_another_layout(a, optim_a, b, optim_b, saved, tmp_path: Path) -> None:
    path, expected = saved(a, optim_a)
    run, where = run_under("resumed", b, optim_b, tmp_path)
    for results, _ in run_ranks(resume, where.world_size, run, where, path):
        assert_same_run(results, expected[0][0])


SAME = [("single", PLAIN), ("ddp", DISTRIBUTED), ("tp2_dp2", DISTRIBUTED), ("tp2_pp2", DISTRIBUTED)]
SAME += [("tp2_dp2", OVERLAPPED), ("pp2_vpp2", DISTRIBUTED), ("fsdp", PLAIN), ("hsdp", PLAIN), ("fsdp_tp2", PLAIN)]


@pytest.mark.parametrize(("layout", "optim"), SAME, ids=lambda value: getattr(value, "name", value))
def test_resume_in_the_same_layout_is_exact(layout: str, optim: OptimConfig, saved, tmp_path: Path) -> None:
    """Bit-equal losses and norms, and random numbers."""
    path, expected = saved(layout, optim)
    run, where = run_under("resumed", layout, optim, tmp_path)
    assert run_ranks(resume, where.world_size, run, where, path) == expected


@pytest.mark.parametrize(
    ("variant", "b"), [("gpt_tied", "fsdp"), ("gpt_tied", "single"), ("llava_odd", "fsdp_tp2"), ("qwen2_vl", "fsdp")]
)
def test_copies_on_other_ranks_are_written_once(variant: str, b: str, tmp_path: Path) -> None:
    """A tied embedding on two stages, a tower that both tensor-parallel ranks hold; sharded moments differ in place."""
    a = "pp2_dp2" if variant == "gpt_tied" else "tp2_dp2"
    run, where = run_under("saved", a, DISTRIBUTED, tmp_path, variant=variant)
    expected = run_ranks(save_and_go_on, where.world_size, run, where)
    path = checkpoints.complete(checkpoints.folder_of(run.exp_manager))[-1]
    for layout, optim in ((a, DISTRIBUTED), (b, PLAIN)):
        run, where = run_under("resumed", layout, optim, tmp_path, variant=variant)
        assert_same_run(run_ranks(resume, where.world_size, run, where, path)[-1][0], expected[0][0])


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(("a", "optim"), [("ddp", DISTRIBUTED), ("ddp", PLAIN), ("fsdp", PLAIN)])
def test_main_weights_and_loss_scale_travel(a: str, optim: OptimConfig, precision: str, saved, tmp_path: Path) -> None:
    """In half precision too the same layout goes on exactly, and another one nearly: its sums round elsewhere."""
    path, expected = saved(a, optim, precision)
    assert all(math.isfinite(norm) for _, norm, _ in expected[0][0])
    run, where = run_under("resumed", a, optim, tmp_path, precision)
    assert run_ranks(resume, where.world_size, run, where, path) == expected
    for b in ("single", "fsdp"):
        run, where = run_under("resumed", b, PLAIN, tmp_path, precision)
        results = run_ranks(resume, where.world_size, run, where, path)[0][0]
        assert_same_run(results, expected[0][0], loss=2e-2, norm=0.1)


def test_gathered_and_asynchronous_checkpoints_hold_the_same(saved, tmp_path: Path) -> None:
    path, expected = saved("fsdp", PLAIN)
    run, where = run_under("gathered", "fsdp", PLAIN, tmp_path)
    run = replace(run, parallel=replace(run.parallel, fsdp_sharded_checkpoint=False))
    asynchronous = replace(run.exp_manager, checkpoint_callback_params=CheckpointConfig(async_save=True))
    run = replace(run, exp_manager=replace(asynchronous, name="gathered"))
    assert run_ranks(save_and_go_on, where.world_size, run, where) == expected
    other = checkpoints.complete(checkpoints.folder_of(run.exp_manager))[-1]
    assert len(list(path.glob("*.distcp"))) == 2
    tensors = [file for file in other.glob("*.distcp") if file.stat().st_size > 100_000]
    assert len(tensors) == 1  # the other rank has nothing but its random numbers
    assert run_ranks(resume, where.world_size, run, where, other) == expected


class Late(staging.Staging):
    """Copies when the next step has come as far as it may."""

    def copy(self, parts, ready):
        until = time.monotonic() + 20
        while heartbeat.last().place != "copy for the checkpoint" and time.monotonic() < until:
            time.sleep(0.001)
        return super().copy(parts, ready)


def save_both_ways(jobs: list[tuple[RunConfig, Layout]]) -> None:
    """Two checkpoints of each run, written at once, and again behind the training."""
    for run, layout in jobs:
        groups.initialize(layout, seed=1)
        engine = make_engine(run, layout, build_all(run, layout)[0])
        names = ("at_once", "beside")
        savers = [saving.Saver(changed(run, name, async_save=name == "beside"), layout) for name in names]
        savers[1].staging = Late()
        for number in range(3):
            steps_of(engine, run, layout, number, 1)
            for saver in savers[: 2 * (number < 2)]:
                saver.save(engine, Position(number + 1, metrics=METRICS))
        savers[1].wait()
        groups.shut_down()


def changed(run: RunConfig, name: str, **settings) -> RunConfig:
    params = CheckpointConfig(save_top_k=-1, **settings)
    return replace(run, exp_manager=replace(run.exp_manager, name=name, checkpoint_callback_params=params))


def test_a_step_does_not_overtake_the_copy_of_the_one_before(tmp_path: Path) -> None:
    """Bit-equal to checkpoints that were written at once, the second of which takes the room of the first."""
    jobs = {1: [("single", PLAIN, "32")], 2: [("ddp", OVERLAPPED, "bf16-mixed"), ("fsdp", PLAIN, "32")]}
    jobs[2] += [("pp2", DISTRIBUTED, "32"), ("ddp", PLAIN, "16-mixed")]
    for world_size, wanted in jobs.items():
        runs = [run_under("x", *one[:2], tmp_path / f"{world_size}_{i}", one[2]) for i, one in enumerate(wanted)]
        run_ranks(save_both_ways, world_size, runs)
        for run, _ in runs:
            paths = [checkpoints.folder_of(changed(run, name).exp_manager) for name in ("at_once", "beside")]
            for step in (1, 2):
                one, other = (TorchDist(Folder(checkpoints.path_of(path, step))) for path in paths)
                assert one.names() == other.names() and len(one.names()) > 100
                assert all(torch.equal(one.read(name), other.read(name)) for name in one.names())


def test_weights_only(saved, tmp_path: Path) -> None:
    """Without the optimizer on either side the moments start anew, in every way to keep them."""
    path, _ = saved("ddp", DISTRIBUTED)
    run, where = run_under("saved", "ddp", DISTRIBUTED, tmp_path)
    weights_only = CheckpointConfig(save_optimizer=False, save_rng=False)
    run = replace(run, exp_manager=replace(run.exp_manager, checkpoint_callback_params=weights_only))
    run_ranks(save_and_go_on, where.world_size, run, where)
    small = checkpoints.complete(checkpoints.folder_of(run.exp_manager))[-1]
    assert not any(name.startswith(("optimizer", "rng")) for name in TorchDist(Folder(small)).names())
    expected = run_ranks(resume, 2, run, where, small)[0][0]
    ignoring = replace(run, exp_manager=replace(run.exp_manager, resume_optimizer=False))
    assert run_ranks(resume, 2, ignoring, where, path)[0][0] == expected
    fsdp, where = run_under("fsdp", "fsdp", PLAIN, tmp_path)
    assert_same_run(run_ranks(resume, 2, fsdp, where, small)[0][0], expected)


def test_a_checkpoint_of_another_model_is_refused(saved, tmp_path: Path) -> None:
    path, _ = saved("single", PLAIN)
    with pytest.raises(ConfigError, match=r"has shape \(.*\), this run's model needs"):
        part = weights.Part("vision_model.conv1.weight", (3, 3), (slice(0, 3), slice(0, 3)), torch.zeros(3, 3))
        weights.fill([part], TorchDist(Folder(path)))
    with pytest.raises(ConfigError, match="the tensor 'nothing' is missing"):
        weights.fill([weights.Part("nothing", (1,), (slice(0, 1),), torch.zeros(1))], TorchDist(Folder(path)))


def read_by_megatron(run: RunConfig, layout: Layout, path: Path):
    """The language model's weights through Megatron's own reader, and ours."""
    groups.initialize(layout, seed=1)
    (model,), parts = build_all(run, layout)
    language_model = model.language_model
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": parallel_state.get_data_parallel_group()}
    shards = language_model.sharded_state_dict(prefix="language_model.", metadata=metadata)
    shards = {key: value for key, value in shards.items() if not key.endswith("_extra_state")}
    theirs = dist_checkpointing.load(shards, str(path))
    weights.fill(parts, TorchDist(Folder(path)))
    ours = {f"language_model.{name}": value for name, value in language_model.named_parameters()}
    equal = {key: bool(torch.equal(theirs[key], ours[key])) for key in theirs if key in ours}
    groups.shut_down()
    return equal


@pytest.mark.parametrize("written_by", ["single", "pp2_vpp2", "fsdp"])
def test_megatrons_reader_reads_them(written_by: str, saved, tmp_path: Path) -> None:
    path, _ = saved(written_by, PLAIN if written_by == "fsdp" else DISTRIBUTED)
    run, where = run_under("read", "tp2", PLAIN, tmp_path)
    for equal in run_ranks(read_by_megatron, 2, run, where, path):
        assert len(equal) > 20 and all(equal.values())


def test_any_run_of_elements_is_boxes() -> None:
    """Against counting: the boxes of a run cover its elements, in memory order."""
    draw = random.Random(0)
    for _ in range(300):
        shape = tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 4)))
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        begin = draw.randint(0, whole.numel())
        end = draw.randint(begin, whole.numel())
        found = [
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, size, strict=True))].flatten()
            for offsets, size in weights.boxes(shape, begin, end)
        ]
        assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(begin, end))


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_table_of_contents_runs_nothing(saved, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match="system: refused"):
        TorchDist(Folder(tmp_path))
    assert not (tmp_path / "pwned").exists()


def make(folder: Path, step: int, **metrics: float) -> Path:
    path = checkpoints.path_of(folder, step)
    checkpoints.begin(path)
    checkpoints.finish(path, Position(step, metrics={"global_step": step, **metrics}), {})
    return path


def steps_in(folder: Path) -> list[int]:
    return [checkpoints.step_of(path) for path in checkpoints.complete(folder)]


def test_unfinished_checkpoints_do_not_count_and_are_removed(tmp_path: Path) -> None:
    make(tmp_path, 1)
    checkpoints.begin(checkpoints.path_of(tmp_path, 2))
    make(tmp_path, 3)
    checkpoints.marker(checkpoints.path_of(tmp_path, 3)).touch()  # killed while it was being removed
    assert steps_in(tmp_path) == [1]
    assert checkpoints.clean(tmp_path) == ["step_000002", "step_000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001"]


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (CheckpointConfig(save_top_k=2), [4, 5]),
        (CheckpointConfig(save_top_k=0), [5]),
        (CheckpointConfig(save_top_k=-1), [1, 2, 3, 4, 5]),
        (CheckpointConfig(save_top_k=2, monitor="reduced_train_loss"), [2, 3, 5]),
        (CheckpointConfig(save_top_k=1, monitor="reduced_train_loss", mode="max"), [4, 5]),
    ],
)
def test_the_best_and_the_newest_are_kept(config: CheckpointConfig, kept: list[int], tmp_path: Path) -> None:
    for step, loss in enumerate([math.nan, 1.0, 2.0, 4.0, 3.0], start=1):
        make(tmp_path, step, reduced_train_loss=loss)
        checkpoints.prune(tmp_path, config)
    assert steps_in(tmp_path) == kept
    assert json.loads((tmp_path / "step_000005/state.json").read_text())["global_step"] == 5


def test_a_removal_that_the_file_system_refuses_leaves_no_whole_checkpoint(tmp_path: Path, monkeypatch) -> None:
    path = make(tmp_path, 1)

    def refuse(*unused, **settings) -> None:
        raise OSError("busy")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(OSError, match="busy"):
        checkpoints.remove(path)
    assert not checkpoints.complete(tmp_path)
