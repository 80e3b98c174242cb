"""Command lines of Pai-Megatron-Patch, translated, composed, and read back argument by argument."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from ported import run_of, words_of

from nemo_vlm import layout as layouts
from nemo_vlm.checkpoints import Position
from nemo_vlm.config import RunConfig
from nemo_vlm.door import CONF, store_defaults
from nemo_vlm.errors import ConfigError
from nemo_vlm.porting import line
from nemo_vlm.porting.document import listing, tables
from nemo_vlm.porting.pai import translate
from nemo_vlm.porting.pai_training import SIZES
from nemo_vlm.script import run_command
from nemo_vlm.training import durations, schedules

ROOT = Path(__file__).parents[1]
DLC = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "KUBERNETES_CONTAINER_RESOURCE_GPU": "8",
}
# As the READMEs of examples/qwen2_5, qwen2_vl and qwen3_vl list them, and the last as its script reads them
NAMES = {
    "qwen2_5": "ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP CP SP DO FL SFT AC "
    "OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN WARMUP OUT",
    "qwen2_vl": "ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP CP DO FL AC "
    "OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN WARMUP OUT",
    "qwen3_vl": "ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP CP ETP EP SP DO FL AC "
    "OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN WARMUP OUT",
}
PRETRAIN = (
    "qwen2_5 dsw 0.5B 1 8 1e-5 1e-6 128 128 bf16 1 1 1 true true true false none false 100000 "
    "/mnt/wudao /mnt/wudao /mnt/mcore 10000 100 /out"
)
TUNE = (
    "qwen2_5 dsw 7B 2 16 2e-5 1e-6 1024 1024 bf16 2 1 1 true true false true sel false 500 "
    "/mnt/train.json /mnt/valid.json /mnt/mcore 1000 30 /out"
)
VISION = (
    "qwen2_vl dsw 7B 1 32 1e-5 1e-6 2048 2048 bf16 2 2 1 true false sel false 100000 "
    "/mnt/wds /mnt/wds /mnt/mcore 20000 200 /out"
)
EXPERTS = (
    "qwen3_vl dlc A3B 1 128 1e-5 1e-6 16384 16384 bf16 4 4 1 1 4 true true true none false 100000 "
    "/mnt/wds /mnt/wds /mnt/mcore 500 50 /out"
)
# As the README of examples/qwen3_vl types it, on one node
README3 = (
    "dsw A3B 1 128 1e-5 1e-6 16384 16384 bf16 4 4 1 1 4 true true true false false 100000 /d /v /mcore 500 50 /out"
)


def changed(line: str, **values: str) -> list[str]:
    """The words of a line with other values, by the arguments' names."""
    name, *arguments = line.split()
    names = NAMES[name].split()
    for key, value in values.items():
        arguments[names.index(key)] = value
    return [name, *arguments]


@dataclass(frozen=True)
class Composed:
    run: RunConfig
    layout: layouts.Layout
    script: str
    words: list[str]
    notes: list[str]


def composed(words: list[str], **env: str) -> Composed:
    """The run of a translated line, on nodes of eight GPUs; what a shell makes of the printed text is what counts."""
    command, notes = translate(words, env)
    printed = words_of(command)
    start = printed.index("python")
    script, overrides = printed[start + 1], printed[start + 2 :]
    run = run_of(Path(script).stem, overrides)
    return Composed(run, layouts.resolve(run, 8, {}), script, printed, notes)


def read_back(found: Composed, name: str) -> dict[str, str]:
    """A run in the words of the original, by its arguments' names."""
    run, layout, optim = found.run, found.layout, found.run.optim
    step, data, limit = run.step, run.data, str(found.run.model.encoder_seq_length)
    sched, tokens = optim.sched, found.run.unit == "tokens"
    model = next(word for word in found.words if word.startswith("model=")).removeprefix("model=")
    precisions = {"fp16": ("16-mixed", False), "bf16": ("bf16-mixed", False), "fp8": ("bf16-mixed", True)}
    saving = run.exp_manager.checkpoint_callback_params
    pieces = data.data_path if isinstance(data.data_path, tuple) else (data.data_path,)
    valid = " ".join(data.validation_files) or data.data_path
    back = {
        "ENV": "dlc" if "-u" in found.words else "dsw",
        "MODEL_SIZE": next(size for sizes in SIZES.values() for size in sizes if sizes[size].model == model),
        "BATCH_SIZE": str(layout.micro_batch_size),
        "GLOBAL_BATCH_SIZE": str(layout.global_batch_size),
        "LR": str(optim.lr).replace("e-0", "e-"),
        "MIN_LR": str(sched.min_lr).replace("e-0", "e-"),
        "SEQ_LEN": limit,
        "PAD_LEN": limit if data.pad_to == "batch" else str(data.pad_to),
        "PR": next(word for word, value in precisions.items() if value == (run.trainer.precision, step.fp8)),
        "TP": str(layout.tensor),
        "PP": str(layout.pipeline),
        "CP": str(layout.context),
        "SP": str(run.parallel.sequence_parallel).lower(),
        "DO": str(optim.name == "distributed_fused_adam").lower(),
        "FL": {"flash": "true", "fused": "false"}[step.attention_backend],
        "SFT": str(not tokens).lower(),
        "AC": "offload"
        if step.cpu_offloading
        else {None: "none", "full": "full", "selective": "sel"}[step.activations_checkpoint_granularity],
        "OPTIMIZER_OFFLOAD": {"auto": "auto", 1.0: "static"}.get(optim.offload) or str(optim.offload).lower(),  # type: ignore[call-overload]
        "SAVE_INTERVAL": str(saving.every_n_train_steps),
        "DATASET_PATH": " ".join(map(str, pieces)),
        "VALID_DATASET_PATH": str(valid),
        "PRETRAIN_CHECKPOINT_PATH": str(run.start.restore_from_path),
        "TRAIN": str(run.length),
        "WARMUP": str(sched.warmup_tokens if tokens else sched.warmup_steps),
        "OUT": str(run.exp_manager.exp_dir),
    }
    back |= {"ETP": str(layout.expert_tensor if run.model.num_moe_experts else 1), "EP": str(layout.expert)}
    return {key: back[key] for key in NAMES[name].split()}


def as_listed(line: str) -> list[str]:
    """Qwen3-VL's arguments as the table of its README has them, without ETP and EP."""
    words = line.split()
    return words[:13] + words[15:]


RAW, PACKED = {"MP_DATASET_TYPE": "raw"}, {"MP_SFT_PACKING": "true"}
LINES = {
    "pretrain": (changed(PRETRAIN), {}),
    "layout": (changed(PRETRAIN, MODEL_SIZE="72B", TP="4", PP="2", GLOBAL_BATCH_SIZE="64"), {"MP_VP": "10"}),
    "nodes": (changed(PRETRAIN, ENV="dlc", MODEL_SIZE="14B", TP="2", CP="2", GLOBAL_BATCH_SIZE="16"), DLC),
    "full": (changed(PRETRAIN, AC="full", PR="fp8", OPTIMIZER_OFFLOAD="auto"), {"MP_AC_LAYERS": "4"}),
    "offload": (changed(PRETRAIN, AC="offload", PR="fp16", OPTIMIZER_OFFLOAD="static"), {"MP_AC_LAYERS": "2"}),
    "blend": (
        changed(
            PRETRAIN,
            DATASET_PATH="0.3 /mnt/a 0.7 /mnt/b,c",
            VALID_DATASET_PATH="/mnt/it's",
            TRAIN="100000",
            WARMUP="10000",
        ),
        PACKED,
    ),
    "parts": (changed(PRETRAIN, TP="2", CP="2", VALID_DATASET_PATH="1 /mnt/c 2 /mnt/it's"), PACKED),
    "tune": (changed(TUNE), RAW),
    "tune_packed": (changed(TUNE, AC="none"), {**RAW, **PACKED}),
    "tune_packed_parts": (changed(TUNE, CP="2"), {**RAW, **PACKED}),
    "tune_idxmap": (changed(TUNE, DO="false", AC="offload"), PACKED),
    "tune_idxmap_parts": (changed(TUNE, BATCH_SIZE="1", CP="2"), {}),
    "vision": (changed(VISION), {"MP_PP0_LAYERS": "12"}),
    "vision_sp": ([*changed(VISION)[:13], "true", *changed(VISION, OPTIMIZER_OFFLOAD="0.5")[13:]], {}),
    "experts": (changed(EXPERTS), DLC),
    "dense": (changed(EXPERTS, ENV="dsw", MODEL_SIZE="8B", TP="2", PP="2", EP="1", OPTIMIZER_OFFLOAD="0.5"), {}),
}


@pytest.fixture(scope="module")
def runs() -> dict[str, Composed]:
    return {name: composed(words, **env) for name, (words, env) in LINES.items()}


@pytest.mark.parametrize("name", LINES)
def test_every_argument_is_what_the_run_resolves(runs: dict[str, Composed], name: str) -> None:
    script, *arguments = LINES[name][0]
    if name == "vision_sp":
        assert runs[name].run.parallel.sequence_parallel
        del arguments[12]
    there = dict(zip(NAMES[script].split(), arguments, strict=True))
    if there.get("SFT") == "false":  # whole steps
        there["WARMUP"] = str(whole_steps(there, "WARMUP") * batch_tokens(there))
    if there["VALID_DATASET_PATH"][0].isdecimal():  # a blend
        there["VALID_DATASET_PATH"] = " ".join(there["VALID_DATASET_PATH"].split()[1::2])
    assert read_back(runs[name], script) == there


def whole_steps(there: dict[str, str], name: str) -> int:
    """As the script divides, twice and downwards."""
    return int(there[name]) // int(there["GLOBAL_BATCH_SIZE"]) // int(there["SEQ_LEN"])


def batch_tokens(there: dict[str, str]) -> int:
    return int(there["GLOBAL_BATCH_SIZE"]) * int(there["SEQ_LEN"])


def test_what_the_scripts_always_set(runs: dict[str, Composed]) -> None:
    for name, found in runs.items():
        run, text = found.run, not found.script.startswith("examples/qwen")
        assert (run.optim.betas, run.trainer.gradient_clip_val) == ((0.9, 0.95), 1.0)
        assert run.optim.weight_decay == (0.1 if text else 0.01)
        assert run.model.init_method_std == (0.008 if text else 0.02)
        assert (run.trainer.val_check_interval, run.trainer.limit_val_batches) == (10000 if text else 1000, 10)
        assert run.data.num_workers == 8
        assert run.optim.sched.name == "CosineAnnealing"
        loss = ("token" if LINES[name][0][16] == "false" else "sample") if text else "micro_batch"
        assert run.step.loss_reduction == loss
        assert run.exp_manager.checkpoint_callback_params.save_top_k == -1
        assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in found.words


def test_variables_of_the_environment(runs: dict[str, Composed]) -> None:
    found = {name: one.run for name, one in runs.items()}
    assert runs["layout"].layout.stage_layers == (10,) * 8
    assert runs["vision"].layout.stage_layers == (12, 16)
    assert (runs["experts"].layout.world_size, runs["experts"].layout.expert_data) == (16, 1)
    assert (found["experts"].model.rotary_base, found["experts"].model.moe_aux_loss_coeff) == (5e6, 0.001)
    vision = runs["vision"].run.data
    assert (vision.data_impl, vision.packing, vision.pad_to) == ("energon", False, 2048)
    assert found["full"].step.activations_checkpoint_num_layers == 4
    assert found["full"].step.activations_checkpoint_method == "uniform"
    fp8 = found["full"].step
    assert (fp8.fp8_hybrid, fp8.fp8_amax_compute_algo, fp8.fp8_amax_history_len) == (True, "max", 1024)
    assert (found["tune"].data.too_long, found["vision"].data.too_long) == ("truncate", "drop")
    assert found["offload"].step.cpu_offloading_num_layers == 2
    assert (found["blend"].data.reset_position_ids, found["blend"].data.reset_attention_mask) == (True, True)
    assert [found[name].data.packing for name in ("tune", "tune_packed", "tune_idxmap")] == [False, True, False]
    kinds = {"pretrain": "mmap", "tune": "json", "tune_idxmap": "sft_idxmap"}
    assert {name: found[name].data.data_impl for name in kinds} == kinds
    assert (runs["nodes"].layout.num_nodes, runs["nodes"].layout.ranks_per_node) == (2, 8)
    named = [word for word in runs["nodes"].words if re.match("MASTER|NODE|WORLD", word)]
    assert named == ["WORLD_SIZE", "MASTER_ADDR=10.0.0.1", "MASTER_PORT=29500", "NODE_RANK=1"]
    assert runs["nodes"].words[:5] == ["env", "-u", "WORLD_SIZE", "-u", "RANK"]


def test_overlap_is_as_it_was_there(runs: dict[str, Composed]) -> None:
    def overlaps(name: str) -> tuple[bool | None, bool | None, bool]:
        run = runs[name].run
        return run.optim.overlap_grad_sync, run.optim.overlap_param_sync, run.step.ub_tp_comm_overlap

    assert overlaps("pretrain") == (True, True, False)
    assert overlaps("layout") == overlaps("tune") == overlaps("experts") == (True, True, True)
    assert overlaps("offload") == overlaps("vision") == (None, None, False)  # as the layout decides
    parts = ("parts", "tune_packed_parts", "tune_idxmap_parts")  # with CP, packs are not all as long
    assert {overlaps(name) for name in parts} == {(True, True, False)}
    assert all(any(note.startswith("CP=2: packed samples") for note in runs[name].notes) for name in parts)
    assert overlaps("vision_sp") == (None, None, True)


def test_validation_is_honoured(runs: dict[str, Composed]) -> None:
    assert runs["pretrain"].run.data.splits == (99, 1, 0)
    assert runs["blend"].run.data.validation_path == "/mnt/it's"
    assert runs["blend"].run.data.data_path == (0.3, "/mnt/a", 0.7, "/mnt/b,c")
    assert any("1 % of DATASET_PATH validates" in note for note in runs["blend"].notes)
    assert runs["parts"].run.data.validation_path == ("/mnt/c", "/mnt/it's")
    assert any("without the weights" in note for note in runs["parts"].notes)


@pytest.mark.parametrize("name", ["tune", "pretrain", "blend", "vision"])
def test_learning_rates_are_megatrons(runs: dict[str, Composed], name: str) -> None:
    """Those of its scheduler under the script's own arguments: SFT decays over TRAIN - WARMUP, pretraining over all."""
    import torch
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    script, *arguments = LINES[name][0]
    there = dict(zip(NAMES[script].split(), arguments, strict=True))
    pretrains = there.get("SFT") == "false"
    steps, warmup = (whole_steps(there, key) if pretrains else int(there[key]) for key in ("TRAIN", "WARMUP"))
    run, batch = durations.settle(runs[name].run, 10**9), int(there["GLOBAL_BATCH_SIZE"])
    assert run.trainer.max_steps == steps
    theirs = OptimizerParamScheduler(
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        init_lr=0.0,
        max_lr=float(there["LR"]),
        min_lr=float(there["MIN_LR"]),
        lr_warmup_steps=warmup * batch,
        lr_decay_steps=(steps if pretrains else steps - warmup) * batch,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    for step in range(steps):
        at = durations.at(runs[name].run, Position(step, step * batch))
        (group,) = theirs.optimizer.param_groups
        ours = schedules.learning_rate(at, run.optim, runs[name].run.length, run.unit)
        assert ours == pytest.approx(group["lr"], rel=1e-12)
        theirs.step(batch)


def test_sizes_are_those_of_the_presets() -> None:
    store_defaults()
    for size in (size for sizes in SIZES.values() for size in sizes.values()):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            model = compose("gpt_pretrain", [f"model={size.model}"]).model
        assert (model.num_layers, model.num_moe_experts or 0) == (size.layers, size.experts)


WRONG = {
    "PR=fp32: must be fp16, bf16 or fp8": (changed(PRETRAIN, PR="fp32"), {}),
    "FL=auto: must be true or false": (changed(PRETRAIN, FL="auto"), {}),
    "AC=true: means none there; must be sel or full": (changed(PRETRAIN, AC="true"), {}),
    "ENV=slurm: must be dsw or dlc": (changed(PRETRAIN, ENV="slurm"), {}),
    "MODEL_SIZE=8B: must be 0.5B, 1.5B": (changed(PRETRAIN, MODEL_SIZE="8B"), {}),
    "SP=false: with TP=2 the script sets --tp-comm-overlap": (changed(PRETRAIN, SP="false", TP="2"), {}),
    "DO=false: the script always sets --overlap-param-gather": (changed(PRETRAIN, DO="false"), {}),
    "OPTIMIZER_OFFLOAD=0.5: must be false, static or auto": (changed(PRETRAIN, OPTIMIZER_OFFLOAD="0.5"), {}),
    "PAD_LEN=256: idxmap's samples are all SEQ_LEN long": (changed(PRETRAIN, PAD_LEN="256"), {}),
    "MP_DATASET_TYPE=raw: JSON is for tuning": (changed(PRETRAIN), RAW),
    "MP_DATASET_TYPE=json: must be idxmap or raw": (changed(PRETRAIN), {"MP_DATASET_TYPE": "json"}),
    "MP_AC_LAYER=2: qwen2_5 does not read it; did you mean MP_AC_LAYERS": (changed(PRETRAIN), {"MP_AC_LAYER": "2"}),
    "MP_VP=5: must be a number of layers of which PP=2": (changed(PRETRAIN, PP="2"), {"MP_VP": "5"}),
    "PRETRAIN_CHECKPOINT_PATH=none: the tokenizer": (changed(PRETRAIN, PRETRAIN_CHECKPOINT_PATH="none"), {}),
    "BATCH_SIZE=one: must be a whole number from 1": (changed(PRETRAIN, BATCH_SIZE="one"), {}),
    "MIN_LR=1e-4: Megatron stops there; must not be above LR=1e-5": (changed(PRETRAIN, MIN_LR="1e-4"), {}),
    "LR=nan: must be a number": (changed(PRETRAIN, LR="nan"), {}),
    "ENV=dlc: WORLD_SIZE is not set": (changed(PRETRAIN, ENV="dlc"), {}),
    "takes 25 arguments, 24 were given; missing OUTPUT_BASEPATH": (changed(PRETRAIN)[:-1], {}),
    "26 were given; the last is OUTPUT_BASEPATH, and more": ([*changed(PRETRAIN), "more"], {}),
    "AC=offload: Megatron does not offload with PP=2": (changed(PRETRAIN, AC="offload", PP="2"), {}),
    "MP_AC_LAYERS=24: must be from 1 to 23": (changed(PRETRAIN, AC="offload"), {"MP_AC_LAYERS": "24"}),
    "MP_AC_LAYERS=5: must divide the layers of a stage, 24": (changed(PRETRAIN, AC="full"), {"MP_AC_LAYERS": "5"}),
    "MP_AC_LAYERS=12: must divide the layers of a stage, 6": (
        changed(PRETRAIN, AC="full", PP="2"),
        {"MP_AC_LAYERS": "12", "MP_VP": "6"},
    ),
    "MP_AC_LAYERS=3: must divide the layers of a stage, 12 and 16": (
        changed(VISION, AC="full"),
        {"MP_AC_LAYERS": "3", "MP_PP0_LAYERS": "12"},
    ),
    "MP_AC_LAYERS=2: must divide the layers of a stage, 23 and 24": (
        changed(EXPERTS, MODEL_SIZE="A22B", AC="full"),
        {**DLC, "MP_AC_LAYERS": "2"},
    ),
    "PR=fp8: MODEL_SIZE=A3B has experts, which are not computed in 8 bits": (changed(EXPERTS, PR="fp8"), DLC),
    "AC=offload: MODEL_SIZE=A3B has experts": (changed(EXPERTS, PP="1", AC="offload"), DLC),
    "EP=3: must divide the 128 experts of MODEL_SIZE=A3B": (changed(EXPERTS, ENV="dsw", EP="3"), {}),
    "MP_PP0_LAYERS=13: the other stages of PP=3 must share": (changed(VISION, PP="3"), {"MP_PP0_LAYERS": "13"}),
    "of 28 layers evenly; the nearest right number is 27": (changed(VISION), {"MP_PP0_LAYERS": "28"}),
    "MP_PP0_LAYERS=12: needs PP from 2 to 28": (changed(VISION, PP="1"), {"MP_PP0_LAYERS": "12"}),
    "TRAIN_TOKENS_OR_ITERS=1000: must be 1024 or more": (changed(PRETRAIN, TRAIN="1000"), {}),
    "WARMUP_TOKENS_OR_ITERS=9300: Megatron's warm-up must end": (changed(PRETRAIN, WARMUP="9300"), {}),
    "LR_WARMUP_ITERS=10000: Megatron's warm-up must end": (changed(VISION, WARMUP="10000"), {}),
    "OUTPUT_BASEPATH=/${JOB}: the settings would read ${ as a reference": (changed(PRETRAIN, OUT="/${JOB}"), {}),
    "VALID_DATASET_PATH=a b c: must be a prefix": (changed(PRETRAIN, VALID_DATASET_PATH="a b c"), {}),
    "MP_SFT_PACKING=true: that script sets it to false": (changed(VISION), PACKED),
    "takes 23 or 24 arguments, 22 were given": (changed(VISION)[:-1], {}),
    "OPTIMIZER_OFFLOAD=2: must be false, static, auto, or": (changed(VISION, OPTIMIZER_OFFLOAD="2"), {}),
    "MODEL_SIZE=A3B: has experts, and the 24 arguments": (as_listed(EXPERTS), DLC),
    "takes 24 or 26 arguments, 25 were given; missing OUTPUT_BASEPATH": (changed(EXPERTS)[:-1], DLC),
    "SP=1: must be true or false": (changed(EXPERTS)[:-2], DLC),
    "EP=4: MODEL_SIZE=8B has no experts": (changed(EXPERTS, MODEL_SIZE="8B"), DLC),
    "SP=false: MODEL_SIZE=A3B has experts, with which TP=4 needs it": (changed(EXPERTS, SP="false"), DLC),
    "WORLD_SIZE=1: TP=4, PP=4, CP=1, ETP=1, EP=4 need a multiple of 16 ranks": (
        changed(EXPERTS),
        {**DLC, "WORLD_SIZE": "1"},
    ),
    "run_mcore_qwen.sh: whose": (["run_mcore_qwen.sh", "dsw"], {}),
    "qwen: must be one of qwen2_5": (["qwen"], {}),
    "USE_TE=false: files": (["hf2mcore_qwen2.5_convertor.sh", "7B", "a", "b", "1", "1", "bf16", "false", "false"], {}),
    "of 28 layers evenly; the nearest right number is 26": (
        ["hf2mcore_qwen2_vl_convertor.sh", "7B", "a", "b", "2", "3", "false", "bf16"],
        {"MP_PP0_LAYERS": "28"},
    ),
    "MG2HF=true: HF_DIR is missing": (["qwen2_5/run_8xH20.sh", "7B", "a", "b", "true", "false", "bf16"], {}),
}


@pytest.mark.parametrize("message", WRONG)
def test_values_that_were_passed_over_in_silence_are_errors(message: str) -> None:
    words, env = WRONG[message]
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        translate(words, env)
    assert "\n" not in str(error.value)


def test_what_is_clear_is_done_and_said() -> None:
    said = {
        "AC=false: nothing is recomputed": (changed(PRETRAIN, AC="false"), {}),
        "MP_AC_LAYERS=2: of no effect with AC=none": (changed(PRETRAIN), {"MP_AC_LAYERS": "2"}),
        "WARMUP_TOKENS_OR_ITERS=100: 0.10 steps of 1024 tokens; 0 here as there": (changed(PRETRAIN), {}),
        "CP=2: packed samples are padded one by one": (changed(TUNE, CP="2"), PACKED),
        "PR=fp16: its buffers are bf16": (changed(PRETRAIN, PR="fp16", TP="2"), {}),
        "SEQ_LEN=512: of no effect": (changed(TUNE, SEQ_LEN="512"), RAW),
        "AC=true: nothing is recomputed, as there": (changed(VISION, AC="true"), {}),
        "DO=false: OPTIMIZER_OFFLOAD=auto needs it": (changed(PRETRAIN, DO="false", OPTIMIZER_OFFLOAD="auto"), {}),
        "OPTIMIZER_OFFLOAD=0.5: there the script never passes it on": (changed(VISION, OPTIMIZER_OFFLOAD="0.5"), {}),
        "MP_VP=7: that version of the script leaves it out": (changed(VISION), {"MP_VP": "7"}),
        "MP_SFT_PACKING=true: there, JSON is never packed": (changed(TUNE), {**RAW, **PACKED}),
        "ENV=dsw: TP=4, PP=4, CP=1, ETP=1, EP=4 need 16 ranks, not the 8 of one node": (
            f"qwen3_vl {README3}".split(),
            {},
        ),
        "PP=4: 94 layers do not divide by it, and Megatron stops there; here the stages have 23, 24, 24, 23": (
            changed(EXPERTS, MODEL_SIZE="A22B"),
            DLC,
        ),
        "MODEL_SIZE=A3B: there --rotary-base is 1e6; here it is 5e6": (changed(EXPERTS), DLC),
        "24 arguments, as its README's table lists them": (as_listed(EXPERTS.replace("A3B", "8B")), DLC),
    }
    for note, (words, env) in said.items():
        assert any(found.startswith(note) for found in translate(words, env)[1]), note
    assert "-ac-none-do-true-sp-true-ti-9-wi-0" in str(translate(changed(PRETRAIN), {})[0])


def test_a_script_is_known_by_its_path_or_family() -> None:
    _, *arguments = changed(PRETRAIN)
    line = str(translate(changed(PRETRAIN), {})[0])
    assert str(translate(["Pai/examples/qwen2_5/run_mcore_qwen.sh", *arguments], {})[0]) == line
    assert str(translate(["run_mcore_qwen.sh", *arguments], {}, "qwen2_5")[0]) == line
    hidden, _ = translate(changed(PRETRAIN), {"WORLD_SIZE": "1", "RANK": "0"})  # of a machine that belongs to a job
    assert str(hidden) == f"env -u WORLD_SIZE -u RANK {line}"
    random, _ = translate(changed(PRETRAIN, PRETRAIN_CHECKPOINT_PATH="none"), {}, tokenizer="/mnt/my tokenizer")
    assert "\"model.tokenizer.type='/mnt/my tokenizer'\"" in str(random) and "restore_from_path" not in str(random)


def test_converters_become_flags_that_ours_takes(tmp_path: Path, monkeypatch, capsys) -> None:
    lines = {
        "toolkits/x/scripts/qwen2_5/run_8xH20.sh 0.5B a b false true bf16": "--format torch_dist --precision bf16",
        "qwen3_vl/run_A22B_16xH20.sh A22B a b true true fp32 hf": "--precision fp32 --hf-config hf",
        "hf2mcore_qwen2.5_convertor.sh 7B a b 2 4 fp16 true false": "--tensor-model-parallel-size 2 "
        "--pipeline-model-parallel-size 4 --precision fp16 --format mp_rank",
        "hf2mcore_qwen2_vl_convertor.sh 7B a b 2 2 true bf16 hf": "--precision bf16 --hf-config hf",
        "hf2mcore_qwen2_vl_convertor.sh 7B a b 2 3 false bf16": "--tensor-model-parallel-size 2 "
        "--pipeline-model-parallel-size 3 --format mp_rank --precision bf16 --pipeline-layers 12,8,8",
    }
    monkeypatch.chdir(tmp_path)
    for typed, flags in lines.items():
        env = {"MP_PP0_LAYERS": "12"} if flags.endswith("12,8,8") else {}
        command, notes = translate(typed.split(), env)
        python, script, *given = shlex.split(str(command).replace("\\\n", ""))
        assert (python, script) == ("python", "scripts/convert_megatron.py")
        assert " ".join(given) == f"--input a --output b {flags}"
        monkeypatch.setattr(sys, "argv", [script, *given])
        with pytest.raises(SystemExit) as end:
            run_command(runpy.run_path(str(ROOT / script))["main"])
        told = capsys.readouterr().err
        assert end.value.code == 2 and re.match(r"--(input=a|hf-config=hf):", told), told  # all flags were taken


def test_scripts_of_data_become_flags_or_are_not_needed() -> None:
    lines = {
        "toolkits/pretrain_data_preprocessing/convert_llava_pretrain_to_wds.py /mnt/l": "--input "
        "/mnt/l/blip_laion_cc_sbu_558k.json --image-folder /mnt/l --output /mnt/l/wds",
        "convert_custom_dataset_to_wds_chatml.py --dataset-root r --train-split 8 --val-split=2": "--image-folder r "
        "--video-folder r --output r/wds --input r/dataset.json --max-samples-per-tar 10000 --split-ratio 8,2,0",
    }
    for typed, flags in lines.items():
        command, _ = line.translate(typed.split(), {})
        assert str(command).replace(" \\\n   ", "") == f"python scripts/prepare_wds.py {flags}"
    wrong = {
        "energon prepare ./": "energon: not needed; scripts/prepare_wds.py runs it",
        "replace_llava_image_key.py --input-file a": "takes `image` as well as `images`",
        "build_llava_frame_dataset.py --dataset-root a": "model.data.video_fps frames a second",
        "convert_llava_pretrain_to_wds.py": "takes one argument",
        "convert_custom_dataset_to_wds_chatml.py --dataset-rot r": "did you mean --dataset-root",
        "convert_custom_dataset_to_wds_chatml.py --json r": "does not say --dataset-root",
    }
    for typed, message in wrong.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            line.translate(typed.split(), {})


def run_script(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/from_pai.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_prints_the_line_alone() -> None:
    done = run_script(*changed(TUNE, AC="false"), "--env", "MP_DATASET_TYPE=raw")
    assert (done.returncode, done.stdout.count("\n\n"), done.stderr.count("\n")) == (0, 0, 1)
    assert done.stdout == f"{translate(changed(TUNE, AC='false'), RAW)[0]}\n"
    wrong = run_script(*changed(PRETRAIN, LR="-1e-5"))
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", "LR=-1e-5: must be a number, 0 or more\n")
    assert listing() in run_script("--help").stdout


def test_the_documentation_has_the_tables_and_the_line_of_its_example() -> None:
    page = (ROOT / "docs/from_pai.md").read_text()
    assert tables() in page
    _, typed, printed = re.split(r"```\n\$ python scripts/from_pai.py |\nnote: [^\n]*\n", page, maxsplit=2)
    assert printed.startswith(f"{translate(shlex.split(typed.replace(chr(92) + chr(10), ' ')), {})[0]}\n```")
