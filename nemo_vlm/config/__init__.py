"""The settings of a run as frozen dataclasses, in NeMo's tree. Every default of a run stands here and nowhere else.

The tree has three branches, `trainer`, `exp_manager` and `model`. NeMo keeps everything about the model flat under
`model`; here that branch is read into several dataclasses (the architecture, which each family defines on top of
`LanguageConfig`, then `ParallelConfig`, `StepConfig`, and the nested `data`, `optim`, `tokenizer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_vlm.config.checks import demand, fill, seconds
from nemo_vlm.config.data import DataConfig, TokenizerConfig
from nemo_vlm.config.exp_manager import CheckpointConfig, EarlyStoppingConfig, ExpManagerConfig
from nemo_vlm.config.model import LanguageConfig, PartConfig, StartConfig, tower_flops
from nemo_vlm.config.nemo import NemoConfig
from nemo_vlm.config.optim import OptimConfig, SchedConfig, Unit
from nemo_vlm.config.peft import LoraConfig, PeftConfig
from nemo_vlm.config.samples import SamplesConfig
from nemo_vlm.config.step import ParallelConfig, StepConfig
from nemo_vlm.config.trainer import Precision, TrainerConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EarlyStoppingConfig",
    "ExpManagerConfig",
    "LanguageConfig",
    "LoraConfig",
    "MODEL_BRANCHES",
    "MODEL_SECTIONS",
    "NemoConfig",
    "OptimConfig",
    "ParallelConfig",
    "PartConfig",
    "PeftConfig",
    "Precision",
    "RunConfig",
    "SamplesConfig",
    "SchedConfig",
    "StartConfig",
    "StepConfig",
    "TokenizerConfig",
    "TrainerConfig",
    "Unit",
    "demand",
    "fill",
    "seconds",
    "tower_flops",
]


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `model` is the family's own config; `family` the name of its folder under `nemo_vlm/models`."""

    family: str
    trainer: TrainerConfig
    exp_manager: ExpManagerConfig
    model: LanguageConfig
    parallel: ParallelConfig
    step: StepConfig
    data: DataConfig
    optim: OptimConfig
    tokenizer: TokenizerConfig
    start: StartConfig = field(default_factory=StartConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)

    @property
    def unit(self) -> Unit:
        """What the run's length and its learning-rate schedule are counted in."""
        if self.data.train_tokens is not None:
            return "tokens"
        return "steps" if self.data.train_samples is None else "samples"

    @property
    def length(self) -> int:
        """Of the run, in that unit."""
        return self.data.train_tokens or self.data.train_samples or self.trainer.max_steps

    @property
    def samples_limit(self) -> int | None:
        """The most that the run reads; None where it is counted in steps."""
        if self.data.train_tokens is not None:
            return self.data.train_tokens // self.model.encoder_seq_length
        return self.data.train_samples


# Which dataclasses the flat branch `model` is made of, beside the architecture, and its nested branches.
MODEL_SECTIONS = {"parallel": ParallelConfig, "step": StepConfig, "start": StartConfig}
MODEL_BRANCHES = {"data": DataConfig, "optim": OptimConfig, "tokenizer": TokenizerConfig, "peft": PeftConfig}
