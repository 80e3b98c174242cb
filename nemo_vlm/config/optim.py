"""`model.optim.*`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from nemo_vlm.config.checks import demand
from nemo_vlm.errors import ConfigError

Unit = Literal["steps", "samples", "tokens"]


@dataclass(frozen=True)
class SchedConfig:
    """`model.optim.sched.*`: NeMo's learning-rate schedules, see training/schedules.py."""

    name: Literal[
        "CosineAnnealing",
        "WarmupAnnealing",
        "SquareAnnealing",
        "SquareRootAnnealing",
        "InverseSquareRootAnnealing",
        "PolynomialDecayAnnealing",
        "WarmupPolicy",
        "constant",
    ] = "CosineAnnealing"
    # Counted in steps, or as the run is: in samples (model.data.train_samples) or tokens (train_tokens)
    warmup_steps: int | None = None
    warmup_samples: int | None = None
    warmup_tokens: int | None = None
    warmup_ratio: float | None = None  # of the decay's end, instead of those
    constant_steps: int = 0  # of CosineAnnealing: at min_lr at the end, after a warm-up from 0, as in Megatron
    constant_samples: int = 0
    constant_tokens: int = 0
    max_steps: int | None = None  # where the decay ends; null: where the run does
    max_samples: int | None = None
    max_tokens: int | None = None
    min_lr: float = 0.0
    power: float = 1.0  # of PolynomialDecayAnnealing

    def __post_init__(self) -> None:
        for unit in get_args(Unit):
            key, constant = f"model.optim.sched.constant_{unit}", self.given("constant", unit)
            demand(constant >= 0, key, constant, "0 or more")
            if constant and self.name != "CosineAnnealing":
                raise ConfigError(f"{key}={constant}: goes with CosineAnnealing, not {self.name}")
            end = self.given("max", unit)
            demand(end is None or end > 0, f"model.optim.sched.max_{unit}", end, "1 or more, or null")

    def given(self, what: Literal["warmup", "constant", "max"], unit: Unit) -> Any:
        """warmup_steps and the like: a number, or nothing where it is not counted in that unit."""
        return getattr(self, f"{what}_{unit}")


@dataclass(frozen=True)
class OptimConfig:
    """`model.optim.*`. All names are AdamW; the distributed ones shard its state over the data-parallel ranks."""

    name: Literal[
        "adam", "adamw", "fused_adam", "megatron_fused_adam", "distributed_fused_adam", "mcore_distributed_optim"
    ] = "fused_adam"
    overlap_grad_sync: bool = False  # reduce gradients while the backward pass runs
    overlap_param_sync: bool = False  # gather weights while the forward pass runs; for the distributed names
    # share of the optimizer's state and step that is moved to the host's memory; auto: what the GPU has no room for
    offload: bool | float | Literal["auto", "static"] = False
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    sched: SchedConfig = field(default_factory=SchedConfig)

    def __post_init__(self) -> None:
        if self.overlap_param_sync and not self.distributed:
            raise ConfigError(
                f"model.optim.overlap_param_sync=true: model.optim.name={self.name} gathers no weights; "
                "take distributed_fused_adam"
            )
        if isinstance(self.offload, float):
            demand(0 <= self.offload <= 1, "model.optim.offload", self.offload, "from 0.0 to 1.0")
        demand(self.lr >= 0, "model.optim.lr", self.lr, "0 or more")
        demand(self.weight_decay >= 0, "model.optim.weight_decay", self.weight_decay, "0 or more")
        demand(all(0 <= beta < 1 for beta in self.betas), "model.optim.betas", list(self.betas), "from 0 to below 1")
        demand(self.eps > 0, "model.optim.eps", self.eps, "more than 0")

    @property
    def distributed(self) -> bool:
        """Megatron's distributed optimizer; the other names are plain AdamW."""
        return self.name in ("distributed_fused_adam", "mcore_distributed_optim")
