"""NeMo's recipes and the commands of its LLaVA guide: numbers, plans on a bare machine, and both stages made tiny."""

from __future__ import annotations

import json
import re
import sys
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from guide import COMMANDS, ENVIRONMENT, overrides
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from test_cli import TRAIN, run
from test_megatron import nemo_name, nemo_settings
from test_sources import archive_of
from tiny_hf import make_clip, make_llama, make_llava, tokenizer

from nemo_vlm import experiment, typed
from nemo_vlm.archive import Archive
from nemo_vlm.config import NemoConfig, TrainerConfig
from nemo_vlm.door import CONF, store_defaults
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.llava.config import Config
from nemo_vlm.planning import plan as planning
from nemo_vlm.sources import starting
from nemo_vlm.sources.megatron import EMBEDDINGS
from nemo_vlm.sources.opening import open_source
from nemo_vlm.training import durations


def tree_of(recipe: str, *given: str) -> dict[str, Any]:
    store_defaults()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree: Any = OmegaConf.to_container(compose(recipe, list(given)), resolve=True)
    return {key: tree[key] for key in ("trainer", "exp_manager", "model")}


def planned(tree: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    model, absent = starting.without_absent(tree["model"])
    found = planning.training(experiment.read({**tree, "model": model}), env)
    return planning.describe(found) | {"notes": [*absent, *found.notes]}


@pytest.mark.parametrize("recipe", COMMANDS)
def test_the_guides_command_is_planned_where_nothing_is(recipe: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = overrides(COMMANDS[recipe])
    monkeypatch.setattr(sys, "argv", ["neva_finetune.py", *given])
    plan = planned(tree_of(recipe, *given), ENVIRONMENT)
    layout = plan["layout"]
    assert (plan["world_size"], layout["tensor"], layout["pipeline"], layout["data"]) == (8, 4, 1, 2)
    assert plan["total_parameters"] == 7_063_427_072
    micro, batch = (32, 256) if recipe == "llava_7b_pretrain" else (8, 128)
    assert (plan["batch"]["micro_batch_size"], plan["batch"]["global_batch_size"]) == (micro, batch)
    said = "\n".join(plan["notes"])
    for key in ("llm.from_pretrained", "vision_encoder.from_pretrained", "tokenizer.type", "data.data_path"):
        assert f"{key}=" in said


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("llava_7b_pretrain", (256, 1e-3, 2176, 65, True, "plain", "square", False)),
        ("llava_7b_finetune", (128, 2e-5, 5197, 155, False, "v1", "pad", False)),
        ("llava_llama3_8b_pretrain", (256, 1e-3, 2176, 65, True, "plain", "square", True)),
        ("llava_llama3_8b_finetune", (128, 2e-5, 5197, 155, False, "llama_3", "pad", True)),
    ],
)
def test_numbers_of_the_recipes(recipe: str, expected: tuple) -> None:
    run = experiment.read(tree_of(recipe))
    optim, mm_cfg, data = run.optim, run.model.mm_cfg, run.data
    batch, template = run.step.global_batch_size, data.conv_template
    steps = run.trainer.max_steps, optim.sched.warmup_steps
    assert expected == (
        *(batch, optim.lr, *steps, mm_cfg.llm.freeze, template, data.image_aspect_ratio, mm_cfg.use_image_tile),
    )
    assert (optim.betas, optim.weight_decay, run.trainer.gradient_clip_val) == ((0.9, 0.999), 0.0, 1.0)
    assert (optim.sched.name, optim.sched.min_lr, optim.sched.constant_steps) == ("CosineAnnealing", 0.0, 0)
    assert (run.trainer.precision, mm_cfg.vision_encoder.freeze, run.exp_manager.resume_if_exists) == (
        *("bf16", True, True),
    )
    assert run.model.parts["vision_projection"].freeze is False


FSDP = [
    "model.fsdp=true",
    "model.fsdp_grad_reduce_dtype=32",
    "model.fsdp_sharded_checkpoint=true",
    "model.fsdp_use_orig_params=true",
    "model.fsdp_cpu_offload=false",
    "model.fsdp_limit_all_gathers=true",
    "model.megatron_amp_O2=false",
]


@pytest.mark.parametrize("recipe", ["llava_7b_finetune", "llava_llama3_8b_pretrain"])
@pytest.mark.parametrize(
    ("strategy", "tensor", "shards"), [("full", 1, 8), ("grad", 1, 8), ("hybrid", 1, 4), ("full", 2, 4)]
)
def test_fsdp_as_nemo_spells_it(recipe: str, strategy: str, tensor: int, shards: int) -> None:
    layout = (f"model.fsdp_sharding_strategy={strategy}", f"model.tensor_model_parallel_size={tensor}")
    given = ("model.tokenizer.type=nowhere", *FSDP, *layout)
    plan = planned(tree_of(recipe, *given), {"WORLD_SIZE": "8"})
    assert (plan["layout"]["fsdp"], plan["layout"]["shards"], plan["layout"]["data"]) == (strategy, shards, 8 // tensor)
    held = sum(entry["bytes"]["weights"] for entry in plan["stages"])
    if strategy != "grad":  # frozen parts are sharded too
        assert held * shards == pytest.approx(4 * plan["total_parameters"], rel=0.01)


def test_fsdp_has_no_pipeline() -> None:
    with pytest.raises(ConfigError, match="^model.fsdp=true: model.pipeline_model_parallel_size=2"):
        experiment.read(tree_of("llava_7b_finetune", "model.fsdp=true", "model.pipeline_model_parallel_size=2"))


def test_a_plan_of_72b_over_sixteen_nodes() -> None:
    given = ("model=qwen2_5_72b", "parallel=tp8_pp4", "trainer.num_nodes=16", "trainer.devices=8")
    plan = planned(tree_of("gpt_pretrain", *given), {})
    layout = plan["layout"]
    assert (plan["world_size"], layout["tensor"], layout["pipeline"], layout["data"]) == (128, 8, 4, 4)
    assert plan["total_parameters"] == 72_706_203_648  # as its model card has it
    assert [entry["stage"] for entry in plan["stages"]] == [stage for stage in range(4) for _ in range(8)]


@pytest.mark.parametrize("layers", ["null", "[0,28]"])
def test_a_plan_of_qwen2_vl_has_its_tower_on_the_first_stage(layers: str) -> None:
    given = ("model=qwen2_vl_7b", "parallel=tp4_pp2", "trainer.devices=8", "model.tokenizer.type=nowhere")
    plan = planned(tree_of("qwen2_vl_finetune", *given, f"model.pipeline_layers={layers}"), {})
    assert plan["total_parameters"] == 8_291_375_616  # as its model card has it
    sums = [
        sum(entry["parameters_by_part"].get(part, 0) for entry in plan["stages"] if entry["stage"] == stage)
        for part in ("vision_model", "vision_projection")
        for stage in (0, 1)
    ]
    assert sums == [631_183_360, 0, 44_575_744, 0]
    first = sum(e["parameters_by_part"]["language_model"] for e in plan["stages"] if e["stage"] == 0)
    alone = first == 152064 * 3584  # with the embedding of words
    assert alone == (layers == "[0,28]")


def test_every_key_of_nemos_engine_is_explained() -> None:
    explained = set()
    tables = (CONF.parent / "docs/from_nemo.md").read_text().partition("## Settings")[2]
    for key in re.findall(r"`([^`]+)`", tables):
        front, _, names = key.rstrip("}").partition("{")  # a_{b, c} is a_b and a_c
        explained |= {front + name for name in names.split(", ")}
    assert {field.name for field in fields(NemoConfig)} - explained - {"nsys_profile"} == set()
    single = {f"trainer.{field.name}" for field in fields(TrainerConfig) if "instead" in field.metadata}
    assert single - explained == set()


def test_a_long_warm_up_is_said_once(caplog) -> None:
    """Where epochs end the run, when their steps are known."""
    run = experiment.read(tree_of("llava_7b_pretrain", "trainer.max_epochs=1", "trainer.max_steps=3"))
    assert "warmup_steps=65" not in caplog.text
    durations.check(run, 10_000)
    assert caplog.text.count("warmup_steps=65: the run ends after 3 steps") == 1


@pytest.mark.parametrize(
    "given",
    [
        "model.native_amp_init_scale=4294967296",
        "model.activation=fast-swiglu",
        "model.use_flash_attention=true",
        "model.grad_allreduce_chunk_size_mb=125",
        "model.nsys_profile.start_step=20",
        "model.precision=bf16",
        "model.cpu_offloading_weights=true",
        "model.moe_router_load_balancing_type=none",
        "model.mm_cfg.vision_encoder.crop_size=[336,336]",
        "model.mm_cfg.llm.model_type=nvgpt",
    ],
)
def test_keys_of_nemo_that_go_with_this_engine(given: str) -> None:
    experiment.read(tree_of("llava_7b_pretrain", given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.fp8_interval=2", "model.fp8_interval=2: Transformer Engine computes the scales anew"),
        ("model.hidden_dropout=0.1", "model.hidden_dropout=0.1: there is no dropout in these models"),
        ("model.transformer_engine=false", "model.transformer_engine=false: take model.transformer_impl=local"),
        ("model.nsys_profile.enabled=true", "model.nsys_profile.enabled=true: start the command itself under `nsys"),
        ("model.dist_ckpt_format=zarr", "model.dist_ckpt_format=zarr: zarr is not written"),
        ("model.moe_router_dtype=null", "model.moe_router_dtype=null: experts are chosen by the softmax"),
        ("model.precision=32", "model.precision=32: trainer.precision=bf16; give that alone"),
        ("model.optim.name=sgd", "model.optim.name=sgd: must be one of adam, adamw, fused_adam"),
        ("model.optim.sched.name=NoamAnnealing", "model.optim.sched.name=NoamAnnealing: must be one of CosineAnn"),
        (
            "model.mm_cfg.vision_encoder.from_hf=false",
            "model.mm_cfg.vision_encoder.from_hf=false: towers of NeMo's own",
        ),
        (
            "model.mm_cfg.vision_encoder.crop_size=[224,224]",
            "model.mm_cfg.vision_encoder.crop_size=[224, 224]: the tower",
        ),
        ("model.mm_cfg.vision_encoder.vision_select_feature=cls_patch", "model.mm_cfg.vision_encoder.vision_select_f"),
        (
            "model.mm_cfg.mm_mlp_adapter_type=qformer",
            "model.mm_cfg.mm_mlp_adapter_type=qformer: must be linear, identi",
        ),
        (
            "model.mm_cfg.llm.from_pretrained=nowhere.nemo",
            "model.mm_cfg.llm.from_pretrained=nowhere.nemo: there is no s",
        ),
    ],
)
def test_what_another_engine_would_do_is_refused_in_one_line(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        experiment.read(tree_of("llava_7b_pretrain", given))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("beside", "given", "right"),
    [
        ("model.cpu_offloading=true", "model.cpu_offloading_weights=true", "weights stay on the GPU; give false"),
        ("model.moe_aux_loss_coeff=1.0", "model.moe_router_load_balancing_type=none", "give model.moe_aux_loss_coeff="),
    ],
)
def test_what_does_nothing_alone_is_refused_beside_what_it_would_change(beside: str, given: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"^{given}: {right}"):
        experiment.read(tree_of("llava_7b_pretrain", beside, given))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the guide's commands name, at a size that trains here; the tokenizer has no <image>."""
    made = tmp_path_factory.mktemp("guide")
    make_llama(made / "vicuna", vocab_size=300)
    make_clip(made / "clip")
    tokenizer().save_pretrained(made / "tokenizer")
    for file in (made / "tokenizer").glob("*.json"):
        file.write_text(file.read_text().replace("<image>", "<gap>"))
    records = []
    for number in range(6):
        Image.new("RGB", (20 + 4 * number, 30), (40 * number, 90, 200)).save(made / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"{number} red circles."}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    records += [{"id": record["id"] + 6, "conversations": record["conversations"]} for record in deepcopy(records)]
    for record in records[6:]:
        record["conversations"][0]["value"] = "What?"
    (made / "pretrain.json").write_text(json.dumps(records[:6]))
    (made / "finetune.json").write_text(json.dumps(records))
    return made


TINY = {
    "model.mm_cfg.llm.from_pretrained": "vicuna",
    "model.mm_cfg.vision_encoder.from_pretrained": "clip",
    "model.tokenizer.type": "tokenizer",
    "model.data.image_folder": ".",
    "model.mm_cfg.vision_encoder.hidden_size": "40",
    "model.data.image_token_len": "16",
    "model.data.crop_size": "[28,28]",
    "model.data.image_size": "[28,28]",
    "model.encoder_seq_length": "512",
    "model.micro_batch_size": "32",
    "model.tensor_model_parallel_size": "2",
    "trainer.max_steps": "3",
}


def train_tiny(recipe: str, folder: Path) -> Archive:
    """Run the guide's command with tiny files and sizes, as the user does."""
    command = COMMANDS[recipe] | TINY | {"model.data.data_path": f"{recipe.rpartition('_')[2]}.json"}
    here = {"WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", "NEMO_CONFIG": recipe, "OMP_NUM_THREADS": "1"}
    result = run(str(TRAIN), *overrides(command), cwd=folder, **{**ENVIRONMENT, **here})
    assert result.returncode == 0, result.stderr
    name = command["exp_manager.name"]
    rows = (folder / "nemo_experiments" / name / "metrics.csv").read_text().splitlines()
    assert len(rows) == 4
    return Archive(folder / "nemo_experiments" / name / "checkpoints" / f"{name}.nemo")


def test_both_stages_of_the_guide_at_a_tiny_size(folder: Path) -> None:
    """The first trains the projector alone, and its archive holds everything; the second begins with it."""
    first = train_tiny("llava_7b_pretrain", folder)
    given = {"vicuna": "language_model.", "clip": "vision_model."}
    for path, part in given.items():
        reader = open_source(folder / path, path).reader
        assert reader.names() == {name for name in first.names() if name.startswith(part)}
        for name in reader.names():
            old, new = reader.read(name).bfloat16(), first.read(name)
            assert torch.equal(new[: len(old)], old), name
    assert first.config["vocab_size"] == len(first.read(EMBEDDINGS)) == 301  # <image> was added
    assert {name for name in first.names() if "projection" in name} == PROJECTOR
    second = train_tiny("llava_7b_finetune", folder)
    assert second.names() == first.names()
    for name in first.names():
        moved = (second.read(name).float() - first.read(name).float()).abs().max()
        assert (moved == 0) if name.startswith("vision_model.") else moved < 1e-2, name


PROJECTOR = {f"vision_projection.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    "path", ["mm_projector.bin", "hf.safetensors", "ours.safetensors", "nemo1", "llava", "llava.nemo"]
)
def test_a_projector_from_anywhere(path: str, folder: Path) -> None:
    """It comes over what model.restore_from_path brings."""
    expected = projectors(folder)
    tree = tree_of("llava_7b_finetune")["model"] | {"restore_from_path": str(folder / "other")}
    tree["mm_cfg"]["pretrain_mm_mlp_adapter"] = str(folder / path)
    settled, _ = starting.settle(tree, set())
    found = starting.first_weights(typed.read_run({**tree_of("llava_7b_finetune"), "model": settled}, Config))
    assert found["vision_projection"].names() == PROJECTOR
    for name, value in expected.items():
        torch.testing.assert_close(found["vision_projection"].read(name), value)
    assert [str(found[part]) for part in ("language_model", "vision_model")] == 2 * [str(folder / "other")]
    assert str(found["vision_projection"]) != str(folder / "other")


def projectors(folder: Path) -> dict[str, torch.Tensor]:
    """A projector in every form, and a LLaVA with another one; its tensors."""
    if not (folder / "llava").exists():
        make_llava(folder / "llava")
        make_llava(folder / "other")
    source = open_source(folder / "llava", "")
    tensors = {name: source.reader.read(name).clone() for name in sorted(PROJECTOR)}
    if (folder / "llava.nemo").exists():
        return tensors
    archive_of(source, folder / "llava.nemo")
    save_file(tensors, folder / "ours.safetensors")
    named = {
        name: f"multi_modal_projector.linear_{int(name.split('.')[1]) + 1}.{name.split('.')[2]}" for name in tensors
    }
    save_file({named[name]: value for name, value in tensors.items()}, folder / "hf.safetensors")
    numbered = {name: f"model.mm_projector.{2 * int(name.split('.')[1])}.{name.split('.')[2]}" for name in tensors}
    torch.save({numbered[name]: value for name, value in tensors.items()}, folder / "mm_projector.bin")
    (folder / "nemo1").mkdir()
    nemo = {nemo_name(name, legacy=False): value for name, value in tensors.items()}
    torch.save(nemo, folder / "nemo1/model_weights.ckpt")
    mm_cfg = {"llm": {"freeze": True}, "mm_mlp_adapter_type": "mlp2x_gelu"}
    (folder / "nemo1/model_config.yaml").write_text(yaml.safe_dump(nemo_settings(source.model, mm_cfg=mm_cfg)))
    return tensors


def test_a_projector_of_other_widths_is_refused(folder: Path) -> None:
    projectors(folder)
    tree = tree_of("llava_7b_finetune", f"model.mm_cfg.pretrain_mm_mlp_adapter={folder}/mm_projector.bin")["model"]
    with pytest.raises(
        ConfigError, match=r"mm_projector.bin: leads from width 40 to 48, this model's from 1024 to 4096"
    ):
        starting.settle(tree, set())
    save_file({"weight": torch.ones(2)}, folder / "no.safetensors")
    tree["mm_cfg"]["pretrain_mm_mlp_adapter"] = str(folder / "no.safetensors")
    with pytest.raises(ConfigError, match=r"no.safetensors: holds no projector of linear layers, but weight"):
        starting.settle(tree, set())


def test_sizes_that_a_checkpoint_decides_are_not_taken_for_mistakes(folder: Path) -> None:
    """A width that the preset's number of heads does not divide by is right where the tower has other heads."""
    given = ["model.mm_cfg.vision_encoder.hidden_size=40", f"model.mm_cfg.vision_encoder.from_pretrained={folder}/clip"]
    with pytest.raises(ConfigError, match="num_attention_heads=16: hidden_size=40 must divide by it"):
        experiment.read(tree_of("llava_7b_finetune", given[0]))
    model, _ = starting.settle(tree_of("llava_7b_finetune", *given)["model"], {given[0].partition("=")[0]})
    assert model["mm_cfg"]["vision_encoder"]["num_attention_heads"] == 5
    with pytest.raises(ConfigError, match=r"^model.mm_cfg.vision_encoder.hidden_size=1024: .*clip has 40$"):
        starting.settle(tree_of("llava_7b_finetune", given[1])["model"], {given[0].partition("=")[0]})
