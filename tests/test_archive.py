"""The .nemo archive: bit-exact, streamed, and closed to what does not belong in it."""

from __future__ import annotations

import gc
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from nemo_vlm import archive
from nemo_vlm.archive import Archive, write_archive
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import safetensors
from nemo_vlm.formats.safetensors import Safetensors, TensorSpec
from nemo_vlm.formats.store import Folder, extract, opened, place_of

TENSORS = {
    "a.weight": torch.randn(5, 7),
    "b.weight": torch.randn(3, 2, 4).bfloat16(),
    "c.bias": torch.randn(9).half(),
    "d": torch.arange(4),
    "e": torch.zeros(0, 3),
    "f": torch.tensor(2.5),
}


def write(path: Path, tensors=TENSORS) -> None:
    folder = path.parent / "tokenizer-source"
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("one\ntwo\n")
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]
    write_archive(path, {"family": "gpt", "lr": 1e-5}, {"tokenizer": folder}, specs, iter(tensors.items()))


@pytest.mark.parametrize("limit", [10**9, 100])
def test_tensors_come_back_bit_equal(tmp_path: Path, monkeypatch, limit: int) -> None:
    monkeypatch.setattr(safetensors, "MAX_SHARD_BYTES", limit)
    write(tmp_path / "x.nemo")
    opened = Archive(tmp_path / "x.nemo")
    assert opened.names() == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = opened.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape == opened.shape(name)
        assert torch.equal(read, tensor)
    assert torch.equal(opened.read("a.weight", (slice(1, 4), slice(2, 5))), TENSORS["a.weight"][1:4, 2:5])
    assert opened.config == {"family": "gpt", "lr": 1e-5}
    assert (extract(opened.store, "tokenizer", tmp_path / "out") / "vocab.txt").read_text() == "one\ntwo\n"
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_others_can_read_it(tmp_path: Path) -> None:
    write(tmp_path / "x.nemo")
    with tarfile.open(tmp_path / "x.nemo") as tar:
        index = json.load(tar.extractfile(archive.INDEX))
        (shard,) = set(index["weight_map"].values())
        theirs = load(tar.extractfile(f"model_weights/{shard}").read())
    assert all(torch.equal(theirs[name], tensor) for name, tensor in TENSORS.items())
    assert b"PROTO" not in (tmp_path / "x.nemo").read_bytes()


def test_an_interrupted_write_leaves_the_old_archive(tmp_path: Path) -> None:
    write(tmp_path / "x.nemo")
    before = (tmp_path / "x.nemo").read_bytes()

    def broken():
        yield "a.weight", TENSORS["a.weight"]
        raise KeyboardInterrupt

    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]
    with pytest.raises(KeyboardInterrupt):
        write_archive(tmp_path / "x.nemo", {}, {}, specs, broken())
    assert (tmp_path / "x.nemo").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize("mode", ["wb", "ab"])  # the kernel appends nothing to a file that is opened so
def test_tensors_of_mapped_files_are_copied_by_the_kernel_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """All of a tensor, a run of its rows, and one that is no run of a file's bytes, behind what is still buffered."""
    stored = {"a": torch.randn(300, 1000), "b": torch.randn(7, 3).bfloat16(), "c": torch.arange(5)}
    save_file(stored, tmp_path / "source.safetensors")
    source = Safetensors(Folder(tmp_path), ["source.safetensors"])
    mapped = {name: source.read(name) for name in stored}
    made = {"b": mapped["b"], "rows": mapped["a"][17:180], "turned": mapped["a"].mT, "c": mapped["c"], "d": stored["c"]}
    places = {name: place_of(tensor.data_ptr(), tensor.nbytes) for name, tensor in made.items()}
    assert [name for name, place in places.items() if place is None] == ["d"]
    content = (tmp_path / "source.safetensors").read_bytes()
    with opened(made["rows"].data_ptr(), made["rows"].nbytes) as (descriptor, offset):
        assert os.pread(descriptor, 8, offset) == content[offset : offset + 8] == stored["a"][17, :2].numpy().tobytes()
    send, copied = os.sendfile, []

    def counted(*given: int) -> int:
        copied.append(send(*given))
        return copied[-1]

    monkeypatch.setattr(os, "sendfile", counted)
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()]
    with open(tmp_path / "target.safetensors", mode) as file:
        safetensors.write(file, specs, iter(made.items()))
        file.write(b"behind")
    runs = sum(made[name].nbytes for name in ("b", "rows", "c"))
    assert sum(copied) == (runs if mode == "wb" else 0)
    written = (tmp_path / "target.safetensors").read_bytes()
    assert written.endswith(b"behind")
    found = load(written.removesuffix(b"behind"))
    assert found.keys() == made.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in made.items())


def test_a_file_is_read_again_as_long_as_it_is_the_mapped_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(3)}, path)
    tensor = Safetensors(Folder(tmp_path), [path.name]).read("a")
    address = tensor.data_ptr()
    with opened(address, 12) as place:
        assert place is not None
    path.rename(tmp_path / "y.safetensors")
    with opened(address, 12) as place:
        assert place is None
    save_file({"a": torch.randn(3)}, path)
    with opened(address, 12) as place:
        assert place is None
    del tensor
    gc.collect()
    assert place_of(address, 12) is None


@pytest.mark.parametrize("name", ["../outside", "/absolute", "a/../../b"])
def test_members_outside_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "x.nemo", "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 3
        tar.addfile(member, io.BytesIO(b"bad"))
    with pytest.raises(ConfigError, match="refuses the member"):
        Archive(tmp_path / "x.nemo")


def test_links_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.nemo", "w") as tar:
        member = tarfile.TarInfo("model_config.yaml")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ConfigError, match="refuses the member"):
        Archive(tmp_path / "x.nemo")


@pytest.mark.parametrize("keep", [0, 100, 600, "half", "all but one byte"])
def test_a_truncated_archive_names_itself(tmp_path: Path, keep: int | str) -> None:
    write(tmp_path / "x.nemo")
    start, size = max(Archive(tmp_path / "x.nemo").store.members.values())
    end = {"half": start + size // 2, "all but one byte": start + size - 1}.get(keep, keep)
    (tmp_path / "y.nemo").write_bytes((tmp_path / "x.nemo").read_bytes()[:end])
    with pytest.raises(ConfigError, match="y.nemo"):
        Archive(tmp_path / "y.nemo")


def test_a_yaml_tag_is_not_executed(tmp_path: Path) -> None:
    with open(tmp_path / "x.nemo", "wb") as file:
        archive.add_bytes(file, "model_config.yaml", b"!!python/object/apply:os.system ['touch executed']\n")
    with pytest.raises(ConfigError, match="model_config.yaml"):
        Archive(tmp_path / "x.nemo")
    assert not Path("executed").exists()
