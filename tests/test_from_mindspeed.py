"""MindSpeed-MM's scripts and JSON files, translated, composed, and read back; and both systems' runs at tiny size."""

from __future__ import annotations

import csv
import io
import json
import re
import runpy
import shlex
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from commands import run as run_command_line
from PIL import Image
from ported import run_of, words_of

from nemo_vlm import layout as layouts
from nemo_vlm.config import RunConfig
from nemo_vlm.data.tokenizer import VISION_TOKENS, train_chat_tokenizer
from nemo_vlm.errors import ConfigError
from nemo_vlm.porting.document import mindspeed_tables
from nemo_vlm.porting.line import translate
from nemo_vlm.script import run_command
from nemo_vlm.training import schedules

ROOT = Path(__file__).parents[1]
VARIABLES = {
    "NPUS_PER_NODE": "8",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "6000",
    "NNODES": "1",
    "NODE_RANK": "0",
    "WORLD_SIZE": "$(($NPUS_PER_NODE*$NNODES))",
    "MM_DATA": '"./examples/qwen2vl/data.json"',
    "MM_MODEL": '"./examples/qwen2vl/model.json"',
    "MM_TOOL": '"./mindspeed_mm/tools/tools.json"',
    "LOAD_PATH": '"ckpt/Qwen2-VL-7B-Instruct"',
    "SAVE_PATH": '"save_dir"',
    "TP": "1",
    "PP": "4",
    "CP": "1",
    "MBS": "1",
    "GRAD_ACC_STEP": "96",
    "DP": "$(($WORLD_SIZE/$TP/$PP/$CP))",
    "GBS": "$(($MBS*$GRAD_ACC_STEP*$DP))",
}
LAUNCHER = "--nproc-per-node $NPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK --master_addr $MASTER_ADDR"
FLAGS = (  # of the first version
    "--use-mcore-models --tensor-model-parallel-size ${TP} --pipeline-model-parallel-size ${PP} --num-layers 28 "
    "--num-layer-list 0,0,10,20 --hidden-size 3584 --micro-batch-size ${MBS} --global-batch-size ${GBS} "
    "--tokenizer-type NullTokenizer --vocab-size 152064 --seq-length 1024 --lr 1.0e-5 --lr-decay-style cosine "
    "--weight-decay 0 --train-iters 10000 --lr-warmup-fraction 0.1 --clip-grad 0.0 --adam-beta1 0.9 --adam-beta2 0.999 "
    "--initial-loss-scale 4096 --no-load-optim --no-load-rng --no-save-optim --no-save-rng --seed 42 --bf16 "
    "--load $LOAD_PATH --variable-seq-lengths --mm-data $MM_DATA --mm-model $MM_MODEL --mm-tool $MM_TOOL "
    "--log-interval 1 --save-interval 10000 --eval-interval 10000 --eval-iters 5000 --save $SAVE_PATH"
)
LATER = "--use-distributed-optimizer --use-flash-attn --num-workers 8 --distributed-timeout-minutes 20 --log-tps"
EXPORTED = (
    "CUDA_DEVICE_MAX_CONNECTIONS=1 ASCEND_SLOG_PRINT_TO_STDOUT=0 ASCEND_GLOBAL_LOG_LEVEL=3 TASK_QUEUE_ENABLE=2 "
    "COMBINED_ENABLE=1 CPU_AFFINITY_CONF=1 HCCL_CONNECT_TIMEOUT=1200 NPU_ASD_ENABLE=0 ASCEND_LAUNCH_BLOCKING=0 "
    "HOST_CACHE_CAPACITY=20 ACLNN_CACHE_LIMIT=100000"
)
ENDS = "\\\n"  # of a line that goes on
ENTRY, BACKEND = "pretrain_qwen2vl.py", "--distributed-backend nccl > logs/train_${logfile}.log 2>&1"
RECORDS = "data/mllm_format_llava_instruct_data.json"
Tree = dict[str, Any]


def model_json() -> Tree:
    return {
        "model_id": "qwen2vl",
        "img_context_token_id": 151655,
        "image_encoder": {
            "vision_encoder": {
                "num_layers": 32,
                "hidden_size": 1280,
                "ffn_hidden_size": 5120,
                "llm_hidden_size": 3584,
                "num_attention_heads": 16,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "layernorm_epsilon": 1e-06,
                "activation_func": "quick_gelu",
                "freeze": True,
            },
            "vision_projector": {"input_size": 1280, "hidden_size": 3584, "ffn_hidden_size": 5120, "freeze": True},
        },
        "text_decoder": {
            "num_layers": 28,
            "num_layer_list": [0, 0, 10, 20],
            "hidden_size": 3584,
            "ffn_hidden_size": 18944,
            "num_attention_heads": 28,
            "num_query_groups": 4,
            "padded_vocab_size": 152064,
            "rope_theta": 1000000.0,
            "position_embedding_type": "rope",
            "untie_embeddings_and_output_weights": True,
            "init_method_std": 0.01,
            "hidden_dropout": 0.0,
        },
        "text_encoder": None,
    }


def data_json() -> Tree:
    return {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {
                "model_name_or_path": "./ckpt/hf_path/Qwen2-VL-7B-Instruct",
                "use_fast_tokenizer": True,
                "image_resolution": 512,
                "video_resolution": 128,
                "video_fps": 2.0,
                "video_maxlen": 64,
            },
            "basic_parameters": {
                "template": "qwen2vl",
                "dataset_dir": "./data",
                "dataset": f"./{RECORDS}",
                "cutoff_len": 1024,
                "max_samples": 1000,
                "mask_history": False,
                "tool_format": None,
            },
            "attr": {"system": None, "images": "images", "videos": None, "messages": "messages", "role_tag": "role"},
        },
        "dataloader_param": {"dataloader_mode": "sampler", "batch_size": 1, "collate_param": {"model_name": "qwen2vl"}},
    }


def later(model: Tree, data: Tree) -> None:
    """What the versions from 2.0.0 on say otherwise."""
    del model["text_decoder"]["num_layer_list"]
    model["text_decoder"] |= {"pipeline_num_layers": [1, 10, 10, 7], "position_embedding_type": "mrope"}
    model["image_encoder"]["vision_encoder"]["pipeline_num_layers"] = [32, 0, 0, 0]
    pixels = {"image_max_pixels": 262144, "image_min_pixels": 0, "video_max_pixels": 16384, "video_min_pixels": 0}
    given = data["dataset_param"]["preprocess_parameters"]
    del given["image_resolution"], given["video_resolution"]
    given |= pixels
    given["video_maxlen"] = 2
    del data["dataset_param"]["basic_parameters"]["cutoff_len"], data["dataset_param"]["attr"]["messages"]
    data["dataset_param"]["basic_parameters"] |= {"max_samples": None, "val_rate": 0.1}
    data["dataloader_param"]["shuffle"] = True


def script(folder: Path, flags: str = FLAGS, entry: str = ENTRY, **variables: str) -> str:
    """A script of theirs, its blocks of arguments in variables."""
    lines = ["#!/bin/bash", "source /usr/local/Ascend/ascend-toolkit/set_env.sh"]
    lines += [f"export {setting}  # of torch_npu" for setting in EXPORTED.split()]
    lines += [f"{name}={value}" for name, value in (VARIABLES | variables).items()]
    blocks = {"DISTRIBUTED_ARGS": f"{LAUNCHER} --master_port $MASTER_PORT", "GPT_ARGS": flags}
    lines += [
        f'{name}="\n    {block.replace(" --", f" {chr(92)}{chr(10)}    --")}\n"' for name, block in blocks.items()
    ]
    lines += ["logfile=$(date +%Y%m%d)", f"torchrun $DISTRIBUTED_ARGS {entry} \\\n    $GPT_ARGS \\\n    {BACKEND}"]
    path = folder / "examples/qwen2vl/finetune_qwen2vl_7b.sh"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def written(folder: Path, model: Tree, data: Tree, flags: str = FLAGS, entry: str = ENTRY, **variables: str) -> str:
    path = script(folder, flags, entry, **variables)
    for name, tree in (("model.json", model), ("data.json", data)):
        Path(path).with_name(name).write_text(json.dumps(tree))
    records = folder / RECORDS
    records.parent.mkdir(exist_ok=True)
    if not records.exists():
        records.write_text("[]")
    return path


def resolved(words: list[str]) -> tuple[RunConfig, layouts.Layout]:
    start = words.index("python")
    run = run_of(Path(words[start + 1]).stem, words[start + 2 :])
    return run, layouts.resolve(run, 8, {})


def test_the_first_version_is_what_the_run_resolves(tmp_path: Path) -> None:
    command, notes = translate([written(tmp_path, model_json(), data_json())], {})
    words = words_of(command)
    run, layout = resolved([word for word in words if word != "trainer.accelerator=npu"])
    assert words[:13] == [*EXPORTED.split(), "python", "examples/qwen2_vl_finetune.py"]
    assert "trainer.accelerator=npu" in words
    assert (layout.stage_layers, layout.pipeline, layout.ranks_per_node) == ((0, 10, 10, 8), 4, 8)
    assert (layout.micro_batch_size, layout.global_batch_size) == (1, 192)
    assert (run.model.hidden_size, run.model.init_method_std, run.model.encoder_seq_length) == (3584, 0.01, 1024)
    assert {name for name, part in run.model.parts.items() if part.freeze} == {"vision_model", "vision_projection"}
    data, saving = run.data, run.exp_manager.checkpoint_callback_params
    assert (data.max_pixels, data.video_max_pixels, data.video_min_pixels) == (512**2, 128**2, 56**2)
    assert (data.video_fps, data.video_min_frames, data.video_max_frames) == (2.0, 2, 64)
    assert (data.packing, data.too_long) == (False, "truncate")
    assert (data.data_path, data.image_folder) == (f"{tmp_path}/{RECORDS}", str(tmp_path))
    assert (data.dataloader_type, run.step.loss_reduction, run.step.seed) == ("single", "micro_batch", 42)
    assert run.start.restore_from_path == f"{tmp_path}/ckpt/Qwen2-VL-7B-Instruct"
    assert run.tokenizer.type == f"{tmp_path}/ckpt/hf_path/Qwen2-VL-7B-Instruct"
    assert (saving.save_optimizer, saving.save_rng, saving.every_n_train_steps) == (False, False, 10000)
    assert (run.exp_manager.exp_dir, run.exp_manager.name) == (f"{tmp_path}/save_dir", "finetune_qwen2vl_7b")
    assert (run.trainer.gradient_clip_val, run.trainer.precision) == (0.0, "bf16-mixed")
    assert (run.optim.weight_decay, run.optim.betas, run.optim.name) == (0.0, (0.9, 0.999), "fused_adam")
    told = ("position_embedding_type=rope", "image_resolution=512", "max_samples=1000", "config.json", "accelerator")
    assert all(any(word in note for note in notes) for word in told), notes
    assert "each about 1920 times" in " ".join(notes)


def test_learning_rates_are_megatrons(tmp_path: Path) -> None:
    import torch
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    flags = FLAGS.replace("--train-iters 10000", "--train-iters 300")
    words = words_of(translate([written(tmp_path, model_json(), data_json(), flags)], {})[0])
    run, _ = resolved([word for word in words if word != "trainer.accelerator=npu"])
    theirs = OptimizerParamScheduler(
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        init_lr=0.0,
        max_lr=1e-5,
        min_lr=0.0,
        lr_warmup_steps=0.1 * 300 * 192,
        lr_decay_steps=300 * 192,
        lr_decay_style="cosine",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    for step in range(300):
        ours = schedules.learning_rate(step * 192, run.optim, run.length, run.unit)
        assert ours == pytest.approx(theirs.optimizer.param_groups[0]["lr"], rel=1e-12)
        theirs.step(192)


def test_later_versions(tmp_path: Path) -> None:
    model, data = model_json(), data_json()
    later(model, data)
    flags = f"{FLAGS.replace('--num-layer-list 0,0,10,20 ', '').replace('-length 1024', '-length 4096')} {LATER}"
    nodes = {"NNODES": "2", "MASTER_ADDR": "gpu-node-01"}
    command, notes = translate([written(tmp_path, model, data, flags, "pretrain_vlm.py")], nodes)
    words = words_of(command)
    run, layout = resolved([word for word in words if word != "trainer.accelerator=npu"])
    assert words[11:14] == ["NODE_RANK=0", "MASTER_ADDR=gpu-node-01", "MASTER_PORT=6000"]
    assert (run.model.encoder_seq_length, run.data.video_min_frames, run.data.video_max_frames) == (4096, 2, 2)
    assert "data=sharegpt" in words  # whose messages are called conversations where nothing is said
    assert (layout.stage_layers, layout.num_nodes, layout.global_batch_size) == ((1, 10, 10, 7), 2, 384)
    assert (run.data.max_pixels, run.data.min_pixels, run.data.video_min_pixels) == (262144, 3136, 3136)
    assert (run.data.validation_split, run.data.dataloader_type, run.data.num_workers) == (0.1, "cyclic", 8)
    assert (run.trainer.val_check_interval, run.trainer.limit_val_batches) == (10000, 5000)
    assert (run.optim.name, run.trainer.hang_timeout) == ("distributed_fused_adam", 1200)
    assert not [note for note in notes if "rope" in note or "max_samples" in note]


def test_a_run_goes_on_where_it_is_loaded_from_what_it_saves(tmp_path: Path) -> None:
    flags = FLAGS.replace("--no-load-rng ", "").replace("--no-save-optim ", "")
    path = written(tmp_path, model_json(), data_json(), flags, LOAD_PATH='"./save_dir"')
    words = words_of(translate([path], {})[0])
    run, _ = resolved([word for word in words if word != "trainer.accelerator=npu"])
    resumed = run.exp_manager
    assert (resumed.resume_if_exists, resumed.resume_ignore_no_checkpoint, run.start.restore_from_path) == (
        True,
        False,
        None,
    )
    assert (resumed.resume_optimizer, resumed.resume_rng) == (False, True)
    assert resumed.checkpoint_callback_params.save_optimizer and not resumed.checkpoint_callback_params.save_rng


def test_what_is_said_of_data(tmp_path: Path) -> None:
    """And the script may have comments in any encoding."""
    model, data = changed(BASIC, val_dataset="val.json", val_rate=0.1)
    path = Path(written(tmp_path, model, data))
    path.write_bytes("# 微调\n".encode("gbk") + path.read_bytes())
    (tmp_path / RECORDS).unlink()
    command, notes = translate([str(path)], {})
    assert "validation_path" in str(command) and "validation_split" not in str(command)
    assert f"{BASIC}.val_rate=0.1: of no effect, val_dataset is there" in notes
    missing = f"{tmp_path}/{RECORDS}: is not there yet; translate again when it is, its names decide image_folder"
    assert missing in notes
    (tmp_path / "data/red.jpg").touch()
    (tmp_path / RECORDS).write_text('[{"images": ["red.jpg"]}]')
    command, notes = translate([str(path)], {})
    assert f"image_folder={tmp_path}/data" in str(command) and missing not in notes


def changed(branch: str, **values: Any) -> tuple[Tree, Tree]:
    """The JSON with other values in a branch."""
    model, data = model_json(), data_json()
    place: Any = data if branch.startswith("data") else model
    for name in branch.split("."):
        place = place[name]
    place |= values
    return model, data


VISION, PROJECTOR, TEXT = "image_encoder.vision_encoder", "image_encoder.vision_projector", "text_decoder"
BASIC, ATTR = "dataset_param.basic_parameters", "dataset_param.attr"
PREPROCESS = "dataset_param.preprocess_parameters"
WRONG: dict[str, tuple[tuple[Tree, Tree], str, dict[str, str]]] = {
    "--lr-warmup-fracton: not known in the script's command; did you mean --lr-warmup-fraction?": (
        (model_json(), data_json()),
        FLAGS.replace("warmup-fraction", "warmup-fracton"),
        {},
    ),
    "8/3: leaves 2, which the script drops": ((model_json(), data_json()), FLAGS, {"PP": "3"}),
    "SEQ_LEN: the script does not set it": ((model_json(), data_json()), f"{FLAGS} --seq-length ${{SEQ_LEN}}", {}),
    "NNODES=$(wc -l < hosts): is a command": ((model_json(), data_json()), FLAGS, {"NNODES": "$(wc -l < hosts)"}),
    "--micro-batch-size is 2; must say the same": ((model_json(), data_json()), FLAGS, {"MBS": "2"}),
    "--num-layer-list 0,0,10,20: text_decoder.num_layer_list is [0,1]": (
        changed(TEXT, num_layer_list=[0, 1]),
        FLAGS,
        {},
    ),
    "text_decoder.num_layer: not known in": (changed(TEXT, num_layer=28), FLAGS, {}),
    "text_decoder.hidden_dropout=0.1: there is no dropout": (changed(TEXT, hidden_dropout=0.1), FLAGS, {}),
    "llm_hidden_size=1280: must be 3584": (changed(VISION, llm_hidden_size=1280), FLAGS, {}),
    "the vision tower stands whole on the first stage; must be [32, 0]": (
        changed(VISION, pipeline_num_layers=[16, 16]),
        FLAGS,
        {},
    ),
    "mask_history=true: all answers of a conversation are trained": (changed(BASIC, mask_history=True), FLAGS, {}),
    "template=llava: the model's own template holds; must be qwen2vl": (
        changed(BASIC, template="llava"),
        FLAGS,
        {},
    ),
    "messages=turns: must be messages or conversations": (changed(ATTR, messages="turns"), FLAGS, {}),
    "text_decoder.num_layers is missing": (changed(TEXT, num_layers=None), FLAGS, {}),
    "text_decoder.untie_embeddings_and_output_weights is missing": (
        changed(TEXT, untie_embeddings_and_output_weights=None),
        FLAGS,
        {},
    ),
    "vision_projector.freeze is missing": (changed(PROJECTOR, freeze=None), FLAGS, {}),
    "video_maxlen is missing": (changed(PREPROCESS, video_maxlen=None), FLAGS, {}),
    "--global-batch-size is missing": (
        (model_json(), data_json()),
        FLAGS.replace("--global-batch-size ${GBS} ", ""),
        {},
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_one_line(tmp_path: Path, message: str) -> None:
    (model, data), flags, variables = WRONG[message]
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        translate([written(tmp_path, model, data, flags, **variables)], {})
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_one_line() -> None:
    for typed, message in {
        "examples/qwen2vl/finetune_qwen2vl_2b.sh": "there is no such file",
        "mm-convert InternVLConverter hf_to_mm": "must be one of mm-convert Qwen2VLConverter hf_to_mm",
        "mm-convert Qwen2VLConverter hf_to_mm --cfg.mm_dir b": "does not say --cfg.hf_config.hf_dir",
        "mm-convert Qwen2VLConverter hf_to_mm --cfg.parallel_config.llm_pp_layers [[0,1],[4,4]]": "virtual stages",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            translate(typed.split(), {})


PLAN = "--cfg.parallel_config.llm_pp_layers [[1,10,10,7]] --cfg.parallel_config.vit_pp_layers [[32,0,0,0]]"
CONVERTERS = {
    f"mm-convert Qwen2VLConverter hf_to_mm --cfg.mm_dir b --cfg.hf_config.hf_dir a {PLAN}": "--input a --output b "
    "--pipeline-layers 1,10,10,7 --format mp_rank --names mindspeed2",
    f"mm-convert Qwen2VLConverter mm_to_hf --cfg.save_hf_dir=b --cfg.mm_dir a --cfg.hf_config.hf_dir c {PLAN}": (
        "--input a --output b --hf-config c"
    ),
    "mm-convert Qwen2VLConverter resplit --cfg.source_dir a --cfg.target_dir b "
    "--cfg.target_parallel_config.llm_pp_layers [4,24] --cfg.target_parallel_config.tp_size 2": "--input a --output b "
    "--pipeline-layers 4,24 --tensor-model-parallel-size 2 --format mp_rank --names mindspeed2",
    "{folder}/qwen2vl_convert_to_mm_ckpt.py": "--input {folder}/a --output {folder}/b --num-layer-list 0,0,10,20 "
    "--format mp_rank --names mindspeed",
    "{folder}/qwen2vl_convert_to_hf.py": "--input {folder}/a --output {folder}/b --hf-config {folder}/c",
}
CONSTANTS = {
    "qwen2vl_convert_to_mm_ckpt.py": "hg_ckpt_dir = 'a'; mm_save_dir = 'b'; pipeline_layer_index = [0, 0, 10, 20]",
    "qwen2vl_convert_to_hf.py": "mm_save_dir = 'a'; hf_save_dir = 'b'; model_path = 'c'",
}


@pytest.mark.parametrize("line", CONVERTERS)
def test_converters_become_flags_that_ours_takes(tmp_path: Path, monkeypatch, capsys, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name, constants in CONSTANTS.items():
        (tmp_path / name).write_text(f"if __name__ == '__main__':\n    {constants}\n    convert(**vars())\n")
    command, _ = translate(line.format(folder=tmp_path).split(), {})
    python, script, *given = shlex.split(str(command).replace("\\\n", ""))
    assert (python, script) == ("python", "scripts/convert_megatron.py")
    assert " ".join(given) == CONVERTERS[line].format(folder=tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *given])
    with pytest.raises(SystemExit) as end:
        run_command(runpy.run_path(str(ROOT / script))["main"])
    told = capsys.readouterr().err
    assert end.value.code == 2 and re.match(r"--(input|hf-config)=", told), told  # all flags were taken


def tokenizer(folder: Path) -> str:
    words = ["user assistant You are a helpful assistant. What is this? It is red. It is blue. system"]
    train_chat_tokenizer(words, 320, VISION_TOKENS).save_pretrained(folder)
    return str(folder)


def image(colour: str) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (56, 84), colour).save(written, "JPEG")
    return written.getvalue()


def started(words: list[str], folder: Path, *overrides: str) -> list[dict[str, str]]:
    """metrics.csv of a printed line that is run with these behind it."""
    start = words.index("python")
    env = dict(word.split("=", 1) for word in words[:start] if "=" in word)
    script = str(ROOT / words[start + 1])
    done = run_command_line(script, *words[start + 2 :], *overrides, "trainer.accelerator=cpu", cwd=folder, **env)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("out/*/metrics.csv")
    return list(csv.DictReader(found.open()))


def test_mindspeeds_run_starts_at_tiny_size(tmp_path: Path) -> None:
    """The tower alone on the first of two stages, from a model.json of those numbers."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/red.jpg").write_bytes(image("red"))
    said = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "It is red."}]
    records = [{"images": ["red.jpg"], "messages": said}, {"messages": [dict(said[0], content="What?"), said[1]]}]
    (tmp_path / RECORDS).write_text(json.dumps(records * 2))
    model, data = model_json(), data_json()
    model["image_encoder"]["vision_encoder"] |= dict(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, llm_hidden_size=64
    )
    model["image_encoder"]["vision_projector"] |= dict(input_size=32, hidden_size=64, ffn_hidden_size=128)
    model["text_decoder"] |= dict(
        num_layers=2,
        num_layer_list=[0, 0],
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        padded_vocab_size=None,
    )
    data["dataset_param"]["preprocess_parameters"]["model_name_or_path"] = tokenizer(tmp_path / "tokenizer")
    flags = FLAGS.replace("--num-layer-list 0,0,10,20", "--num-layer-list 0,0").replace("iters 10000", "iters 2")
    flags = flags.replace("--bf16 --load $LOAD_PATH ", "").replace("fraction 0.1", "fraction 0.5")
    variables = dict(NPUS_PER_NODE="2", PP="2", GRAD_ACC_STEP="2", SAVE_PATH='"out"')
    words = words_of(translate([written(tmp_path, model, data, flags, **variables)], {})[0])
    rows = started(words, tmp_path, "model.vocab_size=null")
    assert [row["consumed_samples"] for row in rows] == ["2", "4"]
    assert [row["visual_tokens"] for row in rows] == ["6.0", "6.0"]
    assert float(rows[0]["lr"]) == 0 and float(rows[1]["lr"]) > 0  # as Megatron's warm-up


def test_pais_run_starts_at_tiny_size(tmp_path: Path) -> None:
    """The line of its README, AC=true and all, on two tensor-parallel ranks and a webdataset as Energon leaves it."""
    folder = tmp_path / "wds"
    (folder / ".nv-meta").mkdir(parents=True)
    for number, colour in enumerate(("red", "blue")):
        turns = [("human", "<image>\nWhat is this?"), ("gpt", f"It is {colour}.")]
        files = {
            "jpg": image(colour),
            "json": json.dumps([{"from": who, "value": said} for who, said in turns]).encode(),
        }
        with tarfile.open(folder / f"pretrain-{number}.tar", "w") as tar:
            for suffix, content in files.items():
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    fields = "field_map: {image: jpg, context: 'json[0][value]', answers: 'json[1][value]'}"
    (folder / ".nv-meta/dataset.yaml").write_text(f"__module__: megatron.energon\n__class__: VQAWebdataset\n{fields}\n")
    (folder / ".nv-meta/split.yaml").write_text(
        "exclude: []\nsplit_parts: {train: [pretrain-0.tar], val: [pretrain-1.tar], test: []}\n"
    )
    line = "qwen2_vl dsw 7B 1 2 1e-5 1e-6 256 256 bf16 2 1 1 true false true false 2 wds wds none 2 0 out"
    words = words_of(translate(line.split(), {}, tokenizer=tokenizer(tmp_path / "tokenizer"))[0])
    tiny = ("model=qwen2_vl_tiny", "model.attention_backend=auto", "model.data.num_workers=0")
    tiny += ("trainer.val_check_interval=2", "model.data.eval_samples=1", "model.data.eval_tokens=2")
    rows = started(words, tmp_path, *tiny)
    assert [row["consumed_samples"] for row in rows] == ["2", "4"]
    assert [row["visual_tokens"] for row in rows] == ["12.0", "12.0"] and rows[1]["val_loss"]
    assert [row["val_accuracy"] for row in rows] == ["", "0.0"]
    (answers,) = tmp_path.rglob("val_answers.jsonl")
    assert json.loads(answers.read_text())["expected"] == "It is blue."


def test_the_documentation_has_the_tables_and_the_line_of_its_example(tmp_path: Path) -> None:
    page = (ROOT / "docs/from_mindspeed.md").read_text()
    assert mindspeed_tables() in page
    command, notes = translate([written(tmp_path, model_json(), data_json())], {})
    printed = "\n".join([*(f"note: {note}" for note in notes), str(command)])
    assert printed.replace(str(tmp_path), "/workspace/MindSpeed-MM") in page
