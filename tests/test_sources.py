"""Checkpoints as people point at them: where they stand, what they decide, what is said of those that are broken."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from test_families import TINY, run_of, settle
from tiny_hf import make_clip, make_llama, make_llava

from nemo_vlm.archive import TOKENIZER, self_contained, write_archive
from nemo_vlm.config import StartConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.safetensors import TensorSpec
from nemo_vlm.formats.store import Folder
from nemo_vlm.models.llava.config import LlmConfig
from nemo_vlm.sources import starting
from nemo_vlm.sources.opening import open_source, tokenizer_files
from nemo_vlm.sources.source import Source, save_files
from nemo_vlm.typed import read_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def llava(folder: Path) -> Path:
    return make_llava(folder / "llava")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    return make_llama(folder / "llama")


def archive_of(source: Source, path: Path) -> Path:
    specs = [TensorSpec(name, source.reader.shape(name), source.reader.dtype(name)) for name in source.reader.names()]
    tensors = ((spec.name, source.reader.read(spec.name)) for spec in specs)
    tokenizer = source.save_files(path.parent / f"{path.name}-tokenizer")
    write_archive(path, self_contained(source.tree), {TOKENIZER: tokenizer}, specs, tensors)
    return path


def test_a_directory_is_found_from_inside(llava: Path, monkeypatch) -> None:
    monkeypatch.chdir(llava)
    assert open_source(".", "--input").parts == {"language_model", "vision_model", "vision_projection"}


@pytest.mark.parametrize("path", ["nowhere", "x" * 300, "/dev/null/x", "a/b/c/d"])
def test_what_is_not_there_is_said_in_one_line(path: str) -> None:
    with pytest.raises(ConfigError, match=f"^--input={path}: there is no such file or directory$"):
        open_source(path, "--input")


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": []},
        {"model_type": "unheard_of"},
        {"num_attention_heads": 0},
        {"rope_parameters": None, "rope_theta": None},
        {"hidden_act": "relu"},
        {"vocab_size": "many"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_describes_no_model_names_itself(llama: Path, tmp_path: Path, change: dict) -> None:
    broken = shutil.copytree(llama, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text()) | change
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"broken/config\.json"):
        open_source(broken, "--input")


@pytest.mark.parametrize("text", ["a: 2024-13-45", "a: !!int abc", "- 1", "[" * 2000, "a: !!python/name:os.system"])
def test_settings_that_are_no_settings_name_themselves(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"model_config\.yaml"):
        open_source(tmp_path, "--input")


def test_what_is_restored_comes_over_the_parts_given_for_themselves(llava: Path, llama: Path, folder: Path) -> None:
    config = TINY["llava"]
    llm = LlmConfig(from_pretrained=str(llama))
    run = replace(
        run_of("llava", replace(config, mm_cfg=replace(config.mm_cfg, llm=llm))), start=StartConfig(str(llava))
    )
    settled = settle(run)
    assert settled.model.hidden_size == open_source(llava, "").model.hidden_size
    assert settled.tokenizer.type == str(llava)
    assert {str(reader) for reader in starting.first_weights(settled).values()} == {str(llava)}


def test_a_tower_alone_restores_no_model(folder: Path) -> None:
    clip = make_clip(folder / "clip")
    run = replace(run_of("llava", TINY["llava"]), start=StartConfig(str(clip)))
    with pytest.raises(ConfigError, match=r"model.restore_from_path=.*clip: holds no whole model, but vision_model"):
        settle(run)


def test_what_is_given_by_hand_may_not_contradict(llama: Path) -> None:
    run = replace(run_of("gpt", replace(TINY["gpt"], num_layers=7)), start=StartConfig(str(llama)))
    with pytest.raises(ConfigError, match=r"^model\.num_layers=7: .*llama has \d$"):
        settle(run, {"model.num_layers"})
    assert settle(run).model.num_layers != 7


def test_a_training_checkpoint_finds_its_tokenizer_in_an_archive(llama: Path, folder: Path) -> None:
    archive = archive_of(open_source(llama, ""), folder / "llama.nemo")
    wanted = {name: span.bytes() for name, span in open_source(llama, "").files.items()}
    assert {name: span.bytes() for name, span in tokenizer_files(str(archive)).items()} == wanted
    with pytest.raises(ConfigError, match=r"model\.tokenizer\.type=nowhere: no tokenizer there"):
        tokenizer_files("nowhere")


def test_an_archive_names_nothing_outside_itself(llava: Path) -> None:
    source = open_source(llava, "")
    run = run_of("llava", source.model)
    tree = self_contained(
        source.tree | {"restore_from_path": "/a", "mm_cfg": source.tree["mm_cfg"] | {"llm": {"from_pretrained": "/b"}}}
    )
    assert "/a" not in yaml.safe_dump(tree) and "/b" not in yaml.safe_dump(tree)
    assert read_model(tree, type(run.model))["model"] == source.model


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside", ""])
def test_files_are_written_inside_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="refused"):
        save_files({name: Folder(tmp_path).span("file")}, tmp_path / "inner")
    assert os.listdir(tmp_path) == ["file"]
