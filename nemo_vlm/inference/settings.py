"""The settings of generation. Their defaults stand here; conf/ offers them to the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Literal

from nemo_vlm.checkpoints import complete
from nemo_vlm.config import ParallelConfig, Precision, demand
from nemo_vlm.errors import ConfigError


@dataclass(frozen=True)
class MachineConfig:
    """`trainer.*`, where generation happens."""

    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    accelerator: Literal["auto", "cpu", "gpu", "npu"] = "auto"
    precision: Precision | Literal["auto"] = "auto"  # auto: as the weights are stored
    hang_timeout: float = 1800.0


@dataclass(frozen=True)
class DecodingConfig:
    """`inference.*`. Scores pass repetition_penalty, temperature, top_k, top_p in this order, as in Hugging Face."""

    greedy: bool = True  # the most likely token; false: one is drawn
    top_k: int = 0  # draw from so many of the most likely tokens; 0: from all
    top_p: float = 1.0  # draw from the most likely tokens whose probabilities add up to this
    temperature: float = 1.0
    repetition_penalty: float = 1.0  # above 1, tokens of prompt and answer become less likely; greedy or not
    seed: int = 1234  # draws depend on it, the prompt's number and the token's, not on batches or ranks
    add_BOS: bool | None = None  # noqa: N815  whether a prompt begins with BOS; null: as the model was trained
    tokens_to_generate: int = 64  # at most; a model's EOS ends an answer earlier, as does its encoder_seq_length
    min_tokens_to_generate: int = 0  # neither EOS nor an end string ends an answer before
    end_strings: tuple[str, ...] = ()  # each ends an answer, and is cut from its text; special tokens too
    compute_logprob: bool = False  # add `logprob`: of each token of the answer, as the model has it
    all_probs: bool = False  # add `full_logprob`: of every token of the vocabulary at each place of the answer
    batch_size: int = 8  # prompts that a copy of the model answers together
    media_base_path: str | None = None  # folder of images and videos; null: that of the prompt file
    images_base_path: str | None = None  # NeMo's older name of it
    media_type: Literal["image", "video"] = "image"  # of what insert_media_token inserts
    insert_media_token: Literal["left", "right"] | None = None  # beside a question that has no placeholder
    insert_image_token: Literal["left", "right"] | None = None  # NeMo's older name of it

    def __post_init__(self) -> None:
        for name, least in (("top_k", 0), ("seed", 0), ("min_tokens_to_generate", 0), ("tokens_to_generate", 1)):
            value = getattr(self, name)
            demand(value >= least, f"inference.{name}", value, f"{least} or more")
        demand(self.batch_size > 0, "inference.batch_size", self.batch_size, "1 or more")
        demand(0 < self.top_p <= 1, "inference.top_p", self.top_p, "above 0, and 1 at most (which turns it off)")
        finite = "above 0 and finite"
        told = f"{finite}; inference.greedy=true draws nothing"
        demand(0 < self.temperature < inf, "inference.temperature", self.temperature, told)
        demand(0 < self.repetition_penalty < inf, "inference.repetition_penalty", self.repetition_penalty, finite)
        if "" in self.end_strings:
            given = list(self.end_strings)
            raise ConfigError(f"inference.end_strings={given}: an empty one would end every answer at once")
        most = self.tokens_to_generate
        demand(
            self.min_tokens_to_generate <= most,
            "inference.min_tokens_to_generate",
            self.min_tokens_to_generate,
            f"inference.tokens_to_generate={most} at most",
        )
        for name, older in (("media_base_path", "images_base_path"), ("insert_media_token", "insert_image_token")):
            if None not in (getattr(self, name), getattr(self, older)):
                raise ConfigError(
                    f"inference.{older}={getattr(self, older)}: another name of inference.{name}; give one"
                )

    @property
    def media_folder(self) -> str | None:
        return self.media_base_path or self.images_base_path

    @property
    def inserted(self) -> Literal["left", "right"] | None:
        """On which side of a question a missing placeholder goes."""
        return self.insert_media_token or self.insert_image_token


@dataclass(frozen=True)
class AskConfig:
    """What every command that answers prompts takes."""

    prompt_file: str | None = None  # JSON, an object a line or a list of them, see inference/prompts.py
    output_file: str | None = None  # JSON, a line for each prompt, in order; null: answers are printed
    trainer: MachineConfig = field(default_factory=MachineConfig)
    inference: DecodingConfig = field(default_factory=DecodingConfig)


@dataclass(frozen=True)
class GenerateConfig(AskConfig):
    """`examples/generate.py`: prompts as they are, or messages."""

    model_path: str | None = None  # a checkpoint of any kind, see sources/
    prompt: str | None = None  # one prompt, instead of a file
    image: str | tuple[str, ...] | None = None  # of that prompt
    video: str | tuple[str, ...] | None = None  # of that prompt; a file, or a folder of frames
    image_folder: str | None = None  # null: inference.media_base_path, or the folder of the file
    model: ParallelConfig = field(default_factory=ParallelConfig)  # the layout

    def __post_init__(self) -> None:
        if self.model_path is None:
            raise ConfigError("model_path=null: give a Hugging Face directory, a .nemo or a training checkpoint")
        if (self.prompt is None) == (self.prompt_file is None):
            raise ConfigError("give either prompt_file=LINES.jsonl or prompt=TEXT")
        for key in ("image", "video"):
            if (given := getattr(self, key)) is not None and self.prompt is None:
                raise ConfigError(f"{key}={given}: goes with prompt=TEXT; a line of prompt_file names its own")
        for name in ("compute_logprob", "all_probs"):
            if getattr(self.inference, name) and self.prompt is not None and self.output_file is None:
                raise ConfigError(f"inference.{name}=true: goes with output_file=LINES.jsonl; the terminal shows texts")
        check_layout(self.model)

    @property
    def source(self) -> tuple[str, str]:
        """The key that names the checkpoint, and the checkpoint."""
        return "model_path", str(self.model_path)

    @property
    def parallel(self) -> ParallelConfig:
        return self.model


def check_layout(parallel: ParallelConfig) -> None:
    if parallel.fsdp:
        raise ConfigError("model.fsdp=true: whole copies of the model answer; take parallel=single, ddp, tp2, pp2 ...")


@dataclass(frozen=True)
class TemplateConfig:
    """`model.data.*`, instead of what the model was trained with."""

    conv_template: str | None = None
    system_message: str | None = None
    num_frames: int | None = None  # of a video
    splice_single_frame: str | None = None


@dataclass(frozen=True)
class NevaModelConfig(ParallelConfig):
    """`model.*`: the layout, and the template of prompts."""

    data: TemplateConfig = field(default_factory=TemplateConfig)


@dataclass(frozen=True)
class QuantizationConfig:
    """`quantization.*`, which NeMo has."""

    enable: bool = False
    algorithm: str = "awq"


@dataclass(frozen=True)
class NevaInferenceConfig(AskConfig):
    """`examples/neva_inference.py`: questions, put into the template that the model was trained with."""

    neva_model_file: str | None = None  # a .nemo, or any other checkpoint, see sources/
    base_model_file: str | None = None
    checkpoint_dir: str | None = None  # instead of neva_model_file: a run's folder of checkpoints,
    checkpoint_name: str | None = None  # and one of them; null: the newest
    hparams_file: str | None = None
    tokenizer_model: str | None = None
    tokenizer_type: str | None = None
    vision_encoder_path: str | None = None
    tensor_model_parallel_size: int | None = None  # null: model.tensor_model_parallel_size
    pipeline_model_parallel_size: int | None = None  # null: model.pipeline_model_parallel_size
    server: bool = False
    web_server: bool = False
    share: bool = False
    port: int | None = None
    web_port: int | None = None
    username: str | None = None
    password: str | None = None
    model: NevaModelConfig = field(default_factory=NevaModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)

    def __post_init__(self) -> None:
        if (self.neva_model_file is None) == (self.checkpoint_dir is None):
            raise ConfigError("give either neva_model_file=X.nemo or checkpoint_dir=RUN/checkpoints")
        if self.prompt_file is None:
            raise ConfigError("prompt_file=null: give the questions, JSON lines or a JSON list")
        self._refuse()
        check_layout(self.model)

    def _refuse(self) -> None:
        """What NeMo has and this has not."""
        for key in ("server", "web_server", "share", "port", "web_port", "username", "password"):
            if (value := getattr(self, key)) not in (None, False):
                raise ConfigError(f"{key}={value}: there is no server here; give prompt_file and output_file")
        for key in ("hparams_file", "tokenizer_model", "tokenizer_type"):
            if (value := getattr(self, key)) is not None:
                raise ConfigError(f"{key}={value}: not needed, a checkpoint holds its settings and its tokenizer")
        if (tower := self.vision_encoder_path) is not None:
            advice = f"scripts/convert_llava_nemo_to_hf.py --vision_encoder_path {tower}"
            raise ConfigError(
                f"vision_encoder_path={tower}: a checkpoint holds its tower; NeMo 1.x's get it by {advice}"
            )
        if (base := self.base_model_file) is not None:
            advice = f"scripts/merge_lora.py --base {base} --adapter {self.neva_model_file} --output MERGED.nemo"
            raise ConfigError(f"base_model_file={base}: merge the adapters into it first, by {advice}")
        if self.quantization.enable:
            raise ConfigError(
                "quantization.enable=true: there is no quantization here; trainer.precision=bf16 is the least"
            )
        if self.checkpoint_name is not None and self.checkpoint_dir is None:
            raise ConfigError(f"checkpoint_name={self.checkpoint_name}: goes with checkpoint_dir")

    @property
    def source(self) -> tuple[str, str]:
        """The key that names the checkpoint, and the checkpoint."""
        if self.neva_model_file is not None:
            return "neva_model_file", self.neva_model_file
        folder = Path(str(self.checkpoint_dir))
        if self.checkpoint_name is not None:
            return "checkpoint_dir", str(folder / self.checkpoint_name)
        if not (found := complete(folder)):
            raise ConfigError(f"checkpoint_dir={folder}: holds no complete checkpoint")
        return "checkpoint_dir", str(found[-1])

    @property
    def parallel(self) -> ParallelConfig:
        """The layout alone, NeMo's two keys of it in their place."""
        layout = {f.name: getattr(self.model, f.name) for f in fields(ParallelConfig)}
        given = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        return ParallelConfig(**layout | {key: getattr(self, key) for key in given if getattr(self, key) is not None})


@dataclass(frozen=True)
class EvaluateConfig:
    """`examples/neva_evaluation.py`: scores of the answers to a LLaVA JSON."""

    neva_model_file: str | None = None  # a .nemo, or any other checkpoint, see sources/
    data_path: str | None = None  # LLaVA JSON or JSONL
    image_folder: str | None = None  # null: beside the file
    video_folder: str | None = None
    output_folder: str = "."  # for predictions.jsonl, predictions.png and scores.json
    trainer: MachineConfig = field(default_factory=MachineConfig)
    model: ParallelConfig = field(default_factory=ParallelConfig)  # the layout
    inference: DecodingConfig = field(default_factory=DecodingConfig)

    def __post_init__(self) -> None:
        for key in ("neva_model_file", "data_path"):
            if getattr(self, key) is None:
                raise ConfigError(f"{key}=null: give the {'model' if key == 'neva_model_file' else 'questions'}")
        for key in ("insert_media_token", "insert_image_token", "media_type"):
            if (given := getattr(self.inference, key)) != getattr(DecodingConfig, key):
                raise ConfigError(f"inference.{key}={given}: a record of data_path says itself where its images stand")
        check_layout(self.model)

    @property
    def source(self) -> tuple[str, str]:
        """The key that names the checkpoint, and the checkpoint."""
        return "neva_model_file", str(self.neva_model_file)

    @property
    def parallel(self) -> ParallelConfig:
        return self.model
