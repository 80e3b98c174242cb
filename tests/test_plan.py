"""Plans against Hugging Face's counts, real ranks' weights, Megatron's groups and what engines really hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from distributed import run_ranks
from megatron.core import parallel_state
from ported import run_of as composed
from test_cli import ROOT, TRAIN
from test_cli import run as command
from test_families import EXPERT_LAYOUTS, LAYOUTS, VARIANTS, build_all, micro_batches, run_of, whole

from nemo_vlm.archive import write_archive
from nemo_vlm.config import (
    CheckpointConfig,
    DataConfig,
    ExpManagerConfig,
    LanguageConfig,
    OptimConfig,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    StepConfig,
    TokenizerConfig,
)
from nemo_vlm.data import digits
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout, one_process
from nemo_vlm.mcore import groups
from nemo_vlm.models.base import family
from nemo_vlm.models.llava.config import Config as LlavaConfig
from nemo_vlm.models.llava.config import MultimodalConfig
from nemo_vlm.planning import machine
from nemo_vlm.planning import plan as planning
from nemo_vlm.planning.memory import heaviest
from nemo_vlm.planning.report import report
from nemo_vlm.sources.tokenizers import load_tokenizer
from nemo_vlm.training.build import build_engine
from nemo_vlm.typed import model_tree

PARTS = {  # of Hugging Face's names, the first that is in one
    "vision_tower": "vision_model",
    "multi_modal_projector": "vision_projection",
    "visual.merger": "vision_projection",
    "visual.deepstack_merger_list": "vision_projection",
    "visual": "vision_model",
}


def on_ranks(run: RunConfig, world_size: int) -> RunConfig:
    return replace(run, trainer=replace(run.trainer, devices=world_size, accelerator="cpu"))


def tiny(variant: str, layout: str, **changes: Any) -> RunConfig:
    name, config = VARIANTS[variant]
    world_size, parallel = (LAYOUTS | EXPERT_LAYOUTS | {"single": (1, ParallelConfig())})[layout]
    step = StepConfig(micro_batch_size=1, global_batch_size=8)
    return on_ranks(run_of(name, config, parallel, step, **changes), world_size)


def planned(run: RunConfig) -> dict[str, Any]:
    return planning.describe(planning.training(run, {}))


def hugging_face_counts(name: str, config: LanguageConfig) -> dict[str, int]:
    """Parameters of the Hugging Face model, by our parts."""
    settings = family(name, "mapping").hf_config(config)
    cls = getattr(transformers, settings["architectures"][0])
    with torch.device("meta"):
        model = cls(cls.config_class.from_dict(settings))
    counts: dict[str, int] = {}
    for key, parameter in model.named_parameters():
        part = next((ours for theirs, ours in PARTS.items() if theirs in key), "language_model")
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def added_up(plan: dict[str, Any]) -> dict[str, int]:
    parts = plan["total_parameters_by_part"]
    return {part: sum(entry["parameters_by_part"][part] for entry in plan["stages"]) for part in parts}


@pytest.mark.parametrize("layout", ["single", *LAYOUTS])
@pytest.mark.parametrize("variant", ["llava", "llava_siglip", "llava_odd", "gpt", "gpt_tied", "gpt_biased"])
def test_counts_equal_hugging_face(variant: str, layout: str) -> None:
    expected, plan = hugging_face_counts(*VARIANTS[variant]), planned(tiny(variant, layout))
    assert plan["total_parameters_by_part"] == added_up(plan) == expected
    assert plan["total_parameters"] == sum(expected.values())
    for entry in plan["stages"]:
        assert entry["parameters"] == sum(entry["parameters_by_part"].values())


@pytest.mark.parametrize("layout", ["single", "fsdp", "tp2_pp2", *EXPERT_LAYOUTS])
def test_counts_of_experts_equal_hugging_face(layout: str) -> None:
    expected, plan = hugging_face_counts(*VARIANTS["qwen3_vl"]), planned(tiny("qwen3_vl", layout))
    assert plan["total_parameters_by_part"] == added_up(plan) == expected
    idle = 4 * 2 * 3 * 64 * 48  # in each of 4 layers, 2 of 4 experts
    assert plan["active_parameters"] == sum(expected.values()) - idle


def counted(num_layers: int) -> tuple[int, int]:
    """Parameters of a Qwen3-VL 30B-A3B with so many decoder layers: of its experts, and the others."""
    experts = num_layers * 128 * 3 * 2048 * 768
    attention = 2048 * (32 + 4 + 4) * 128 + 32 * 128 * 2048 + 2 * 128
    language = 2 * 151936 * 2048 + num_layers * (attention + 2 * 2048 + 128 * 2048) + 2048
    block = 4 * 1152**2 + 4 * 1152 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    tower = 27 * block + (1536 + 1) * 1152 + 2304 * 1152
    mergers = 4 * (4608**2 + 4608 + 4608 * 2048 + 2048) + 2 * 1152 + 3 * 2 * 4608
    return experts, language + tower + mergers


def test_30b_a3b_over_eight_nodes() -> None:
    """With 8 ranks that share the experts of a stage: two of those that share its tensors, which are 4."""
    assert sum(counted(48)) == 31_070_754_032
    nodes = ("trainer.num_nodes=8", "trainer.devices=8", "trainer.precision=bf16-mixed", "model.num_layers=4")
    sizes = ("model.expert_model_parallel_size=8", "model.optim.name=distributed_fused_adam")
    batch = ("model.micro_batch_size=1", "model.global_batch_size=128")
    run = composed("qwen3_vl_finetune", ["model=qwen3_vl_30b_a3b", "parallel=tp4_pp4_ep4", *nodes, *sizes, *batch])
    plan, (experts, others) = planned(run), counted(4)
    assert plan["total_parameters"] == experts + others
    assert plan["active_parameters"] == experts * 8 // 128 + others
    assert [entry["rank"] for entry in plan["stages"]] == [16 * stage + rank for stage in range(4) for rank in range(8)]
    assert [entry["expert_rank"] for entry in plan["stages"][:8]] == list(range(8))
    assert {len(plan["groups"][name][0]) for name in ("data", "tensor")} == {4}
    assert [len(plan["groups"][name][0]) for name in ("expert", "expert_tensor", "expert_data")] == [8, 1, 2]
    middle = plan["stages"][8]
    own = experts // 4 // 8  # of one layer, an eighth
    dense = middle["parameters"] + middle["replicated_parameters"] - own
    assert middle["bytes"]["gradients"] == 4 * (own + dense)
    assert middle["bytes"]["optimizer"] == 12 * own // 2 + 12 * dense // 4
    most = heaviest(run, planning.training(run, {}).layout, trains=True).memory.total
    assert most == max(sum(kept(entry).values()) for entry in plan["stages"])
    lines = list(report(plan))
    assert "of them active" in lines[0] and "expert 8 (tensor 1, data 2)" in lines[1]
    assert lines[-4].split()[:3] == ["0", "0-3", "0-7"]


def test_llava_7b_over_two_nodes() -> None:
    multimodal = MultimodalConfig(image_token_index=32000)
    config = LlavaConfig(vocab_size=32064, make_vocab_size_divisible_by=64, mm_cfg=multimodal)
    parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    run = run_of("llava", config, parallel, StepConfig(micro_batch_size=8, global_batch_size=32))
    plan = planned(replace(on_ranks(run, 8), trainer=replace(run.trainer, devices=8, num_nodes=2)))
    assert plan["total_parameters"] == 7_063_427_072 == sum(hugging_face_counts("llava", config).values())
    assert plan["world_size"] == 16 and [entry["rank"] for entry in plan["stages"]] == [0, 1, 2, 3]
    assert plan["batch"] == {
        "micro_batch_size": 8,
        "global_batch_size": 32,
        "num_micro_batches": 1,
        "samples_per_rank": 8,
        "data_parallel_size": 4,
        "packing": False,
    }


def really_held(run: RunConfig, layout: Layout) -> tuple[int, dict[str, int]]:
    """Parameters of this rank; on rank 0 also those of the gathered model, by part."""
    groups.initialize(layout, seed=1)
    chunks, parts = build_all(run, layout)
    gathered: dict[str, int] = {}
    for name, tensor in whole(parts).items():
        gathered[planning.part_name(name)] = gathered.get(planning.part_name(name), 0) + tensor.numel()
    groups.shut_down()
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()), gathered


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("llava", "tp2_pp2"),
        ("llava", "pp2_dp2"),
        ("llava_odd", "tp2"),
        ("llava", "pp2"),
        ("gpt_tied", "pp2"),
        ("gpt", "tp4"),
    ],
)
def test_counts_equal_real_ranks(variant: str, layout: str) -> None:
    run = tiny(variant, layout)
    plan, resolved = planned(run), planning.training(run, {}).layout
    ranks = run_ranks(really_held, resolved.world_size, run, resolved)
    assert ranks[0][1] == plan["total_parameters_by_part"]
    for entry in plan["stages"]:
        held = entry["parameters"] + entry["replicated_parameters"] + entry["padding_parameters"]
        assert held == ranks[entry["rank"]][0]


def test_replicated_and_tied_parameters_count_once() -> None:
    tensor = planned(tiny("llava_odd", "tp2"))["stages"]
    assert tensor[0]["replicated_parameters"] == 0 < tensor[0]["parameters_by_part"]["vision_model"]
    assert tensor[1]["parameters_by_part"]["vision_model"] == 0
    first, last = planned(tiny("gpt_tied", "pp2"))["stages"]
    embedding = 250 * 48
    assert (first["replicated_parameters"], last["replicated_parameters"]) == (0, embedding)


@pytest.mark.parametrize(
    ("variant", "layout"),
    [("gpt", layout) for layout in ("single", "tp2_pp2", "tp2_dp2", "tp2_sp_cp2", "fsdp_tp2", "tp2_pp2_vpp2")]
    + [("qwen3_vl", layout) for layout in ("tp2_ep2", "pp2_ep2", "cp2_ep2")],
)
def test_groups_are_megatrons(variant: str, layout: str) -> None:
    run = tiny(variant, layout)
    plan, resolved = planned(run), planning.training(run, {}).layout
    ours = {
        rank: {name: of(ranks, rank) for name, ranks in plan["groups"].items()} for rank in range(resolved.world_size)
    }
    for rank, expected in ours.items():
        with groups.pretend(resolved, rank):
            found = {
                "tensor": parallel_state.get_tensor_model_parallel_group(),
                "context": parallel_state.get_context_parallel_group(),
                "pipeline": parallel_state.get_pipeline_model_parallel_group(),
                "data": parallel_state.get_data_parallel_group(),
                "expert": parallel_state.get_expert_model_parallel_group(),
                "expert_tensor": parallel_state.get_expert_tensor_parallel_group(),
                "expert_data": parallel_state.get_expert_data_parallel_group(),
            }
            ranks = {key: torch.distributed.get_process_group_ranks(found[key]) for key in expected}
            assert ranks == expected and ("expert" in ranks) == (variant == "qwen3_vl")
            place = (
                parallel_state.get_pipeline_model_parallel_rank(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
        entries = [(entry["stage"], entry["tensor_rank"]) for entry in plan["stages"] if entry["rank"] == rank]
        assert entries in ([], [place])
    assert len(plan["stages"]) == resolved.ranks_of_copy * resolved.pipeline
    assert any("sequence_parallel" in note for note in plan["notes"]) == (layout == "tp2_ep2")


@pytest.mark.parametrize(("layout", "rank"), [("tp2", "each"), ("fsdp", "the first")])
def test_the_copy_of_asynchronous_saves_is_told(layout: str, rank: str) -> None:
    settings = CheckpointConfig(async_save=True, save_optimizer=layout == "tp2")
    run, kept = tiny("gpt", layout), ExpManagerConfig(checkpoint_callback_params=settings)
    run = replace(run, exp_manager=kept, parallel=replace(run.parallel, fsdp_sharded_checkpoint=False))
    plan = planned(run)
    held = max(entry["bytes"]["weights"] + entry["bytes"]["optimizer"] * (layout == "tp2") for entry in plan["stages"])
    (note,) = [note for note in plan["notes"] if "async_save" in note]
    most = held * (1 if layout == "tp2" else plan["layout"]["shards"])
    assert f"up to {most / 2**30:.3f} GiB of the host's memory for {rank} rank" in note
    assert not any("async_save" in note for note in planned(tiny("gpt", layout))["notes"])


def of(ranks: list[list[int]], rank: int) -> list[int]:
    (group,) = [group for group in ranks if rank in group]
    return group


def engine_bytes(run: RunConfig, layout: Layout) -> dict[str, int]:
    """What this rank's engine keeps after a step; Megatron's buffers with their padding."""
    groups.initialize(layout, seed=1)
    engine = build_engine(run, layout)
    updater = engine.updater
    samples = family(run.family, "tiny").samples(run.model, layout.global_batch_size, torch.Generator().manual_seed(0))
    engine.step(micro_batches(layout, samples), lr=1e-3)
    weights = [values for chunk in range(len(updater.modules)) for _, _, values in updater.local_weights(chunk)]
    if layout.fsdp:
        gradients = [parameter.grad.to_local() for parameter in updater.trained]
    else:
        gradients = [buffer.grad_data for module in updater.modules for buffer in module.buffers]
    state = [
        values
        for shard in updater.shards()
        for key, values in shard.tensors.items()
        if key != "param" or not layout.fsdp  # its main weights are its weights
    ]
    groups.shut_down()
    kinds = {"weights": weights, "gradients": gradients, "optimizer": state}
    return {kind: sum(each.numel() * each.itemsize for each in tensors) for kind, tensors in kinds.items()}


def kept(entry: dict[str, Any]) -> dict[str, int]:
    """Bytes from step to step; tests/test_plan_memory.py is about those inside one."""
    return {kind: entry["bytes"][kind] for kind in ("weights", "gradients", "optimizer")}


def frozen(run: RunConfig) -> RunConfig:
    llm = replace(run.model.mm_cfg.llm, freeze=True)
    return replace(run, model=replace(run.model, mm_cfg=replace(run.model.mm_cfg, llm=llm)))


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("layout", ["single", "tp2", "pp2_vpp2", "fsdp", "fsdp_tp2", "hsdp"])
def test_bytes_are_what_engines_hold(layout: str, precision: str) -> None:
    run = tiny("llava", layout, precision=precision)
    plan, resolved = planned(run), planning.training(run, {}).layout
    ranks = run_ranks(engine_bytes, resolved.world_size, run, resolved)
    for entry in plan["stages"]:
        assert kept(entry) == ranks[entry["rank"]]


def test_gathered_weights_count_under_grad() -> None:
    full, grad = (
        planned(tiny("llava", layout, precision="bf16-mixed"))["stages"][0] for layout in ("fsdp", "fsdp_grad")
    )
    gathered = 2 * (grad["parameters"] + grad["padding_parameters"])
    assert kept(grad) == kept(full) | {"weights": full["bytes"]["weights"] + gathered}
    assert grad["bytes"]["buffers"] < full["bytes"]["buffers"]  # no layer is gathered again


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_the_distributed_optimizer_is_shared(precision: str) -> None:
    run = tiny("llava", "ddp", precision=precision, optim=OptimConfig(name="distributed_fused_adam"))
    (entry,), resolved = planned(run)["stages"], planning.training(run, {}).layout
    ranks = run_ranks(engine_bytes, 2, run, resolved)
    assert entry["bytes"]["weights"] == ranks[0]["weights"]
    assert entry["bytes"]["optimizer"] == sum(rank["optimizer"] for rank in ranks) // 2
    padding = ranks[0]["gradients"] / entry["bytes"]["gradients"]  # of Megatron's buckets, to multiples of 128 a rank
    assert 1.0 <= padding < 1.1


def test_experts_are_shared_by_their_own_data_parallel_ranks() -> None:
    """Each rank is the only one with its half of the experts, and keeps all of their optimizer's state."""
    run = tiny("qwen3_vl", "ep2", optim=OptimConfig(name="distributed_fused_adam"))
    plan, resolved = planned(run), planning.training(run, {}).layout
    ranks = run_ranks(engine_bytes, 2, run, resolved)
    assert [entry["bytes"]["weights"] for entry in plan["stages"]] == [rank["weights"] for rank in ranks]
    held = sum(entry["bytes"]["optimizer"] for entry in plan["stages"])
    assert held == sum(rank["optimizer"] for rank in ranks)


@pytest.mark.parametrize("layout", ["single", "fsdp", "lora"])
def test_frozen_parts_have_neither_gradients_nor_state(layout: str) -> None:
    run = frozen(tiny("llava", "single" if layout == "lora" else layout))
    run = replace(run, peft=PeftConfig("lora" if layout == "lora" else None))
    (entry,), resolved = planned(run)["stages"], planning.training(run, {}).layout
    assert run_ranks(engine_bytes, resolved.world_size, run, resolved)[0] == kept(entry)
    parts = entry["parameters_by_part"]
    assert entry["bytes"]["gradients"] < 4 * (parts["vision_model"] + parts["vision_projection"])


def test_an_unknown_vocabulary_is_an_error() -> None:
    run = tiny("gpt", "single")
    run = replace(run, model=replace(run.model, vocab_size=None), tokenizer=TokenizerConfig("nowhere"))
    with pytest.raises(ConfigError, match="^model.vocab_size=null: model.tokenizer.type=nowhere is not here"):
        planning.training(run, {})


def test_batches_must_divide_and_the_file_be_writable(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="^model.global_batch_size=8: does not divide by model.micro_batch_size=1 x 3"
    ):
        planning.training(on_ranks(tiny("gpt", "single"), 3), {})
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "plan.json"):
        with pytest.raises(ConfigError, match=f"^plan_file={path}: cannot be written"):
            planning.write({}, path)
    assert [path.name for path in tmp_path.parent.glob(".*partial*")] == []


def test_the_launcher_matters_only_where_devices_are_auto() -> None:
    run = tiny("gpt", "tp2")
    assert planning.training(run, {"WORLD_SIZE": "4"}).layout.world_size == 2
    auto = replace(run, trainer=replace(run.trainer, devices="auto"))
    assert planning.training(auto, {"WORLD_SIZE": "4"}).layout.world_size == 4
    assert planning.training(auto, {}).layout.world_size == 2


def test_the_demos_vocabulary(tmp_path: Path) -> None:
    digits.write(tmp_path / "digits")
    assert len(load_tokenizer(TokenizerConfig(str(tmp_path / "digits/tokenizer")))) == digits.NUM_TOKENS


@pytest.mark.parametrize(
    ("demo", "file", "tokenizer", "size"),
    [
        ("digits", "digits_vqa/train.json", "datasets/digits_vqa/tokenizer", digits.NUM_TOKENS),
        ("digit_pairs", "digit_pairs/train.json", "datasets/digit_pairs/tokenizer", 320),
        ("docstring_questions", "docstring_questions/train.json", "datasets/docstrings/tokenizer", 2048),
        ("digits", "digits_vqa/train.json", "datasets/mine/tokenizer", None),
        ("docstring_questions", "docstring_questions/train.json", "datasets/docstring_questions/tokenizer", None),
    ],
)
def test_only_the_demos_own_tokenizer_is_known(demo: Any, file: str, tokenizer: str, size: int | None) -> None:
    data, run = DataConfig(prepare=demo, data_path=f"datasets/{file}"), tiny("gpt", "single")
    assert planning.demo_vocabulary(replace(run, data=data, tokenizer=TokenizerConfig(tokenizer))) == size


CLUSTER = "model=llava_7b parallel=tp4 trainer.num_nodes=2 trainer.devices=8 dry_run=true plan_file=plans/plan.json"


def test_the_command(tmp_path: Path) -> None:
    elsewhere = (
        "trainer.accelerator=gpu",
        "trainer.precision=bf16",
        "model.transformer_impl=transformer_engine",
        "model.attention_backend=flash",
        "model.fp8=true",
        "model.cpu_offloading=true",
        "model.data.train_samples=1000",
        "model.optim.sched.warmup_samples=100",
        "exp_manager.resume_from_step=7",
    )
    result = command(str(TRAIN), *CLUSTER.split(), *elsewhere, cwd=tmp_path, NCCL_SOCKET_IFNAME="nothing0")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "model.tokenizer.type=datasets/digits_vqa/tokenizer: not here; planned with a vocabulary of 32064" in lines
    assert "model.data.data_path=datasets/digits_vqa/train.json: not here; the plan does not need it" in lines
    assert "model.data.train_samples=1000: trainer.max_steps=31" in lines
    assert "exp_manager.resume_from_step=7: no such checkpoint here; the plan does not need it" in lines
    assert lines[-2].split()[:3] == ["0", "0-3", "1,767,461,888"]
    plan = json.loads((tmp_path / "plans/plan.json").read_text())
    assert (plan["world_size"], plan["total_parameters"]) == (16, 7_063_427_072)
    assert [path.name for path in tmp_path.rglob("*")] == ["plans", "plan.json"]


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    result = command("-X", "importtime", str(TRAIN), "dry_run=true", cwd=tmp_path)
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "torch" in imported and not imported & {"transformers", "pytorch_lightning", "lightning"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("parallel=tp2 trainer.devices=3", "trainer.devices=3 x trainer.num_nodes=1: 3 ranks do not divide by"),
        ("model.tokenizer.type=nowhere", "model.vocab_size=null: model.tokenizer.type=nowhere is not here to tell it"),
        ("dry_run=maybe", "dry_run=maybe: must be true or false"),
        ("dry_run=false plan_file=plan.json", "plan_file=plan.json: goes with dry_run=true"),
        ("dry_run=false hardware=h200", "hardware=h200: goes with dry_run=true"),
        ("hardware=foo", "hardware=foo: must be one of h100, h200, b200, a100, 910b"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: str, message: str) -> None:
    result = command(str(TRAIN), "dry_run=true", *arguments.split(), cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(message)


def test_the_evaluation_is_planned_from_its_archive(tmp_path: Path) -> None:
    name, config = VARIANTS["llava"]
    tree = model_tree(run_of(name, config))
    write_archive(tmp_path / "tiny.nemo", tree, {}, [], [])
    script = str(ROOT / "examples/neva_evaluation.py")
    arguments = ("neva_model_file=tiny.nemo", "dry_run=true", "plan_file=plan.json", "trainer.precision=bf16")
    result = command(script, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    count = sum(hugging_face_counts(name, config).values())
    (entry,) = plan["stages"]
    assert (plan["world_size"], plan["total_parameters"], entry["parameters"]) == (1, count, count)
    held = 2 * (count + entry["padding_parameters"])
    in_a_step = {"activations": None, "buffers": None}
    assert entry["bytes"] == {"weights": held, "gradients": 0, "optimizer": 0} | in_a_step
    missing = command(script, "neva_model_file=nowhere.nemo", "dry_run=true", cwd=tmp_path)
    assert (missing.returncode, missing.stderr) == (
        2,
        "neva_model_file=nowhere.nemo: there is no such file or directory\n",
    )


@pytest.mark.parametrize(
    ("num_nodes", "env", "lacking"),
    [
        (1, {}, []),
        (1, {"NODE_RANK": "1"}, ["NODE_RANK=1 must be a number below 1"]),  # left over from another run
        (2, {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "1"}, []),
        (2, {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "2"}, ["NODE_RANK=2 must be a number below 2"]),
        (2, {"MASTER_ADDR": "a", "MASTER_PORT": "x", "NODE_RANK": "0"}, ["MASTER_PORT=x must be a number below 65536"]),
        (2, {"NODE_RANK": "0"}, ["trainer.num_nodes=2 needs MASTER_ADDR, MASTER_PORT in the environment"]),
        (2, {"LOCAL_RANK": "0"}, []),  # torchrun has seen to it
    ],
)
def test_what_nodes_must_be_told(num_nodes: int, env: dict[str, str], lacking: list[str]) -> None:
    layout = replace(one_process(LanguageConfig()), num_nodes=num_nodes)
    assert machine.lacking_nodes(layout, env) == lacking
