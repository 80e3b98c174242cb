"""scoring.exports: one export for each content, whole and right, whoever asks, however often and at the same time."""

from __future__ import annotations

import logging
import shutil
import socket
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from distributed import run_ranks
from tiny_hf import make_qwen

from nemo_vlm import checkpoints
from nemo_vlm.conversion.jobs import Run, import_huggingface
from nemo_vlm.errors import ConfigError
from nemo_vlm.scoring.exports import alone, check_unchanged, huggingface
from nemo_vlm.sources.opening import open_source

WRITER = f"{socket.gethostname()}-{2**22}"  # which is no process


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    make_qwen(folder / "hf")
    import_huggingface(open_source(folder / "hf", "input"), folder / "model.nemo", Run("auto", "cpu", False))
    return folder


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A .nemo of the test's own, and a cache beside it."""
    return Path(shutil.copy(made / "model.nemo", tmp_path))


def exported(model: Path, cache: str = "cache") -> Path:
    return huggingface(str(model), "--model", model.parent / cache)


def test_the_same_content_is_exported_once(made: Path, model: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    assert huggingface(str(made / "hf"), "--model", model.parent / "cache") == made / "hf"
    assert not (model.parent / "cache").exists()
    found = exported(model)
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (made / "hf", found))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert sum("read" in text.split() for text in caplog.messages) == 1
    assert f"exports kept in {found.parent}: 1 (" in caplog.text
    caplog.clear()
    before = (found / "model.safetensors").stat()
    assert exported(model) == found and not caplog.messages
    model.touch()
    assert exported(model) == exported(Path(shutil.copy(model, model.with_name("copy.nemo")))) == found
    assert (found / "model.safetensors").stat() == before
    assert sum("read" in text.split() for text in caplog.messages) == 2
    assert exported(model, "other").name == found.name


def test_another_content_is_another_export(model: Path) -> None:
    first, end = exported(model), model.stat().st_size - 20_000  # inside the last tensor
    with open(model, "r+b") as file:
        file.seek(end)
        [byte] = file.read(1)
        file.seek(end)
        file.write(bytes([byte ^ 1]))
    second = exported(model)
    with tarfile.open(model) as tar:
        tar.extractall(model.with_name("extracted"), filter="data")
    folder = model.with_name("extracted")
    assert exported(folder) == second
    config = folder / "model_config.yaml"
    config.write_text(config.read_text().replace("max_position_embeddings: ", "max_position_embeddings: 1"))
    third = exported(folder)
    tokenizer = folder / "tokenizer/tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert len({first, second, third, exported(folder)}) == 4


def ask(model: Path) -> tuple[str, int]:
    found = exported(model)
    return str(found), (found / "model.safetensors").stat().st_ino


def test_processes_wait_for_the_one_that_exports(model: Path, caplog) -> None:
    assert len(set(run_ranks(ask, 3, model))) == 1
    assert len(list((model.parent / "cache/exports").iterdir())) == 1
    shutil.rmtree(model.parent / "cache/exports")
    caplog.set_level(logging.INFO)
    other = threading.Thread(target=exported, args=(model,))
    with alone(model.parent / "cache/lock", "exports big.nemo"):
        other.start()
        while not caplog.messages and other.is_alive():
            time.sleep(0.01)
        assert "waits for process" in caplog.text and caplog.text.endswith(", which exports big.nemo\n")
    other.join()
    assert exported(model).is_dir()


def test_what_was_left_or_lost(model: Path, caplog) -> None:
    found = exported(model)
    left, of_another_machine = (found.with_name(f".{found.name}.partial-{writer}") for writer in (WRITER, "host-1"))
    for partial in (left, of_another_machine):
        partial.mkdir()
        (partial / "model.safetensors").touch()
    weights = found / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert exported(model) == found and weights.read_bytes() == content
    assert "it is made again" in caplog.text
    assert not left.exists() and of_another_machine.exists()


def test_what_cannot_be_exported(made: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="^--model=.*, --cache=.*: the one cannot be .*Not a directory"):
        huggingface(str(model), "--model", model)
    bare = shutil.copytree(made / "hf", model.parent / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigError, match="^--model=.*bare: holds no tokenizer"):
        exported(Path(bare))
    unfinished = model.parent / "step_000001"
    unfinished.mkdir()
    checkpoints.marker(unfinished).touch()
    with pytest.raises(ConfigError, match="step_000001: this checkpoint is unfinished"):
        exported(unfinished)
    with pytest.raises(ConfigError, match="^--model=.*was changed while it was read"):
        check_unchanged(open_source(model, "--model"), "--model", "a stamp of before")
