"""Weights by their full name and shape, whatever the layout: drawn, read and gathered.

Megatron's sharded_state_dict knows, for every parameter of a rank, the name and shape of the whole tensor and which
part of it this rank holds: global layer number, gate and up halves, query groups. The vocabulary's padding, which
depends on the layout, is not part of the whole tensor. That is read once, as regions of each parameter, before
gradient buffers or FSDP move the parameters; any run of a parameter's elements (a shard of the distributed optimizer
or of FSDP, a moment of Adam) then has its place in the whole tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from nemo_vlm import heartbeat
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import Reader, Slices, listed
from nemo_vlm.formats.stacked import EXPERTS
from nemo_vlm.mcore import cpu
from nemo_vlm.mcore.groups import from_every_rank, send

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Region:
    """A run of a local parameter's elements, in memory order, that is a box of the whole tensor `name`.

    Attributes:
        shape: of the whole tensor, without padding.
        slices: where the box lies in the whole.
        start: first element of the run in the flattened parameter.
        primary: False for a tied weight's copy on another pipeline stage.
    """

    name: str
    shape: tuple[int, ...]
    slices: Slices
    start: int
    primary: bool

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.slices)


Regions = dict[str, list[Region]]  # by the parameter's name in its module


@dataclass(frozen=True)
class Part:
    """A part of the whole tensor `name`, held by this rank as a view of its memory."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    slices: Slices  # where the part lies in the whole
    data: Tensor
    primary: bool = True

    @property
    def bounds(self) -> Bounds:
        return tuple((s.start, s.stop) for s in self.slices)


def regions(model: nn.Module, vocab_size: int) -> Regions:
    """Where each parameter of a freshly built model lies in whole tensors. Tied weights appear once."""
    shards: dict = {}
    for name, child in model.named_children():
        shards |= sharded_state_dict_default(child, f"{name}.", metadata={"non_homogeneous_layers": True})
    apply_factories(shards)  # a gated linear_fc1 becomes two shards, which are views of the parameter
    flat = [shard for entry in shards.values() for shard in (entry if isinstance(entry, list) else [entry])]
    names = {memory(parameter): name for name, parameter in model.named_parameters()}
    found: Regions = {name: [] for name in names.values()}
    for shard in flat:
        if isinstance(shard, ShardedTensor):
            found[names[memory(shard.data)]].append(region_of(shard, vocab_size))
    return found


def memory(tensor: Tensor) -> int:
    """Tells parameters apart by their memory, which views share; data_ptr() is 0 for all on the meta device."""
    return tensor.untyped_storage()._cdata


def region_of(shard: ShardedTensor, vocab_size: int) -> Region:
    shape = list(shard.global_shape)
    if shard.allow_shape_mismatch:  # Megatron's mark of the vocabulary
        shape[0] = vocab_size
    local_shape = (*[1] * shard.prepend_axis_num, *shard.local_shape)  # one of a layer's experts
    ends = [
        min(offset + size, limit) for offset, size, limit in zip(shard.global_offset, local_shape, shape, strict=True)
    ]
    slices = tuple(slice(min(offset, end), end) for offset, end in zip(shard.global_offset, ends, strict=True))
    copy = isinstance(shard.replica_id, tuple) and shard.replica_id[0] > 0
    return Region(shard.key, tuple(shape), slices, shard.data.storage_offset(), not copy)


def view(places: list[Region], values: Tensor, first: int = 0) -> list[Part]:
    """A run of a parameter's elements as parts of whole tensors.

    Args:
        places: the parameter's regions.
        values: the run, contiguous.
        first: its first element in the flattened parameter.
    """
    flat = values.detach().view(-1)
    parts = []
    for place in places:
        begin = max(place.start, first)
        end = min(place.start + math.prod(place.size), first + len(flat))
        at = begin - first
        for offsets, size in boxes(place.size, begin - place.start, end - place.start):
            slices = tuple(
                slice(s.start + offset, s.start + offset + length)
                for s, offset, length in zip(place.slices, offsets, size, strict=True)
            )
            data = flat[at : at + math.prod(size)].view(size)
            parts.append(Part(place.name, place.shape, slices, data, place.primary))
            at += math.prod(size)
    return parts


def boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements [begin, end) of a tensor in memory order as boxes (offsets, size), in the same order."""
    if begin >= end:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row  # whole rows
    edges = [(begin, min(end, first * row)), (max(begin, last * row), end)] if first <= last else [(begin, end)]
    for number, (start, stop) in enumerate(edges):
        if number == 1 and first < last:
            yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
        index = start // row
        for offsets, size in boxes(shape[1:], start - index * row, stop - index * row):
            yield (index, *offsets), (1, *size)


def parts(model: nn.Module, vocab_size: int) -> list[Part]:
    """Every parameter of a freshly built model as parts of whole tensors."""
    places = regions(model, vocab_size)
    return [part for name, parameter in model.named_parameters() for part in view(places[name], parameter.data)]


@torch.no_grad()
def draw(model_parts: list[Part], seed: int, std: float, num_layers: int) -> None:
    """Initial values for any layout: each whole tensor is drawn from its own name, a rank keeps its part.

    Norm weights are 1, biases 0; the rest is normal with `std`, the layers that write into the residual stream
    with std / sqrt(2 * num_layers) (GPT-2's rule, Megatron's scaled_init_method_normal). Of stacked experts each is
    drawn for itself, so that a rank draws only those that it holds.
    """
    pieces = [piece for part in model_parts for piece in by_expert(part)]
    for name, same in groupby(sorted(pieces, key=by_name), by_name):  # such as gate and up
        heartbeat.at("drawing weights")
        first, *others = same
        residual = ".linear_proj.weight" in name or ".linear_fc2.weight" in name
        whole = whole_initial(first, seed, std / (2 * num_layers) ** 0.5 if residual else std)
        for part in (first, *others):
            part.data.copy_(whole[part.slices])


def by_expert(part: Part) -> list[Part]:
    """Each expert of a stacked tensor's part, as Megatron's TEGroupedMLP names it; any other part as it is."""
    if not EXPERTS.fullmatch(part.name):
        return [part]
    entries = enumerate(part.data, part.slices[0].start)
    return [Part(f"{part.name}{entry}", part.shape[1:], part.slices[1:], data) for entry, data in entries]


def by_name(part: Part) -> str:
    return part.name


def whole_initial(part: Part, seed: int, std: float) -> Tensor:
    if part.name.endswith("bias"):
        return torch.zeros(part.shape)
    if len(part.shape) == 1:
        return torch.ones(part.shape)
    return torch.empty(part.shape).normal_(0.0, std, generator=generator(seed, part.name))


def generator(seed: int, name: str) -> torch.Generator:
    """That of a tensor, by its name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def fill(model_parts: Iterable[Part], reader: Reader) -> None:
    """Read this rank's parts of whole tensors, in place.

    Raises:
        ConfigError: a tensor is missing or has another shape.
    """
    stored = reader.names()
    for part in model_parts:
        if part.name not in stored:
            raise ConfigError(f"{reader}: the tensor '{part.name}' is missing")
        if (shape := reader.shape(part.name)) != part.shape:
            raise ConfigError(
                f"{reader}: the tensor '{part.name}' has shape {shape}, this run's model needs {part.shape}"
            )
        part.data.copy_(reader.read(part.name, part.slices))


def load(model_parts: list[Part], reader: Reader) -> None:
    """As fill, on all ranks together, which must use all that is there.

    Raises:
        ConfigError: as fill, or a tensor is left over.
    """
    fill(model_parts, reader)
    held = from_every_rank({part.name for part in model_parts})
    if extra := reader.names() - set().union(*held):
        raise ConfigError(f"{reader}: the model has no place for the tensors {listed(sorted(extra))}")


@dataclass(frozen=True)
class Placement:
    """Who holds which part of a whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    holders: dict[Bounds, int]  # the rank of each part


def placements(model_parts: list[Part]) -> dict[str, Placement]:
    """All whole tensors over all ranks, in a fixed order; each part is taken from the lowest rank that has it."""
    mine = [(part.name, part.shape, part.data.dtype, part.bounds) for part in model_parts if part.primary]
    holders: dict[str, dict[Bounds, int]] = {}
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for rank, theirs in enumerate(from_every_rank(mine)):
        for name, shape, dtype, bounds in theirs:
            kinds[name] = (shape, dtype)
            holders.setdefault(name, {}).setdefault(bounds, rank)
    return {name: Placement(*kinds[name], holders[name]) for name in sorted(kinds)}


def gather(model_parts: list[Part], placed: dict[str, Placement]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors one by one on rank 0, on the CPU; every rank must run through it, the others get nothing."""
    rank, device = torch.distributed.get_rank(), cpu.device()
    mine = {(part.name, part.bounds): part.data for part in model_parts}
    for name, placement in placed.items():
        heartbeat.at("gathering weights")  # a large model's take longer than any step
        if rank == 0:
            yield name, collect(name, placement, mine, device)
            continue
        for bounds, holder in placement.holders.items():
            if holder == rank:
                send(mine[name, bounds].contiguous(), 0)


def collect(name: str, placement: Placement, mine: dict, device: torch.device) -> Tensor:
    """Rank 0's side of gather, for one tensor."""
    whole = torch.empty(placement.shape, dtype=placement.dtype)
    for bounds, holder in placement.holders.items():
        if holder == 0:
            part = mine[name, bounds]
        else:
            part = torch.empty([end - start for start, end in bounds], dtype=placement.dtype, device=device)
            torch.distributed.recv(part, holder)
        whole[tuple(slice(*bound) for bound in bounds)] = part.cpu()
    return whole
