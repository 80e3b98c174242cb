"""Weight rules as data: one table a family, read in both directions between Hugging Face's names and ours.

A rule joins one tensor of ours with one or several of theirs. A table that leaves a tensor of either side unused is an
error. Values are whole tensors (see mcore.weights), so rules know nothing of layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nemo_vlm.errors import ConfigError

Read = Callable[[str], Tensor]


class Rule(Protocol):
    """One tensor of ours and its counterparts."""

    @property
    def ours(self) -> str: ...
    @property
    def theirs(self) -> tuple[str, ...]: ...
    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Their tensors, in the order of `theirs`, as ours."""
        ...

    def split(self, whole: Tensor) -> list[Tensor]:
        """The inverse."""
        ...


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    ours: str
    their_name: str

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.their_name,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def split(self, whole: Tensor) -> list[Tensor]:
        return [whole]


@dataclass(frozen=True)
class Reshape:
    """The same values in another shape."""

    ours: str
    their_name: str
    our_shape: tuple[int, ...]
    their_shape: tuple[int, ...]

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.their_name,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].reshape(self.our_shape)

    def split(self, whole: Tensor) -> list[Tensor]:
        return [whole.reshape(self.their_shape)]


@dataclass(frozen=True)
class FuseQKV:
    """Query, key and value as Megatron's linear_qkv: group by group, the group's queries, its key, its value.

    Serves weights and biases.
    """

    ours: str
    query: str
    key: str
    value: str
    num_heads: int
    num_groups: int

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        grouped = [part.unflatten(0, (self.num_groups, -1)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> list[Tensor]:
        per_group = self.num_heads // self.num_groups
        grouped = whole.unflatten(0, (self.num_groups, per_group + 2, -1))
        parts = (
            grouped[:, :per_group],
            grouped[:, per_group : per_group + 1],
            grouped[:, per_group + 1 :],
        )
        return [part.flatten(0, 2) for part in parts]


@dataclass(frozen=True)
class FuseGateUp:
    """SwiGLU's two projections as Megatron's linear_fc1: the gate above, the other below."""

    ours: str
    gate: str
    up: str

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def split(self, whole: Tensor) -> list[Tensor]:
        return list(whole.chunk(2))


def to_ours(rules: Iterable[Rule], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors under our names.

    Raises:
        ConfigError: a tensor that a rule needs is missing, or one is left over.
    """
    rules = list(rules)
    check_complete({name for rule in rules for name in rule.theirs}, set(theirs))
    return {rule.ours: rule.join([theirs[name] for name in rule.theirs]) for rule in rules}


def to_theirs(rules: Iterable[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under Hugging Face's names.

    Raises:
        ConfigError: as to_ours.
    """
    rules = list(rules)
    check_complete({rule.ours for rule in rules}, set(ours))
    return {name: part for rule in rules for name, part in zip(rule.theirs, rule.split(ours[rule.ours]), strict=True)}


def check_complete(needed: set[str], found: set[str]) -> None:
    if missing := sorted(needed - found):
        raise ConfigError(f"tensors are missing: {', '.join(missing)}")
    if unused := sorted(found - needed):
        raise ConfigError(f"tensors have no rule: {', '.join(unused)}")
