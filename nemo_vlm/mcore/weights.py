"""Weights by their full name and shape, whatever the layout: drawn, read and gathered.

Megatron's sharded_state_dict knows, for every parameter of a rank, the name and shape of the whole tensor and which
part of it this rank holds: global layer number, gate and up halves, query groups. The vocabulary's padding, which
depends on the layout, is not part of the whole tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from nemo_vlm.errors import ConfigError

Slices = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """A part of the whole tensor `name`, held by this rank as a view of a parameter.

    Attributes:
        shape: of the whole tensor, without padding.
        slices: where the part lies in the whole.
        data: the parameter's memory; with padding rows, if any, at the end.
    """

    name: str
    shape: tuple[int, ...]
    slices: Slices
    data: Tensor

    @property
    def bounds(self) -> Bounds:
        return tuple((s.start, s.stop) for s in self.slices)

    @property
    def inner(self) -> Tensor:
        """The part without padding."""
        return self.data[tuple(slice(0, s.stop - s.start) for s in self.slices)]


class Reader(Protocol):
    """Whole tensors by name, of which slices can be read."""

    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, slices: Slices) -> Tensor: ...
    def names(self) -> set[str]: ...


def parts(model: nn.Module, vocab_size: int) -> list[Part]:
    """Every parameter of this rank as parts of whole tensors. Tied weights appear once."""
    shards: dict = {}
    for name, child in model.named_children():
        shards |= sharded_state_dict_default(child, f"{name}.", metadata={"non_homogeneous_layers": True})
    apply_factories(shards)  # a gated linear_fc1 becomes two shards, which are views of the parameter
    flat = [shard for entry in shards.values() for shard in (entry if isinstance(entry, list) else [entry])]
    return [part_of(shard, vocab_size) for shard in flat if isinstance(shard, ShardedTensor)]


def part_of(shard: ShardedTensor, vocab_size: int) -> Part:
    shape = list(shard.global_shape)
    if shard.allow_shape_mismatch:  # Megatron's mark of the vocabulary
        shape[0] = vocab_size
    ends = [
        min(offset + size, limit)
        for offset, size, limit in zip(shard.global_offset, shard.local_shape, shape, strict=True)
    ]
    slices = tuple(slice(min(offset, end), end) for offset, end in zip(shard.global_offset, ends, strict=True))
    return Part(shard.key, tuple(shape), slices, shard.data.detach())


@torch.no_grad()
def draw(model_parts: list[Part], seed: int, std: float, num_layers: int) -> None:
    """Initial values for any layout: each whole tensor is drawn from its own name, a rank keeps its part.

    Norm weights are 1, biases 0; the rest is normal with `std`, the layers that write into the residual stream
    with std / sqrt(2 * num_layers) (GPT-2's rule, Megatron's scaled_init_method_normal).
    """
    for part in model_parts:
        part.data.zero_()
        residual = ".linear_proj.weight" in part.name or ".linear_fc2.weight" in part.name
        part.inner.copy_(whole_initial(part, seed, std / (2 * num_layers) ** 0.5 if residual else std)[part.slices])


def whole_initial(part: Part, seed: int, std: float) -> Tensor:
    if part.name.endswith("bias"):
        return torch.zeros(part.shape)
    if len(part.shape) == 1:
        return torch.ones(part.shape)
    digest = hashlib.sha256(f"{seed}:{part.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(part.shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def load(model_parts: list[Part], reader: Reader) -> None:
    """Fill this rank's parts from whole tensors.

    Raises:
        ConfigError: a tensor is missing, has another shape, or (on a single rank, which holds all) is left over.
    """
    for part in model_parts:
        if part.name not in reader.names():
            raise ConfigError(f"{reader}: the tensor '{part.name}' is missing")
        if reader.shape(part.name) != part.shape:
            raise ConfigError(
                f"{reader}: the tensor '{part.name}' has shape {reader.shape(part.name)}, the model needs {part.shape}"
            )
        part.data.zero_()
        part.inner.copy_(reader.read(part.name, part.slices))
    held = gather_objects({part.name for part in model_parts})
    extra = reader.names() - set().union(*held)
    if extra:
        raise ConfigError(f"{reader}: the model has no place for the tensors {', '.join(sorted(extra)[:5])}")


@dataclass(frozen=True)
class Placement:
    """Who holds which part of a whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    holders: dict[Bounds, int]  # the rank of each part


def placements(model_parts: list[Part]) -> dict[str, Placement]:
    """All whole tensors over all ranks, in a fixed order; each part is taken from the lowest rank that has it."""
    mine = [(part.name, part.shape, part.data.dtype, part.bounds) for part in model_parts]
    holders: dict[str, dict[Bounds, int]] = {}
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for rank, theirs in enumerate(gather_objects(mine)):
        for name, shape, dtype, bounds in theirs:
            kinds[name] = (shape, dtype)
            holders.setdefault(name, {}).setdefault(bounds, rank)
    return {name: Placement(*kinds[name], holders[name]) for name in sorted(kinds)}


def gather(model_parts: list[Part], placed: dict[str, Placement]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors one by one on rank 0, on the CPU; every rank must run through it, the others get nothing."""
    rank, device = torch.distributed.get_rank(), model_parts[0].data.device
    mine = {(part.name, part.bounds): part.inner for part in model_parts}
    for name, placement in placed.items():
        if rank == 0:
            yield name, collect(name, placement, mine, device)
            continue
        for bounds, holder in placement.holders.items():
            if holder == rank:
                torch.distributed.send(mine[name, bounds].contiguous(), 0)


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


def gather_objects(mine: object) -> list:
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
