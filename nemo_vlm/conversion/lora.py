"""Adapters merged into the model that they were trained beside."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nemo_vlm.config.peft import factors, is_adapter
from nemo_vlm.conversion.convert import Target, dtype_of, prepared, to_nemo
from nemo_vlm.conversion.verify import check_tensors
from nemo_vlm.errors import ConfigError
from nemo_vlm.formats.grown import grown
from nemo_vlm.formats.reader import Joined, Reader, Shape, Slices, chosen, whole
from nemo_vlm.mapping import check
from nemo_vlm.models.base import family, starts
from nemo_vlm.sources.megatron import EMBEDDINGS, HEAD
from nemo_vlm.sources.opening import open_adapter, open_source
from nemo_vlm.sources.source import Source
from nemo_vlm.sources.starting import owners

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """A base's tensors with scale * B A added to those that have an adapter, in the base's dtype.

    What else was trained with the adapters, the projector, stands in the base's place.

    Raises:
        ConfigError: the adapters do not fit the base.
    """

    base: Reader
    adapter: Reader
    scale: float

    def __post_init__(self) -> None:
        found = {name for name in self.adapter.names() if is_adapter(name)}
        if alien := sorted(found - {factor for name in self.base.names() for factor in factors(name)}):
            raise ConfigError(f"{self.adapter}: the base {self.base} has no layer for '{alien[0]}'")
        for name in sorted(self.adapted):
            a, b = (self.adapter.shape(factor) for factor in factors(name))
            if self.base.shape(name) != (b[0], a[1]):
                raise ConfigError(
                    f"{self.adapter}: the adapter of '{name}' is for a layer of shape {(b[0], a[1])}, "
                    f"the base {self.base} has {self.base.shape(name)}"
                )

    def __str__(self) -> str:
        return f"{self.base} with {self.adapter}"

    @cached_property
    def adapted(self) -> set[str]:
        """The base's weights that have an adapter."""
        return {name for name in self.base.names() if factors(name)[0] in self.adapter.names()}

    @cached_property
    def replaced(self) -> set[str]:
        return {name for name in self.adapter.names() if not is_adapter(name)}

    def names(self) -> set[str]:
        return self.base.names() | self.replaced

    def shape(self, name: str) -> Shape:
        return (self.adapter if name in self.replaced else self.base).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return (self.base if name in self.base.names() else self.adapter).dtype(name)

    def read(self, name: str, slices: Slices = ()) -> Tensor:
        if name in self.replaced:
            return self.adapter.read(name, slices).to(self.dtype(name))
        weight = self.base.read(name, slices)
        if name not in self.adapted:
            return weight
        rows, columns = slices or whole(self.shape(name))
        a_name, b_name = factors(name)
        rank = slice(0, self.adapter.shape(a_name)[0])
        a, b = self.adapter.read(a_name, (rank, columns)), self.adapter.read(b_name, (rows, rank))
        return torch.addmm(weight.float(), b.float(), a.float(), alpha=self.scale).to(weight.dtype)


def base_of(bases: Sequence[str], adapter: Source) -> dict[str, Source]:
    """The checkpoint that gives each module of the base.

    Args:
        bases: as Source.bases of the adapter names them: each module is from where the run had it. Others: of two that
            hold a module the later one gives it.
    """
    named = list(starts(adapter.tree)) if list(bases) == adapter.bases else [("--base", None, base) for base in bases]
    found = owners(named)
    if len(set(bases)) > 1:
        log.info("the base: %s", ", ".join(f"{module} from {source}" for module, source in found.items()))
    return found


def merge(bases: Sequence[str], adapter_path: str, output: Path, precision: str, verify: bool) -> None:
    """Write the .nemo of a base with an adapter merged into it; tensors go by one part at a time.

    Args:
        bases: checkpoints that hold the parts of the base; see base_of.
        verify: compare what was written with what was to be written.
    Raises:
        ConfigError: the adapter is of another model.
    """
    adapter = open_adapter(adapter_path, "--adapter")
    modules = base_of(bases, adapter)
    for base in modules.values():
        prepared(base, output)
    parts = [chosen(base.reader, [f"{name}."]) for name, base in modules.items()]
    # Tokens that the tokenizer got for the run have their rows in its base as there.
    whole_base = grown(Joined(parts), (EMBEDDINGS, HEAD), adapter.model.vocab_size)
    reader = Merged(whole_base, adapter.reader, adapter.settings["peft"].lora_tuning.scale)
    check(reader, {rule.ours: rule.shape for rule in family(adapter.family, "mapping").rules(adapter.model)})
    tree = {key: value for key, value in adapter.tree.items() if key != "peft"}
    source, dtype = replace(adapter, tree=tree, reader=reader), dtype_of(precision)

    def compare(made: Path) -> None:
        check_tensors(reader, open_source(made, "--output").reader, dtype)

    to_nemo(source, Target(output, dtype, compare if verify else None))
