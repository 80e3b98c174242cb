"""Qwen3-VL, dense and with experts, between Hugging Face, our archives and Megatron's directories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from distributed import run_ranks
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import load_file
from test_families import TINY, build_all, make_layout, run_of, settle, sharded
from test_megatron import UNVERIFIED, VERIFIED, assert_same, mp_rank
from tiny_hf import make_qwen, make_qwen3_vl

from nemo_vlm.config import StartConfig
from nemo_vlm.config.multimodal import LlmConfig
from nemo_vlm.conversion.convert import Target
from nemo_vlm.conversion.jobs import export_huggingface, import_huggingface
from nemo_vlm.conversion.megatron import Export, convert, to_megatron
from nemo_vlm.conversion.settings import merged
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import InMemory
from nemo_vlm.formats.stacked import single_layers
from nemo_vlm.formats.store import Folder
from nemo_vlm.formats.torch_dist import TorchDist
from nemo_vlm.mapping import Ours
from nemo_vlm.mcore import groups
from nemo_vlm.models.base import family
from nemo_vlm.sources import starting
from nemo_vlm.sources.huggingface import as_in_file
from nemo_vlm.sources.megatron import open_megatron
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source
from nemo_vlm.sources.starting import first_weights
from nemo_vlm.training.build import build_engine
from nemo_vlm.typed import model_tree, plain

MODEL, MAPPING = TINY["qwen3_vl"], family("qwen3_vl", "mapping")
FFN = 40  # of each expert of make_qwen3_vl


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return make_qwen3_vl(tmp_path_factory.mktemp("moe") / "hf", moe=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make_qwen3_vl(tmp_path_factory.mktemp("tied") / "hf", tied=True)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def source_of(config=MODEL) -> Source:
    """A model of random tensors."""
    draw, rules = torch.Generator().manual_seed(1), MAPPING.rules(config)
    tensors = {rule.ours: torch.randn(rule.shape, generator=draw) for rule in rules}
    return Source(Path("tiny"), {"family": "qwen3_vl", **plain(config)}, InMemory(tensors, "tiny"))


@pytest.mark.parametrize("which", ["moe", "tied"])
def test_there_and_back_is_bit_equal(which: str, request, tmp_path: Path, caplog) -> None:
    """Verified by what both models say of a text, an image and a video; tokenizer and processor come along."""
    caplog.set_level("INFO")
    original = request.getfixturevalue(which)
    import_huggingface(open_source(original, "input"), tmp_path / "x.nemo", UNVERIFIED)
    export_huggingface(open_source(tmp_path / "x.nemo", "input"), tmp_path / "back", VERIFIED)
    prompts = [record.args[0] for record in caplog.records if "largest logit difference" in record.msg]
    assert prompts == ["a text prompt", "a prompt with an image", "a prompt with a video"]
    assert same(tensors(original), tensors(tmp_path / "back"))
    assert config_of(tmp_path / "back") == config_of(original)
    files = {path.name for path in original.iterdir()}
    assert files <= {path.name for path in (tmp_path / "back").iterdir()}
    template = transformers.AutoTokenizer.from_pretrained(tmp_path / "back").chat_template
    assert template == transformers.AutoTokenizer.from_pretrained(original).chat_template


def config_of(folder: Path) -> dict:
    """What transformers makes of config.json, but for who wrote it, and tokens: the tokenizer says."""
    tree = transformers.AutoConfig.from_pretrained(folder).to_dict()
    parts = {part: tree.pop(part) for part in ("text_config", "vision_config")}
    found = tree | {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    apart = (
        "_name_or_path",
        "dtype",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "norm_topk_prob",
    )
    tied = {"tied": tree["tie_word_embeddings"]}
    return tied | {key: value for key, value in found.items() if not key.endswith(apart) and value is not None}


def test_whole_tensors_by_hand(moe: Path) -> None:
    theirs, ours = tensors(moe), open_source(moe, "input").reader
    front, hf = "language_model.decoder.layers.2.", "model.language_model.layers.2."
    joint = f"{front}mlp.experts.experts.linear_fc1.weight"
    gate, up = theirs[f"{hf}mlp.experts.gate_up_proj"][3].chunk(2, dim=-1)  # as transformers 4.57 multiplies by them
    assert torch.equal(ours.read(joint)[3], torch.cat([gate.T, up.T]))
    one = (slice(1, 2), slice(3, 9), slice(0, 5))
    assert torch.equal(ours.read(joint, one), ours.read(joint)[one])
    assert torch.equal(ours.read(f"{front}mlp.router.weight"), theirs[f"{hf}mlp.gate.weight"])
    assert torch.equal(ours.read(f"{front}pre_mlp_layernorm.weight"), theirs[f"{hf}post_attention_layernorm.weight"])
    merger = "model.visual.deepstack_merger_list.2."
    assert torch.equal(ours.read("vision_projection.deepstack.2.1.bias"), theirs[f"{merger}linear_fc2.bias"])
    assert torch.equal(ours.read("vision_model.position_embeddings.weight"), theirs["model.visual.pos_embed.weight"])


def test_what_transformers_5_saves_is_the_same_model(moe: Path, tmp_path: Path, caplog) -> None:
    """Whose experts have other axes; and it goes out as on the hub."""
    make_qwen3_vl(tmp_path / "five", moe=True, on_hub=False)
    assert tensors(tmp_path / "five")["model.language_model.layers.0.mlp.experts.down_proj"].shape == (4, 64, FFN)
    assert_same(open_source(tmp_path / "five", "input").reader, open_source(moe, "input").reader)
    export_huggingface(open_source(tmp_path / "five", "input"), tmp_path / "out", UNVERIFIED)
    assert same(tensors(moe), tensors(tmp_path / "out"))
    assert "the wrong way round" not in caplog.text


SQUARES = {"gate_up": 32, "down": 64}  # FFN sizes that make one of the two tensors square, at 64 hidden


@pytest.mark.parametrize("ffn", [FFN, *SQUARES.values()])
def test_the_layout_of_experts_is_told_by_all_shapes(ffn: int) -> None:
    """Where one of the two is square, by the other; a mixture is none."""
    config = replace(MODEL, hidden_size=64, moe_ffn_hidden_size=ffn)
    source, rules = source_of(config), MAPPING.rules(config)
    hub = {name: rule.split(source.reader, name, ()) for rule in rules for name in rule.theirs}
    experts = [name for name in hub if ".mlp.experts." in name]
    five = hub | {name: hub[name].mT for name in experts}
    for layout in (hub, five):
        assert_same(Ours(as_in_file(rules, InMemory(layout)), InMemory(layout)), source.reader)
    down = max(name for name in experts if hub[name].shape[-1] != hub[name].shape[-2])
    with pytest.raises(ConfigError, match=r"one: the tensor '.*' is laid out as on the hub, '.*' as transformers 5"):
        as_in_file(rules, InMemory(hub | {down: five[down]}, "one"))


@pytest.mark.parametrize("which", SQUARES)
def test_square_experts_go_out_with_a_warning(which: str, tmp_path: Path, caplog) -> None:
    """Which is deserved: transformers 5 takes them for its own. Read here, they are what they were."""
    theirs = make_qwen3_vl(tmp_path / "hf", moe=True, moe_intermediate_size=SQUARES[which])
    import_huggingface(open_source(theirs, "input"), tmp_path / "x.nemo", VERIFIED)
    assert "the models are not run to compare them: transformers 5, which tells layouts by shape" in caplog.text
    caplog.clear()
    export_huggingface(open_source(tmp_path / "x.nemo", "input"), tmp_path / "back", UNVERIFIED)
    assert f"reads square experts ('model.language_model.layers.0.mlp.experts.{which}_proj')" in caplog.text
    assert same(tensors(theirs), tensors(tmp_path / "back"))
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "back")
    right = open_source(tmp_path / "back", "input").reader
    layer = model.model.language_model.layers[0].mlp.experts
    for name, module in (("gate_up", "linear_fc1"), ("down", "linear_fc2")):
        wanted = right.read(f"language_model.decoder.layers.0.mlp.experts.experts.{module}.weight")
        assert torch.equal(getattr(layer, f"{name}_proj"), wanted) == (name != which)


def test_configurations_that_are_not_built_are_refused(moe: Path, tmp_path: Path) -> None:
    shutil.copytree(moe, tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    tree = json.loads(file.read_text())
    for key, value in {"decoder_sparse_step": 2, "mlp_only_layers": [0], "norm_topk_prob": False}.items():
        file.write_text(json.dumps(tree | {"text_config": tree["text_config"] | {key: value}}))
        with pytest.raises(ConfigError, match=rf"{key}={re_of(value)} is not supported, only"):
            open_source(tmp_path / "hf", "input")


def re_of(value) -> str:
    return str(value).replace("[", r"\[").replace("]", r"\]")


def language_of(source: Source) -> dict[str, torch.Tensor]:
    return {name: source.reader.read(name) for name in source.reader.names() if name.startswith("language_model.")}


def by_megatron(run, layouts: dict[str, list | int], read: dict, written: Path, full: dict) -> list[str]:
    """dist_checkpointing.load of our directories, and save, under each layout; what was read wrongly on this rank."""
    filesystem_async._process_memory = int  # it only logs the number, and needs psutil for that
    wrong = []
    for name, frequency in layouts.items():
        where, _ = sharded(run, name)
        layout = make_layout(where, torch.distributed.get_world_size())
        groups.initialize(layout, seed=1)
        (model,), parts = build_all(where, layout)
        language, mine = model.language_model, [part for part in parts if part.name in full]
        language.decoder.config.moe_layer_freq = frequency  # a list: Megatron numbers the layers' tensors
        for part in mine:
            part.data.zero_()
        state = dist_checkpointing.load(language.sharded_state_dict(prefix="language_model."), str(read[name]))
        language.load_state_dict({key.removeprefix("language_model."): state[key] for key in state if "." in key})
        wrong += [f"{name}: {part.name}" for part in mine if not torch.equal(part.data, full[part.name][part.slices])]
        (written / name).mkdir(exist_ok=True)
        dist_checkpointing.save(language.sharded_state_dict(prefix="language_model."), str(written / name))
        groups.shut_down()
    return wrong


def from_hub(run, layouts: list[str], full: dict) -> list[str]:
    """What the engine starts from otherwise than Hugging Face's directory has it, on this rank."""
    wrong = []
    for name in layouts:
        where, _ = sharded(run, name)
        layout = make_layout(where, torch.distributed.get_world_size())
        groups.initialize(layout, seed=1)
        parts = build_engine(where, layout).parts()
        wrong += [f"{name}: {part.name}" for part in parts if not torch.equal(part.data, full[part.name][part.slices])]
        groups.shut_down()
    return wrong


def both(megatrons: tuple, hubs: tuple) -> list[str]:
    """In the same ranks, whose start takes longest."""
    return by_megatron(*megatrons) + from_hub(*hubs)


def test_megatron_reads_what_is_written_here_and_the_other_way_round(moe: Path, tmp_path: Path) -> None:
    """torch_dist under tensor, pipeline and expert parallelism, layers stacked or, as Pai's, with their numbers.

    And Hugging Face's directory, whose experts are read turned, and only those of a rank.
    """
    source = source_of()
    for names in ("pai", "megatron"):
        to_megatron(source, Target(tmp_path / names), Export("torch_dist", names=names))
        assert_same(open_megatron(tmp_path / names).reader, source.reader)
    listed = [1] * MODEL.num_layers
    layouts = {"tp2": 1, "pp2": listed, "tp2_ep2": 1, "ep2": listed, "etp2": 1}
    read = {name: tmp_path / ("megatron" if freq == 1 else "pai") / "release" for name, freq in layouts.items()}
    full = language_of(source)
    started = settle(replace(run_of("qwen3_vl", MODEL), start=StartConfig(str(moe))))
    hub = open_source(moe, "input").reader
    hubs = (started, ["tp2_ep2", "etp2", "ep2"], {name: hub.read(name) for name in hub.names()})
    megatrons = (run_of("qwen3_vl", MODEL), layouts, read, tmp_path, full)
    assert run_ranks(both, 2, megatrons, hubs) == [[]] * 2
    for name, frequency in layouts.items():
        kept = TorchDist(Folder(tmp_path / name))
        number = "" if frequency == 1 else "0."
        assert f"language_model.decoder.layers.{number}mlp.experts.experts.linear_fc1.weight" in kept.names()
        reader = single_layers(kept)
        assert reader.names() == full.keys()
        assert all(torch.equal(reader.read(key)[: len(value)], value) for key, value in full.items())


PAI = {  # as Pai-Megatron-Patch's Qwen3VLModel calls a dense or a MoE model's modules
    "vision_model.conv1.bias": "vision_model.patch_embed.proj.bias",
    "vision_model.position_embeddings.weight": "vision_model.pos_embed.weight",
    "vision_model.layers.1.mlp.linear_fc1.weight": "vision_model.decoder.layers.1.mlp.linear_fc1.weight",
    "vision_projection.merger.norm.weight": "vision_model.decoder.final_layernorm.weight",
    "vision_projection.merger.1.weight": "vision_model.projection.encoder.linear_fc2.weight",
    "vision_projection.deepstack.2.norm.bias": "vision_model.decoder.deepstack_norm_list.2.bias",
    "vision_projection.deepstack.0.0.weight": "vision_model.decoder.deepstack_merger_list.0.encoder.linear_fc1.weight",
}


def test_files_of_ranks(tmp_path: Path) -> None:
    """Every expert a tensor of its own, gate and up of each split apart; as Megatron's sequential experts, too."""
    source = source_of()
    to_megatron(source, Target(tmp_path / "out"), mp_rank(2, 2))
    assert_same(open_megatron(tmp_path / "out").reader, source.reader)
    files = sorted((tmp_path / "out/release").glob("*/model_optim_rng.pt"))
    stages = [torch.load(file, weights_only=False)["model"] for file in files]  # mp_rank_TT_PPP
    front = "language_model.decoder.layers."
    whole = source.reader.read(f"{front}3.mlp.experts.experts.linear_fc1.weight")
    gate, up = whole[2].chunk(2)
    part = torch.cat([gate.chunk(2)[1], up.chunk(2)[1]])  # of the second tensor-parallel rank
    assert torch.equal(stages[3][f"{front}1.mlp.experts.linear_fc1.weight2"], part)
    assert f"{front}1.mlp.experts.linear_fc1._extra_state" in stages[3]
    for ours, theirs in PAI.items():
        first = tuple(slice(0, size) for size in stages[0][theirs].shape)  # of the first tensor-parallel rank
        assert torch.equal(stages[0][theirs], source.reader.read(ours, first)), ours
    for file in files:
        content = torch.load(file, weights_only=False)
        content["model"] = {sequential(name): value for name, value in content["model"].items()}
        torch.save(content, file)
    assert any("local_experts.3.linear_fc2.weight" in name for name in content["model"])
    assert_same(open_megatron(tmp_path / "out").reader, source.reader)
    files[0].parent.rename(files[0].parent.with_name("mp_rank_00_000_000"))
    with pytest.raises(ConfigError, match="files of expert-parallel ranks are not read; save as torch_dist"):
        open_megatron(tmp_path / "out")


def sequential(name: str) -> str:
    """SequentialMLP's name of a grouped expert's weight."""
    front, found, last = name.partition(".mlp.experts.linear_fc")
    module, _, expert = last.partition(".weight")
    return f"{front}.mlp.experts.local_experts.{expert}.linear_fc{module}.weight" if found and expert else name


def test_arguments_tell_of_experts(tmp_path: Path) -> None:
    """Of a language model, whose directory needs no config.json; what is not built is refused."""
    config = replace(TINY["gpt"], num_moe_experts=4, moe_ffn_hidden_size=40, moe_aux_loss_coeff=0.01, qk_layernorm=True)
    draw = torch.Generator().manual_seed(1)
    drawn = {rule.ours: torch.randn(rule.shape, generator=draw) for rule in family("gpt", "mapping").rules(config)}
    source = Source(Path("gpt"), {"family": "gpt", **plain(config)}, InMemory(drawn, "gpt"))
    to_megatron(source, Target(tmp_path / "out"), Export("torch_dist"))
    (tmp_path / "out/config.json").rename(tmp_path / "config.json")
    found = open_megatron(tmp_path / "out")
    assert found.model == config
    assert_same(found.reader, source.reader)
    file = tmp_path / "out/release/common.pt"
    common = torch.load(file, weights_only=False)
    for name, value, hf in (
        ("moe_router_score_function", "sigmoid", None),
        ("moe_layer_freq", [0, 1, 1, 1], None),
        ("moe_router_topk", 4, tmp_path),
        ("num_experts", 8, tmp_path),
    ):
        changed = type(common["args"])(**{**vars(common["args"]), name: value})
        torch.save({**common, "args": changed}, file)
        with pytest.raises(ConfigError, match=rf"{name}={re_of(value)}"):
            open_megatron(tmp_path / "out", hf_config=hf)


def test_a_dense_start_ends_the_presets_experts(tied: Path) -> None:
    """And the auxiliary loss with them, unless it was set by hand."""
    run = replace(run_of("qwen3_vl", replace(MODEL, moe_aux_loss_coeff=0.01)), start=StartConfig(str(tied)))
    tree, decided = starting.settle(model_tree(run), ())
    assert (tree["num_moe_experts"], tree["moe_aux_loss_coeff"]) == (None, 0.0)
    assert "model.moe_aux_loss_coeff=0.0 (not 0.01)" in decided
    assert settle(run).model.num_moe_experts is None
    with pytest.raises(ConfigError, match="model.num_moe_experts=null: give .* model.moe_aux_loss_coeff=0.0 with it"):
        settle(run, ["model.moe_aux_loss_coeff"])


def test_a_text_only_qwen3_moe_starts_the_language_model(tmp_path: Path, moe: Path) -> None:
    """Each expert of which is three tensors; and goes back into them, verified by its logits."""
    settings = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True)
    text = make_qwen(tmp_path / "text", "qwen3_moe", hidden_size=64, head_dim=32, **settings)
    import_huggingface(open_source(text, "input"), tmp_path / "x.nemo", UNVERIFIED)
    export_huggingface(open_source(tmp_path / "x.nemo", "input"), tmp_path / "back", VERIFIED)
    assert same(tensors(text), tensors(tmp_path / "back"))
    config = replace(MODEL, mm_cfg=replace(MODEL.mm_cfg, llm=LlmConfig(from_pretrained=str(text))))
    run = settle(run_of("qwen3_vl", config))
    assert (run.model.num_moe_experts, run.model.moe_ffn_hidden_size, run.model.num_layers) == (4, 40, 3)
    started = first_weights(run)["language_model"]
    expected = tensors(text)["model.layers.1.mlp.experts.2.down_proj.weight"]
    joint = started.read("language_model.decoder.layers.1.mlp.experts.experts.linear_fc2.weight")
    assert torch.equal(joint[2], expected)


def test_megatrons_directories_of_huggingfaces(moe: Path, tied: Path, tmp_path: Path) -> None:
    """By the script's own function: tied embeddings over a pipeline, and experts, back to the same bits."""
    for original, export in ((moe, Export("torch_dist")), (tied, mp_rank(2, 2, pipeline_layers=(1, 3)))):
        there, back = tmp_path / f"{original.parent.name}_there", tmp_path / f"{original.parent.name}_back"
        convert(str(original), there, UNVERIFIED, export)
        convert(str(there), back, UNVERIFIED)
        assert same(tensors(original), tensors(back))
        assert (back / "preprocessor_config.json").is_file() and (there / "video_preprocessor_config.json").is_file()


def test_megatrons_directories_say_how_images_are_seen(moe: Path, tmp_path: Path) -> None:
    """As the archive that they are made of, whose run saw other sizes and times; in the files of Hugging Face's."""
    limits = {"min_pixels": 1, "max_pixels": 9, "video_total_min_pixels": 2, "video_total_pixels": 40}  # 32 x 32 each
    seen = {name: count * 32**2 for name, count in limits.items()} | {"video_fps": 0.5, "video_max_frames": 12}
    hub = open_source(moe, "input")
    trained = replace(hub, tree=merged(hub.tree, {"data": seen}))
    import_huggingface(trained, tmp_path / "x.nemo", UNVERIFIED)
    export_huggingface(open_source(tmp_path / "x.nemo", "input"), tmp_path / "hf", UNVERIFIED)
    beside = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir() if path.name != "model.safetensors"}
    assert beside.keys() >= {"preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja"}
    for name, export in {"dist": Export("torch_dist"), "ranks": mp_rank(2), "again": Export("torch_dist")}.items():
        convert(str(tmp_path / ("x.nemo" if name != "again" else "ranks")), tmp_path / name, UNVERIFIED, export)
        assert open_source(tmp_path / name, "input").settings["data"] == trained.settings["data"]
        assert {file: (tmp_path / name / file).read_bytes() for file in beside} == beside
