"""Checkpoints as people point at them: where they stand, what they decide, what is said of those that are broken."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_families import TINY, run_of, settle
from tiny_hf import make_clip, make_llama, make_llava

from nemo_vlm.archive import TOKENIZER, self_contained, write_archive
from nemo_vlm.config import DataConfig, PeftConfig, StartConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.grown import grown
from nemo_vlm.formats.reader import InMemory, Slices
from nemo_vlm.formats.safetensors import TensorSpec
from nemo_vlm.formats.store import Folder
from nemo_vlm.models.llava.config import LlmConfig
from nemo_vlm.sources import starting
from nemo_vlm.sources.opening import open_source, tokenizer_files
from nemo_vlm.sources.source import Source, save_files
from nemo_vlm.typed import model_tree, read_model


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


@dataclass(frozen=True)
class Counted(InMemory):
    """Says which rows were read."""

    read_rows: list[slice] = field(default_factory=list)

    def read(self, name: str, slices: Slices = ()) -> torch.Tensor:
        self.read_rows.append(slices[0] if slices else slice(0, self.shape(name)[0]))
        return super().read(name, slices)


def test_a_slice_of_a_grown_table_reads_what_it_needs() -> None:
    old = torch.randn(10_000, 6).bfloat16()
    reader = Counted({"table": old})
    table = grown(reader, ["table"], 10_004)
    expected = torch.cat([old, old.double().mean(0, keepdim=True).bfloat16().expand(4, -1)])
    for rows in (slice(5, 9), slice(9_998, 10_002), slice(10_001, 10_004)):
        for columns in (slice(0, 6), slice(2, 3)):
            assert torch.equal(table.read("table", (rows, columns)), expected[rows, columns])
    assert torch.equal(table.read("table"), expected)
    read = [(rows.start, rows.stop) for rows in reader.read_rows]
    assert read[:3] == [(5, 9), (5, 9), (9_998, 10_000)]
    assert read.count((0, 10_000)) == 1  # by the last line; the mean is of chunks, once
    assert sum(stop - start for start, stop in read) == 2 * 4 + 2 * 2 + 10_000 + 10_000


def test_a_plan_needs_no_adapter(tmp_path: Path) -> None:
    run = run_of("gpt", TINY["gpt"])
    tree = model_tree(replace(run, peft=PeftConfig("lora", str(tmp_path / "none.nemo"))))
    kept, notes = starting.without_absent(tree)
    assert kept["peft"] == tree["peft"] | {"restore_from_path": None}
    assert notes == [f"model.peft.restore_from_path={tmp_path}/none.nemo: not here; planned from the preset"]


@pytest.mark.parametrize(("norm", "kind"), [(True, "mlp_downsample"), (False, "mlp2x_gelu")])
def test_a_projector_behind_a_norm_is_another(norm: bool, kind: str, tmp_path: Path) -> None:
    layers = ("norm", "0", "1") if norm else ("0", "1")
    names = {f"vision_projection.{layer}.{name}" for layer in layers for name in ("weight", "bias")}
    save_file({name: torch.ones(2) for name in names}, tmp_path / "projector.safetensors")
    source = open_source(tmp_path / "projector.safetensors", "")
    assert source.tree["mm_cfg"]["mm_mlp_adapter_type"] == kind and source.reader.names() == names


@pytest.mark.parametrize("given", [(-1.0, -1.0), (0.0, 1.0), (2.0, -1.0)])
def test_weights_of_files_are_above_zero(given: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="concat_sampling_probabilities=.*: must be 2 weights"):
        DataConfig(data_path=("a.json", "b.json"), concat_sampling_probabilities=given)


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
