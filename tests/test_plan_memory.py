"""The plan's memory against what steps really hold: tensors counted op by op, and that count against torch's own."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from distributed import run_ranks
from test_families import TINY, make_layout, run_of
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from nemo_vlm.config import DataConfig, LanguageConfig, LoraConfig, ParallelConfig, PeftConfig, RunConfig, StepConfig
from nemo_vlm.config.plan import PlanConfig
from nemo_vlm.data import packing
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.planning import machine
from nemo_vlm.planning import plan as planning
from nemo_vlm.planning.activations import activation_bytes, buffer_bytes
from nemo_vlm.planning.measured import TensorBytes
from nemo_vlm.planning.workload import Workload, num_micro_batches, of_batch, workload
from nemo_vlm.training.rehearsal import batches_of, rehearse

PHOTO = {"max_pixels": 100_000}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
FULL = {"activations_checkpoint_granularity": "full"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, settings of planned_run
    "gpt": (1, dict(name="gpt", precision="bf16")),
    "llava": (1, dict(name="llava", data={"packing": True}, model={"encoder_seq_length": 800})),
    "llava_lora": (1, dict(name="llava", peft=PeftConfig("lora", None, LoraConfig(target_modules=("all",))))),
    "qwen3_vl": (1, dict(name="qwen3_vl", data=PHOTO)),
    "gpt_vpp2": (2, dict(name="gpt", parallel=VPP2)),
    "gpt_fsdp": (2, dict(name="gpt", parallel={"fsdp": True}, step=FULL)),
    "gpt_fsdp_vocabulary": (2, dict(name="gpt", parallel={"fsdp": True}, model={"vocab_size": 8192})),
    "qwen2_vl_tp2_sp": (2, dict(name="qwen2_vl", data=PHOTO, parallel=TP2_SP)),
    "qwen3_vl_ep2": (2, dict(name="qwen3_vl", data=PHOTO, parallel={"expert_model_parallel_size": 2})),
}


def larger(name: str, **sizes: Any) -> LanguageConfig:
    """The family's smallest with so many numbers a token that they outweigh what is rounded."""
    wide = dict(hidden_size=128, ffn_hidden_size=352, kv_channels=32, encoder_seq_length=256, vocab_size=512)
    config: Any = replace(TINY[name], **wide | ({"mrope_section": None} if "qwen" in name else {}) | sizes)
    if config.media is None:
        return config
    seen = {"hidden_size": 96, "ffn_hidden_size": 256} | ({"image_size": 96} if name == "llava" else {})
    tower = replace(config.mm_cfg.vision_encoder, **seen)
    return replace(config, mm_cfg=replace(config.mm_cfg, vision_encoder=tower))


def planned_run(
    ranks: int,
    name: str,
    parallel: dict[str, Any] | None = None,
    step: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **rest: Any,
) -> tuple[RunConfig, Layout]:
    config, parallels = larger(name, **model or {}), ParallelConfig(**parallel or {})
    precision = rest.pop("precision", "32")
    run = run_of(name, config, parallels, StepConfig(2, 8, **step or {}), precision=precision)
    trainer = replace(run.trainer, accelerator="cpu", devices=ranks)
    run = replace(run, trainer=trainer, data=DataConfig(**data or {}), **rest)
    return run, make_layout(run, ranks)


RUNS = {key: planned_run(ranks, **settings) for key, (ranks, settings) in CASES.items()}


def rehearsed(runs: list[tuple[RunConfig, Layout]]) -> list[Counter[str]]:
    found = []
    for run, layout in runs:
        groups.initialize(layout, seed=1)
        found.append(rehearse(run, layout))
        groups.shut_down()
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, list[Counter[str]]]:
    """What each rank of each run held at its peak."""
    found = {}
    for ranks in (1, 2):
        some = {key: run for key, run in RUNS.items() if run[1].world_size == ranks}
        results = run_ranks(rehearsed, ranks, list(some.values()))
        found |= dict(zip(some, zip(*results, strict=True), strict=True))
    return found


@pytest.mark.parametrize("key", RUNS)
def test_a_rank_holds_what_was_planned(key: str, measured: dict[str, list[Counter[str]]]) -> None:
    (run, layout), held = RUNS[key], measured[key]
    for entry in planning.describe(planning.training(run, {}))["stages"]:
        planned, found = entry["bytes"], held[entry["rank"]]
        assert sum(planned.values()) == pytest.approx(found.total(), rel=0.08), (planned, found)
        for kind in ("weights", "optimizer") if layout.fsdp is None else ():
            assert planned[kind] == pytest.approx(found[kind], rel=1e-3)
        kept = ("weights", "optimizer") + (("gradients",) if layout.fsdp is None else ())  # FSDP's come and go
        passing = (sum(size for kind, size in sizes.items() if kind not in kept) for sizes in (planned, found))
        assert next(passing) == pytest.approx(next(passing), rel=0.1), (planned, found)
        assert planned["activations"] == sum(entry["activations_by_part"].values())


@pytest.mark.parametrize("key", ["gpt", "llava", "qwen3_vl"])
def test_an_estimate_is_what_its_batches_are(key: str) -> None:
    run, layout = RUNS[key]
    assert {of_batch(batch, run.model) for batch in batches_of(run, layout)} == {workload(run, layout)}


@pytest.mark.parametrize(
    ("samples", "ranks", "pipeline", "virtual"), [(128, 1, 4, 1), (128, 2, 1, 1), (40, 8, 1, 1), (30, 2, 4, 2)]
)
def test_packs_are_counted_as_the_loader_makes_them(samples: int, ranks: int, pipeline: int, virtual: int) -> None:
    run, layout = RUNS["llava"]
    sizes = dict(pipeline=pipeline, virtual=virtual, micro_batch_size=1, num_micro_batches=samples // ranks)
    layout, together = replace(layout, **sizes), pipeline if virtual > 1 else 1
    work, full = (workload(run, layout, 100, 0, fullest) for fullest in (False, True))
    packs = packing.plan(numpy.full((samples, 1), 100), [800], ranks * together)
    assert num_micro_batches(run, layout, work) * ranks == len(packs)
    assert full.tokens == 800 and work.samples == math.ceil(samples / len(packs))


def test_estimates_follow_what_is_given() -> None:
    run, layout = RUNS["llava"]
    assert workload(run, layout) == Workload(2, 1, 800, 800, 320000, 512, 288, 2, 288, 41472)
    given = workload(run, layout, tokens_per_sample=200, images_per_sample=0)
    assert given == Workload(4, 1, 800, 800, 160000, 800)
    limited = replace(run, data=replace(run.data, max_visual_tokens_per_micro_batch=200))
    assert workload(limited, layout).samples == 1
    assert workload(run, layout, tokens_per_sample=300, images_per_sample=0).tokens == 2 * 300  # as they are given
    short = replace(run, model=replace(run.model, encoder_seq_length=100))
    assert workload(short, layout).visual_tokens == 0  # such an image has no room
    (note,) = [one for one in planning.describe(planning.training(short, {}))["notes"] if one.startswith("a micro")]
    assert "without an image, which has no room in model.encoder_seq_length" in note


@pytest.mark.parametrize(
    ("key", "tokens", "images", "told"),
    [
        ("llava", 801, None, "plan_tokens=801: must be at most model.encoder_seq_length=800"),
        ("llava", None, 6, "plan_images=6: they are 864 tokens, and a sample has 800"),
        ("llava", 100, 1, "plan_images=1: they are 144 tokens, and a sample has 100"),
        ("llava", 100, None, "plan_tokens=100: an image is 144 tokens; plan_images=0 plans text alone"),
        ("gpt", None, 1, "plan_images=1: goes with a model that sees"),
    ],
)
def test_more_than_a_sample_can_have_is_refused(key: str, tokens: int | None, images: int | None, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{told}$"):
        workload(*RUNS[key], tokens, images)


@pytest.mark.parametrize("file", ["foo.yaml", "plan/parallel/foo", "plan/parallel/foo.yml"])
def test_a_searched_layout_lies_where_it_is_found(file: str) -> None:
    with pytest.raises(ConfigError, match=f"^search_file={file}: must be FOLDER/parallel/NAME.yaml"):
        PlanConfig(search_file=file)


def test_settings_that_a_plan_does_not_take() -> None:
    with pytest.raises(ConfigError, match="^search_file=a/parallel/b.yaml: goes with search=true$"):
        PlanConfig(search_file="a/parallel/b.yaml")
    with pytest.raises(ConfigError, match="^plan_picture=plan.txt: must be a file that ends in .png, or null$"):
        PlanConfig(plan_picture="plan.txt")
    with pytest.raises(ConfigError, match=r"^dry_run=false: the recipe only plans \(it has plan_picture=plan.png\)"):
        PlanConfig(plan_picture="plan.png").refuse_without_plan({"dry_run", "model"})
    with pytest.raises(ConfigError, match="^plan_picture=plan.png: goes with dry_run=true$"):
        PlanConfig(plan_picture="plan.png").refuse_without_plan({"plan_picture"})
    PlanConfig().refuse_without_plan(())


@pytest.mark.parametrize("key", ["plan_file", "plan_picture", "search_file"])
def test_files_are_tried_before_the_work(key: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "parallel/taken.yaml").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    ending = ".png" if key == "plan_picture" else ".yaml"
    planning.check_files(PlanConfig(search=True, **{key: str(tmp_path / f"new/parallel/one{ending}")}))
    for path in (tmp_path / f"file/parallel/one{ending}", Path("/proc/parallel/one").with_suffix(ending)):
        with pytest.raises(ConfigError, match=f"^{key}={path}: cannot be written"):
            planning.check_files(PlanConfig(search=True, **{key: str(path)}))
    with pytest.raises(ConfigError, match="cannot be written .Is a directory"):
        planning.check_files(PlanConfig(search=True, search_file=str(tmp_path / "parallel/taken.yaml")))
    assert sorted(tmp_path.rglob("*")) == before


def test_micro_batches_wait_as_the_schedule_has_them() -> None:
    """Of 1F1B stage p of 4 keeps 4 - p; what is recomputed keeps its input alone."""
    run, layout = planned_run(4, "gpt", {"pipeline_model_parallel_size": 4})
    one, decoders = replace(layout, num_micro_batches=1), []
    for stage in range(4):
        alone = activation_bytes(run, one, stage)["decoder"]
        decoders.append(activation_bytes(run, layout, stage)["decoder"])
        assert decoders[-1] == pytest.approx((4 - stage) * alone, abs=8)
    hidden = 2 * 256 * 128 * 4  # of a micro-batch
    again, _ = planned_run(4, "gpt", {"pipeline_model_parallel_size": 4}, FULL)
    assert activation_bytes(again, layout, 1)["decoder"] == 3 * 2 * hidden  # of one layer, and what came in
    assert buffer_bytes(run, layout) == hidden


def test_a_step_that_may_not_fit_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    run, layout = RUNS["gpt"]
    machine.check_machine(run, layout, 0, {})
    assert not caplog.records
    long = replace(run, model=replace(run.model, encoder_seq_length=10**9))
    machine.check_machine(long, layout, 0, {})
    assert re.match(r"a step may need up to \d+.\d GiB a rank \(dry_run=true", caplog.messages[0])


def test_less_is_kept_where_less_trains() -> None:
    run, layout = RUNS["qwen3_vl"]
    mm: Any = run.model.media
    still = replace(mm, vision_encoder=replace(mm.vision_encoder, freeze=True))
    frozen = replace(run, model=replace(run.model, mm_cfg=still))  # type: ignore[call-arg]
    kept, left = (activation_bytes(each, layout, 0) for each in (run, frozen))
    assert left["vision_model"] == 0 < kept["vision_model"]
    assert left["vision_projection"] == kept["vision_projection"] > 0


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(batch).square().sum().backward()
    optimizer.step()


def test_bytes_are_counted_as_by_torch() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 32))
    optimizer, batch = torch.optim.AdamW(model.parameters()), torch.randn(128, 64)
    steps(model, optimizer, batch)
    theirs, ours = MemTracker(), TensorBytes()
    theirs.track_external(model, optimizer, batch)
    with theirs:
        steps(model, optimizer, batch)
    state = [value for each in optimizer.state.values() for value in each.values()]
    for kind, tensors in (("weights", model.parameters()), ("optimizer", state), ("batch", [batch])):
        ours.count(tensors, kind)
    ours.count([parameter.grad for parameter in model.parameters() if parameter.grad is not None], "gradients")
    ours.restart()
    with ours:
        steps(model, optimizer, batch)
    expected = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert ours.peak == expected
    assert ours.at_peak["weights"] == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_storages_that_are_given_back_do_not_count() -> None:
    with TensorBytes() as tracker:
        first = torch.zeros(1000)
        view = first[10:]
        with tracker.of("inside"):
            second = view + 1
        assert (tracker.bytes["other"], tracker.bytes["inside"]) == (4000, 3960)
        first.untyped_storage().resize_(0)
        assert tracker.bytes["other"] == 0
        del second
    assert tracker.total == 0 and tracker.peak == 7960
