"""To and from Megatron's own directories: torch_dist, or a file for each rank under any parallel sizes."""

from __future__ import annotations

import argparse
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_vlm.config import ParallelConfig
from nemo_vlm.conversion.convert import Target, dtype_of, prepared, rules_of, to_huggingface, to_nemo
from nemo_vlm.conversion.huggingface import CONFIG, write_json
from nemo_vlm.conversion.stream import Cast, Meter, check_space
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import folder_written_whole
from nemo_vlm.formats import rank_files_writer, torch_dist_writer
from nemo_vlm.formats.rank_files_writer import Ranks
from nemo_vlm.formats.reader import Renamed
from nemo_vlm.layout import stage_layers
from nemo_vlm.models.base import family
from nemo_vlm.sources.megatron import RELEASE, TRACKER, is_megatron, megatron_name, open_megatron
from nemo_vlm.sources.megatron_args import to_args
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source

DECODER_LAYER = re.compile(r"(?P<front>(?:.*\.)?decoder\.layers\.)\d+\.")  # the language model's, and a tower's

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """How a Megatron directory is to be written.

    Attributes:
        stage_layers: for mp_rank, decoder layers of each pipeline stage by hand; None: as even as they go.
        iteration: a number or "release".
    """

    kind: Literal["torch_dist", "mp_rank"]
    tensor: int = 1
    pipeline: int = 1
    stage_layers: tuple[int, ...] | None = None
    iteration: str = RELEASE

    @property
    def number(self) -> int:
        return 0 if self.iteration == RELEASE else int(self.iteration)

    @property
    def folder(self) -> str:
        return RELEASE if self.iteration == RELEASE else f"iter_{self.number:07d}"


def convert(input_path: str, target: Target, export: Export | None, iteration: str | None, hf: Path | None) -> None:
    """Whatever can be opened to Megatron's directory; or such a directory to a .nemo or Hugging Face's directory.

    Args:
        export: None: by the output's name a .nemo, else Hugging Face's directory.
        iteration: of the input, where that is Megatron's.
        hf: a directory whose config.json describes the input.
    Raises:
        ConfigError: the input is damaged or not whole, or the output cannot be written so.
    """
    path = Path(input_path)
    source = open_megatron(path, iteration, hf) if is_megatron(path) else open_source(input_path, "--input")
    if export is not None:
        to_megatron(source, target, export)
    elif target.output.suffix == ".nemo":
        to_nemo(source, target)
    else:
        to_huggingface(source, target)


def to_megatron(source: Source, target: Target, export: Export) -> None:
    """Write a directory, which takes its name when every tensor in it has been read back and is equal, bit by bit."""
    output, model = prepared(source, target.output), source.model
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output={output}: is there already; give another name")
    cast = Cast(source.reader, target.dtype)
    specs = cast.specs(rule.ours for rule in rules_of(source))
    check_space(output, sum(spec.num_bytes for spec in specs))
    output.parent.mkdir(parents=True, exist_ok=True)
    meter = Meter(specs, str(output))
    with folder_written_whole(output) as folder:
        write_json(folder / CONFIG, family(source.family, "mapping").hf_config(model))
        source.save_files(folder)
        (folder / TRACKER).write_text(f"{export.iteration}\n")
        write_weights(source, cast, folder / export.folder, export)
        written = open_megatron(folder).reader
        for name, tensor in meter.tensors(cast):
            if not same_bits(written.read(name), tensor):
                raise ConfigError(
                    f"{output}: the tensor '{name}' reads back differently: the disk is not to be trusted"
                )
        report = meter.report()
    log.info("wrote %s", report)


def write_weights(source: Source, cast: Cast, folder: Path, export: Export) -> None:
    """The weights of an iteration and Megatron's arguments, without an optimizer."""
    model, variants = source.model, family(source.family, "mapping").MEGATRON_VARIANTS
    reader = Renamed(cast, {megatron_name(name, variants): name for name in cast.names()})
    decoder = megatron_name("language_model.decoder.", variants)
    dtype = cast.dtype("language_model.embedding.word_embeddings.weight")
    half = {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16}
    divisor = model.make_vocab_size_divisible_by
    args = {**to_args(model), "params_dtype": dtype, **half}
    folder.mkdir()
    if export.kind == "torch_dist":
        common: dict[str, Any] = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0}
        decoders = {match["front"] for name in reader.names() if (match := DECODER_LAYER.match(name))}
        torch_dist_writer.write(folder, reader, {**common, "iteration": export.number}, decoders)
        return
    ranks = Ranks(
        tensor=export.tensor,
        stage_layers=stages_of(source, export),
        padded_vocab_size=-(-(model.vocab_size or 0) // (divisor * export.tensor)) * divisor * export.tensor,
        decoder=decoder,
        gated=(decoder,),
        tied=model.share_embeddings_and_output_weights,
    )
    rank_files_writer.write(folder, reader, ranks, args, export.number)


def stages_of(source: Source, export: Export) -> tuple[int, ...]:
    """Decoder layers of each stage.

    Raises:
        ConfigError: they, or attention heads, do not divide.
    """
    heads = {"num_query_groups": source.model.num_query_groups}
    if hasattr(source.model, "mm_cfg"):
        heads["mm_cfg.vision_encoder.num_attention_heads"] = source.model.mm_cfg.vision_encoder.num_attention_heads
    for name, count in heads.items():
        if (count or 0) % export.tensor:
            raise ConfigError(f"--tensor-model-parallel-size={export.tensor}: model.{name}={count} must divide by it")
    parallel = ParallelConfig(pipeline_model_parallel_size=export.pipeline, pipeline_layers=export.stage_layers)
    return stage_layers(source.model.num_layers, parallel)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaNs included."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return bool(torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other))))


def run(flags: argparse.Namespace) -> None:
    """scripts/convert_megatron.py, its flags read.

    Raises:
        ConfigError: as convert, or the flags do not go together.
    """
    theirs = is_megatron(Path(flags.input))
    check_flags(flags, theirs)
    layers = flags.pipeline_layers
    stages = flags.pipeline_model_parallel_size or (len(layers) if layers else 1)
    export = None
    if flags.format is not None:
        iteration = flags.iteration or RELEASE
        export = Export(flags.format, flags.tensor_model_parallel_size, stages, layers, iteration)
    target = Target(flags.output, dtype_of(flags.precision))
    convert(flags.input, target, export, flags.iteration if theirs else None, flags.hf_config)


def check_flags(flags: argparse.Namespace, from_megatron: bool) -> None:
    """Raises ConfigError for a flag that is wrong, or that would do nothing."""
    sizes = {
        "tensor-model-parallel-size": flags.tensor_model_parallel_size,
        "pipeline-model-parallel-size": flags.pipeline_model_parallel_size or 1,
        "pipeline-layers": ",".join(map(str, flags.pipeline_layers or ())) or 1,
    }
    given = [f"--{name}={value}" for name, value in sizes.items() if value != 1]
    if flags.iteration not in (None, RELEASE) and not flags.iteration.isdecimal():
        raise ConfigError(f"--iteration={flags.iteration}: must be a number or release")
    if given and flags.format == "torch_dist":
        raise ConfigError("--format=torch_dist: is read under every layout; sizes are given with --format=mp_rank only")
    if given and flags.format is None:
        raise ConfigError(f"{given[0]}: is of a Megatron directory to write; give --format=mp_rank")
    if flags.iteration is not None and flags.format is None and not from_megatron:
        raise ConfigError(f"--iteration={flags.iteration}: neither --input nor the output is a Megatron directory")
    if flags.hf_config is not None and not from_megatron:
        raise ConfigError(f"--hf-config={flags.hf_config}: describes a Megatron directory, and --input is none")
