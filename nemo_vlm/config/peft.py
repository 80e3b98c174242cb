"""`model.peft.*`: low-rank adapters (LoRA, Hu et al. 2021) beside a frozen language model, under NeMo's names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import getitem
from typing import Any, Literal

from nemo_vlm.config.checks import demand, fill
from nemo_vlm.config.model import LanguageConfig
from nemo_vlm.errors import ConfigError

Target = Literal["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2", "attention", "mlp", "all"]
Initial = Literal["xavier", "kaiming", "normal", "zero"]

# The linear layers that NeMo's names mean, as Megatron calls them.
LINEARS: dict[str, tuple[str, ...]] = {
    "attention_qkv": ("linear_qkv",),
    "attention_dense": ("linear_proj",),
    "mlp_fc1": ("linear_fc1",),
    "mlp_fc2": ("linear_fc2",),
    "attention": ("linear_qkv", "linear_proj"),
    "mlp": ("linear_fc1", "linear_fc2"),
    "all": ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
}
BY_COLUMNS = frozenset({"linear_qkv", "linear_fc1"})  # how tensor parallelism splits these; the others by rows
ADAPTER = "_adapter"  # what an adapter's name has behind that of its linear layer
PROJECTOR = "vision_projection"  # trains beside adapters, unless it is frozen


@dataclass(frozen=True)
class LoraConfig:
    """`model.peft.lora_tuning.*`: y = W x + alpha / adapter_dim * B A dropout(x)."""

    variant: Literal["nemo"] = "nemo"  # query, key and value share A
    target_modules: tuple[Target, ...] = ("attention_qkv",)
    adapter_dim: int = 32  # rank of B A
    alpha: float | None = None  # null: adapter_dim
    adapter_dropout: float = 0.0
    column_init_method: Initial = "xavier"  # of A
    row_init_method: Initial = "zero"  # of B

    def __post_init__(self) -> None:
        key = "model.peft.lora_tuning"
        demand(len(self.target_modules) > 0, f"{key}.target_modules", "[]", f"some of {', '.join(LINEARS)}")
        demand(self.adapter_dim > 0, f"{key}.adapter_dim", self.adapter_dim, "1 or more")
        fill(self, alpha=float(self.adapter_dim))
        demand(self.scale > 0, f"{key}.alpha", self.alpha, "more than 0")
        demand(0 <= self.adapter_dropout < 1, f"{key}.adapter_dropout", self.adapter_dropout, "0 or more, below 1")

    @property
    def scale(self) -> float:
        assert self.alpha is not None
        return self.alpha / self.adapter_dim

    @property
    def linears(self) -> set[str]:
        """The linear layers of a decoder layer that get an adapter."""
        return {linear for target in self.target_modules for linear in LINEARS[target]}


@dataclass(frozen=True)
class PeftConfig:
    """`model.peft.*`."""

    peft_scheme: Literal["lora", "none"] | None = None
    restore_from_path: str | None = None  # an adapter's .nemo or training checkpoint that the run starts from
    lora_tuning: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.restore_from_path is not None and self.lora is None:
            raise ConfigError(
                f"model.peft.restore_from_path={self.restore_from_path}: needs model.peft.peft_scheme=lora"
            )
        for f in fields(LoraConfig) if self.lora is None else ():
            value, default = getattr(self.lora_tuning, f.name), getattr(LoraConfig(), f.name)
            demand(value == default, f"model.peft.lora_tuning.{f.name}", value, "left out without peft_scheme=lora")

    @property
    def lora(self) -> LoraConfig | None:
        """None where the model trains without adapters."""
        return self.lora_tuning if self.peft_scheme == "lora" else None


def check_given(peft: PeftConfig, tree: Mapping[str, Any], given: Collection[str]) -> None:
    """Raises ConfigError where the user unfreezes a part by hand that stays frozen beside adapters.

    Args:
        tree: the branch `model`.
        given: keys that the user has set by hand.
    """
    for key in sorted(given) if peft.lora else ():
        front, *path = key.split(".")
        if (front, path[-1:]) == ("model", ["freeze"]) and reduce(getitem, path, tree) is False:
            raise ConfigError(f"{key}=false: with model.peft.peft_scheme=lora it stays frozen; leave it out")


def is_adapter(name: str) -> bool:
    """Whether a tensor is an adapter's, by its name."""
    return re.search(rf"{ADAPTER}\.linear_(in|out)\.weight$", name) is not None


def factors(weight: str) -> tuple[str, str]:
    """The names of A and B beside a linear layer's weight."""
    adapter = weight.removesuffix(".weight") + ADAPTER
    return f"{adapter}.linear_in.weight", f"{adapter}.linear_out.weight"


def trains(name: str, model: LanguageConfig) -> bool:
    """Whether a tensor trains in a run with adapters: they do, and the projector where it is not frozen."""
    part = name.partition(".")[0]
    return is_adapter(name) or part == PROJECTOR and not model.parts[PROJECTOR].freeze
