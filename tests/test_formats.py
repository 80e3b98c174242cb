"""Files of torch and Megatron, read in place: against torch's and Megatron's own readers; bombs do not go off."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
import shutil
import tarfile
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
from test_families import TINY, biased, build_all, run_of, sharded, tied, whole

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats import torch_dist_writer, torch_file
from nemo_vlm.formats.rank_files import RankFiles
from nemo_vlm.formats.rank_files_writer import Ranks, write
from nemo_vlm.formats.reader import InMemory
from nemo_vlm.formats.stacked import Unstacked
from nemo_vlm.formats.store import Folder, Tar
from nemo_vlm.formats.torch_dist import TorchDist
from nemo_vlm.mcore import groups
from nemo_vlm.sources.megatron import open_megatron
from nemo_vlm.sources.megatron_args import to_args

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
        layers = Unstacked(reader)
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
    reader = RankFiles(Folder(theirs), gated=("decoder.",))
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
    reader = Unstacked(TorchDist(Folder(tmp_path)))
    assert reader.names() == set(full) and all(torch.equal(reader.read(name), full[name]) for name in full)
    run, layout = sharded(RUN, "tp2_pp2")
    assert all(run_ranks(load_by_megatron, 4, run, layout, tmp_path, full))
