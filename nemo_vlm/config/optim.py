"""`model.optim.*`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from nemo_vlm.config.checks import demand
from nemo_vlm.errors import ConfigError

if TYPE_CHECKING:
    from nemo_vlm.layout import Layout

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


SHARDED = ("distributed_fused_adam", "mcore_distributed_optim")  # names that ask for it on any layout


@dataclass(frozen=True)
class OptimConfig:
    """`model.optim.*`. All names are AdamW."""

    name: Literal[
        "adam", "adamw", "fused_adam", "megatron_fused_adam", "distributed_fused_adam", "mcore_distributed_optim"
    ] = "fused_adam"
    # Megatron's distributed optimizer: its state sharded over the data-parallel ranks; null: where there are several,
    # or something of it may be offloaded in 16 bits
    distributed: bool | None = None
    # Reduce gradients while the backward pass runs, gather weights while the forward pass does, where the state is
    # sharded, which needs the first; null: on accelerators, where there are several data-parallel ranks and nothing is
    # offloaded
    overlap_grad_sync: bool | None = None
    overlap_param_sync: bool | None = None
    # share of the optimizer's state and step that is moved to the host's memory; auto: what the GPU has no room for
    offload: bool | float | Literal["auto", "static"] = False
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    sched: SchedConfig = field(default_factory=SchedConfig)

    def __post_init__(self) -> None:
        if self.distributed is False and self.name in SHARDED:
            raise ConfigError(f"model.optim.distributed=false: model.optim.name={self.name} is; take fused_adam")
        if self.overlap_param_sync and self.overlap_grad_sync is False:
            raise ConfigError("model.optim.overlap_grad_sync=false: overlap_param_sync=true needs it; take true")
        if self.overlap_param_sync and self.distributed is False:
            raise ConfigError("model.optim.overlap_param_sync=true: without model.optim.distributed none are gathered")
        if isinstance(self.offload, float):
            demand(0 <= self.offload <= 1, "model.optim.offload", self.offload, "from 0.0 to 1.0")
        demand(self.lr >= 0, "model.optim.lr", self.lr, "0 or more")
        demand(self.weight_decay >= 0, "model.optim.weight_decay", self.weight_decay, "0 or more")
        demand(all(0 <= beta < 1 for beta in self.betas), "model.optim.betas", list(self.betas), "from 0 to below 1")
        demand(self.eps > 0, "model.optim.eps", self.eps, "more than 0")

    @property
    def offloads(self) -> bool:
        """Whether some of it may be moved to the host's memory."""
        return self.offload not in (False, 0.0)

    def shards(self, layout: Layout, precision: str) -> bool:
        """Whether Megatron's distributed optimizer keeps the state; FSDP shards it itself.

        Args:
            precision: of the trainer. Megatron offloads main weights where they are sharded, if only by one rank, and
                weights that are their own main weights, in fp32, where they are not.
        """
        if layout.fsdp is not None:
            return False
        if self.distributed is not None or self.name in SHARDED:
            return self.distributed is not False
        return precision != "32" if self.offloads else layout.replicas > 1

    def sharing(self, layout: Layout, precision: str) -> tuple[int, int]:
        """Ranks that share the state of the same weights: outside of experts, and in them. FSDP's shards aside."""
        return (layout.replicas, layout.expert_data) if self.shards(layout, precision) else (1, 1)

    def settled(self, layout: Layout, precision: str, on_cpu: bool) -> OptimConfig:
        """With what is left open decided: on a CPU nothing runs beside the reductions, so overlap would only cost."""
        sharded = self.shards(layout, precision)
        many = layout.replicas > 1 and layout.fsdp is None and not on_cpu and not self.offloads
        grads, params = self.overlap_grad_sync, self.overlap_param_sync
        params = sharded and ((many and grads is not False) if params is None else params)  # they need the gradients'
        return replace(
            self,
            distributed=sharded,
            name="fused_adam",
            overlap_grad_sync=many or params if grads is None else grads,
            overlap_param_sync=params,
        )
