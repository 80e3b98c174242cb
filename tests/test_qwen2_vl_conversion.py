"""Qwen2-VL between Hugging Face, our archives, Pai-Megatron-Patch and MindSpeed-MM."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from distributed import run_ranks
from safetensors.torch import load_file, save_file
from test_families import assert_same_run, assert_same_weights, make_layout, run_of, settle, steps_of, whole
from test_megatron import UNVERIFIED, VERIFIED, assert_same, mp_rank, run_script
from tiny_hf import make_clip, make_qwen, make_qwen2_vl

from nemo_vlm.config import DataConfig, ParallelConfig, RunConfig, StartConfig
from nemo_vlm.config.multimodal import LlmConfig
from nemo_vlm.conversion.jobs import export_huggingface, import_huggingface
from nemo_vlm.conversion.megatron import Export, convert
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import safetensors
from nemo_vlm.inference.restore import process_group
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.models.base import family
from nemo_vlm.sources import starting
from nemo_vlm.sources.megatron import open_megatron
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.starting import first_weights
from nemo_vlm.training.build import build_engine
from nemo_vlm.typed import model_tree

LAYERS, GROUPS, TOWER_LAYERS, TOWER_HEADS = 4, 2, 2, 4  # of make_qwen2_vl
PLAN = (0, 0, 1, 2)  # the first layer of each stage, as MindSpeed has it


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_qwen2_vl(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make_qwen2_vl(tmp_path_factory.mktemp("tied") / "hf", tied=True)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def with_names_in_memory(folder: Path, copy: Path) -> Path:
    """As some writers save what transformers holds: everything under `model.`."""
    shutil.copytree(folder, copy)
    renamed = {re.sub(r"^model\.", "model.language_model.", name): value for name, value in tensors(folder).items()}
    renamed = {re.sub(r"^visual\.", "model.visual.", name): value for name, value in renamed.items()}
    save_file(renamed, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("names", ["hub", "in memory"])
@pytest.mark.parametrize("which", ["model", "tied"])
def test_there_and_back_is_bit_equal(which: str, names: str, request, tmp_path: Path, monkeypatch, caplog) -> None:
    """Verified by what both models say of a text, an image and a video; in one file, or in several."""
    caplog.set_level("INFO")
    monkeypatch.setattr(safetensors, "MAX_SHARD_BYTES", 5 * 10**9 if names == "hub" else 50_000)
    original = request.getfixturevalue(which)
    source = original if names == "hub" else with_names_in_memory(original, tmp_path / "renamed")
    run = VERIFIED if names == "hub" else UNVERIFIED
    import_huggingface(open_source(source, "input"), tmp_path / "x.nemo", run)
    export_huggingface(open_source(tmp_path / "x.nemo", "input"), tmp_path / "back", run)
    prompts = [record.args[0] for record in caplog.records if "largest logit difference" in record.msg]
    assert prompts == ["a text prompt", "a prompt with an image", "a prompt with a video"] * (2 if run.verify else 0)
    assert same(tensors(original), tensors(tmp_path / "back"))
    assert (tmp_path / "back/model.safetensors.index.json").exists() == (names != "hub")
    found, expected = config_of(tmp_path / "back"), config_of(original)
    assert {key: found[key] for key in expected if found[key] != expected[key]} == {}
    files = {path.name for path in original.iterdir() if "safetensors" not in path.name}
    assert files <= {path.name for path in (tmp_path / "back").iterdir()}
    made = [
        (transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoImageProcessor.from_pretrained(folder))
        for folder in (tmp_path / "back", original)
    ]
    (tokenizer, images), (their_tokenizer, their_images) = made
    assert tokenizer.chat_template == their_tokenizer.chat_template and "<|video_pad|>" in tokenizer.chat_template
    assert images.to_dict()["size"] == their_images.to_dict()["size"] and type(images) is type(their_images)


def test_a_small_vocabulary_is_assumed_no_tokens_beyond_it() -> None:
    """Of which transformers would warn."""
    made = family("qwen2_vl", "mapping").hf_config(family("qwen2_vl", "tiny").config())
    text = transformers.Qwen2VLConfig.from_dict(made).text_config
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (None, None, None)


def config_of(folder: Path) -> dict:
    """What transformers makes of config.json; without windows, which are not used, and tokens: the tokenizer says."""
    tree = transformers.AutoConfig.from_pretrained(folder).to_dict()
    text, vision = tree.pop("text_config"), tree.pop("vision_config")
    text["rope_parameters"].pop("type", None)  # transformers 4's word
    found = tree | {f"text.{key}": value for key, value in text.items()}
    found |= {f"vision.{key}": value for key, value in vision.items()}
    apart = ("_name_or_path", "max_window_layers", "dtype", "text.bos_token_id", "text.pad_token_id")
    return {key: value for key, value in found.items() if not key.endswith(apart)}


def interleaved(fused: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries, keys and values [3, heads, size, ...] in the order of heads."""
    return fused.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


MINDSPEED = (  # as its converters spell it
    ("visual.merger.mlp.0", "image_encoder.projector.encoder.linear_fc1"),
    ("visual.merger.mlp.2", "image_encoder.projector.encoder.linear_fc2"),
    ("visual.merger.ln_q", "image_encoder.projector.layernorm"),
    ("visual.patch_embed.proj", "image_encoder.encoder.patch_embed.proj"),
    ("visual.blocks", "image_encoder.encoder.blocks.layers"),
    ("attn.proj", "self_attention.linear_proj"),
    ("attn.qkv", "self_attention.linear_qkv"),
    ("mlp.fc", "mlp.linear_fc"),
    ("norm1", "input_layernorm"),
    ("norm2", "pre_mlp_layernorm"),
    ("self_attn.o_proj", "self_attention.linear_proj"),
    ("post_attention_layernorm", "pre_mlp_layernorm"),
    ("mlp.down_proj", "mlp.linear_fc2"),
    ("model.norm.", "decoder.final_layernorm."),
    ("model.embed_tokens", "embedding.word_embeddings"),
    ("model.layers", "decoder.layers"),
    ("lm_head", "output_layer"),
)


def mindspeed(theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole model as MindSpeed-MM's converters make it of Hugging Face's tensors, by hand."""
    left, found = dict(theirs), {}
    for layer in range(LAYERS):
        ours, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [left.pop(f"{hf}self_attn.{part}_proj.{kind}").chunk(GROUPS) for part in "qkv"]
            fused = torch.cat([part for group in zip(*parts, strict=True) for part in group])
            found[f"{ours}self_attention.linear_qkv.{kind}"] = fused
        gate_up = [left.pop(f"{hf}mlp.{part}_proj.weight") for part in ("gate", "up")]
        found[f"{ours}mlp.linear_fc1.weight"] = torch.cat(gate_up)
    for name, tensor in left.items():
        value = interleaved(tensor, TOWER_HEADS) if "attn.qkv" in name else tensor
        for old, new in MINDSPEED:
            name = name.replace(old, new)
        found[name] = value
    return found


# The stage of the embedding where the first has no layer: version 2 builds no language model there.
EMBEDS = {"mindspeed": 0, "mindspeed2": 1}


def split(whole: Mapping[str, torch.Tensor], plan: tuple[int, ...], towers: tuple[int, ...], embeds: int) -> list[dict]:
    """Each stage's part, layers counted from 0; the plans are first layers."""
    last, found = len(plan) - 1, [{} for _ in plan]
    ends = {"decoder.": (plan, (*plan[1:], LAYERS)), "image_encoder.": (towers, (*towers[1:], TOWER_LAYERS))}
    for name, value in whole.items():
        if match := re.fullmatch(r"(image_encoder.|decoder.)(.*layers\.|layers\.)(\d+)(\..*)", name):
            firsts, stops = ends[match[1]]
            number = int(match[3])
            stage = next(n for n, (first, stop) in enumerate(zip(firsts, stops, strict=True)) if first <= number < stop)
            found[stage][f"{match[1]}{match[2]}{number - firsts[stage]}{match[4]}"] = value
        elif name.startswith(("decoder.final", "output_layer")):
            found[last][name] = value
        elif name.startswith("embedding"):
            found[embeds][name] = value
        else:
            tower_end = max(n for n, first in enumerate(towers) if first < (*towers[1:], TOWER_LAYERS)[n])
            found[tower_end if "projector" in name else 0][name] = value
    return found


def save(folder: Path, stages: list[dict], prefix: str, more: Mapping) -> None:
    """`release/mp_rank_00_PPP` with that prefix of the language model's names."""
    for stage, content in enumerate(stages):
        path = folder / f"release/mp_rank_00_{stage:03d}"
        path.mkdir(parents=True)
        named = {name if name.startswith("image") else prefix + name: value.clone() for name, value in content.items()}
        torch.save({"model": named, **more}, path / "model_optim_rng.pt")


def stages_in(folder: Path) -> list[dict]:
    """What each stage's file holds, of the first tensor-parallel rank."""
    files = sorted(folder.glob("mp_rank_00*/model_optim_rng.pt"))
    loaded = [torch.load(file, weights_only=False)["model"] for file in files]
    return [{name: value for name, value in stage.items() if value is not None} for stage in loaded]


@pytest.mark.parametrize("names", ["mindspeed", "mindspeed2"])
def test_mindspeeds_files(names: str, model: Path, tmp_path: Path) -> None:
    """Written as its own converter would, under a plan; and read: with arguments that say nothing, the tower spread."""
    prefix = "text_decoder." if names == "mindspeed2" else ""
    convert(str(model), tmp_path / "ours", UNVERIFIED, mp_rank(1, 4, names=names, num_layer_list=PLAN))
    whole_model = mindspeed(tensors(model))
    expected = split(whole_model, PLAN, (0, TOWER_LAYERS, TOWER_LAYERS, TOWER_LAYERS), EMBEDS[names])
    found = [
        {name.removeprefix(prefix): value for name, value in stage.items()}
        for stage in stages_in(tmp_path / "ours/release")
    ]
    assert all(same(stage, wanted) for stage, wanted in zip(found, expected, strict=True))
    assert [sum("decoder.layers" in name for name in stage) // 7 for stage in found] == [0, 1, 1, 2]

    more = {"args": argparse.Namespace(num_layers=1, norm_epsilon=1e-5)} if prefix else {}
    stages = split(whole_model, (0, 0, 1, 3), (0, 1, TOWER_LAYERS, TOWER_LAYERS), EMBEDS[names])
    save(tmp_path / "theirs", stages, prefix, more)
    (tmp_path / "theirs/_lastest_checkpointed_iteration.txt").write_text("release")  # so spelled
    with pytest.raises(ConfigError, match="does not say all of the model; copy Hugging Face's config.json to"):
        open_megatron(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "back", UNVERIFIED, hf=model)
    assert same(tensors(tmp_path / "back"), tensors(model))


def trained(run: RunConfig, layout: Layout, steps: int):
    """Losses and gradient norms of steps on what the run starts from, and the whole weights after them."""
    groups.initialize(layout, seed=1)
    engine = build_engine(run, layout)
    results = steps_of(engine, run, layout, count=steps)
    final = whole(engine.parts())
    groups.shut_down()
    return results, final


def from_files(folder: Path, **parallel) -> RunConfig:
    config = replace(family("qwen2_vl", "tiny").config(), make_vocab_size_divisible_by=1)  # as Pai has it
    run = run_of("qwen2_vl", config, ParallelConfig(**parallel))
    return settle(replace(run, start=StartConfig(str(folder))))


def of_this_rank(run: RunConfig, layout: Layout) -> dict[str, torch.Tensor]:
    """What Megatron's modules on this rank hold when they have read their parts, flat, under global names."""
    groups.initialize(layout, seed=1)
    parts = build_engine(run, layout).parts()
    groups.shut_down()
    names = dict.fromkeys(part.name for part in parts)
    return {name: torch.cat([part.data.flatten() for part in parts if part.name == name]) for name in names}


def under_plans(plan: RunConfig, pai: RunConfig):
    """Both in the same ranks, whose start takes longest."""
    return trained(plan, make_layout(plan, 4), 2), of_this_rank(pai, make_layout(pai, 4))


def test_plans_of_both_systems_train(model: Path, tmp_path: Path) -> None:
    """MindSpeed's [0, 0, 1, 2]: two steps equal to one process; Pai's 2 x 2 ranks: each reads what its file holds."""
    mm, pai = tmp_path / "mm", tmp_path / "pai"
    convert(str(model), mm, UNVERIFIED, mp_rank(1, 4, names="mindspeed", num_layer_list=PLAN))
    convert(str(model), pai, UNVERIFIED, mp_rank(2, 2, pipeline_layers=(1, 3)))
    plan = from_files(mm, pipeline_model_parallel_size=4, num_layer_list=PLAN)
    halves = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "first_pipeline_num_layers": 1}
    ranks = run_ranks(under_plans, 4, plan, from_files(pai, **halves))

    (results, final), alone = ranks[0][0], from_files(model)
    with process_group(make_layout(alone, 1)):
        expected, expected_weights = trained(alone, make_layout(alone, 1), 2)
    assert_same_run(results, expected)
    assert_same_weights(final, expected_weights)

    variant = family("qwen2_vl", "mapping").MEGATRON_VARIANTS["pai"]
    for rank, (_, held) in enumerate(ranks):
        file = pai / f"release/mp_rank_{rank % 2:02d}_{rank // 2:03d}/model_optim_rng.pt"
        saved = {
            name: value for name, value in torch.load(file, weights_only=False)["model"].items() if value is not None
        }
        first = 1 if rank // 2 else 0  # the stage's first layer
        assert len(saved) == len(held)
        for name, value in held.items():
            front, layer, rest = re.fullmatch(r"(language_model\.decoder\.layers\.|)(\d*)(.*)", name).groups()
            there = f"{front}{int(layer) - first}{rest}" if front else name
            found = saved[variant.name_of(there)].flatten()
            assert torch.equal(found[: len(value)], value) and not found[len(value) :].any(), name  # and padding


def test_what_was_trained_goes_back(tied: Path, tmp_path: Path) -> None:
    """Through every derivative's names and layouts, tied embeddings in pipelines too, to the same bits."""
    exports = [Export(kind, names=names) for kind in ("torch_dist", "mp_rank") for names in ("pai", "mindspeed2")]
    exports += [mp_rank(2, 2, "20", pipeline_layers=(1, 3)), mp_rank(2, 4, "20", "mindspeed", num_layer_list=PLAN)]
    exports += [mp_rank(1, 2, "20", "mindspeed2", pipeline_layers=(0, LAYERS))]
    source = str(tied)
    for number, export in enumerate(exports):
        convert(source, tmp_path / str(number), UNVERIFIED, export)
        source = str(tmp_path / str(number))
    convert(source, tmp_path / "back", UNVERIFIED, iteration="20")
    assert same(tensors(tmp_path / "back"), tensors(tied))


def test_mindspeed_copies_tied_embeddings(tied: Path, tmp_path: Path) -> None:
    """In one stage, too."""
    whole_model = mindspeed(tensors(tied))
    copied = {**whole_model, "output_layer.weight": whole_model["embedding.word_embeddings.weight"]}
    save(tmp_path / "mm", [copied], "text_decoder.", {})
    found = open_megatron(tmp_path / "mm/release", hf_config=tied)
    assert_same(found.reader, open_source(tied, "input").reader)


def test_pai_unties_what_it_splits_over_a_pipeline(tied: Path, tmp_path: Path) -> None:
    """Its converter says so in the arguments and writes a copy, which training can change: then it is no copy."""
    convert(str(tied), tmp_path / "pai", UNVERIFIED, mp_rank(1, 2))
    for stage in (0, 1):
        file = tmp_path / f"pai/release/mp_rank_00_{stage:03d}/model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        content["args"].untie_embeddings_and_output_weights = True
        content["args"].position_embedding_type = "rope"  # M-RoPE all the same
        torch.save(content, file)
    assert_same(open_megatron(tmp_path / "pai").reader, open_source(tied, "input").reader)
    content["model"]["language_model.output_layer.weight"][0, 0] += 1
    torch.save(content, file)
    with pytest.raises(ConfigError, match="ties its embeddings, but 'language_model.output_layer.weight' differs"):
        open_megatron(tmp_path / "pai")


def test_the_script_takes_mindspeeds_words(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    flags = ("--input", model, "--output", tmp_path / "mm", "--format", "mp_rank", "--num-layer-list", "0,0,1,2")
    assert run_script(monkeypatch, capsys, *flags, "--names", "mindspeed", "--no-verify")[0] == 0
    assert sorted(stages_in(tmp_path / "mm/release")[1])[0] == "decoder.layers.0.input_layernorm.weight"
    for more, said in (
        (("--names", "mindspeed3"), "--names=mindspeed3: of a qwen2_vl it must be pai or mindspeed or mindspeed2"),
        (("--pipeline-layers", "0,1,1,2"), "model.num_layer_list=[0, 0, 1, 2]: model.pipeline_layers says the same"),
    ):
        code, message = run_script(monkeypatch, capsys, *flags[:2], "--output", tmp_path / "x", *flags[4:], *more)
        assert (code, message[: len(said)]) == (2, said)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, {"max_pixels": 16, "video_fps": 1.0, "video_max_pixels": 16, "video_min_pixels": 4}),
        ({"max_pixels": 8, "num_frames": 6}, {"video_max_pixels": 16, "video_min_pixels": 4}),
    ],
)
def test_a_run_sees_what_its_weights_saw(given: dict, taken: dict, model: Path, tmp_path: Path) -> None:
    """Where neither the user nor a preset says anything of images and videos; limits in blocks of 28 x 28 pixels."""
    shutil.copytree(model, tmp_path / "hf")
    videos = tmp_path / "hf/video_preprocessor_config.json"
    videos.write_text(json.dumps(json.loads(videos.read_text()) | {"fps": 1}))
    given, taken = ({k: v * 28**2 if "pixels" in k else v for k, v in said.items()} for said in (given, taken))
    run = replace(run_of("qwen2_vl", family("qwen2_vl", "tiny").config()), data=DataConfig(**given))
    tree, decided = starting.settle(model_tree(replace(run, start=StartConfig(str(tmp_path / "hf")))), ())
    assert [line for line in decided if "model.data" in line] == [f"model.data.{k}={v}" for k, v in taken.items()]
    assert tree["data"] == model_tree(run)["data"] | taken


def test_parts_come_from_several_checkpoints(model: Path, tmp_path: Path) -> None:
    """A language model of its own, the tower and the merger of a Qwen2-VL; or what is wrong with that in one line."""
    llm = make_qwen(tmp_path / "llm", hidden_size=64, num_attention_heads=4)
    config = family("qwen2_vl", "tiny").config()

    def started(llm: Path, tower: Path):
        vision = replace(config.mm_cfg.vision_encoder, from_pretrained=str(tower))
        mm = replace(config.mm_cfg, llm=LlmConfig(str(llm)), vision_encoder=vision, pretrain_mm_mlp_adapter=str(model))
        return settle(run_of("qwen2_vl", replace(config, mm_cfg=mm)))

    run = started(llm, model)
    assert (run.model.num_layers, run.model.mrope_section) == (3, (2, 3, 3))
    assert (run.model.mm_cfg.vision_encoder.num_layers, run.tokenizer.type) == (TOWER_LAYERS, str(llm))
    found, theirs = first_weights(run), tensors(model) | tensors(llm)
    assert {name: str(reader) for name, reader in found.items()} == {
        "language_model": str(llm),
        "vision_model": str(model),
        "vision_projection": str(model),
    }
    for part, ours, name in (
        ("language_model", "decoder.final_layernorm.weight", "model.norm.weight"),
        ("vision_model", "conv1.weight", "visual.patch_embed.proj.weight"),
        ("vision_projection", "1.weight", "visual.merger.mlp.2.weight"),
    ):
        assert torch.equal(found[part].read(f"{part}.{ours}"), theirs[name])
    with pytest.raises(ConfigError, match=r"pretrain_mm_mlp_adapter=.*: leads from width 192 to 64, .* 192 to 112"):
        started(make_qwen(tmp_path / "wide"), model)
    with pytest.raises(ConfigError, match=r"from_pretrained=.*: holds a vision_model of the family llava, this"):
        started(llm, make_clip(tmp_path / "clip"))
