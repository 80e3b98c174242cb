"""Experts, their router and its auxiliary loss: against plain torch and transformers, and alike under every layout."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from test_families import (
    TINY,
    assert_same_run,
    assert_same_weights,
    build_all,
    make_layout,
    micro_batches,
    one_rank,
    run_of,
    samples_of_step,
    whole,
)
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from nemo_vlm import checkpoints, options
from nemo_vlm import layout as layouts
from nemo_vlm.batch import IGNORE_INDEX, Sample, collate, empty_sample, pack
from nemo_vlm.checkpoints import Position
from nemo_vlm.config import (
    ExpManagerConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    StepConfig,
)
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import reader
from nemo_vlm.layout import Layout, one_process
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.config import language_config, one_process_context
from nemo_vlm.mcore.engine import Engine
from nemo_vlm.mcore.experts import PADDING, Router, loss_weights
from nemo_vlm.mcore.weights import Part, draw
from nemo_vlm.training import saving
from nemo_vlm.training.build import make_engine
from nemo_vlm.training.loss import token_mean

COEFFICIENT, NUM_STEPS = 0.5, 3
MODEL = replace(TINY["gpt"], num_layers=3, num_moe_experts=4, moe_ffn_hidden_size=24, moe_aux_loss_coeff=COEFFICIENT)
PLAIN = OptimConfig(lr=1e-2, eps=1e-6)
DISTRIBUTED = replace(PLAIN, name="distributed_fused_adam")
TWO_STAGES = dict(pipeline_model_parallel_size=2)
SHARED = dict(expert_model_parallel_size=2)
TENSOR = dict(tensor_model_parallel_size=2)
APART = dict(expert_tensor_parallel_size=1)

Results = tuple[list[tuple[float, float, float]], list[tuple], dict[str, torch.Tensor]]


def run_with(optim: OptimConfig = PLAIN, precision: str = "32", **parallel) -> RunConfig:
    step = StepConfig(micro_batch_size=2, global_batch_size=8)
    return run_of("gpt", MODEL, ParallelConfig(**parallel), step, optim, precision)


def recomputed(run: RunConfig) -> RunConfig:
    settings = dict(activations_checkpoint_granularity="full")
    return replace(run, step=replace(run.step, **settings))


def by_allgather(run: RunConfig) -> RunConfig:
    return replace(run, step=replace(run.step, moe_token_dispatcher_type="allgather"))


def batches_of(run: RunConfig, layout: Layout, number: int):
    """The last step's samples are one token long: some experts and some ranks have none."""
    if number < NUM_STEPS - 1:
        return micro_batches(layout, samples_of_step(run, number))
    one = Sample(torch.tensor([number]), torch.tensor([number + 1]))
    return micro_batches(layout, [one] * run.step.global_batch_size)


def steps_of(engine: Engine, run: RunConfig, layout: Layout, steps: Collection[int]):
    found, loads = [], []
    for number in steps:
        result = engine.step(batches_of(run, layout, number), lr=run.optim.lr)
        assert result.experts is not None
        found.append((result.loss, result.grad_norm, result.counts[0]))
        loads.append((result.experts.tokens, result.experts.aux_loss))
    return found, loads


def train(runs: dict[str, tuple[RunConfig, Layout]]) -> dict[str, Results]:
    """Several runs one after another: losses, norms and loads of steps, an evaluation and a step behind it; weights."""
    found = {}
    for name, (run, layout) in runs.items():
        groups.initialize(layout, seed=1)
        engine = make_engine(run, layout, build_all(run, layout)[0])
        results, loads = steps_of(engine, run, layout, range(NUM_STEPS))
        loss, weight, *_ = engine.evaluate(batches_of(run, layout, 0), token_mean)
        (after,), _ = steps_of(engine, run, layout, range(1))  # an evaluation leaves nothing behind for the next step
        found[name] = [*results, (loss / weight, 1.0, weight), after], loads, whole(engine.parts())
        groups.shut_down()
    return found


def on_ranks(world_size: int, runs: dict[str, RunConfig]) -> dict[str, Results]:
    return run_ranks(train, world_size, {name: (run, make_layout(run, world_size)) for name, run in runs.items()})[0]


@pytest.fixture(scope="module")
def single() -> Results:
    return on_ranks(1, {"single": run_with()})["single"]


RUNS = {
    2: {
        "ep2": run_with(**SHARED),
        "etp2": run_with(expert_tensor_parallel_size=2),
        "tp2": run_with(**TENSOR),
        "tp2_ep2": run_with(**TENSOR, **SHARED, **APART),
        "tp2_ep2_allgather": by_allgather(run_with(**TENSOR, **SHARED, **APART)),
        "cp2_ep2": run_with(context_parallel_size=2, **SHARED),
        "pp2_vpp2_recomputed": recomputed(run_with(**TWO_STAGES, virtual_pipeline_model_parallel_size=2)),
        "fsdp_recomputed": recomputed(run_with(fsdp=True)),
    },
    4: {
        "ep2_dp4": run_with(DISTRIBUTED, **SHARED),
        "tp2_etp1_dp2": run_with(**TENSOR, **APART),
        "pp2_ep2_recomputed": recomputed(run_with(**TWO_STAGES, **SHARED)),
        "ep4_etp1_tp2_cp2": run_with(**TENSOR, **APART, context_parallel_size=2, expert_model_parallel_size=4),
    },
}


@pytest.fixture(scope="module")
def everywhere() -> dict[str, Results]:
    return {name: found for world_size, runs in RUNS.items() for name, found in on_ranks(world_size, runs).items()}


@pytest.mark.parametrize("name", [name for runs in RUNS.values() for name in runs])
def test_every_layout_trains_with_the_auxiliary_loss_as_one_process(name: str, everywhere, single) -> None:
    results, loads, weights = everywhere[name]
    expected, expected_loads, expected_weights = single
    assert_same_run(results, expected)
    assert_same_weights(weights, expected_weights)
    for (tokens, aux_loss), (expected_tokens, expected_loss) in zip(loads, expected_loads, strict=True):
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(aux_loss, expected_loss, rtol=1e-5, atol=0)


def test_every_token_goes_to_so_many_experts(single) -> None:
    """Padding does not count; the last step's tokens are all the same one, and some experts get nothing."""
    results, loads, _ = single
    for (_, _, tokens), (sent, _) in zip(results[:NUM_STEPS], loads, strict=True):
        assert sent.sum(1).tolist() == [2 * tokens] * MODEL.num_layers
    assert loads[-1][0].eq(0).any()


def test_whole_tensors_stack_the_experts(single) -> None:
    front = "language_model.decoder.layers.0."
    shapes = {name.removeprefix(front): tuple(value.shape) for name, value in single[2].items() if front in name}
    hidden, width = MODEL.hidden_size, 24
    assert shapes.items() >= {
        ("pre_mlp_layernorm.weight", (hidden,)),
        ("mlp.router.weight", (4, hidden)),
        ("mlp.experts.experts.linear_fc1.weight", (4, 2 * width, hidden)),
        ("mlp.experts.experts.linear_fc2.weight", (4, hidden, width)),
    }


def test_a_rank_draws_no_experts_but_its_own() -> None:
    """All of so many would fit into no memory; each is the same whatever is beside it."""
    name, shape = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight", (4, 6, 5)
    every, half = torch.empty(shape), torch.empty(1, 3, 5)
    draw([Part(name, shape, reader.whole(shape), every)], 7, 0.02, 1)
    place = (slice(2, 3), slice(3, 6), slice(0, 5))
    draw([Part(name, (10**13, 6, 5), place, half)], 7, 0.02, 1)
    assert torch.equal(every[place], half)
    assert len({float(expert.norm()) for expert in every}) == 4


def make_router(coefficient: float) -> Router:
    model = replace(MODEL, moe_aux_loss_coeff=coefficient)
    router = Router(language_config(model, one_process_context(model)), get_default_pg_collection())
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def test_the_router_by_hand() -> None:
    """Weights, auxiliary loss and gradients in plain torch; transformers' loss counts each token top-k times."""
    generator, weight, scale = torch.Generator().manual_seed(1), 5.0, 3.0
    hidden = torch.randn(7, 2, MODEL.hidden_size, generator=generator)
    outer = torch.randn(14, 4, generator=generator)
    padding = torch.arange(14) % 5 == 0
    with one_rank(MODEL):
        router = make_router(COEFFICIENT)
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([scale]))  # as Megatron's schedule does
        router.loss_weights = torch.full((14,), weight).masked_fill(padding, PADDING)
        probs, chosen = router(hidden)
        (probs * outer).sum().backward()

    plain = router.weight.detach().clone().requires_grad_()
    logits = hidden.flatten(0, 1) @ plain.T
    scores = logits.softmax(-1)
    top, index = scores.topk(2)
    expected = torch.zeros(14, 4).scatter(1, index, top / top.sum(-1, keepdim=True))
    aux_loss = load_balancing_loss_func((logits[~padding],), 4, 2) / 2
    ((expected * outer).sum() + scale * weight * COEFFICIENT * aux_loss).backward()

    assert torch.equal(chosen, expected > 0)
    torch.testing.assert_close(probs, expected)
    torch.testing.assert_close(router.weight.grad, plain.grad)
    assert router.seen is not None
    torch.testing.assert_close(router.seen[:4], chosen[~padding].sum(0).double())
    assert router.seen[4].item() == pytest.approx(weight * aux_loss.item())

    router.seen, router.loss_weights = None, torch.full((14,), PADDING)  # all records of a micro-batch were left out
    router(hidden)
    assert router.seen.tolist() == [0.0] * 5


def test_padding_is_told_apart() -> None:
    """And what stands for a record that was left out; a single token that is trained on is one."""
    samples = [Sample(torch.arange(n), torch.full((n,), IGNORE_INDEX)) for n in (2, 3)]
    samples[1:1] = [empty_sample(0, "no image"), Sample(torch.zeros(1).long(), torch.ones(1).long())]
    weighted = [replace(batch, loss_weight=torch.tensor(7)) for batch in (collate(samples, 4), pack(samples, 8))]
    rows = [loss_weights(batch) for batch in weighted]
    lengths = [2, 0, 1, 3]
    assert rows[0].tolist() == [[7] * length + [PADDING] * (4 - length) for length in lengths]
    assert rows[1].tolist() == [[7, 7, PADDING, 7, 7, 7, 7, PADDING]]
    assert loss_weights(collate(samples)) is None


def save(run: RunConfig, layout: Layout):
    """Results of the step behind a checkpoint."""
    groups.initialize(layout, seed=1)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    steps_of(engine, run, layout, range(1))
    saver = saving.Saver(run, layout)
    saver.save(engine, Position(1, run.step.global_batch_size, metrics={"global_step": 1.0}))
    saver.wait()
    results, _ = steps_of(engine, run, layout, range(1, 2))
    groups.shut_down()
    return results


def resume_and_save(run: RunConfig, layout: Layout, path: Path, folder: Path):
    """Results of the step behind a checkpoint of another layout, which is written again before it."""
    groups.initialize(layout, seed=5)
    engine = make_engine(run, layout, build_all(run, layout)[0])
    position = saving.load(engine, path, run.exp_manager, layout)
    saver = saving.Saver(replace(run, exp_manager=replace(run.exp_manager, exp_dir=str(folder))), layout)
    saver.save(engine, position)
    saver.wait()
    results, _ = steps_of(engine, run, layout, range(1, 2))
    groups.shut_down()
    return results


def test_a_checkpoint_goes_from_layout_to_layout(tmp_path: Path) -> None:
    manager = ExpManagerConfig(name="run", exp_dir=str(tmp_path / "ep2"))
    run = replace(run_with(DISTRIBUTED, **SHARED), exp_manager=manager)
    expected = run_ranks(save, 2, run, make_layout(run, 2))[0]
    after = {"single": (1, run_with()), "tp2_ep2": (2, run_with(DISTRIBUTED, **TENSOR, **SHARED, **APART))}
    for name, (world_size, other) in after.items():
        (path,) = checkpoints.complete(checkpoints.folder_of(manager))
        other, folder = replace(other, exp_manager=manager), tmp_path / name
        results = run_ranks(resume_and_save, world_size, other, make_layout(other, world_size), path, folder)[0]
        assert_same_run(results, expected)
        manager = replace(manager, exp_dir=str(folder))


def train_once(runs: list[tuple[RunConfig, Layout]]):
    """Losses, norms, weights and what trains, of a step of each run."""
    found = []
    for run, layout in runs:
        groups.initialize(layout, seed=1)
        engine = make_engine(run, layout, build_all(run, layout)[0])
        results, _ = steps_of(engine, run, layout, range(1))
        found.append((results, whole(engine.parts()), set(whole(engine.kept_parts())), engine.loss_scale))
        groups.shut_down()
    return found


ADAPTERS = PeftConfig("lora", lora_tuning=LoraConfig(target_modules=("attention",), adapter_dim=4))


def test_adapters_of_attention_train_beside_experts() -> None:
    adapted, shared = (replace(run_with(**parallel), peft=ADAPTERS) for parallel in ({}, TENSOR | SHARED | APART))
    ((expected, before, kept, _),) = run_ranks(train_once, 1, [(adapted, make_layout(adapted, 1))])[0]
    ((results, weights, _, _),) = run_ranks(train_once, 2, [(shared, make_layout(shared, 2))])[0]
    assert_same_run(results, expected)
    assert_same_weights(weights, before)
    assert all("self_attention" in name for name in kept)


def test_half_precision_follows_fp32(single) -> None:
    """In fp16 the experts' gradients overflow and are scaled with all others, and in bf16 they stay close."""
    kinds = [("bf16-mixed", DISTRIBUTED), ("16-mixed", PLAIN)]
    runs = [run_with(optim, precision, **SHARED) for precision, optim in kinds]
    for results, *_ in run_ranks(train_once, 2, [(run, make_layout(run, 2)) for run in runs])[0]:
        assert_same_run(results, single[0][:1], loss=2e-2, norm=2e-1)


def changed(run: RunConfig, **settings) -> RunConfig:
    """With settings of any section of `model`."""
    for section in ("model", "parallel", "step", "data", "peft"):
        mine = {key: value for key, value in settings.items() if hasattr(getattr(run, section), key)}
        run = replace(run, **{section: replace(getattr(run, section), **mine)})
    return run


DENSE = dict(num_moe_experts=None, moe_ffn_hidden_size=None, moe_aux_loss_coeff=0.0)
ALL = PeftConfig("lora", lora_tuning=LoraConfig(target_modules=("all",)))
SPLIT_PACKS = dict(context_parallel_size=2, expert_model_parallel_size=4)
REFUSED = [
    (dict(expert_model_parallel_size=3), "model.num_moe_experts=4: must be a multiple of expert_model_parallel_size=3"),
    (
        dict(expert_tensor_parallel_size=5),
        "model.moe_ffn_hidden_size=24: must be a multiple of expert_tensor_parallel_size=5",
    ),
    (dict(expert_model_parallel_size=0), "model.expert_model_parallel_size=0: must be 1 or more"),
    (DENSE | SHARED, "model.expert_model_parallel_size=2: must be 1 with model.num_moe_experts=null"),
    (DENSE | dict(moe_permute_fusion=True), "model.moe_permute_fusion=true: must be false with model.num_moe_experts="),
    (dict(fsdp=True, **SHARED), "model.expert_model_parallel_size=2: must be 1 with model.fsdp=true"),
    (dict(fsdp=True, **TENSOR, **APART), "model.expert_tensor_parallel_size=1: must be 2 with model.fsdp=true"),
    (
        dict(moe_token_dispatcher_type="allgather", **TWO_STAGES),
        "model.moe_token_dispatcher_type=allgather: must be alltoall with model.pipeline_model_parallel_size=2",
    ),
    (
        dict(moe_token_dispatcher_type="allgather", **SHARED),
        "model.moe_token_dispatcher_type=allgather: all batches must be as long; give model.data.pad_to=",
    ),
    (
        dict(moe_token_dispatcher_type="allgather", data_impl="sft_idxmap", **SPLIT_PACKS),
        "model.moe_token_dispatcher_type=allgather: not with packed samples and model.context_parallel_size above 1",
    ),
    (dict(moe_grouped_gemm=True, transformer_impl="local"), "model.moe_grouped_gemm=true: is Transformer Engine's"),
    (dict(peft=ALL), "model.peft.lora_tuning.target_modules=[all]: must be [attention], [attention_qkv] or"),
    (dict(moe_router_topk=5), "model.moe_router_topk=5: must be from 2 to model.num_moe_experts=4"),
    (dict(moe_router_topk=1), "model.moe_router_topk=1: must be from 2 to model.num_moe_experts=4"),
    (
        dict(num_moe_experts=None),
        "model.num_moe_experts=null: give model.moe_ffn_hidden_size=null model.moe_router_topk=2 "
        "model.moe_aux_loss_coeff=0.0 with it, or a number of experts",
    ),
    (dict(moe_aux_loss_coeff=-1.0), "model.moe_aux_loss_coeff=-1.0: must be 0 or more"),
    (dict(num_moe_experts=1), "model.num_moe_experts=1: must be 2 or more, or null"),
    (dict(bias=True), "model.bias=true: must be false with model.num_moe_experts"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_does_not_go_together_is_refused(settings: dict, message: str) -> None:
    """A user reads one line."""
    run = run_with()
    with pytest.raises(ConfigError, match=re.escape(message)):
        if "peft" in settings:
            run = replace(run, peft=settings["peft"])
        options.check(changed(run, **settings))


def test_ranks_hold_whole_copies_of_both_parts() -> None:
    """On a CPU as many ranks start as dense part and experts need together."""
    run = run_with(**TENSOR, expert_model_parallel_size=2, expert_tensor_parallel_size=2)
    where = layouts.resolve(run, 0, {})
    assert (where.world_size, where.tensor, where.data, where.expert, where.expert_tensor) == (4, 2, 2, 2, 2)
    assert where.sequence_parallel  # by itself
    assert (layouts.resolve(run_with(**TENSOR), 0, {}).expert_tensor, one_process(MODEL).expert) == (2, 1)
    message = "2 ranks do not divide by the 4 of expert_model_parallel_size=2 x expert_tensor_parallel_size=2 x"
    with pytest.raises(ConfigError, match=message):
        make_layout(run, 2)
