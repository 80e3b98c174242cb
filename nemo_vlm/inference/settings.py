"""The settings of generation. Its defaults stand here; conf/generate.yaml offers them to the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_vlm.config import ParallelConfig, Precision, demand
from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class MachineConfig:
    """`trainer.*`, where generation happens."""

    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Precision | Literal["auto"] = "auto"  # auto: as the weights are stored
    hang_timeout: float = 1800.0


@dataclass(frozen=True)
class DecodingConfig:
    """`inference.*`."""

    greedy: bool = True
    tokens_to_generate: int = 64  # at most; a model's EOS ends an answer earlier, as does its encoder_seq_length

    def __post_init__(self) -> None:
        if not self.greedy:
            raise ConfigError("inference.greedy=false: there is no sampling yet; leave it true")
        demand(self.tokens_to_generate > 0, "inference.tokens_to_generate", self.tokens_to_generate, "1 or more")


@dataclass(frozen=True)
class GenerateConfig:
    """What is asked of which model."""

    model_path: str | None = None  # a checkpoint of any kind, see sources/
    prompt_file: str | None = None  # a JSON line for each prompt, see inference/prompts.py
    prompt: str | None = None  # one prompt, instead of a file
    image: str | tuple[str, ...] | None = None  # of that prompt
    image_folder: str | None = None  # null: the folder of the file, or the working directory
    output_file: str | None = None  # null: answers are printed
    trainer: MachineConfig = field(default_factory=MachineConfig)
    model: ParallelConfig = field(default_factory=ParallelConfig)  # the layout
    inference: DecodingConfig = field(default_factory=DecodingConfig)

    def __post_init__(self) -> None:
        if self.model_path is None:
            raise ConfigError("model_path=null: give a Hugging Face directory, a .nemo or a training checkpoint")
        if (self.prompt is None) == (self.prompt_file is None):
            raise ConfigError("give either prompt_file=LINES.jsonl or prompt=TEXT")
        if self.image is not None and self.prompt is None:
            raise ConfigError(f"image={self.image}: goes with prompt=TEXT; a line of prompt_file names its own")
        if self.model.fsdp or self.model.cpu_data_parallel_size > 1:
            key = "fsdp=true" if self.model.fsdp else f"cpu_data_parallel_size={self.model.cpu_data_parallel_size}"
            raise ConfigError(f"model.{key}: one copy of the model answers; take parallel=single, tp2, pp2 or tp2_pp2")
