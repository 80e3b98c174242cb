"""The plan's times and its search: hand counts, Megatron's own schedule, torch's count of FLOPs, and brute force."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from hydra import compose, initialize_config_dir
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from omegaconf import OmegaConf
from PIL import Image
from ported import run_of as composed
from test_families import VARIANTS, build_all, run_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nemo_vlm import layout as layouts
from nemo_vlm.batch import collate, round_up
from nemo_vlm.config import ParallelConfig, RunConfig, StepConfig
from nemo_vlm.config.peft import PeftConfig
from nemo_vlm.config.plan import PlanConfig
from nemo_vlm.door import CONF, store_defaults
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout, one_process
from nemo_vlm.mcore import groups
from nemo_vlm.models.base import family
from nemo_vlm.planning import communication, hardware, rules, search
from nemo_vlm.planning import plan as planning
from nemo_vlm.planning.activations import activation_bytes, buffer_bytes
from nemo_vlm.planning.communication import Case
from nemo_vlm.planning.expected import expected
from nemo_vlm.planning.flops import forward_flops, passes, step_flops
from nemo_vlm.planning.memory import hold
from nemo_vlm.planning.parameters import Count, count, counter
from nemo_vlm.planning.schedule import Stages, bubble, length, order, simulate
from nemo_vlm.planning.timing import (
    LATENCY,
    Pass,
    computed_flops,
    decoder_layer,
    exposed_ring,
    ffn_products,
    spared,
    step_time,
    update_times,
)
from nemo_vlm.planning.workload import Workload
from nemo_vlm.typed import read_run

BENCHMARKS = Path(__file__).parents[1] / "scripts/benchmarks"
H100 = hardware.named("H100")


def even(ranks: int, chunks: int = 1) -> Stages:
    return Stages((1.0,) * ranks * chunks, (2.0,) * ranks * chunks, ranks)


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), [(4, 1, 8), (4, 2, 8), (8, 5, 16), (4, 1, 2), (2, 3, 4)])
def test_bubbles_of_even_stages(ranks: int, chunks: int, micro_batches: int) -> None:
    """(p - 1) / (m v + p - 1), arXiv:2104.04473, section 2.2."""
    stages = even(ranks, chunks)
    found = bubble(stages, micro_batches, length(stages, micro_batches))
    assert found == pytest.approx((ranks - 1) / (micro_batches * chunks + ranks - 1))


def test_uneven_stages_wait_for_the_slowest() -> None:
    """By hand: rank 1 is busy from 1 to 13, twice 2 and 4; the last gradient goes back through rank 0 in 2."""
    stages = Stages((1.0, 2.0), (2.0, 4.0), 2)
    ends = {(p.rank, p.backward, p.micro_batch): p.end for p in simulate(stages, 2)}
    assert ends == {
        (0, False, 0): 1,
        (0, False, 1): 2,
        (1, False, 0): 3,
        (1, True, 0): 7,
        (0, True, 0): 9,
        (1, False, 1): 9,
        (1, True, 1): 13,
        (0, True, 1): 15,
    }
    assert bubble(stages, 2, length(stages, 2)) == pytest.approx(1 - 9 / 15)


def test_what_is_not_simulated_repeats() -> None:
    for stages in (
        Stages((1.5, 1.0, 1.0, 1.0), (3.0, 2.0, 2.0, 2.6), 4),
        Stages((1.5, *[1.0] * 7), (3.0, *[2.0] * 6, 2.6), 4),
    ):
        assert length(stages, 64) == pytest.approx(max(piece.end for piece in simulate(stages, 64)))


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), [(4, 2, 8), (2, 3, 6)])
def test_the_order_is_megatrons(ranks: int, chunks: int, micro_batches: int) -> None:
    table = get_schedule_table(micro_batches, chunks, ranks)
    for rank in range(ranks):
        passes_of_rank = list(order(rank, ranks, chunks, micro_batches))
        forward = [(micro_batch, chunk) for backward, chunk, micro_batch in passes_of_rank if not backward]
        backward = [(micro_batch, chunk) for backward, chunk, micro_batch in passes_of_rank if backward]
        assert forward == table
        assert backward == [(micro_batch, chunks - 1 - chunk) for micro_batch, chunk in table]
        warm = [each[0] for each in passes_of_rank].index(True) - 1  # then they take turns
        assert warm == 2 * (ranks - rank - 1) + (chunks - 1) * ranks


def gpt(**changes: Any) -> RunConfig:
    run = run_of("gpt", VARIANTS["gpt"][1])
    return replace(run, model=replace(run.model, vocab_size=256), **changes)


def case(layout: Layout, run: RunConfig | None = None, **work: int) -> Case:
    found = dict(samples=2, rows=2, positions=128, tokens=128, squared_lengths=2 * 64**2, trained_tokens=100) | work
    run = run or gpt()
    work = Workload(**found)
    return Case(replace(run, trainer=replace(run.trainer, precision="bf16")), layout, work, work, H100)


def laid_out(**sizes: Any) -> Layout:
    given = dict(num_nodes=2, ranks_per_node=8, tensor=1, pipeline=1, sequence_parallel=False, stage_layers=(4,))
    return Layout(**given | dict(micro_batch_size=2, num_micro_batches=3) | sizes)


def test_bytes_that_ranks_send() -> None:
    """By hand, of 128 tokens of 48 values in two bytes: 12,288 bytes; 4 groups of keys and values of 12 each."""
    model = gpt().model
    hidden = 128 * model.hidden_size * 2
    plain = communication.of_layer(case(laid_out(tensor=4)))
    assert plain["tensor"] == (2 * 2 * 3 / 4 * hidden, 2 * 2 * 3 / 4 * hidden)  # two sums forward, two backward
    sequence = communication.of_layer(case(laid_out(tensor=4, sequence_parallel=True)))
    assert sequence["tensor"] == (4 * 3 / 4 * hidden, 6 * 3 / 4 * hidden)  # and two gathers for the weights
    keys = 2 * 64 * model.num_query_groups * model.kv_channels * 2
    assert communication.of_layer(case(laid_out(context=2)))["context"] == (keys, 2 * keys)
    pipeline = case(laid_out(pipeline=2, stage_layers=(2, 2)))
    held = count(pipeline.run, 1)
    for stage in (0, 1):  # one sends hidden states on, the other gradients back
        sent = communication.of_step(pipeline, held.of_stage(pipeline.layout, stage), stage)
        assert sent["pipeline"] == 3 * hidden
    alone = case(laid_out())
    trained = held.alone.plus(held.layer, 4).trained
    sent = communication.of_step(alone, held.of_stage(alone.layout, 0), 0)
    assert (sent["gradients"], sent["weights"]) == (4 * trained * 15 / 16, 2 * trained * 15 / 16)
    sharded = case(laid_out(fsdp="full"))
    sent = communication.of_step(sharded, held.of_stage(sharded.layout, 0), 0)
    assert sent["weights"] == 3 * 2 * 2 * trained * 15 / 16  # forward and backward, each micro-batch
    assert sent["gradients"] == 3 * 4 * trained * 15 / 16


def test_tokens_travel_to_their_experts() -> None:
    run = run_of("qwen3_vl", VARIANTS["qwen3_vl"][1])
    found = case(laid_out(expert=2), run)
    one = 128 * run.model.hidden_size * 2 * run.model.moe_router_topk / 2  # half of them to the other rank
    assert communication.of_layer(found)["expert"] == (2 * one, 2 * one)


def test_what_is_recomputed_sends_again() -> None:
    """Under sequence parallelism, 4 messages of each of 4 layers in each of 3 micro-batches."""
    plain = gpt()
    full = replace(plain, step=StepConfig(activations_checkpoint_granularity="full"))
    half = replace(full.step, activations_checkpoint_method="block", activations_checkpoint_num_layers=2)

    def sent(run: RunConfig) -> float:
        found = case(laid_out(tensor=4, sequence_parallel=True), run)
        return communication.of_step(found, count(run, 4).of_stage(found.layout, 0), 0)["tensor"]

    again = 3 * 4 * 4 * 3 / 4 * 128 * plain.model.hidden_size * 2
    assert sent(full) - sent(plain) == pytest.approx(again)
    assert sent(replace(full, step=half)) - sent(plain) == pytest.approx(again / 2)


def test_experts_are_updated_by_their_own_groups() -> None:
    """By hand: 16 ranks train the rest, 4 each expert, one on each of two nodes' halves."""
    run = run_of("qwen3_vl", VARIANTS["qwen3_vl"][1])
    found = case(laid_out(expert=4), run)
    held = Count(0, 1000, 0, 4000)
    assert communication.of_update(found, held) == (
        (4 * 1000 * 15 / 16, 4 * 4000 * 3 / 4),
        (2 * 1000 * 15 / 16, 2 * 4000 * 3 / 4),
    )
    assert communication.replica_speed(found) == 8 * H100.network
    assert communication.expert_data_speed(found) == 2 * H100.network  # two of the four are on a node
    _, seconds = update_times(found, even(1), held)
    assert seconds == pytest.approx(30 * (1000 / 16 + 4000 / 4) / (H100.hbm * 0.8))


def test_hybrid_shards_stay_on_their_node() -> None:
    found = case(laid_out(fsdp="hybrid"))
    assert communication.shard_speed(found) == H100.link
    assert communication.copy_speed(found) == H100.network  # one of two copies on each node
    scattered, gathered, summed = communication.of_fsdp(found, Count(1000, 1000))
    assert (scattered, gathered, summed) == (4 * 1000 * 7 / 8, (2 * 1000 * 7 / 8, 2 * 1000 * 7 / 8), 4 * 1000 / 8)
    assert communication.shard_speed(case(laid_out(fsdp="full"))) == 8 * H100.network


def test_the_tower_sends_its_sums() -> None:
    """Two a layer and the projector's, forward; backward as many, or the projector's alone under a frozen tower."""
    run = run_of("llava", VARIANTS["llava"][1])
    mm = run.model.mm_cfg
    frozen = replace(
        run, model=replace(run.model, mm_cfg=replace(mm, vision_encoder=replace(mm.vision_encoder, freeze=True)))
    )
    tensor, seen = laid_out(tensor=2), dict(patches=64, visual_tokens=64)
    layers = 2 * mm.vision_encoder.depth * 2 * 1 / 2 * 64 * mm.vision_encoder.hidden_size * 2
    into, out = (2 * 1 / 2 * 64 * width * 2 for width in (mm.projector_input_size, run.model.hidden_size))
    assert communication.tower(case(tensor, run, **seen)) == (layers + out, layers + into)
    assert communication.tower(case(tensor, frozen, **seen)) == (layers + out, into)


def test_speeds_of_groups() -> None:
    """At a node's border, a ring has the adapters of all its members there."""
    inside = case(laid_out(tensor=8))
    assert communication.tensor_speed(inside) == H100.link
    assert communication.replica_speed(inside) == H100.network
    assert communication.replica_speed(case(laid_out())) == 8 * H100.network
    assert communication.tensor_speed(case(laid_out(tensor=16))) == 8 * H100.network


@pytest.mark.parametrize(("recomputed", "times"), [(False, 3), (True, 4)])
def test_the_last_mlp_takes_labelled_positions_alone(recomputed: bool, times: int) -> None:
    """A quarter of 128 positions have a label: forward, backward and again, three quarters of three products less."""
    run = gpt()
    step = dict.fromkeys(search.OF_RECOMPUTATION, None)
    if recomputed:
        step = dict(zip(search.OF_RECOMPUTATION, ("full", "block", 4), strict=True))
    run = replace(run, step=replace(run.step, **step))
    all_of_them, few = (case(laid_out(), run, trained_tokens=labels) for labels in (128, 32))
    weights, vocabulary = 3 * run.model.hidden_size * run.model.ffn_hidden_size, run.model.vocab_size
    saved = 96 * (times * 2 * weights + 3 * 2 * run.model.hidden_size * vocabulary)
    assert computed_flops(all_of_them) - computed_flops(few) == pytest.approx(saved)
    assert spared(all_of_them).total == 0
    assert spared(few).total == pytest.approx(0.75 * times * ffn_products(few))
    sequence = laid_out(tensor=2, sequence_parallel=True)
    assert spared(case(sequence, run, trained_tokens=32)).total == 0  # needs them all


def torchs_flops(variant: str) -> tuple[float, float]:
    """Of a real forward pass, as torch counts them, and as we do; torch counts attention's products whole, and so many
    rows of the output as pad the vocabulary.
    """
    run = run_of(*VARIANTS[variant])
    layout = replace(one_process(run.model), micro_batch_size=2)
    groups.initialize(layout, seed=1)
    ((model,), _) = build_all(run, layout)
    model.requires_grad_(False)
    samples = family(run.family, "tiny").samples(run.model, 2, torch.Generator().manual_seed(0))
    batch = collate(samples)
    with FlopCounterMode(display=False) as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(batch, torch.zeros_like(batch.labels))
    groups.shut_down()
    _, positions, squares, patches, frames, *_ = batch.counts().tolist()
    ours = forward_flops(run.model, positions, squares, patches, frames)
    whole = 2 * ours["attention"] / squares * len(samples) * batch.tokens.shape[1] ** 2
    multiple = run.model.make_vocab_size_divisible_by
    padded = ours["output"] * round_up(run.model.vocab_size, multiple) / run.model.vocab_size
    return counted.get_total_flops(), sum(ours.values()) - ours["attention"] - ours["output"] + whole + padded


def torchs_flops_of_all(variants: tuple[str, ...]) -> list[tuple[float, float]]:
    return [torchs_flops(variant) for variant in variants]


def test_flops_are_those_that_torch_counts() -> None:
    """LLaVA's convolution over patches and class tokens are not counted; they are small in towers of full size."""
    (found,) = run_ranks(torchs_flops_of_all, 1, ("llava", "qwen2_vl", "gpt", "qwen3_vl"))
    for (theirs, ours), error in zip(found, (0.05, 0.001, 0.001, 0.001), strict=True):
        assert ours == pytest.approx(theirs, rel=error)


def test_frozen_parts_take_fewer_passes() -> None:
    run = run_of("llava", VARIANTS["llava"][1])
    mm = run.model.mm_cfg
    frozen_tower = replace(mm, vision_encoder=replace(mm.vision_encoder, freeze=True))
    first_stage = replace(frozen_tower, llm=replace(mm.llm, freeze=True))
    assert passes(replace(run.model, mm_cfg=frozen_tower), False) == dict(
        vision=1, projector=3, decoder=3, attention=3, output=3
    )
    assert passes(replace(run.model, mm_cfg=first_stage), False) == dict(
        vision=1, projector=3, decoder=2, attention=3, output=2
    )
    assert passes(gpt().model, True) == dict(vision=1, projector=1, decoder=2, attention=3, output=2)
    assert step_flops(gpt().model, 100, 0, adapters=True) == pytest.approx(2 / 3 * step_flops(gpt().model, 100, 0))


@pytest.mark.parametrize("variant", ["llava", "llava_odd", "gpt_tied", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_counted_parameters_are_those_that_are_built(variant: str, tensor: int, pipeline: int) -> None:
    run = run_of(*VARIANTS[variant])
    model = replace(run.model, num_layers=5)
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    run = replace(run, model=model, parallel=parallel, trainer=replace(run.trainer, devices=4, accelerator="cpu"))
    layout = layouts.resolve(run, 0, {})
    for stage in range(pipeline):
        assert count(run, tensor).memory(run, layout, stage) == hold(run, layout, stage).memory


def test_stages_that_are_alike_are_built_once() -> None:
    run = run_of(*VARIANTS["qwen3_vl"])
    run = replace(run, model=replace(run.model, num_layers=16))
    layout = laid_out(num_nodes=1, tensor=2, pipeline=4, virtual=2, stage_layers=(2,) * 8, sequence_parallel=True)
    found = planning.hold_all(planning.Planned(run, layout, True, []))
    assert found == [hold(run, layout, stage, number) for stage in range(4) for number in range(2)]


@pytest.mark.parametrize(("tensor", "expert", "expert_tensor"), [(1, 4, 1), (2, 4, 1), (1, 2, 2), (2, 2, 2)])
def test_ranks_that_differ_in_experts_alone_are_built_once(tensor: int, expert: int, expert_tensor: int) -> None:
    """Though a stage between them is left out when one is built, and each rank has other experts."""
    run = run_of(*VARIANTS["qwen3_vl"])
    run = replace(run, model=replace(run.model, num_layers=12))
    sizes: dict[str, Any] = dict(tensor=tensor, expert=expert, expert_tensor=expert_tensor)
    layout = laid_out(num_nodes=4, pipeline=4, stage_layers=(2, 3, 4, 3), sequence_parallel=tensor > 1, **sizes)
    found = planning.hold_all(planning.Planned(run, layout, True, []))
    ranks = [(stage, number) for stage in range(4) for number in range(layout.ranks_of_copy)]
    assert found == [hold(run, layout, *place) for place in ranks]


def test_adapters_are_counted() -> None:
    run = gpt(peft=PeftConfig(peft_scheme="lora"))
    assert count(run, 2).memory(run, laid_out(tensor=2), 0) == hold(run, laid_out(tensor=2), 0).memory


def small(**changes: Any) -> RunConfig:
    """On four ranks, with something to choose."""
    run = gpt(step=StepConfig(micro_batch_size=1, global_batch_size=4))
    model = replace(run.model, num_layers=4, hidden_size=512, ffn_hidden_size=2048, kv_channels=128, **changes)
    trainer = replace(run.trainer, devices=4, precision="bf16")
    return replace(run, model=model, trainer=trainer)


def test_what_a_search_replaces_is_told() -> None:
    given = {"search", "parallel", "model", "model.micro_batch_size", "model.fsdp", "model.global_batch_size"}
    assert search.replaced(given) == ["model.fsdp", "model.micro_batch_size", "parallel"]


def by_brute_force(run: RunConfig, room: float) -> list[tuple[float, RunConfig]]:
    """Every layout, micro-batch and recomputation that fits, with each stage built."""
    found, parameters = [], counter(run)
    for plain in search.cases(run, PlanConfig()):
        for number in range(len(search.RECOMPUTED)):
            one = search.candidate(plain, parameters, number).case
            stages = range(one.layout.pipeline)
            memory = [
                hold(one.run, one.layout, stage).memory.total
                + sum(activation_bytes(one.run, one.layout, stage, one.work).values())
                + buffer_bytes(one.run, one.layout, one.work)
                for stage in stages
            ]
            if max(memory) <= room:
                heaviest = parameters(one.layout.tensor).heaviest(one.layout)
                found.append((step_time(one, heaviest).seconds, one.run))
    return sorted(found, key=lambda each: each[0])


def test_a_search_starts_from_nothing() -> None:
    """What the run's own layout says leaves no trace in those that are tried."""
    plain = small()
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, pipeline_layers=(1, 1, 1, 1)
    )
    found = [
        [one.run.parallel for one in search.cases(run, PlanConfig())]
        for run in (plain, replace(plain, parallel=parallel))
    ]
    assert found[0] == found[1]
    assert any(one.fsdp for one in found[1])


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_the_search_finds_what_brute_force_finds(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is plenty, and where it is not."""
    run = small()
    plenty = search.ranked(run, PlanConfig())
    room = share * max(one.memory for one in plenty)
    tight = replace(H100, memory=room / (1 - rules.RESERVE))
    monkeypatch.setitem(hardware.HARDWARE, "h100", tight)
    best, *others = search.ranked(run, PlanConfig())
    expected = by_brute_force(run, room * 1.000001)
    assert best.time.seconds == pytest.approx(expected[0][0])
    assert best.memory <= room and len(others) > 2
    assert [one.time.seconds for one in (best, *others)] == sorted(one.time.seconds for one in (best, *others))


def test_a_model_that_fits_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hardware.HARDWARE, "a100", replace(hardware.HARDWARE["a100"], memory=2**20))
    with pytest.raises(ConfigError, match="^hardware=a100: no layout of 4 ranks fits; the nearest, .* GiB a rank of"):
        search.ranked(small(), PlanConfig(hardware="A100"))
    prime = replace(small(), trainer=replace(small().trainer, devices=11))
    with pytest.raises(ConfigError, match="^search=true: no layout of 11 ranks suits the model and"):
        search.ranked(replace(prime, step=StepConfig(global_batch_size=8)), PlanConfig())
    anywhere = replace(small(), trainer=replace(small().trainer, devices="auto"))
    with pytest.raises(ConfigError, match="^trainer.devices=auto: a search needs a number"):
        search.best(anywhere, PlanConfig())
    with pytest.raises(ConfigError, match="^hardware=v100: must be one of h100, h200, b200, a100, 910b"):
        hardware.named("v100")


def test_the_searched_layout_is_a_file_of_the_group(tmp_path: Path) -> None:
    """Chosen by parallel=planned, it makes the run that was found, and the same plan."""
    settings = ["model=llava_7b", "trainer.devices=8", "trainer.precision=bf16", "model.global_batch_size=64"]
    run = composed("neva_finetune", settings)
    run = replace(run, model=replace(run.model, mm_cfg=replace(run.model.mm_cfg, image_token_index=32000)))
    wanted = PlanConfig(search=True, search_file=str(tmp_path / "parallel/planned.yaml"))
    best = search.best(run, wanted)
    assert Path(wanted.search_file).read_text().splitlines()[1] == "# Searched for llava of 32 layers on 8 x h100."
    store_defaults()
    places = [f"hydra.searchpath=[file://{tmp_path}]", "parallel=planned"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree: Any = OmegaConf.to_container(compose("neva_finetune", [*settings, *places]), resolve=True)
    again = read_run({key: tree[key] for key in ("trainer", "exp_manager", "model")}, family("llava", "config").Config)
    assert (again.parallel, again.step) == (best.parallel, best.step)
    layout = layouts.resolve(best, 0, {})
    described = planning.describe(planning.Planned(best, layout, True, []))
    assert described["rules"] == [] and described["step_time"]["mfu"] > 0.4
    file = tmp_path / "plan.png"
    wanted = PlanConfig(plan_picture=str(file), plan_file=str(tmp_path / "plan.json"))
    planning.show(planning.Planned(best, layout, True, [], wanted))
    with Image.open(file) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0x9E, 0xCA, 0xE1), (0xFD, 0xD0, 0xA2), (0xEE, 0x66, 0x77)} <= colors  # forward, backward, activations


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_step_is_what_its_parts_are(fsdp: bool) -> None:
    """Of one stage: its passes, and what is told beside them; and what messages make of it."""
    run = replace(gpt(), parallel=ParallelConfig(fsdp=fsdp))
    layout = laid_out(fsdp="full" if fsdp else None)
    one, held = case(layout, run), Count(10**9, 10**9, 0, 0)
    told = expected(one, [held], 0)
    time, passes = told["step_time"], sum(sum(way) for way in told["stage_seconds"].values())
    found = step_time(one, held)
    assert time["seconds"] == pytest.approx(3 * passes + found.exposed + time["optimizer"])
    assert 0 < time["waits_for_messages"] < time["seconds"] - time["optimizer"]


def test_rules_of_thumb() -> None:
    crowded = case(laid_out(tensor=16, pipeline=1, num_micro_batches=1))
    assert rules.broken(crowded, 0, 0) == ["tensor parallelism: its groups cross nodes of 8 ranks"]
    deep = case(laid_out(pipeline=4, stage_layers=(1,) * 4, num_micro_batches=2))
    (told,) = rules.broken(deep, 0, 0.5)
    assert told == "pipeline: 2 micro-batches do not fill 4 stages"
    (told,) = rules.broken(case(laid_out()), 2 * H100.memory, 0)
    assert told.startswith("memory: a rank needs 158.2 GiB, h100 has 79.1")
    fp8 = gpt(step=replace(gpt().step, fp8=True))
    (told,) = rules.broken(replace(case(laid_out(), fp8), hardware=hardware.named("a100")), 0, 0)
    assert told == "model.fp8=true: a100 has no 8-bit products"


def test_what_costs_more_takes_longer() -> None:
    def layer(**sizes: Any) -> float:
        step = sizes.pop("step", {})
        run = small()
        run = replace(run, step=replace(run.step, **step))
        return decoder_layer(case(laid_out(**sizes), run, positions=65536, tokens=65536)).total

    assert layer(tensor=4) < layer(tensor=2) < layer()
    assert layer(tensor=16) > layer(tensor=8)  # over nodes
    assert layer(tensor=4, sequence_parallel=True, step=dict(ub_tp_comm_overlap=True)) < layer(
        tensor=4, sequence_parallel=True
    )


def test_context_parallelism_is_not_free() -> None:
    """Each step around the ring starts by itself; what our own kernels gather waits, whatever attention takes."""
    run, ring = gpt(), Pass(0.5, 1.0)
    assert exposed_ring(case(laid_out(context=4), on(run, "gpu")), ring, 9.0) == (3 * LATENCY, 3 * LATENCY)
    assert exposed_ring(case(laid_out(context=4), on(run, "gpu")), ring, 0.1) == pytest.approx((0.4, 0.75))
    gathered = case(laid_out(context=4), on(run, "npu"))
    assert exposed_ring(gathered, ring, 9.0) == (0.5, 1.0)
    keys = 3 * 32 * 2 * run.model.num_query_groups * run.model.kv_channels * 2
    assert communication.of_layer(gathered)["context"] == (keys, keys)


def on(run: RunConfig, accelerator: str) -> RunConfig:
    return replace(run, trainer=replace(run.trainer, accelerator=accelerator))


CLAIMED = ("Llama2-7B fp8", "Llama3-70B fp8 TP4 PP8 VP5", "Llama3-8B fp8, B200", "Qwen3-8B bf16")
CLAIMED += ("Qwen2.5-7B LoRA bf16", "Llama3-70B bf16 FSDP CP2, recomputed", "Qwen3-30B-A3B bf16 EP8")


@pytest.mark.parametrize("name", CLAIMED)
def test_published_runs_are_expected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of those that scripts/benchmarks/plan_times.py claims; it has them all."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import plan_times

    (run,) = (one for one in plan_times.RUNS if one.name == name)
    assert plan_times.planned(run) == pytest.approx(run.tokens, rel=plan_times.BAND)
