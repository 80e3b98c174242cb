"""What a run can be told beside its layout: frozen parts, learning rates by part, recomputation, overlap, offload."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import product

import numpy
import pytest
import torch
from distributed import run_ranks
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator
from megatron.core.transformer.transformer_layer import TransformerLayer
from test_families import (
    TINY,
    assert_same_run,
    assert_same_weights,
    build_all,
    make_layout,
    micro_batches,
    on_ranks,
    run_of,
    sharded,
    single,
    steps_of,
    train,
    whole,
)
from torch.distributed.tensor import DTensor

from nemo_vlm.batch import Sample
from nemo_vlm.config import OptimConfig, ParallelConfig, RunConfig, StepConfig
from nemo_vlm.data.loader import Share, StepSampler
from nemo_vlm.data.orders import Blend, batch_size_at
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups, replicated
from nemo_vlm.models.base import family
from nemo_vlm.training.build import make_engine

DISTRIBUTED = OptimConfig(name="distributed_fused_adam", lr=1e-2, eps=1e-6)
PROJECTOR = {"language_model", "vision_model"}  # LLaVA's first stage trains the projector alone
FROZEN = {
    "projector_only": PROJECTOR,
    "tower_frozen": {"vision_model"},
    "language_only": {"vision_model", "vision_projection"},  # as MindSpeed-MM tunes Qwen2-VL
}
FROZEN_LAYOUTS = [
    *product(["llava"], ["projector_only", "tower_frozen"], ["ddp", "tp2_dp2", "pp2", "pp2_vpp2", "fsdp", "fsdp_tp2"]),
    *product(["qwen2_vl"], ["language_only"], ["pp2", "fsdp"]),
]


def with_parts(run: RunConfig, frozen: set[str] = frozenset(), ratios: dict[str, float] | None = None) -> RunConfig:
    mm, ratios = (
        run.model.mm_cfg,
        {"language_model": 1.0, "vision_model": 1.0, "vision_projection": 1.0} | (ratios or {}),
    )
    mm = replace(
        mm,
        llm=replace(mm.llm, freeze="language_model" in frozen, lr_ratio=ratios["language_model"]),
        vision_encoder=replace(
            mm.vision_encoder, freeze="vision_model" in frozen, vision_encoder_lr_ratio=ratios["vision_model"]
        ),
        freeze_mm_mlp_adapter="vision_projection" in frozen,
        mm_mlp_adapter_lr_ratio=ratios["vision_projection"],
    )
    return replace(run, model=replace(run.model, mm_cfg=mm))


def llava(**settings) -> RunConfig:
    return run_of("llava", TINY["llava"], **settings)


@pytest.fixture(scope="module")
def reference():
    known = {}

    def get(key: str, run: RunConfig):
        if key not in known:
            known[key] = single(run)
        return known[key]

    return get


@pytest.fixture(scope="module")
def starts() -> dict[str, dict[str, torch.Tensor]]:
    """The weights that all runs of a family start from."""
    runs = {name: run_of(name, TINY[name]) for name in ("llava", "qwen2_vl")}
    return {name: run_ranks(first_weights, 1, run, make_layout(run, 1))[0] for name, run in runs.items()}


def first_weights(run: RunConfig, layout: Layout):
    groups.initialize(layout, seed=1)
    return whole(build_all(run, layout)[1])


def frozen_holdings(run: RunConfig, layout: Layout, frozen: set[str]):
    """A step, and what this rank then keeps for frozen parameters: optimizer state, gradients, elements held."""
    groups.initialize(layout, seed=1)
    chunks = build_all(run, layout)[0]
    full = {(i, name): p.numel() for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
    engine = make_engine(run, layout, chunks)
    steps_of(engine, run, layout, 0, 1)
    parameters = {(i, name): p for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
    cold = {key: p for key, p in parameters.items() if key[1].split(".")[0] in frozen}
    state = {(shard.chunk, shard.name) for shard in engine.updater.shards()} & cold.keys()
    gradients = [key for key, p in cold.items() if p.grad is not None or hasattr(p, "main_grad")]
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in cold.values())
    groups.shut_down()
    return state, gradients, held, sum(full[key] for key in cold)


def frozen_run(name: str, frozen: str, **settings) -> RunConfig:
    return with_parts(run_of(name, TINY[name], **settings), FROZEN[frozen])


@pytest.fixture(scope="module")
def frozen_everywhere():
    found = {}
    for name, frozen, layout in FROZEN_LAYOUTS:
        run = frozen_run(name, frozen, **({} if "fsdp" in layout else {"optim": DISTRIBUTED}))
        found[name, frozen, layout] = sharded(run, layout, micro_batch_size=2)
    return on_ranks(found)


@pytest.mark.parametrize(("name", "frozen", "layout"), FROZEN_LAYOUTS)
def test_frozen_parts_stay_in_every_layout(name, frozen, layout, frozen_everywhere, reference, starts) -> None:
    expected, expected_weights = reference(frozen, frozen_run(name, frozen))
    results, final = frozen_everywhere[name, frozen, layout][0]
    assert_same_run(results, expected)
    assert_same_weights(final, expected_weights)
    for key, value in final.items():
        stays = key.split(".")[0] in FROZEN[frozen] or (name == "llava" and untouched(key))
        assert torch.equal(value, starts[name][key]) == stays, key


def untouched(key: str) -> bool:
    """Behind the selected layer of LLaVA's tower."""
    return key.startswith(("vision_model.ln_post", f"vision_model.layers.{TINY['llava'].mm_cfg.vision_encoder.depth}."))


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "hsdp"])
def test_frozen_parts_cost_no_gradients_and_no_state(layout: str) -> None:
    run, where = sharded(with_parts(llava(), PROJECTOR), layout)
    for state, gradients, held, full in run_ranks(frozen_holdings, where.world_size, run, where, PROJECTOR):
        assert not state and not gradients
        assert held == full if layout == "ddp" else held == pytest.approx(full / 2, rel=0.02)


@pytest.mark.parametrize(
    ("name", "layout"), [("llava", "single"), ("qwen2_vl", "tp2"), ("llava", "pp2_vpp2"), ("qwen2_vl", "fsdp")]
)
def test_learning_rates_by_part(name: str, layout: str) -> None:
    """Adam's first step is as long as the learning rate, for each weight with a gradient that is not tiny."""
    ratios = {"language_model": 0.5, "vision_model": 0.1, "vision_projection": 2.0}
    run = with_parts(run_of(name, TINY[name]), ratios=ratios)
    run, where = (run, make_layout(run, 1)) if layout == "single" else sharded(run, layout)
    start, end = run_ranks(one_step, where.world_size, run, where)[0]
    for part, ratio in ratios.items():
        changes = [(end[name] - start[name]).abs().max() for name in end if name.startswith(part)]
        assert float(max(changes)) == pytest.approx(run.optim.lr * ratio, rel=0.02)


def one_step(run: RunConfig, layout: Layout):
    groups.initialize(layout, seed=1)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    start = whole(engine.parts())
    steps_of(engine, run, layout, 0, 1)
    end = whole(engine.parts())
    groups.shut_down()
    return start, end


RECOMPUTE = {
    "uniform": (("full", "uniform", 1), {"vision": 2, "first": 2, "last": 2}),
    "uniform_2": (("full", "uniform", 2), {"vision": 2, "first": 2, "last": 2}),
    "block": (("full", "block", 1), {"vision": 1, "first": 2, "last": 1}),
    "selective": (("selective", None, None), {"vision": 1, "first": 1, "last": 1}),
}


def counted_steps(run: RunConfig, layout: Layout):
    """Steps, and how often a layer of each kind and its core attention ran in a micro-batch."""
    groups.initialize(layout, seed=1)
    (model,), _ = build_all(run, layout)
    tower = model.vision_model
    watched = {
        "vision": tower.layers[tower.depth - 1],
        "first": model.language_model.decoder.layers[0],
        "last": model.language_model.decoder.layers[-1],
    }
    counts = dict.fromkeys([*watched, *(f"{name} attention" for name in watched)], 0)

    def count(name: str):
        def hook(*unused):
            counts[name] += 1

        return hook

    for name, layer in watched.items():
        layer.register_forward_pre_hook(count(name))
        layer.self_attention.core_attention.register_forward_pre_hook(count(f"{name} attention"))
    engine = make_engine(run, layout, [model])
    results = steps_of(engine, run, layout, 0, 2)
    groups.shut_down()
    return results, {name: number / (2 * layout.num_micro_batches) for name, number in counts.items()}


@pytest.mark.parametrize(("name", "kind"), [*product(["llava"], RECOMPUTE), ("qwen2_vl", "uniform_2")])
def test_recomputation_changes_work_and_not_results(name: str, kind: str, reference) -> None:
    (granularity, method, layers), layer_runs = RECOMPUTE[kind]
    step = StepConfig(
        2,
        8,
        activations_checkpoint_granularity=granularity,
        activations_checkpoint_method=method,
        activations_checkpoint_num_layers=layers,
    )
    plain, run = (run_of(name, TINY[name], **settings) for settings in ({}, {"step": step}))
    results, counts = run_ranks(counted_steps, 1, run, make_layout(run, 1))[0]
    assert_same_run(results, reference(name, plain)[0][:2])
    for layer, number in layer_runs.items():
        assert counts[layer] == number
        assert counts[f"{layer} attention"] == (2 if kind == "selective" else number)


OVERLAPS = [*product(["gradients", "gradients and weights"], ["ddp", "tp2_dp2", "pp2_dp2", "pp2_vpp2"])]


@pytest.fixture(scope="module")
def overlapped():
    overlapping = replace(DISTRIBUTED, overlap_grad_sync=True)
    runs = {key: llava(optim=replace(overlapping, overlap_param_sync="weights" in key[0])) for key in OVERLAPS}
    return on_ranks({key: sharded(run, key[1]) for key, run in runs.items()})


@pytest.mark.parametrize(("flags", "layout"), OVERLAPS)
def test_overlap_changes_no_results(flags: str, layout: str, overlapped, reference) -> None:
    results, final = overlapped[flags, layout][0]
    expected, expected_weights = reference("llava", llava())
    assert_same_run(results, expected)
    assert_same_weights(final, expected_weights)


def weights_on_their_way(run: RunConfig, layout: Layout):
    """Of the tower's weights, each gathered for itself, how many were on their way when its forward pass ended."""
    groups.initialize(layout, seed=1)
    replicated.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=1)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    (module,), counts = engine.updater.modules, []

    def count(tower, *unused) -> None:
        trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
        handles = {module.param_to_bucket_group[parameter].param_gather_handle for parameter in trained}
        counts.append((len(trained), len(handles - {None})))

    module.module.model.vision_model.register_forward_hook(count)
    results = steps_of(engine, run, layout)
    groups.shut_down()
    return results, counts


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_no_weight_is_read_before_it_is_there(name: str, reference) -> None:
    optim = replace(DISTRIBUTED, overlap_grad_sync=True, overlap_param_sync=True)
    plain, (run, where) = run_of(name, TINY[name]), sharded(run_of(name, TINY[name], optim=optim), "ddp", 4)
    for results, counts in run_ranks(weights_on_their_way, 2, run, where):
        assert_same_run(results, reference(name, plain)[0])
        assert all(trained > 10 and waiting == 0 for trained, waiting in counts)


def gathered_after_forward(run: RunConfig, layout: Layout):
    """Whether a layer's weights are still gathered when the backward pass begins, and the axes of their mesh."""
    groups.initialize(layout, seed=1)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    stage = engine.updater.modules[0]
    layer = next(module for module in stage.modules() if isinstance(module, TransformerLayer))
    seen = []
    stage.register_forward_hook(lambda *unused: seen.append(any(isinstance(p, DTensor) for p in layer.parameters())))
    steps_of(engine, run, layout, 0, 1)
    parameter = next(layer.parameters())
    groups.shut_down()
    return not seen[0], parameter.device_mesh.ndim, parameter.to_local().numel() / parameter.numel()


@pytest.mark.parametrize(
    ("layout", "effect"), [("fsdp", (False, 1, 0.5)), ("fsdp_grad", (True, 1, 0.5)), ("hsdp", (False, 2, 0.5))]
)
def test_fsdp_strategies_differ_in_what_they_keep(layout: str, effect: tuple) -> None:
    run, where = sharded(llava(), layout)
    for seen in run_ranks(gathered_after_forward, where.world_size, run, where):
        assert seen == effect


def test_fsdp_reduces_in_the_dtype_that_is_asked_for(reference) -> None:
    """fp32 layouts agree ten times better than this differs."""
    run, where = sharded(llava(), "fsdp")
    run = replace(run, parallel=ParallelConfig(fsdp=True, fsdp_grad_reduce_dtype="bf16"))
    narrow = run_ranks(train, 2, run, where)[0][0]
    expected = reference("llava", llava())[0]
    assert narrow[0][0] == pytest.approx(expected[0][0], rel=1e-6)
    assert narrow[0][1] != pytest.approx(expected[0][1], rel=2e-6)
    assert_same_run(narrow[:1], expected[:1], norm=1e-3)


def poisoned(run: RunConfig, layout: Layout, samples: list[Sample]):
    """A step on good samples, one with a NaN in an image, one more; whether the second changed a weight."""
    groups.initialize(layout, seed=1)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    good = micro_batches(layout, samples)
    nan = replace(samples[0].images, pixel_values=samples[0].images.pixel_values * math.nan)
    bad = [replace(samples[0], images=nan), *samples[1:]]
    first = engine.step(good, lr=1e-2)
    before = [part.data.clone() for part in engine.saved_parts() + engine.optimizer_parts()]
    second = engine.step(micro_batches(layout, bad), lr=1e-2)
    after = [part.data for part in engine.saved_parts() + engine.optimizer_parts()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    third = engine.step(good, lr=1e-2)
    groups.shut_down()
    return first.loss, second.skipped, same, third.loss, engine.optimizer_state()["step"]


@pytest.mark.parametrize("layout", ["single", "ddp", "pp2_dp2", "tp2", "fsdp", "hsdp"])
def test_a_step_with_nan_changes_nothing_on_any_rank(layout: str) -> None:
    run = llava(optim=DISTRIBUTED if layout == "pp2_dp2" else OptimConfig(lr=1e-2))
    if layout == "ddp":
        run = replace(run, optim=replace(DISTRIBUTED, overlap_grad_sync=True, overlap_param_sync=True))
    samples = family("llava", "tiny").samples(run.model, 16, torch.Generator().manual_seed(0))
    samples = sorted(samples, key=lambda sample: -len(sample.images))[:8]
    assert len(samples[0].images)
    run, where = (run, make_layout(run, 1)) if layout == "single" else sharded(run, layout)
    for first, skipped, same, third, steps in run_ranks(poisoned, where.world_size, run, where, samples):
        assert skipped and same and steps == 2
        assert third < first


def test_ramp_up_is_megatrons() -> None:
    step = StepConfig(micro_batch_size=2, global_batch_size=32, rampup_batch_size=(8, 8, 100))
    theirs = RampupBatchsizeNumMicroBatchesCalculator(32, 2, 2, False, 0, 8, 8, 100)
    for consumed in range(0, 200, 4):
        theirs.update(consumed, consistency_check=False)
        assert batch_size_at(consumed, step) == theirs.get_current_global_batch_size(), consumed


def test_ramp_up_reads_every_sample_once_and_resumes() -> None:
    step = StepConfig(micro_batch_size=2, global_batch_size=16, rampup_batch_size=(4, 4, 24))
    order = Blend([numpy.arange(1000)], (1.0,), 7, shuffle=False)
    ranks = [[groups[0] for groups in StepSampler(order, 8, 0, step, Share(rank, 2))] for rank in range(2)]
    sizes = [len(a) + len(b) for a, b in zip(*ranks, strict=True)]
    assert sizes == [4, 4, 8, 12, 16, 16, 16, 16]
    read = [k for a, b in zip(*ranks, strict=True) for k in a + b]
    assert read == list(range(len(read)))
    again = StepSampler(order, 5, sum(sizes[:3]), step, Share(0, 2))
    assert [groups[0] for groups in again] == ranks[0][3:]
