"""Weight rules as data: one table a family, read in both directions between Hugging Face's tensors and ours.

A rule joins one tensor of ours with one or several of theirs, and knows all their shapes. A table over a reader of one
side is a reader of the other: tensors are made one by one, and a slice of one touches only what it needs. A table that
leaves a tensor of either side unused is an error. Tensors are whole (see mcore.weights), so rules know no layouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.reader import Reader, Shape, Slices, check_names, whole
from nemo_vlm.formats.stacked import Unstacked

# For Variant.names: norms as modules of their own, as in Megatron's layers without Transformer Engine.
SEPARATE_NORMS = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class Variant:
    """How a derivative of Megatron-LM writes a family's checkpoints.

    Attributes:
        names: beginnings of our names, or parts that begin with a dot, and what they are there.
        pads: whether it pads the vocabulary, as Megatron-LM, or keeps the rows that Hugging Face's file has.
        args_tell: whether the arguments in its checkpoints are the model's; else they are Megatron's defaults.
        embeds_first: whether the first pipeline stage has the embedding even where it has no layer; else it stands on
            the first one with layers.
        lists_moe_layers: whether its moe_layer_freq is a list where there are experts; Megatron then stacks no layers
            in torch_dist.
    """

    names: Mapping[str, str]
    pads: bool = False
    args_tell: bool = True
    embeds_first: bool = True
    lists_moe_layers: bool = False

    def name_of(self, ours: str) -> str:
        """What it calls a tensor of ours."""
        for part in self.names:
            if part.startswith("."):
                ours = ours.replace(part, self.names[part])
        front = max((old for old in self.names if ours.startswith(old)), key=len, default=None)
        return ours if front is None else self.names[front] + ours.removeprefix(front)


class Rule(Protocol):
    """One tensor of ours and its counterparts."""

    @property
    def ours(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def theirs(self) -> Mapping[str, Shape]: ...
    def join(self, theirs: Reader, slices: Slices) -> Tensor:
        """Ours, or a slice of it, from their tensors."""
        ...

    def split(self, ours: Reader, name: str, slices: Slices) -> Tensor:
        """Theirs of that name, or a slice of it, from our tensor."""
        ...


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a tensor."""

    name: str
    first: int
    last: int  # the row behind it

    @property
    def length(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Rows:
    """Our tensor is made of rows of theirs: renamed, or several fused into one.

    Attributes:
        runs: rows of their tensors, in our order; together they are all rows of all of them.
        rest: the shape behind the first dimension, which is the same everywhere.
    """

    ours: str
    runs: tuple[Run, ...]
    rest: Shape = ()

    @cached_property
    def shape(self) -> Shape:
        return (sum(run.length for run in self.runs), *self.rest)

    @cached_property
    def theirs(self) -> Mapping[str, Shape]:
        rows: dict[str, int] = {}
        for run in self.runs:
            rows[run.name] = max(run.last, rows[run.name]) if run.name in rows else run.last
        return {name: (count, *self.rest) for name, count in rows.items()}

    def join(self, theirs: Reader, slices: Slices) -> Tensor:
        return read_runs(theirs, self.runs, slices or whole(self.shape))

    def split(self, ours: Reader, name: str, slices: Slices) -> Tensor:
        borders = pairwise(accumulate((run.length for run in self.runs), initial=0))
        places = sorted(
            (run.first, Run(self.ours, start, end))
            for (start, end), run in zip(borders, self.runs, strict=True)
            if run.name == name
        )
        return read_runs(ours, [run for _, run in places], slices or whole(self.theirs[name]))


def read_runs(reader: Reader, runs: Sequence[Run], slices: Slices) -> Tensor:
    """A slice of the tensor that the runs make, one after another; a view where one run holds all of it."""
    wanted, *rest = slices
    found: list[Tensor] = []
    at = 0
    for run in runs:
        start, stop = max(wanted.start, at), min(wanted.stop, at + run.length)
        if start < stop or not found and run is runs[-1]:  # nothing is a tensor, too
            rows = slice(run.first + start - at, run.first + max(start, stop) - at)
            found.append(reader.read(run.name, (rows, *rest)))
        at += run.length
    return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True)
class Reshape:
    """The same values in another shape; for small tensors, which are read whole."""

    ours: str
    shape: Shape
    their_name: str
    their_shape: Shape

    @property
    def theirs(self) -> Mapping[str, Shape]:
        return {self.their_name: self.their_shape}

    def join(self, theirs: Reader, slices: Slices) -> Tensor:
        return theirs.read(self.their_name).reshape(self.shape)[slices]

    def split(self, ours: Reader, name: str, slices: Slices) -> Tensor:
        return ours.read(self.ours).reshape(self.their_shape)[slices]


@dataclass(frozen=True)
class Swapped:
    """Theirs with its last two axes the other way round; a slice is a transposed view of the same slice of theirs."""

    ours: str
    shape: Shape
    their_name: str

    @property
    def theirs(self) -> Mapping[str, Shape]:
        return {self.their_name: swapped(self.shape)}

    def join(self, theirs: Reader, slices: Slices) -> Tensor:
        return theirs.read(self.their_name, self.swapped(slices)).mT

    def split(self, ours: Reader, name: str, slices: Slices) -> Tensor:
        return ours.read(self.ours, self.swapped(slices)).mT

    def swapped(self, slices: Slices) -> Slices:
        """No slices, which mean all, stay none."""
        assert len(slices) in (0, len(self.shape))
        return swapped(slices)


@dataclass(frozen=True)
class Stacked:
    """Ours has an axis in front, of experts say, whose every entry is made by a rule of its own from theirs.

    Attributes:
        each: their rules, in order, all of one shape; what they call ours is known nowhere else.
    """

    ours: str
    each: tuple[Rows, ...]

    @cached_property
    def shape(self) -> Shape:
        return (len(self.each), *self.each[0].shape)

    @cached_property
    def owners(self) -> Mapping[str, int]:
        """The entry that each tensor of theirs is a part of."""
        return {name: number for number, rule in enumerate(self.each) for name in rule.theirs}

    @cached_property
    def theirs(self) -> Mapping[str, Shape]:
        return {name: shape for rule in self.each for name, shape in rule.theirs.items()}

    def join(self, theirs: Reader, slices: Slices) -> Tensor:
        first, *rest = slices or whole(self.shape)
        return torch.stack([rule.join(theirs, tuple(rest)) for rule in self.each[first]])

    def split(self, ours: Reader, name: str, slices: Slices) -> Tensor:
        number = self.owners[name]
        rule = self.each[number]
        return rule.split(Unstacked(ours, {rule.ours: (self.ours, number)}), name, slices)


def swapped(axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """A shape, or slices, with the last two axes the other way round."""
    return (*axes[:-2], *axes[:-3:-1])


def rename(ours: str, theirs: str, shape: Shape) -> Rows:
    """The same tensor under another name."""
    return Rows(ours, (Run(theirs, 0, shape[0]),), shape[1:])


def fuse_qkv(ours: str, names: Sequence[str], num_heads: int, num_groups: int, head_size: int, rest: Shape) -> Rows:
    """Query, key and value as Megatron's linear_qkv: group by group, the group's queries, its key, its value.

    Args:
        names: theirs, in that order; weights, or biases.
    """
    rows = (num_heads // num_groups * head_size, head_size, head_size)
    runs = [
        Run(name, group * count, (group + 1) * count)
        for group in range(num_groups)
        for name, count in zip(names, rows, strict=True)
    ]
    return Rows(ours, tuple(runs), rest)


def regroup_qkv(ours: str, theirs: str, num_heads: int, head_size: int, rest: Shape) -> Rows:
    """Query, key and value that are fused there already, one above the other, as Megatron's linear_qkv."""
    part = num_heads * head_size
    starts = [part * kind + head_size * head for head in range(num_heads) for kind in range(3)]
    return Rows(ours, tuple(Run(theirs, start, start + head_size) for start in starts), rest)


def fuse_gate_up(ours: str, gate: str, up: str, ffn_size: int, rest: Shape) -> Rows:
    """SwiGLU's two projections as Megatron's linear_fc1: the gate above, the other below."""
    return Rows(ours, (Run(gate, 0, ffn_size), Run(up, 0, ffn_size)), rest)


class Ours:
    """Their tensors under our names.

    Raises:
        ConfigError: a tensor that a rule needs is missing or has another shape, or one is left over.
    """

    def __init__(self, rules: Iterable[Rule], theirs: Reader) -> None:
        self.rules, self.theirs = {rule.ours: rule for rule in rules}, theirs
        check(theirs, {name: shape for rule in self.rules.values() for name, shape in rule.theirs.items()})

    def __str__(self) -> str:
        return str(self.theirs)

    def names(self) -> set[str]:
        return set(self.rules)

    def shape(self, name: str) -> Shape:
        return self.rules[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return reduce(torch.promote_types, (self.theirs.dtype(theirs) for theirs in self.rules[name].theirs))

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        return self.rules[name].join(self.theirs, slices)


class Theirs:
    """Our tensors under their names.

    Raises:
        ConfigError: as Ours.
    """

    def __init__(self, rules: Iterable[Rule], ours: Reader) -> None:
        self.ours, rules = ours, list(rules)
        self.rules = {name: rule for rule in rules for name in rule.theirs}
        check(ours, {rule.ours: rule.shape for rule in rules})

    def __str__(self) -> str:
        return str(self.ours)

    def names(self) -> set[str]:
        return set(self.rules)

    def shape(self, name: str) -> Shape:
        return self.rules[name].theirs[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.ours.dtype(self.rules[name].ours)

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        return self.rules[name].split(self.ours, name, slices)


def check(reader: Reader, needed: Mapping[str, Shape]) -> None:
    """All names are there, no other, and all shapes are right.

    Raises:
        ConfigError: says which is not.
    """
    check_names(reader, set(needed))
    for name, shape in needed.items():
        if reader.shape(name) != shape:
            raise ConfigError(
                f"{reader}: the tensor '{name}' has shape {reader.shape(name)}, the configuration needs {shape}"
            )
