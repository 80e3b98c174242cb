"""Megatron's directories and NeMo 1.x's archives: written, opened, converted, and refused where they are not right."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import re
import runpy
import shutil
import sys
import tarfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from test_families import TINY, biased, odd, qwen2, qwen3, tied
from test_formats import BOMBS

from nemo_vlm.archive import Archive
from nemo_vlm.config import ParallelConfig
from nemo_vlm.conversion.convert import Target, to_nemo
from nemo_vlm.conversion.jobs import Run
from nemo_vlm.conversion.megatron import Export, convert, to_megatron
from nemo_vlm.conversion.verify import same_bits
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import torch_dist_writer
from nemo_vlm.formats.reader import InMemory, chosen
from nemo_vlm.mapping import Theirs
from nemo_vlm.models.base import family
from nemo_vlm.script import run_command
from nemo_vlm.sources.megatron import open_megatron
from nemo_vlm.sources.nemo1 import open_nemo1
from nemo_vlm.sources.nemo1_settings import image_size
from nemo_vlm.sources.source import Source
from nemo_vlm.typed import plain

UNVERIFIED, VERIFIED = Run("auto", "cpu", False), Run("auto", "cpu", True)
SCRIPT = Path(__file__).parents[1] / "scripts/convert_megatron.py"
MODELS = {
    "gpt": ("gpt", TINY["gpt"]),
    "gpt_tied": ("gpt", tied(TINY["gpt"])),
    "gpt_biased": ("gpt", biased(TINY["gpt"])),
    "gpt_qwen2": ("gpt", qwen2(TINY["gpt"])),
    "gpt_qwen3": ("gpt", qwen3(TINY["gpt"])),
    "llava": ("llava", TINY["llava"]),
    "llava_odd": ("llava", odd(TINY["llava"])),
}


def mp_rank(tensor: int, pipeline: int = 1, iteration: str = "release", names: str | None = None, **plan) -> Export:
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    return Export("mp_rank", ParallelConfig(**sizes, **plan), iteration, names)


EXPORTS = {
    "torch_dist": Export("torch_dist"),
    "tp2_pp2": mp_rank(2, 2, "20", pipeline_layers=(1, 3)),
    "pp3": mp_rank(1, 3),
    "pp2_empty": mp_rank(1, 2, pipeline_layers=(0, 4)),
    "tp2": mp_rank(2),
}


def source_of(model: str) -> Source:
    """A model of random tensors."""
    name, config = MODELS[model]
    draw = torch.Generator().manual_seed(1)
    rules = family(name, "mapping").rules(config)
    tensors = {rule.ours: torch.randn(rule.shape, generator=draw).to(torch.bfloat16) for rule in rules}
    return Source(Path(model), {"family": name, **plain(config)}, InMemory(tensors, model))


def assert_same(found, expected) -> None:
    assert found.names() == expected.names()
    assert all(same_bits(found.read(name), expected.read(name)) for name in expected.names())


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("model", ["gpt", "gpt_tied", "gpt_biased", "gpt_qwen2", "gpt_qwen3", "llava"])
def test_exported_and_imported(model: str, export: str, tmp_path: Path) -> None:
    source = source_of(model)
    to_megatron(source, Target(tmp_path / "out"), EXPORTS[export])
    found = open_megatron(tmp_path / "out")
    assert_same(found.reader, source.reader)
    assert (found.family, found.model.num_layers) == (source.family, source.model.num_layers)
    iteration = "iter_0000020" if export == "tp2_pp2" else "release"
    assert_same(open_megatron(tmp_path / "out" / iteration).reader, source.reader)
    name = "language_model.embedding.word_embeddings.weight"
    rows = slice(30, 41)
    assert same_bits(found.reader.read(name, (rows, slice(3, 7))), source.reader.read(name)[rows, 3:7])


def test_without_a_config_json_megatrons_arguments_are_read(tmp_path: Path) -> None:
    for model, export in (("gpt_biased", "torch_dist"), ("gpt_qwen2", "tp2_pp2"), ("gpt_qwen3", "torch_dist")):
        source, out = source_of(model), tmp_path / model
        to_megatron(source, Target(out), EXPORTS[export])
        (out / "config.json").rename(tmp_path / "config.json")
        found = open_megatron(out)
        assert found.model == source.model
        assert_same(found.reader, source.reader)
        assert open_megatron(out, hf_config=tmp_path).model.num_layers == 4


def test_names_with_a_language_models_prefix_are_read(tmp_path: Path) -> None:
    """As a derivative of Megatron-LM writes them that trains language models inside multimodal ones."""
    source = source_of("gpt_qwen3")
    (tmp_path / "release").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    (tmp_path / "config.json").write_text(json.dumps(family("gpt", "mapping").hf_config(source.model)))
    torch_dist_writer.write(tmp_path / "release", source.reader, {}, ("language_model.decoder.layers.",))
    found = open_megatron(tmp_path)
    assert_same(found.reader, source.reader)
    assert found.model.qk_layernorm


def test_what_does_not_divide_is_said(tmp_path: Path) -> None:
    for export, message in (
        (mp_rank(2), r"model.mm_cfg.vision_encoder.num_attention_heads=5 must divide by it"),
        (mp_rank(1, 2, pipeline_layers=(1, 1)), r"model.pipeline_layers=\[1, 1\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            to_megatron(source_of("llava_odd"), Target(tmp_path / "out"), export)
    assert not list(tmp_path.iterdir())


def run_script(monkeypatch, capsys, *flags: object) -> tuple[int, str]:
    """Exit code and stderr of scripts/convert_megatron.py."""
    monkeypatch.setattr(sys, "argv", ["convert_megatron.py", *map(str, flags)])
    main = runpy.run_path(str(SCRIPT))["main"]
    try:
        run_command(main)
    except SystemExit as end:
        return int(end.code), capsys.readouterr().err.strip()
    return 0, ""


def test_the_script_goes_both_ways(tmp_path: Path, monkeypatch, capsys) -> None:
    source, first = source_of("llava"), tmp_path / "first"
    source.tree["data"] = {"image_aspect_ratio": "pad"}
    to_megatron(source, Target(first), EXPORTS["tp2_pp2"])
    flags = ("--format", "mp_rank", "--tensor-model-parallel-size", 2, "--pipeline-layers", "3,1", "--iteration", "20")
    assert run_script(monkeypatch, capsys, "--input", first, "--output", tmp_path / "second", *flags) == (0, "")
    assert sorted(path.name for path in (tmp_path / "second/iter_0000020").iterdir())[-1] == "mp_rank_01_001"
    assert_same(open_megatron(tmp_path / "second").reader, source.reader)
    assert run_script(monkeypatch, capsys, "--input", tmp_path / "second", "--output", tmp_path / "a.nemo") == (0, "")
    assert_same(Archive(tmp_path / "a.nemo"), source.reader)
    flags = ("--output", tmp_path / "third", "--format", "torch_dist", "--precision", "fp32")
    assert run_script(monkeypatch, capsys, "--input", tmp_path / "a.nemo", *flags)[0] == 0
    assert open_megatron(tmp_path / "third").settings["data"].image_aspect_ratio == "pad"
    third = open_megatron(tmp_path / "third").reader
    assert all(torch.equal(third.read(name), source.reader.read(name).float()) for name in source.reader.names())
    code, said = run_script(monkeypatch, capsys, "--input", first, "--output", first, "--format", "torch_dist")
    assert code == 2 and said == f"{first}: is the source itself; give another name for the output"
    source.tree["data"] = {"image_aspect_ratio": "keep"}  # which no file beside the weights could say
    with pytest.raises(ConfigError, match="image_aspect_ratio=keep: Hugging Face's LlavaProcessor cannot"):
        to_megatron(source, Target(tmp_path / "fourth"), EXPORTS["torch_dist"])
    assert not (tmp_path / "fourth").exists()


def bomb(folder: Path, export: str) -> None:
    """One file of a directory that itself converts becomes a bomb."""
    file = next(folder.rglob(".metadata" if export == "torch_dist" else "model_optim_rng.pt"))
    if export == "torch_dist":
        file.write_bytes(pickle.dumps(BOMBS["system"]))
    else:
        content = torch.load(file, weights_only=False)
        torch.save(content | {"args": BOMBS["eval"]}, file)


def cut_short(folder: Path, export: str) -> None:
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def rank_missing(folder: Path, export: str) -> None:
    shutil.rmtree(next(folder.rglob("mp_rank_01_000"), None) or next(folder.rglob("release")))


def other_shape(folder: Path, export: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def fewer_layers(folder: Path, export: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def unknown(folder: Path, export: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))


def tracker(folder: Path, export: str) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("../../x")


DAMAGES = {
    bomb: r"its pickle names (posix.system|builtins.eval): refused, nothing of it was executed",
    cut_short: r"cut short",
    rank_missing: r"is missing; there are|holds no checkpoint",
    other_shape: r"arguments say ffn_hidden_size=96, but .*config.json means 64; one of them is of another model",
    fewer_layers: r"arguments say num_layers=4, but .*config.json means 3; one of them is of another model",
    unknown: r"model_type=mamba is not known here; there are",
    tracker: r"names the iteration '../../x', must be a number or release",
}


@pytest.mark.parametrize("export", ["torch_dist", "tp2_pp2"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_directory_is_refused(damage, export: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Made from one that itself converts: one line, exit code 2, nothing written, nothing executed."""
    monkeypatch.chdir(tmp_path)
    to_megatron(source_of("gpt"), Target(tmp_path / "in"), EXPORTS[export])
    convert(str(tmp_path / "in"), tmp_path / "good.nemo", UNVERIFIED)
    damage(tmp_path / "in", export)
    before = sorted(tmp_path.iterdir())
    code, said = run_script(monkeypatch, capsys, "--input", tmp_path / "in", "--output", tmp_path / "out.nemo")
    assert code == 2 and len(said.splitlines()) == 1
    with pytest.raises(ConfigError, match=DAMAGES[damage]):
        raise ConfigError(said)
    assert sorted(tmp_path.iterdir()) == before


def test_arguments_that_are_not_built_are_refused(tmp_path: Path) -> None:
    """Beside a config.json, too."""
    to_megatron(source_of("gpt"), Target(tmp_path / "in"), EXPORTS["torch_dist"])
    file = tmp_path / "in/release/common.pt"
    common = torch.load(file, weights_only=False)
    for name, value in {
        "rotary_interleaved": True,
        "apply_layernorm_1p": True,
        "multi_latent_attention": True,
        "window_size": (128, 0),
    }.items():
        args = argparse.Namespace(**{**vars(common["args"]), name: value})
        torch.save({**common, "args": args}, file)
        with pytest.raises(ConfigError, match=rf"release: its arguments {name}=.* are not supported, only {name}="):
            open_megatron(tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "value", "theirs"),
    [
        ("hidden_size", 64, 48),
        ("num_layers", 5, 4),
        ("num_attention_heads", 2, 4),
        ("num_query_groups", 1, 2),
        ("ffn_hidden_size", 95, 96),
        ("rotary_base", 500000, 10000.0),
        ("untie_embeddings_and_output_weights", False, True),
        ("qk_layernorm", True, False),
    ],
)
def test_arguments_that_contradict_config_json_are_refused(name: str, value, theirs, tmp_path: Path) -> None:
    to_megatron(source_of("gpt"), Target(tmp_path / "in"), EXPORTS["torch_dist"])
    file = tmp_path / "in/release/common.pt"
    common = torch.load(file, weights_only=False)
    assert vars(common["args"])[name] == theirs
    torch.save({**common, "args": argparse.Namespace(**{**vars(common["args"]), name: value})}, file)
    with pytest.raises(ConfigError, match=rf"say {name}={value}, but .*config.json means {theirs}; one of them"):
        open_megatron(tmp_path / "in")


def test_of_two_epsilons_config_jsons_is_taken(tmp_path: Path, caplog) -> None:
    """As Pai-Megatron-Patch takes it back from its 72B, which it trains with another than the hub's."""
    to_megatron(source_of("gpt"), Target(tmp_path / "in"), EXPORTS["tp2"])
    for file in tmp_path.rglob("model_optim_rng.pt"):
        content = torch.load(file, weights_only=False)
        content["args"].norm_epsilon = 1e-6
        torch.save(content, file)
    assert open_megatron(tmp_path / "in").model.layernorm_epsilon == 1e-5
    assert re.search(r"arguments say norm_epsilon=1e-06, but .*config.json means 1e-05, which is taken", caplog.text)


def test_rows_that_cannot_be_padding_are_refused(tmp_path: Path) -> None:
    """By what the arguments pad to, else by what is usual."""
    source = source_of("gpt")
    to_megatron(source, Target(tmp_path / "in"), EXPORTS["torch_dist"])
    file, rows = tmp_path / "in/release/common.pt", source.model.vocab_size
    args = {**vars(torch.load(file, weights_only=False)["args"]), "make_vocab_size_divisible_by": 8}
    tensors = {name.removeprefix("language_model."): source.reader.read(name) for name in source.reader.names()}
    for surplus, known, limit in ((1024, {}, 1024), (16, {"tensor_model_parallel_size": 2}, 16)):
        for count, fits in ((surplus - 1, True), (surplus, False)):
            padded = dict(tensors)
            for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                padded[name] = torch.cat([tensors[name], torch.ones(count, 48, dtype=torch.bfloat16)])
            shutil.rmtree(tmp_path / "in/release")
            (tmp_path / "in/release").mkdir()
            common = {"args": argparse.Namespace(**args, **known)}
            torch_dist_writer.write(tmp_path / "in/release", InMemory(padded), common)
            if fits:
                assert_same(open_megatron(tmp_path / "in").reader, source.reader)
                continue
            with pytest.raises(ConfigError, match=rf"has {rows + count} rows for .* of {rows}; .* than {limit}:"):
                open_megatron(tmp_path / "in")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tensor-model-parallel-size", 2), "--tensor-model-parallel-size=2: is of a Megatron directory"),
        (
            ("--pipeline-model-parallel-size", 2),
            "--pipeline-model-parallel-size=2: is of a Megatron directory",
        ),
        (("--pipeline-layers", "1,3"), "--pipeline-layers=1,3: is of a Megatron directory"),
        (("--iteration", 5), "--iteration=5: neither --input nor the output is a Megatron directory"),
        (("--hf-config", "x"), "--hf-config=x: describes a Megatron directory, and --input is none"),
    ],
)
def test_flags_without_effect_are_refused(flags, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    to_nemo(source_of("gpt"), Target(tmp_path / "a.nemo"))
    more = ("--input", tmp_path / "a.nemo", "--output", tmp_path / "out")
    code, said = run_script(monkeypatch, capsys, *more, *flags)
    assert code == 2 and said.startswith(message) and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def nemo_settings(config, **more) -> dict:
    """model_config.yaml, as far as NeMo's settings are not our defaults."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    found = {name: getattr(config, name) for name in names}
    fixed = {"activation": "fast-swiglu", "normalization": "rmsnorm", "position_embedding_type": "rope", "bias": False}
    return (
        found | fixed | {"encoder_seq_length": config.encoder_seq_length, "target": "nemo...MegatronNevaModel"} | more
    )


def nemo_name(name: str, legacy: bool) -> str:
    """NeMo's name of a tensor of ours, the tower's excepted."""
    if name.startswith("vision_projection."):
        _, index, kind = name.split(".")
        front = "language_model." if legacy else ""
        return (
            f"model.{front}embedding.word_embeddings.adapter_layer.mm_projector_adapter.mm_projector."
            f"{2 * int(index)}.{kind}"
        )
    name = name.removeprefix("language_model.")
    if not legacy:
        return f"model.{name}"
    for old, new in LEGACY_NAMES.items():
        name = name.replace(old, new)
    return f"model.language_model.{name}"


LEGACY_NAMES = {
    "decoder.": "encoder.",
    "linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.input_layernorm": "input_layernorm",
    "linear_fc1.layer_norm_": "post_attention_layernorm.",
    "mlp.post_attention_layernorm": "post_attention_layernorm",
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
}


def nemo_tensors(source: Source, legacy: bool) -> dict[str, torch.Tensor]:
    """Whole tensors as NeMo calls them, the vocabulary padded by 6 rows, the tower as Hugging Face's."""
    found = {}
    theirs = Theirs(family(source.family, "mapping").rules(source.model), source.reader)
    for name in source.reader.names():
        if not name.startswith("vision_model."):
            value = source.reader.read(name)
            rows = 6 if name.endswith(("word_embeddings.weight", "output_layer.weight")) else 0
            padding = torch.ones(rows, *value.shape[1:], dtype=value.dtype)
            found[nemo_name(name, legacy)] = torch.cat([value, padding]) if rows else value
    tower = "model.language_model." if legacy else "model."
    for name in theirs.names():
        if name.startswith("vision_tower."):
            there = f"{tower}embedding.word_embeddings.vision_encoder.{name.removeprefix('vision_tower.')}"
            found[there] = theirs.read(name).clone()
    return found


def lay_out(folder: Path, tensors: dict, ranks: tuple[int, int] | None, num_layers: int) -> None:
    """Files of ranks by hand; None is one file at the top."""
    tensor_ranks, stages = ranks or (1, 1)
    for tensor in range(tensor_ranks):
        for stage in range(stages):
            mine = {}
            for name, value in tensors.items():
                local, place = name, 0
                if ".vision_encoder." not in name and (found := re.fullmatch(r"(.*\.layers\.)(\d+)(\..*)", name)):
                    place, number = divmod(int(found[2]), num_layers // stages)
                    local = f"{found[1]}{number}{found[3]}"
                elif "final_layernorm" in name or "output_layer" in name:
                    place = stages - 1
                if place == stage:
                    mine[local] = shard(name, value, tensor, tensor_ranks)
            path = "" if ranks is None else f"tp_rank_{tensor:02d}_pp_rank_{stage:03d}"
            path = f"mp_rank_{tensor:02d}" if ranks and stages == 1 else path
            (folder / path).mkdir(exist_ok=True)
            torch.save(mine | {"model.rotary_pos_emb.inv_freq": torch.ones(4)}, folder / path / "model_weights.ckpt")


def shard(name: str, value: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    """A rank's part, cut by the rules of NeMo's own scripts."""
    if "vision_encoder" in name or "mm_projector" in name or value.dim() < 2:
        return value
    if "linear_fc1" in name or "dense_h_to_4h" in name:
        gate, up = (half.chunk(count)[rank] for half in value.chunk(2))
        return torch.cat([gate, up])
    columns = name.endswith(("linear_proj.weight", "linear_fc2.weight", "dense.weight", "dense_4h_to_h.weight"))
    return value.chunk(count, dim=int(columns))[rank].clone()


@pytest.mark.parametrize("legacy", [False, True], ids=["mcore", "legacy"])
@pytest.mark.parametrize("ranks", [None, (2, 1), (2, 2)], ids=["one", "tp2", "tp2_pp2"])
def test_nemo_1_archives(ranks, legacy: bool, tmp_path: Path) -> None:
    """Laid out by hand in each layout, read to the same tensors; a tar with ./ in front as good as a directory."""
    source, folder = source_of("llava"), tmp_path / "run"
    folder.mkdir()
    lay_out(folder, nemo_tensors(source, legacy), ranks, 4)
    write_nemo_settings(folder, source)
    with tarfile.open(tmp_path / "run.nemo", "w") as tar:
        tar.add(folder, ".")
    for path in (folder, tmp_path / "run.nemo"):
        found = open_nemo1(path)
        assert found.family == "llava" and found.files.keys() == {"tokenizer.model"}
        assert_same(found.reader, source.reader)
        assert replace(found.model.mm_cfg.vision_encoder, from_pretrained=None) == source.model.mm_cfg.vision_encoder


def write_nemo_settings(folder: Path, source: Source) -> None:
    vision = source.model.mm_cfg.vision_encoder
    encoder = {"from_pretrained": "openai/clip", "crop_size": [vision.image_size] * 2, "patch_dim": vision.patch_dim}
    encoder |= {"num_attention_heads": vision.num_attention_heads, "vision_select_layer": vision.vision_select_layer}
    mm_cfg = {"llm": {"freeze": False}, "vision_encoder": encoder, "mm_mlp_adapter_type": "mlp2x_gelu"}
    artifact = "0123456789abcdef0123456789abcdef_tokenizer.model"
    tokenizer = {"library": "sentencepiece", "model": f"nemo:{artifact}"}
    settings = nemo_settings(source.model, mm_cfg=mm_cfg, tokenizer=tokenizer)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "0123456789abcdef0123456789abcdef_tokenizer.model").write_bytes(
        sentencepiece_model(source.model.vocab_size)
    )


@cache
def sentencepiece_model(size: int) -> bytes:
    import sentencepiece

    made, draw = io.BytesIO(), random.Random(0)
    words = ("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000))
    settings = {"vocab_size": size, "model_type": "bpe", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(words), model_writer=made, **settings)
    return made.getvalue()


def test_nemo_1_archives_hold_what_was_trained(tmp_path: Path) -> None:
    """Of NeVA's pretraining the projector, of its tuning all but the tower; distributed, too."""
    source = source_of("llava")
    write_nemo_settings(tmp_path, source)
    tensors = nemo_tensors(source, legacy=False)
    parts = {"vision_projection": "adapter_layer", "language_model vision_projection": ""}
    for modules, mark in parts.items():
        kept = {name: value for name, value in tensors.items() if mark in name and ".vision_encoder." not in name}
        torch.save(kept, tmp_path / "model_weights.ckpt")
        found = open_nemo1(tmp_path)
        assert found.parts == set(modules.split())
        assert_same(found.reader, chosen(source.reader, modules.split()))
    (tmp_path / "model_weights.ckpt").unlink()
    (tmp_path / "model_weights").mkdir()
    torch_dist_writer.write(tmp_path / "model_weights", InMemory(tensors), {}, ("model.decoder.layers.",))
    assert_same(open_nemo1(tmp_path).reader, source.reader)
    shutil.rmtree(tmp_path / "model_weights")
    (tmp_path / "model_weights/model.decoder.final_layernorm.weight").mkdir(parents=True)
    (tmp_path / "model_weights/model.decoder.final_layernorm.weight/.zarray").write_text("{}")
    with pytest.raises(ConfigError, match="its weights are in zarr, which is not read"):
        open_nemo1(tmp_path)


def test_nemo_1_archives_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = source_of("llava")
    write_nemo_settings(tmp_path, source)
    tensors = nemo_tensors(source, legacy=False)
    qkv = "model.decoder.layers.1.self_attention.linear_qkv.weight"
    for content, message in (
        ({name: value for name, value in tensors.items() if name != qkv}, r"layers of a stage|tensors are missing"),
        (tensors | {qkv: tensors[qkv][1:]}, r"linear_qkv.weight' has shape \(95, 48\), the configuration needs \(96"),
        (tensors | {"model.reward_head.weight": torch.ones(2)}, r"no place for these tensors: .*reward_head"),
        ({"state": BOMBS["system"], **tensors}, r"its pickle names posix.system: refused"),
    ):
        torch.save(content, tmp_path / "model_weights.ckpt")
        with pytest.raises(ConfigError, match=message):
            open_nemo1(tmp_path)


@pytest.mark.parametrize("name", ["0" * 32 + "_../x", "0" * 32 + "_..", "0..0_/x"])
def test_a_nemo_1_archive_writes_nothing_outside(name: str, tmp_path: Path) -> None:
    """Of a member's name, which may not be a path when its hash is gone, the last part is taken."""
    source = source_of("llava")
    (tmp_path / "run").mkdir()
    write_nemo_settings(tmp_path / "run", source)
    config = tmp_path / "run/model_config.yaml"
    artifact = "0123456789abcdef0123456789abcdef_tokenizer.model"
    config.write_text(config.read_text().replace(f"nemo:{artifact}", f"nemo:{name}"))
    torch.save(nemo_tensors(source, legacy=False), tmp_path / "run/model_weights.ckpt")
    member = tmp_path / "run" / artifact
    with tarfile.open(tmp_path / "run.nemo", "w") as tar:
        tar.add(config, "model_config.yaml")
        tar.add(tmp_path / "run/model_weights.ckpt", "model_weights.ckpt")
        tar.add(member, name)
    if name.endswith(".."):
        with pytest.raises(ConfigError, match="is no name of a file"):
            open_nemo1(tmp_path / "run.nemo")
    else:
        assert open_nemo1(tmp_path / "run.nemo").files.keys() == {"x"}


@pytest.mark.parametrize("prefix", ["model.module.", "module."])
def test_nemo_1_archives_of_wrapped_modules(prefix: str, tmp_path: Path) -> None:
    """Gate and up of two ranks are joined half by half under these names, too."""
    source = source_of("llava")
    tensors = nemo_tensors(source, legacy=False)
    lay_out(tmp_path, {prefix + name.removeprefix("model."): value for name, value in tensors.items()}, (2, 1), 4)
    write_nemo_settings(tmp_path, source)
    assert_same(open_nemo1(tmp_path).reader, source.reader)


def gpt_of_nemo(folder: Path, **settings) -> Source:
    source = source_of("gpt")
    torch.save(nemo_tensors(source, legacy=False), folder / "model_weights.ckpt")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(nemo_settings(source.model, **settings)))
    return open_nemo1(folder)


def test_nemo_1_settings_are_read_or_refused(tmp_path: Path) -> None:
    assert gpt_of_nemo(tmp_path, window_size=None, rotary_interleaved=False).model.rope_scaling_factor is None
    assert gpt_of_nemo(tmp_path, scale_positional_embedding=True).model.rope_scaling_factor == 8.0
    assert gpt_of_nemo(tmp_path, window_size=[-1, -1], normalize_attention_scores=True).family == "gpt"
    for name, value in {
        "rotary_interleaved": True,
        "window_size": [128, 0],
        "normalize_attention_scores": False,
        "transformer_block_type": "post_ln",
        "num_moe_experts": 8,
    }.items():
        with pytest.raises(ConfigError, match=rf"model_config.yaml: {name}=.* is not supported, only "):
            gpt_of_nemo(tmp_path, **{name: value})


def test_the_image_size_that_was_saved_is_kept() -> None:
    """SigLIP's 384 pixels hold 27 patches of 14, which cover 378."""
    assert image_size(729, 14, 384) == 384
    assert image_size(729, 14, None) == image_size(729, 14, 336) == 378
