"""Every file of conf/ composes, reads, and its model builds on the meta device under several layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from ported import run_of as composed

from nemo_vlm.config.plan import KEYS
from nemo_vlm.door import CONF, store_defaults
from nemo_vlm.inference.settings import EvaluateConfig, GenerateConfig, NevaInferenceConfig
from nemo_vlm.layout import Layout, resolve, stage_layers
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.weights import parts
from nemo_vlm.models.base import family
from nemo_vlm.models.build import build_chunks
from nemo_vlm.planning.memory import hold
from nemo_vlm.typed import read, read_run

GROUPS = ("model", "data", "parallel", "optim", "trainer", "exp_manager")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
BILLIONS = {"llava_7b": 7.06, "llava_13b": 13.35, "llava_llama3_8b": 8.36}


def run_of(*overrides: str):
    store_defaults()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = OmegaConf.to_container(compose("neva_finetune", list(overrides)), resolve=True)
    tree = {key: tree[key] for key in ("trainer", "exp_manager", "model")}
    return read_run(tree, family(tree["model"]["family"], "config").Config)


def settled(run):
    """As after the demo's tokenizer was read."""
    model = replace(run.model, vocab_size=run.model.vocab_size or 400)
    if run.family == "llava":
        model = replace(model, mm_cfg=replace(model.mm_cfg, image_token_index=4))
    return replace(run, model=model)


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=["/".join(choice) for choice in CHOICES])
def test_every_choice_composes(group: str, name: str) -> None:
    run_of(f"{group}={name}")


def test_every_recipe_composes() -> None:
    store_defaults()
    for path in CONF.glob("*.yaml"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            tree = OmegaConf.to_container(compose(path.stem), resolve=True)
        for key in ("debug", "dry_run", *KEYS):
            tree.pop(key, None)
        if "data_path" in tree:
            read(EvaluateConfig, tree, "")
        elif "neva_model_file" in tree:
            read(NevaInferenceConfig, tree | {"neva_model_file": "a model", "prompt_file": "questions"}, "")
        elif "model_path" in tree:
            read(GenerateConfig, tree | {"model_path": "a model", "prompt": "a prompt"}, "")
        elif "model" in tree:
            read_run(tree, family(tree["model"]["family"], "config").Config)


def layout(run, tp: int, pp: int) -> Layout:
    parallel = replace(run.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return Layout(1, tp * pp, tp, pp, tp > 1, stage_layers(run.model.num_layers, parallel), 1, 1, expert_tensor=tp)


# The full-size Qwens are test_presets.py's.
@pytest.mark.parametrize(
    "name", [name for group, name in CHOICES if group == "model" and ("qwen" not in name or "tiny" in name)]
)
def test_every_model_builds_in_parts_that_add_up(name: str) -> None:
    run = settled(run_of(f"model={name}"))
    shapes = {}
    for tp, pp in ((1, 1), (2, 1), (1, 2), (4, 4) if run.model.num_layers > 8 else (2, 2)):
        found, count = {}, {}
        for rank in range(tp * pp):
            with groups.pretend(layout(run, tp, pp), rank):
                (model,) = build_chunks(run, layout(run, tp, pp))
                for part in parts(model, run.model.vocab_size):
                    found[part.name] = part.shape
                    count.setdefault(part.name, {})[tuple((s.start, s.stop) for s in part.slices)] = part.data.numel()
        shapes[tp, pp] = found
        for part_name, shape in found.items():  # the parts of all ranks cover the whole, none twice
            size = 1
            for n in shape:
                size *= n
            assert sum(count[part_name].values()) == size, (part_name, tp, pp)
    assert all(found == shapes[1, 1] for found in shapes.values())
    if name in BILLIONS:
        total = hold(run, layout(run, 1, 1), 0, 0).num_parameters
        assert total / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


@pytest.mark.parametrize(
    ("recipe", "model", "size"),
    [
        ("neva_finetune", "llava_tiny", 8),
        ("neva_finetune", "llava_7b", 1),
        ("neva_finetune", "llava_llama3_8b", 1),
        ("neva_finetune", "llama3_70b", 1),
        ("qwen2_vl_finetune", "qwen2_vl_tiny", 8),
        ("qwen2_vl_finetune", "qwen2_vl_72b", 1),
        ("qwen3_vl_finetune", "qwen3_vl_tiny", 8),
        ("qwen3_vl_finetune", "qwen3_vl_235b_a22b", 1),
    ],
)
def test_a_recipes_batch_divides_whatever_its_model(recipe: str, model: str, size: int) -> None:
    """Of the demo 8 samples at once; of a large model one, so that 32 replicas share the batch of 32."""
    large = size == 1
    cluster = ["parallel=tp8_pp4", "trainer.num_nodes=128", "trainer.devices=8"] if large else []
    run = composed(recipe, [f"model={model}", *cluster])
    layout = resolve(run, 0, {})
    assert (layout.micro_batch_size, layout.global_batch_size, layout.data) == (size, 32, 32 if large else 1)
