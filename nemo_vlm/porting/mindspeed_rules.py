"""MindSpeed-MM's flags and JSON keys as settings of ours.

What the rules say of them is from its text: examples/qwen2vl of revisions effa119e (November 2024, the first), 1.0.0,
2.0.0 and 26.0.0, with the Megatron that these take.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_vlm.errors import ConfigError
from nemo_vlm.porting.pai_rules import CALLBACK, SCHED
from nemo_vlm.porting.shell import Text
from nemo_vlm.porting.table import Check, Item, Note, Rule, Values

TEXT, VISION, PROJECTOR = "text_decoder", "image_encoder.vision_encoder", "image_encoder.vision_projector"
PREPROCESS, BASIC, ATTR = (f"dataset_param.{part}" for part in ("preprocess_parameters", "basic_parameters", "attr"))
LOADER = "dataloader_param"
TOWER = "model.mm_cfg.vision_encoder"


@dataclass(frozen=True)
class Preset:
    """A file of conf/model and what its language model is, by model.json's keys."""

    name: str
    keys: Mapping[str, str]


def preset(name: str, *numbers: int) -> Preset:
    keys = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
    return Preset(name, dict(zip(keys, map(str, numbers), strict=True)))


PRESETS = (
    preset("qwen2_vl_2b", 28, 1536, 8960, 12, 2, 151936),
    preset("qwen2_vl_7b", 28, 3584, 18944, 28, 4, 152064),
    preset("qwen2_vl_72b", 80, 8192, 29568, 64, 8, 152064),
)


def preset_of(values: Values) -> Preset:
    """The size of that width, or else the smallest, of which everything is then another."""
    width = values[f"{TEXT}.hidden_size"]
    return next((one for one in PRESETS if one.keys["hidden_size"] == width), PRESETS[0])


def model(values: Values, name: str) -> Iterator[Item]:
    yield "model", preset_of(values).name


def sized(key: str) -> Rule:
    """A number of the language model; it is printed where the preset has another."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        own = "vocab_size" if name.endswith("vocab_size") else name.rpartition(".")[2]
        if values[name] != preset_of(values).keys[own]:
            yield key, int(values[name])

    return rule


def usual(key: str, number: float) -> Rule:
    """A number that all sizes share; it is printed where it is another."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        if float(values[name]) != number:
            yield key, values[name]

    return rule


def same_as(other: str, times: str = "") -> Rule:
    """A number that must be that of another key, or as often as a third squared."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        right = values.number(other) * (values.number(times) ** 2 if times else 1)
        if values.number(name) != right:
            raise ConfigError(f"{name}={values[name]}: must be {right}, from {other}")
        yield from ()

    return rule


def untied(values: Values, name: str) -> Iterator[Item]:
    shared = not values.true(name)
    if shared != (preset_of(values) is PRESETS[0]):
        yield "model.share_embeddings_and_output_weights", shared


def positions(values: Values, name: str) -> Iterator[Item]:
    if values[name] == "rope":
        yield Note(
            f"{name}=rope: there, positions count on through images; here they are Qwen2-VL's own (M-RoPE), with which "
            "its weights were made"
        )


def frozen(key: str) -> Rule:
    """Both vision parts, which the first versions froze whatever model.json said."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        yield key, values.true(name)
        if not values.true(name) and values["entry"] == "pretrain_qwen2vl.py":
            yield Note(f"{name}=false: trained; the first version of {values['entry']} froze it all the same")

    return rule


def sections(values: Values, name: str) -> Iterator[Item]:
    if numbers(values[name]) != [16, 24, 24]:
        yield "model.mrope_section", numbers(values[name])


def placeholder(values: Values, name: str) -> Iterator[Item]:
    """There one id serves images or videos; here the tokenizer tells both."""
    if values[name] == "151656":
        yield Note(f"{name}=151656: not needed for videos; images and videos may stand in one record")
    elif values[name] != "151655":
        yield "model.mm_cfg.image_token_index", values.number(name)


def tower_stages(values: Values, name: str) -> Iterator[Item]:
    """The tower's plan: here it stands whole on the first stage."""
    first, *others = numbers(values[name])
    if str(first) != values[f"{VISION}.num_layers"] or any(others):
        raise ConfigError(
            f"{name}={values[name]}: the vision tower stands whole on the first stage; must be "
            f"{[values.number(f'{VISION}.num_layers'), *[0] * len(others)]}".replace("'", "")
        )
    yield from ()


def stages(values: Values, name: str) -> Iterator[Item]:
    """text_decoder.pipeline_num_layers: layers of each stage, of a virtual pipeline in a list of lists."""
    plan = json.loads(values[name])
    if isinstance(plan[0], list) and len(plan) > 1:
        yield "model.virtual_pipeline_model_parallel_size", len(plan)
    if len(numbers(values[name])) > 1:
        yield "model.pipeline_layers", numbers(values[name])


def first_layers(values: Values, name: str) -> Iterator[Item]:
    """The first layer of each stage, which stands in the script and in model.json; one stage needs none."""
    there = f"{TEXT}.num_layer_list"
    if values["--num-layer-list"] and values[there] and numbers(values["--num-layer-list"]) != numbers(values[there]):
        raise ConfigError(
            f"--num-layer-list {values['--num-layer-list']}: {there} is {values[there]}; must say the same"
        )
    if name == there and values["--num-layer-list"]:
        return
    if values.number("--pipeline-model-parallel-size") > 1:
        yield "model.num_layer_list", numbers(values[name])


def numbers(text: str) -> list[int]:
    """Of a list, or a list of lists, in JSON or with commas."""
    return [int(number) for number in re.findall(r"\d+", text)]


def is_list(name: str, value: str) -> None:
    if not re.fullmatch(r"[\[\]\d,\s]+", value) or not numbers(value):
        raise ConfigError(f"{name}={value}: must be whole numbers with commas between")


def exactly(right: str, why: str) -> Check:
    """The check of a key of which only one value, or none, makes sense here."""

    def check(name: str, value: str) -> None:
        if value != right and not (is_number(value) and is_number(right) and float(value) == float(right)):
            raise ConfigError(f"{name}={value}: {why}; must be {right or 'null'}")

    return check


def is_number(value: str) -> bool:
    return re.fullmatch(r"[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?", value) is not None


def limit(values: Values, name: str) -> Iterator[Item]:
    """--seq-length, which limits samples from 2.0.0 on, where cutoff_len is refused."""
    if not values[f"{BASIC}.cutoff_len"]:
        yield "model.encoder_seq_length", values.number(name)


def place(key: str) -> Rule:
    """The rule of a path, which is relative to the folder that their script is started in."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        yield key, path(values, values[name])

    return rule


def path(values: Values, name: str) -> Text:
    return Text(os.path.normpath(os.path.join(values.folder, name)))


def told(key: str) -> Rule:
    """The rule of a flag of the architecture, which model.json decides; 1 stands for none in later versions."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        right = values[key]
        if right and values[name] not in ("1", "true") and float(values[name]) != float(right):
            yield Note(f"{name} {values[name]}: of no effect, {key} is {right}")

    return rule


def load(values: Values, name: str) -> Iterator[Item]:
    """The first weights, or the run that is gone on with where both paths are the same."""
    optimizer, rng = (not values.true(flag) for flag in ("--no-load-optim", "--no-load-rng"))
    if path(values, values[name]) == path(values, values["--save"]):
        yield "exp_manager.resume_if_exists", True
        yield "exp_manager.resume_ignore_no_checkpoint", False
        yield "exp_manager.resume_optimizer", optimizer
        yield "exp_manager.resume_rng", rng
        yield Note(
            f"{name} is --save: goes on with the newest checkpoint of this run; exp_manager.resume_from_step=N with "
            "that of iteration N"
        )
        return
    weights = path(values, values[name])
    yield "model.restore_from_path", weights
    if not Path(weights.value, "config.json").is_file():
        yield Note(
            f"{name} {values[name]}: needs Hugging Face's config.json in it, which their converters leave out; copy it "
            "there, or take Hugging Face's directory itself, which needs no conversion"
        )
    if optimizer:
        yield Note(f"{name} without --no-load-optim: weights alone are read of it, and the optimizer starts anew")


def save(values: Values, name: str) -> Iterator[Item]:
    yield "exp_manager.exp_dir", path(values, values[name])
    yield "exp_manager.name", Text(Path(values["script"]).stem)
    yield f"{CALLBACK}.save_optimizer", not values.true("--no-save-optim")
    yield f"{CALLBACK}.save_rng", not values.true("--no-save-rng")
    yield f"{CALLBACK}.save_top_k", -1


def optimizer(values: Values, name: str) -> Iterator[Item]:
    yield "model.optim.name", "distributed_fused_adam" if values.true(name) else "fused_adam"


def betas(values: Values, name: str) -> Iterator[Item]:
    yield "model.optim.betas", [values["--adam-beta1"], values["--adam-beta2"]]


def decay(values: Values, name: str) -> Iterator[Item]:
    names = {"cosine": "CosineAnnealing", "linear": "PolynomialDecayAnnealing", "constant": "constant"}
    yield f"{SCHED}.name", names[values[name]]
    if values["--lr-warmup-fraction"] and values["--lr-warmup-iters"]:
        raise ConfigError("--lr-warmup-fraction: --lr-warmup-iters is there too; give one of them")


def samples(key: str) -> Rule:
    """Steps as the samples that Megatron counts: its warm-up begins at 0, as ours does of a run in samples."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        yield key, values.number(name) * values.number("--global-batch-size")

    return rule


def precision(values: Values, name: str) -> Iterator[Item]:
    """--bf16, and --fp16 beside it; neither is 32 bits."""
    if values.true("--bf16") and values.true("--fp16"):
        raise ConfigError("--bf16: --fp16 is there too; give one of them")
    mixed = "bf16-mixed" if values.true("--bf16") else "16-mixed" if values.true("--fp16") else 32
    yield "trainer.precision", mixed


def loss_scale(values: Values, name: str) -> Iterator[Item]:
    if values.true("--fp16"):
        yield "model.native_amp_init_scale", values[name]


def loss(values: Values, name: str) -> Iterator[Item]:
    token, sample = (values.true(f"--calculate-per-{unit}-loss") for unit in ("token", "sample"))
    if token and sample:
        raise ConfigError("--calculate-per-token-loss: --calculate-per-sample-loss is there too; give one of them")
    yield "model.loss_reduction", "token" if token else "sample" if sample else "micro_batch"


def recompute(values: Values, name: str) -> Iterator[Item]:
    yield "model.activations_checkpoint_granularity", values[name]


def validation(key: str) -> Rule:
    """Of validations, which there are none of without their data."""

    def rule(values: Values, name: str) -> Iterator[Item]:
        if values[f"{BASIC}.val_dataset"] or values[f"{BASIC}.val_rate"]:
            yield key, values.number(name)

    return rule


def backend(values: Values, name: str) -> Iterator[Item]:
    """nccl, which torch_npu takes for hccl."""
    yield "trainer.accelerator", "npu"
    yield Note("trainer.accelerator=npu: as there; leave it out on GPUs")


def timeout(values: Values, name: str) -> Iterator[Item]:
    yield "trainer.hang_timeout", 60 * values.number(name)
