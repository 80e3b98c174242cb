"""Megatron's legacy checkpoints written: a file for each tensor- and pipeline-parallel rank, tensor by tensor.

A file is laid out by torch.save without data, and filled in place through a mapping of it: memory is bounded by one
tensor, whatever the size of the model.
"""

from __future__ import annotations

import argparse
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from nemo_vlm.errors import ConfigError
from nemo_vlm.files import sync
from nemo_vlm.formats import torch_file
from nemo_vlm.formats.rank_files import LAYER, axis_of, is_gated
from nemo_vlm.formats.reader import Reader, Shape
from nemo_vlm.formats.store import Span
from nemo_vlm.formats.torch_dist_writer import WITH_STATE

FILE = "model_optim_rng.pt"


@dataclass(frozen=True)
class Ranks:
    """How a model is divided.

    Attributes:
        tensor: tensor-parallel ranks.
        stage_layers: layers of the language model on each pipeline stage; the first one holds all else that comes
            before them, towers included.
        embedding: the stage that the language model's embedding stands on.
        decoder: beginning of the names of the language model's decoder, "decoder.".
        gated: beginnings of names of modules whose fc1 is gated.
        padded_vocab_size: rows of zeros follow the vocabulary up to this.
        tied: the last stage repeats embeddings that stand on an earlier one as its output layer.
    """

    tensor: int
    stage_layers: tuple[int, ...]
    padded_vocab_size: int
    embedding: int = 0
    decoder: str = "decoder."
    gated: tuple[str, ...] = ("decoder.",)
    tied: bool = False

    @property
    def top(self) -> str:
        """Beginning of the language model's names."""
        return self.decoder.removesuffix("decoder.")

    def folder(self, tensor: int, stage: int) -> str:
        return f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if len(self.stage_layers) > 1 else "")

    def place(self, name: str) -> tuple[int, str]:
        """The stage of a tensor, and its name there."""
        layer = LAYER.fullmatch(name)
        if layer and layer["front"] == f"{self.decoder}layers.":
            number = int(layer["number"])
            for stage, count in enumerate(self.stage_layers):
                if number < count:
                    return stage, f"{layer['front']}{number}{layer['rest']}"
                number -= count
            raise ConfigError(f"layers {self.stage_layers} on the stages: the model has more, '{name}'")
        if name.startswith(f"{self.top}embedding."):
            return self.embedding, name
        behind = name.startswith((self.decoder, f"{self.top}output_layer."))
        return len(self.stage_layers) - 1 if behind else 0, name


def write(folder: Path, reader: Reader, ranks: Ranks, args: Mapping[str, Any], iteration: int) -> None:
    """Every rank's file.

    Args:
        reader: whole tensors under Megatron's names, without padding.
        args: the model's arguments as Megatron's; sizes of the layout are added.
    Raises:
        ConfigError: a tensor does not divide.
    """
    layout = {
        "tensor_model_parallel_size": ranks.tensor,
        "pipeline_model_parallel_size": len(ranks.stage_layers),
        "padded_vocab_size": ranks.padded_vocab_size,
        "iteration": iteration,
    }
    names = [contents(reader, ranks, stage) for stage in range(len(ranks.stage_layers))]
    for stage, placed in enumerate(names):
        for tensor in range(ranks.tensor):
            path = folder / ranks.folder(tensor, stage) / FILE
            path.parent.mkdir(parents=True)
            rest = {
                "args": argparse.Namespace(**args, **layout),
                "checkpoint_version": 3.0,
                "iteration": iteration,
                "model": extra_states(placed, ranks, stage),
            }
            write_file(path, reader, ranks, placed, rest, tensor)


def contents(reader: Reader, ranks: Ranks, stage: int) -> dict[str, str]:
    """A stage's tensors: their names there, and in the whole model."""
    found = {}
    for name in sorted(reader.names()):
        place, local = ranks.place(name)
        if place == stage:
            found[local] = name
    if ranks.tied and ranks.embedding < stage == len(ranks.stage_layers) - 1:
        found[f"{ranks.top}output_layer.weight"] = f"{ranks.top}embedding.word_embeddings.weight"
    return found


def extra_states(names: Iterable[str], ranks: Ranks, stage: int) -> dict[str, None]:
    """What a stage's linear layers would keep for Transformer Engine; Megatron insists on the names."""
    found = [f"{match['module']}._extra_state" for name in names if (match := WITH_STATE.fullmatch(name))]
    last = [f"{ranks.top}output_layer._extra_state"] if stage == len(ranks.stage_layers) - 1 else []
    return dict.fromkeys(found + last)


def write_file(
    path: Path, reader: Reader, ranks: Ranks, names: Mapping[str, str], rest: dict[str, Any], tensor: int
) -> None:
    """The file of a rank; on disk when this returns.

    Args:
        names: the rank's tensors there, and in the reader.
        rest: what else the file holds; of `model` what is no tensor.
    """
    with FakeTensorMode():
        model = {
            local: torch.empty(local_shape(reader, ranks, name), dtype=reader.dtype(name))
            for local, name in names.items()
        }
    with skip_data(materialize_fake_tensors=True):
        torch.save({**rest, "model": model | rest["model"]}, path)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        fill(Span(memory, 0, len(memory), str(path)), reader, ranks, names, tensor)
        memory.flush()
    sync(path)


def fill(file: Span, reader: Reader, ranks: Ranks, names: Mapping[str, str], tensor: int) -> None:
    """Write a rank's parts to where they lie."""
    model = torch_file.load(file)["model"]
    for local, name in names.items():
        target = model[local]
        for source, goal in runs(reader, ranks, name, tensor):
            target[goal].copy_(source)


def local_shape(reader: Reader, ranks: Ranks, name: str) -> Shape:
    """Of every tensor-parallel rank's part.

    Raises:
        ConfigError: the tensor does not divide.
    """
    shape, axis = list(padded_shape(reader, ranks, name)), axis_of(name)
    if axis is None:
        return tuple(shape)
    parts = ranks.tensor * (2 if is_gated(name, ranks.gated) else 1)
    if shape[axis] % parts:
        raise ConfigError(f"{reader}: the tensor '{name}' of shape {tuple(shape)} does not divide into {parts} parts")
    shape[axis] //= ranks.tensor
    return tuple(shape)


def padded_shape(reader: Reader, ranks: Ranks, name: str) -> Shape:
    vocabulary = (f"{ranks.top}embedding.word_embeddings.weight", f"{ranks.top}output_layer.weight")
    shape = reader.shape(name)
    return (ranks.padded_vocab_size, *shape[1:]) if name in vocabulary else shape


def runs(reader: Reader, ranks: Ranks, name: str, tensor: int) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
    """What a rank holds of a tensor, one run after another along the sharded dimension, and where it goes."""
    axis, shape = axis_of(name), local_shape(reader, ranks, name)
    if axis is None:
        yield reader.read(name), (slice(None),) * len(shape)
        return
    halves = 2 if is_gated(name, ranks.gated) else 1
    size, whole = shape[axis] // halves, reader.shape(name)
    for half in range(halves):
        first = (half * ranks.tensor + tensor) * size
        last = min(first + size, whole[axis])  # behind the vocabulary there is its padding
        goal = [slice(0, length) for length in shape]
        goal[axis] = slice(half * size, (half + 1) * size)
        source = [slice(0, length) for length in whole]
        source[axis] = slice(min(first, last), last)
        filled = max(last - first, 0)
        values = reader.read(name, tuple(source))
        if filled < size:
            missing = [size - filled if dim == axis else length for dim, length in enumerate(shape)]
            values = torch.cat([values, torch.zeros(missing, dtype=values.dtype)], axis)
        yield values, tuple(goal)
