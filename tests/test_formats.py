"""Files of torch and Megatron, read in place: against torch's and Megatron's own readers; bombs do not go off."""

from __future__ import annotations

import argparse
import enum
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from test_families import TINY, biased, build_all, run_of, sharded, tied, whole
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_vlm.conversion.convert import Target
from nemo_vlm.conversion.megatron import Export, to_megatron
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import opcodes, torch_dist_writer, torch_file, unpickle
from nemo_vlm.formats.rank_files import RankFiles, is_gated
from nemo_vlm.formats.rank_files_writer import Ranks, write
from nemo_vlm.formats.reader import InMemory
from nemo_vlm.formats.safetensors import Safetensors
from nemo_vlm.formats.stacked import single_layers
from nemo_vlm.formats.store import Folder, Tar
from nemo_vlm.formats.torch_dist import TorchDist
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.config import context
from nemo_vlm.mcore.layers import layer_spec, norm_class
from nemo_vlm.mcore.vit import vision_config
from nemo_vlm.models.base import family
from nemo_vlm.models.llava.model import vision_shape
from nemo_vlm.sources.megatron import open_megatron
from nemo_vlm.sources.megatron_args import to_args
from nemo_vlm.sources.source import Source
from nemo_vlm.typed import plain

RUN = run_of("gpt", TINY["gpt"])


class Kind(enum.Enum):
    LOCAL = 1


class Named:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.called = function, args

    def __reduce__(self):
        return self.called


BOMBS = {
    "system": Named(os.system, "touch canary"),
    "eval": Named(eval, "open('canary', 'w').close()"),
    "getattr": Named(getattr, Named(__import__, "os"), "system"),
    "open": Named(open, "canary", "w"),
}


def test_a_file_of_torch_save_reads_like_torch_load(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    linear = torch.nn.Linear(3, 4)
    content = {
        "model": linear.state_dict(),
        "parameter": linear.weight,
        "view": base[1:3, ::2],
        "transposed": base.t(),
        "bool": torch.ones(3, dtype=torch.bool),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.0, dtype=torch.bfloat16),
        "uint16": torch.arange(3).to(torch.uint16),
        "plain": {"list": [1, 2.5, None, "text", b"\xff", {3}, (4, True)], "size": torch.Size((1, 2))},
        "args": argparse.Namespace(tensor_model_parallel_size=2, dtype=torch.bfloat16, kind=Kind.LOCAL),
    }
    torch.save(content, tmp_path / "file.pt")
    expected = torch.load(tmp_path / "file.pt", weights_only=False)
    found = torch_file.load(Folder(tmp_path).span("file.pt"))
    assert list(found) == list(expected)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype is value.dtype and torch.equal(found[key], value.detach()), key
    assert all(torch.equal(found["model"][key], value) for key, value in expected["model"].items())
    assert found["plain"] == expected["plain"]
    args = found["args"].fields()
    assert (args["tensor_model_parallel_size"], args["dtype"]) == (2, torch.bfloat16)
    assert args["kind"].called.endswith("Kind") and args["kind"].args == (1,)  # a record, not the class


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path, store = tmp_path / "file.pt", Folder(tmp_path)
    torch.save({"a": torch.arange(1000)}, path)
    whole_file = path.read_bytes()
    for name, content in {
        "short.pt": whole_file[:5000],
        "short2.pt": whole_file[:-30],
        "text.pt": b"not a zip",
        "empty.pt": b"",
        "flipped.pt": whole_file.replace(b"storage", b"strrage"),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            torch_file.load(Folder(tmp_path).span(name))
    torch.save({"a": torch.arange(10)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match=r"old.pt: was written by torch before 1.6 .* torch.save\("):
        torch_file.load(Folder(tmp_path).span("old.pt"))
    assert torch_file.load(store.span("file.pt"))["a"].sum() == 499500


def test_tensors_outside_their_storage_are_refused(tmp_path: Path) -> None:
    torch.save(torch.arange(8.0), tmp_path / "file.pt")
    good = (tmp_path / "file.pt").read_bytes()
    pickled = b"K\x00K\x08\x85"  # offset 0, size (8,)
    assert good.count(pickled) == 1
    for bad in (b"K\x01K\x08\x85", b"K\x00K\x09\x85"):
        (tmp_path / "bad.pt").write_bytes(good.replace(pickled, bad))
        with pytest.raises(ConfigError, match="lies outside its storage"):
            torch_file.load(Folder(tmp_path).span("bad.pt"))


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_does_not_go_off(bomb: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": BOMBS[bomb]}, tmp_path / "file.pt")
    with pytest.raises(ConfigError, match=r"file.pt: its pickle names [\w.]+: refused, nothing of it was executed$"):
        torch_file.load(Folder(tmp_path).span("file.pt"))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(BOMBS[bomb]))
    with pytest.raises(ConfigError, match=r"metadata: its pickle names [\w.]+: refused, nothing of it was executed$"):
        TorchDist(Folder(tmp_path))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "name",
    ["torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict", "builtins\ndict", "torch\nSize", "torch\nfloat32"],
)
def test_a_pickle_cannot_change_what_it_is_handed(name: str, tmp_path: Path) -> None:
    """The opcode BUILD sets attributes of whatever stands before it."""
    for state in (b"}\x8c\x08functionK\x01s", b"N}\x8c\x08functionK\x01s\x86"):
        (tmp_path / ".metadata").write_bytes(b"\x80\x04c" + name.encode() + b"\n" + state + b"b.")
        with pytest.raises(ConfigError, match="its pickle is damaged"):
            TorchDist(Folder(tmp_path))


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x08tQ"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x08\x85K\x01\x85tR"


def torch_save_of(pickled: bytes, path: Path) -> Any:
    """Loads a file of torch.save with this pickle and 8 floats."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("file/data/0", torch.arange(8.0).numpy().tobytes())
    return torch_file.load(Folder(path.parent).span(path.name))


@pytest.mark.parametrize("state", [b"}%b%bs", b"N}%b%bs\x86"])
@pytest.mark.parametrize(
    ("held", "name", "value"),
    [
        (PARAMETER + STORAGE + b"R", b"size", b"J\xff\xff\xff\x7f"),  # a storage taken apart: the bytes of the file
        (PARAMETER + b"c_codecs\nencode\nR", b"__defaults__", b"K\x01\x85"),  # a function of ours
        (STORAGE, b"dtype", b"ctorch\nint8\n"),
        (TENSOR, b"offset", b"J\xff\xff\xff\x7f"),
    ],
    ids=["span", "function", "storage", "tensor"],
)
def test_a_pickle_cannot_take_apart_what_it_is_handed(held, name, value, state, tmp_path: Path) -> None:
    change = state % (b"X" + len(name).to_bytes(4, "little") + name, value)
    before = unpickle.to_bytes.__defaults__
    try:
        with pytest.raises(ConfigError, match=r"file.pt: its pickle is damaged \("):
            torch_save_of(held + change + b"b", tmp_path / "file.pt")
        assert unpickle.to_bytes.__defaults__ == before
    finally:
        unpickle.to_bytes.__defaults__ = before
    assert torch.equal(torch_save_of(TENSOR, tmp_path / "good.pt"), torch.arange(8.0))
    with pytest.raises(ConfigError, match="its pickle is damaged"):  # in place of a tensor, something else
        torch_save_of(PARAMETER + b"(X\x01\0\0\0a\x89NtR", tmp_path / "file.pt")


def test_a_small_pickle_cannot_ask_for_much(tmp_path: Path) -> None:
    for bad in (b"Nr\xff\xff\xff\x7f", b"Np2147483647\n", b"\x8e" + b"\xff" * 7 + b"\x7f", b"C\x09abc", b"\x82\x01"):
        with pytest.raises(ConfigError, match="file.pt: its pickle is damaged"):
            torch_save_of(bad, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=r"memo is 2147483647|cut short|opcode 0x82"):
            opcodes.check(bad + b".")
    doubled = torch_save_of(b"N" + b"2\x86" * 100, tmp_path / "file.pt")  # 2 ** 100 paths
    assert doubled[0] is doubled[1]


def test_every_opcode_of_plain_data_is_known() -> None:
    some = [
        1,
        2.5,
        -3,
        70000,
        2**40,
        10**30,
        None,
        True,
        False,
        "text\n",
        "é" * 300,
        b"\xff" * 300,
        {3},
        frozenset([1]),
    ]
    tree = {"a": some, "b": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], "c": argparse.Namespace(dtype=torch.float32)}
    tree |= {"many": {number: str(number) for number in range(70000)}, "bytes": bytearray(b"a"), "set": {1, 2}}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps(tree, protocol)
        opcodes.check(content)
        for length in range(0, len(content), len(content) // 50):
            with pytest.raises(ValueError):
                opcodes.check(content[:length])


def dist(folder: Path, boxes: list[tuple[tuple, tuple]], shape: tuple, name: str = "a") -> TorchDist:
    """A .metadata of one tensor of bytes that says so of its chunks; there are no files."""
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    entry = TensorStorageMetadata(TensorProperties(torch.uint8), torch.Size(shape), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({name: entry}, storage_data={})))
    return TorchDist(Folder(folder))


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 4)), ((0, 0), (2, 4))],
        [((0, 0), (3, 4)), ((2, 0), (2, 4))],
        [((0, 0), (2, 4)), ((1, 0), (2, 4))],  # as many elements as there are
        [((0, 0), (2, 2)), ((0, 2), (4, 2)), ((1, 0), (2, 2))],
    ],
)
def test_chunks_that_overlap_are_refused(boxes, tmp_path: Path) -> None:
    """They would hide that elements are missing."""
    with pytest.raises(ConfigError, match=r".metadata: not a table of tensors .*of the tensor 'a' overlap"):
        dist(tmp_path, boxes, (4, 4))


def test_chunks_that_do_not_overlap_are_read(tmp_path: Path) -> None:
    grid = [((row, column, 0), (2, 5, 7)) for row in range(0, 400, 2) for column in range(0, 500, 5)]
    assert len(dist(tmp_path, grid, (400, 500, 7)).entries["a"].chunks) == 20000
    bricks = [((0, 0), (2, 2)), ((2, 0), (2, 2)), ((0, 2), (1, 2)), ((1, 2), (3, 2)), ((4, 0), (0, 4))]
    assert len(dist(tmp_path, bricks, (4, 4)).entries["a"].chunks) == 5
    for bad in ((4.0,), (-1,), (True,)):
        with pytest.raises(ConfigError, match="not a table of tensors"):
            contents_of(tmp_path, bad)


def contents_of(folder: Path, shape: tuple) -> TorchDist:
    entry = TensorStorageMetadata(TensorProperties(torch.uint8), shape, [])  # type: ignore[arg-type]
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"a": entry}, storage_data={})))
    return TorchDist(Folder(folder))


@pytest.mark.parametrize("shape", [(), (2**40, 3)])
def test_what_cannot_be_stacked_stays(shape: tuple, tmp_path: Path) -> None:
    reader = dist(tmp_path, [], shape, "decoder.layers.x")
    assert (
        single_layers(reader).names() == {"decoder.layers.x"}
        and single_layers(reader).shape("decoder.layers.x") == shape
    )


def test_a_type_that_is_none_is_refused(tmp_path: Path) -> None:
    entry = TensorStorageMetadata(TensorProperties("uint8"), torch.Size((4,)), [])  # type: ignore[arg-type]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": entry}, storage_data={})))
    with pytest.raises(ConfigError, match=r"not a table of tensors .*the type of 'a' is a str"):
        TorchDist(Folder(tmp_path))


def safetensors_of(folder: Path, header: str, size: int = 16) -> Safetensors:
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(size)
    (folder / "a.safetensors").write_bytes(content)
    return Safetensors(Folder(folder), ["a.safetensors"])


def listed(shape: object, offsets: object, name: str = "a") -> str:
    return f'"{name}": {json.dumps({"dtype": "U8", "shape": shape, "data_offsets": offsets})}'


def header_of(*tensors: str) -> str:
    return "{" + ", ".join(tensors) + "}"


@pytest.mark.parametrize(
    "header",
    [
        header_of(listed([2.0], [0, 2])),
        header_of(listed([True], [0, 1])),
        header_of(listed(["2"], [0, 2])),
        header_of(listed([2], [0.0, 2.0])),
        header_of(listed([-1], [0, 1])),
        header_of(listed([2**63], [0, 2**63])),
        header_of(listed([2**40, 2**40, 0], [0, 0])),
        header_of(listed([2], [0, 2]), listed([2], [2, 4])),
        header_of(listed([4], [0, 4]), listed([4], [3, 7], "b")),
        "[" * 100_000,
        '{"a": 1e999}',
        '{"a": {"dtype": "U8", "dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}',
    ],
)
def test_a_damaged_header_of_safetensors_is_named(header: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.safetensors: "):
        safetensors_of(tmp_path, header)
    good = header_of(listed([4], [0, 4]), listed([3], [4, 7], "b"), listed([0], [4, 4], "c"))
    assert safetensors_of(tmp_path, good).names() == {"a", "b", "c"}


def test_a_header_of_safetensors_is_bounded(tmp_path: Path) -> None:
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((10**8 + 1).to_bytes(8, "little"))
        file.truncate(10**8 + 100)
    with pytest.raises(ConfigError, match=r"a.safetensors: its header has 100000001 bytes, more than 100000000"):
        Safetensors(Folder(tmp_path), ["a.safetensors"])


def test_archives_that_are_compressed_or_sparse_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    with tarfile.open(tmp_path / "a.nemo", "w:gz") as tar:
        tar.add(tmp_path / "a", "a")
    with pytest.raises(ConfigError, match=r"a.nemo: is compressed; decompress it: gzip -dc .*a.nemo > .*a-plain.nemo$"):
        Tar(tmp_path / "a.nemo")
    sparse = tarfile.TarInfo("a")
    sparse.size, sparse.pax_headers = 1, {"GNU.sparse.map": "4096,1", "GNU.sparse.size": "8192", "GNU.sparse.name": "a"}
    with tarfile.open(tmp_path / "b.nemo", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse, io.BytesIO(b"a"))
    with pytest.raises(ConfigError, match=r"b.nemo: refuses the member 'a', which is not a plain file"):
        Tar(tmp_path / "b.nemo")


def ranks_of(folder: Path, **ranks: dict) -> RankFiles:
    for name, content in ranks.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        torch.save({"model": content}, folder / name / "model_optim_rng.pt")
    return RankFiles(Folder(folder), "", lambda name: False)


def test_files_of_ranks_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one, more = {"a.weight": torch.ones(2)}, {"a.weight": torch.ones(2), "b.weight": torch.ones(2)}
    place = r"mp_rank_0\d/model_optim_rng.pt"
    for content in ((one, more), (more, one)):
        with pytest.raises(ConfigError, match=rf"{place} holds 'b.weight', which {place} lacks"):
            ranks_of(tmp_path / "keys", mp_rank_00=content[0], mp_rank_01=content[1])
    with pytest.raises(ConfigError, match=r"mp_rank_00/.* and mp_rank_00_000/.* are files of the same rank; remove"):
        ranks_of(tmp_path / "sets", mp_rank_00=one, mp_rank_00_000=one)
    with pytest.raises(ConfigError, match=r"mp_rank_00/model_optim_rng.pt: 'a.weight' is no tensor, but a Kind"):
        ranks_of(tmp_path / "kinds", mp_rank_00={"a.weight": Kind.LOCAL})
    torch.save({"model0": one, "model1": more}, tmp_path / "sets/mp_rank_00/model_optim_rng.pt")
    shutil.rmtree(tmp_path / "sets/mp_rank_00_000")
    (tmp_path / "sets/mp_rank_01").mkdir()
    torch.save({"model0": one}, tmp_path / "sets/mp_rank_01/model_optim_rng.pt")
    with pytest.raises(ConfigError, match=rf"{place} holds 1 virtual stages, {place} 2"):
        RankFiles(Folder(tmp_path / "sets"), "", lambda name: False)


def save_by_megatron(run, layout, folder: Path, metadata: dict | None) -> dict | None:
    """dist_checkpointing.save of a model and of other things; the whole tensors on rank 0."""
    filesystem_async._process_memory = int  # it only logs the number, and needs psutil for that
    groups.initialize(layout, seed=1)
    (model,), parts = build_all(run, layout)
    rank = torch.distributed.get_rank()
    extra = {
        "args": argparse.Namespace(**to_args(run.model), kind=Kind.LOCAL),
        "iteration": 7,
        "rng": ShardedObject("rng_state", {"seed": rank}, (4,), (rank,), replica_id=0),
        "moment": ShardedTensor.from_rank_offsets("optimizer.exp_avg", torch.full((3,), float(rank)), (0, rank, 4)),
    }
    dist_checkpointing.save(model.language_model.sharded_state_dict(metadata=metadata) | extra, str(folder))
    full = whole(parts)
    groups.shut_down()
    return {name.removeprefix("language_model."): value for name, value in full.items()} if rank == 0 else None


@pytest.fixture(scope="module")
def by_megatron(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A directory that Megatron wrote at TP2 PP2, its equal layers stacked, and the whole tensors in it."""
    folder = tmp_path_factory.mktemp("megatron")
    run, layout = sharded(RUN, "tp2_pp2")
    return folder, run_ranks(save_by_megatron, 4, run, layout, folder, None)[0]


def cut(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(size // 3, size - size // 4) for size in shape)


def unpadded(reader, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The vocabulary's padding depends on the layout that wrote it."""
    return reader.read(name)[: len(tensor)]


def test_a_directory_of_megatrons_reads(by_megatron, tmp_path: Path) -> None:
    folder, full = by_megatron
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder, "./model_weights")
    for reader in (TorchDist(Folder(folder)), TorchDist(Tar(tmp_path / "a.tar"), "model_weights/")):
        assert reader.shape("decoder.layers.mlp.linear_fc1.weight") == (4, 192, 48)
        assert reader.read("optimizer.exp_avg").tolist() == [float(rank) for rank in range(4) for _ in range(3)]
        assert {"rng_state/shard_0_4", "rng_state/shard_3_4"} < reader.objects
        layers = single_layers(reader)
        assert layers.names() == set(full) | {"optimizer.exp_avg"}
        for name, tensor in full.items():
            found = unpadded(layers, name, tensor)
            assert found.dtype is tensor.dtype and torch.equal(found, tensor), name
            slices = cut(tuple(tensor.shape))
            assert torch.equal(layers.read(name, slices), tensor[slices]), name
    common = torch_file.load(Folder(folder).span("common.pt"))
    assert (common["iteration"], common["args"].fields()["num_layers"]) == (7, 4)


def test_a_directory_of_megatrons_opens_as_a_model(by_megatron, tmp_path: Path) -> None:
    """By its own arguments; and whatever else it holds is known or refused."""
    shutil.copytree(by_megatron[0], tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    source = open_megatron(tmp_path)
    assert source.model == RUN.model
    assert source.reader.names() == {f"language_model.{name}" for name in by_megatron[1]}
    for name, tensor in by_megatron[1].items():
        assert torch.equal(source.reader.read(f"language_model.{name}"), tensor), name


def test_one_chunk_is_a_view_and_nothing_else_is_touched(by_megatron, tmp_path: Path) -> None:
    folder, full = by_megatron
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    name = "decoder.layers.mlp.linear_fc2.weight"
    reader = TorchDist(Folder(tmp_path))
    place = next(chunk.place for chunk in reader.entries[name].chunks if chunk.offsets == (0, 0, 0))
    for file in tmp_path.glob("*.distcp"):
        if file.name != place[0]:
            file.unlink()
    reader = TorchDist(Folder(tmp_path))
    box = (slice(0, 1), slice(5, 9), slice(0, 48))  # of the first tensor-parallel rank of the first stage
    first, again = reader.read(name, box), reader.read(name, box)
    assert first.data_ptr() == again.data_ptr()
    assert torch.equal(first[0], full["decoder.layers.0.mlp.linear_fc2.weight"][5:9, :48])
    with pytest.raises(ConfigError, match=rf"has no __\d_\d.distcp, in the tensor '{name}'"):
        reader.read(name)


def test_a_directory_cut_short_names_file_and_tensor(by_megatron, tmp_path: Path) -> None:
    shutil.copytree(by_megatron[0], tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("*.distcp"):
        os.truncate(file, 1000)
    reader = TorchDist(Folder(tmp_path))
    with pytest.raises(ConfigError, match=r"__\d_\d.distcp: cut short .*, in the tensor 'output_layer.weight'"):
        reader.read("output_layer.weight")
    os.truncate(tmp_path / ".metadata", 1000)
    with pytest.raises(ConfigError, match=r".metadata: its pickle is damaged"):
        TorchDist(Folder(tmp_path))
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ConfigError, match=r".metadata: not a table of tensors"):
        TorchDist(Folder(tmp_path))


def fused_norms(state: dict) -> dict:
    """The names of Transformer Engine's layers; in this process Megatron's local ones run."""
    norms = {
        ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
        ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
    }
    for old, new in norms.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


def save_ranks(run, layout, folder: Path) -> dict | None:
    """Every rank's own state, as Megatron's legacy checkpoints keep it; the whole tensors on rank 0."""
    groups.initialize(layout, seed=1)
    chunks, parts = build_all(run, layout)
    tensor, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    states = [fused_norms(model.language_model.state_dict_for_save_checkpoint()) for model in chunks]
    content = {"model": states[0]} if len(states) == 1 else {f"model{n}": state for n, state in enumerate(states)}
    last = layout.pipeline == 1
    path = folder / (f"mp_rank_{tensor:02d}" if last else f"mp_rank_{tensor:02d}_{stage:03d}") / "model_optim_rng.pt"
    path.parent.mkdir()
    torch.save(content | {"args": argparse.Namespace(kind=Kind.LOCAL), "checkpoint_version": 3.0, "iteration": 7}, path)
    full = whole(parts)
    groups.shut_down()
    first = torch.distributed.get_rank() == 0
    return {name.removeprefix("language_model."): value for name, value in full.items()} if first else None


@pytest.mark.parametrize(
    ("layout", "stages", "config"),
    [
        ("tp2_pp2", (1, 3), TINY["gpt"]),
        ("pp2_vpp2", (1, 1, 1, 1), TINY["gpt"]),
        ("tp2", (4,), biased(TINY["gpt"])),
        ("pp2", (2, 2), tied(TINY["gpt"])),
    ],
)
def test_files_of_ranks(layout: str, stages: tuple[int, ...], config, tmp_path: Path) -> None:
    """Read like the whole model, and written as each rank would write its own."""
    run, where = sharded(run_of("gpt", config), layout)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    full = run_ranks(save_ranks, where.world_size, run, replace(where, stage_layers=stages), theirs)[0]
    reader = RankFiles(Folder(theirs), "", lambda name: is_gated(name, ("decoder.",)))
    for name, tensor in full.items():
        found = unpadded(reader, name, tensor)
        assert found.dtype is tensor.dtype and torch.equal(found, tensor), name
        slices = cut(tuple(tensor.shape))
        assert torch.equal(reader.read(name, slices), tensor[slices]), name
    if layout != "pp2_vpp2":
        padded = reader.shape("embedding.word_embeddings.weight")[0]
        shared = config.share_embeddings_and_output_weights
        write(ours, InMemory(full), Ranks(where.tensor, stages, padded, tied=shared), {"num_layers": 4}, 7)
        for path in theirs.glob("*/model_optim_rng.pt"):
            assert_same_file(path, ours / path.relative_to(theirs))


def assert_same_file(theirs: Path, ours: Path) -> None:
    expected = torch.load(theirs, weights_only=False)["model"]
    with torch.serialization.safe_globals([argparse.Namespace]):
        for mapped in (False, True):
            found = torch.load(ours, weights_only=True, mmap=mapped)
            assert found["model"].keys() == expected.keys()
            for name, value in expected.items():
                assert found["model"][name] is value is None or torch.equal(found["model"][name], value), name
            assert (found["checkpoint_version"], found["iteration"], found["args"].num_layers) == (3.0, 7, 4)


def load_by_megatron(run, layout, folder: Path, full: dict) -> bool:
    """dist_checkpointing.load of a model, extra states included: the right weights on this rank?"""
    groups.initialize(layout, seed=1)
    (model,), parts = build_all(run, layout)
    for part in parts:
        part.data.zero_()
    state = dist_checkpointing.load(model.language_model.sharded_state_dict(), str(folder))
    model.language_model.load_state_dict({name: state[name] for name in state if "." in name})
    wanted = [full[part.name.removeprefix("language_model.")][part.slices] for part in parts]
    groups.shut_down()
    return all(torch.equal(part.data, value) for part, value in zip(parts, wanted, strict=True))


def test_megatron_reads_a_directory_of_ours(by_megatron, tmp_path: Path) -> None:
    """Stacked as Megatron would; the vocabulary without padding."""
    full = by_megatron[1]
    torch_dist_writer.write(tmp_path, InMemory(full), {"iteration": 7, "args": argparse.Namespace(num_layers=4)})
    reader = single_layers(TorchDist(Folder(tmp_path)))
    assert reader.names() == set(full) and all(torch.equal(reader.read(name), full[name]) for name in full)
    run, layout = sharded(RUN, "tp2_pp2")
    assert all(run_ranks(load_by_megatron, 4, run, layout, tmp_path, full))


def load_tower_by_megatron(run, layout, folder: Path, full: dict) -> bool:
    """dist_checkpointing.load of Megatron's own CLIPViTModel: the right weights on this rank?"""
    groups.initialize(layout, seed=1)
    vision, build = run.model.mm_cfg.vision_encoder, context(layout)
    config = vision_config(vision_shape(vision), build, split=True)
    norm = norm_class(config, build.kernels)
    size = dict(patch_dim=vision.patch_dim, img_h=vision.image_size, img_w=vision.image_size)
    tower = CLIPViTModel(config, layer_spec(config, build.kernels, causal=False), norm, norm, **size)
    wanted = tower.sharded_state_dict(prefix="vision_model.")
    keys = {entry.key for entry in wanted.values() if isinstance(entry, ShardedTensor)}
    stacked = {key for key in keys if ".layers." in key}
    assert stacked and all(key.startswith("vision_model.decoder.layers.") for key in stacked)
    assert not any(key.removeprefix("vision_model.decoder.layers.")[0].isdigit() for key in stacked)
    state = dist_checkpointing.load(wanted, str(folder))
    rank, right = parallel_state.get_tensor_model_parallel_rank(), []
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            ours = full[fused_norms({name.replace(".decoder.", "."): None}).popitem()[0]]
            axis = next((dim for dim, size in enumerate(value.shape) if ours.shape[dim] != size), 0)
            part = ours.narrow(axis, rank * value.shape[axis] if value.shape != ours.shape else 0, value.shape[axis])
            right.append(torch.equal(value, part))
    groups.shut_down()
    return len(right) == len(list(tower.parameters())) and all(right)


def test_megatron_reads_a_vision_tower_of_ours(tmp_path: Path) -> None:
    """A LLaVA's blocks are stacked all alike: Megatron asks for all of them in one way."""
    config = TINY["llava"]
    rules, draw = family("llava", "mapping").rules(config), torch.Generator().manual_seed(1)
    full = {rule.ours: torch.randn(rule.shape, generator=draw) for rule in rules}
    source = Source(Path("llava"), {"family": "llava", **plain(config)}, InMemory(full))
    to_megatron(source, Target(tmp_path / "out"), Export("torch_dist"))
    run, layout = sharded(run_of("llava", config), "tp2")
    assert all(run_ranks(load_tower_by_megatron, 2, run, layout, tmp_path / "out/release", full))
