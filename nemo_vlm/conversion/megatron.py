"""To and from Megatron's own directories: torch_dist, or a file for each rank under any parallel sizes."""

from __future__ import annotations

import argparse
import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nemo_vlm.config import ParallelConfig
from nemo_vlm.conversion.convert import Target, dtype_of, prepared, rules_of, to_huggingface, to_nemo
from nemo_vlm.conversion.huggingface import write_companions
from nemo_vlm.conversion.jobs import Run, check_of
from nemo_vlm.conversion.stream import Cast, Meter, check_space, runs
from nemo_vlm.conversion.verify import same_bits
from nemo_vlm.errors import ConfigError
from nemo_vlm.files import folder_written_whole
from nemo_vlm.formats import rank_files_writer, torch_dist_writer
from nemo_vlm.formats.rank_files_writer import Ranks
from nemo_vlm.formats.reader import Renamed
from nemo_vlm.layout import stage_layers
from nemo_vlm.models.base import family
from nemo_vlm.script import choose_device
from nemo_vlm.sources.megatron import DECODER, EMBEDDINGS, RELEASE, TRACKER, is_megatron, open_megatron
from nemo_vlm.sources.megatron_args import to_args
from nemo_vlm.sources.megatron_experts import with_single_experts
from nemo_vlm.sources.opening import open_source
from nemo_vlm.sources.source import Source

LAYER = re.compile(r"(?P<front>(?:.*\.)?(?:decoder|blocks)\.layers\.)\d+\.")  # the language model's, and a tower's

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """How a Megatron directory is to be written.

    Attributes:
        parallel: for mp_rank, how the model is divided over tensor- and pipeline-parallel ranks.
        iteration: a number or "release".
        names: whose names the tensors get, of the family's MEGATRON_VARIANTS; None: the first's.
    """

    kind: Literal["torch_dist", "mp_rank"]
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    iteration: str = RELEASE
    names: str | None = None

    @property
    def number(self) -> int:
        return 0 if self.iteration == RELEASE else int(self.iteration)

    @property
    def folder(self) -> str:
        return RELEASE if self.iteration == RELEASE else f"iter_{self.number:07d}"


def convert(
    input_path: str,
    output: Path,
    job: Run,
    export: Export | None = None,
    iteration: str | None = None,
    hf: Path | None = None,
) -> None:
    """Whatever can be opened to Megatron's directory; or such a directory to a .nemo or Hugging Face's directory.

    Args:
        export: None: by the output's name a .nemo, else Hugging Face's directory.
        iteration: of the input, where that is Megatron's.
        hf: a directory whose config.json describes the input.
    Raises:
        ConfigError: the input is damaged or not whole, or the output cannot be written so.
    """
    choose_device(job.device)
    path = Path(input_path)
    source = open_megatron(path, iteration, hf) if is_megatron(path) else open_source(input_path, "--input")
    target = Target(output, dtype_of(job.precision), check_of(source, job))
    if export is not None:
        to_megatron(source, target, export)
    elif target.output.suffix == ".nemo":
        to_nemo(source, target)
    else:
        to_huggingface(source, target)


def to_megatron(source: Source, target: Target, export: Export) -> None:
    """Write a directory, which takes its name when every tensor in it has been read back and is equal, bit by bit.

    Beside the weights stands what Hugging Face's directory has there: Megatron's arguments say nothing of images.
    """
    output, names = prepared(source, target.output), names_of(source, export)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output={output}: is there already; give another name")
    cast = Cast(source.reader, target.dtype)
    specs = cast.specs(rule.ours for rule in rules_of(source))
    check_space(output, sum(spec.num_bytes for spec in specs))
    output.parent.mkdir(parents=True, exist_ok=True)
    meter = Meter(specs, str(output))
    with folder_written_whole(output) as folder:
        write_companions(source, specs, folder)
        (folder / TRACKER).write_text(f"{export.iteration}\n")
        write_weights(source, cast, folder / export.folder, replace(export, names=names))
        written = open_megatron(folder).reader
        wanted = [(spec.name, rows) for spec in specs for rows in runs(spec)]
        for (name, rows), (_, part) in zip(wanted, meter.parts(cast), strict=True):
            if not same_bits(written.read(name, rows), part):
                raise ConfigError(
                    f"{output}: the tensor '{name}' reads back differently: the disk is not to be trusted"
                )
        report = meter.report()
        if target.check:
            target.check(folder)
    log.info("wrote %s", report)


def names_of(source: Source, export: Export) -> str:
    """Whose names the tensors get.

    Raises:
        ConfigError: the family has no such.
    """
    known = family(source.family, "mapping").MEGATRON_VARIANTS
    if export.names not in (None, *known):
        raise ConfigError(f"--names={export.names}: of a {source.family} it must be {' or '.join(known)}")
    return export.names or str(next(iter(known)))


def write_weights(source: Source, cast: Cast, folder: Path, export: Export) -> None:
    """The weights of an iteration and Megatron's arguments, without an optimizer."""
    model, variant = source.model, family(source.family, "mapping").MEGATRON_VARIANTS[export.names]
    reader = Renamed(cast, {variant.name_of(name): name for name in cast.names()})
    decoder, tensor = variant.name_of(DECODER), export.parallel.tensor_model_parallel_size
    dtype = cast.dtype(EMBEDDINGS)
    half = {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16}
    divisor = model.make_vocab_size_divisible_by if variant.pads else 1
    listed = variant.lists_moe_layers and model.num_moe_experts is not None
    more = {"moe_layer_freq": [1] * model.num_layers} if listed else {}
    args = {**to_args(model), **more, "params_dtype": dtype, **half, "make_vocab_size_divisible_by": divisor}
    folder.mkdir()
    if export.kind == "torch_dist":
        common: dict[str, Any] = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0}
        decoders = {match["front"] for name in reader.names() if not listed and (match := LAYER.match(name))}
        torch_dist_writer.write(folder, reader, {**common, "iteration": export.number}, decoders)
        return
    layers = stages_of(source, export)
    ranks = Ranks(
        tensor=tensor,
        stage_layers=layers,
        padded_vocab_size=-(-(model.vocab_size or 0) // (divisor * tensor)) * divisor * tensor,
        embedding=0 if variant.embeds_first else next(stage for stage, count in enumerate(layers) if count),
        decoder=decoder,
        gated=(decoder,),
        tied=model.share_embeddings_and_output_weights,
    )
    rank_files_writer.write(folder, with_single_experts(reader), ranks, args, export.number)


def stages_of(source: Source, export: Export) -> tuple[int, ...]:
    """Decoder layers of each stage.

    Raises:
        ConfigError: they, or attention heads, do not divide.
    """
    tensor = export.parallel.tensor_model_parallel_size
    for name, count in source.model.divided_heads.items():
        if count % tensor:
            raise ConfigError(f"--tensor-model-parallel-size={tensor}: model.{name}={count} must divide by it")
    return stage_layers(source.model.num_layers, export.parallel)


def run(flags: argparse.Namespace) -> None:
    """scripts/convert_megatron.py, its flags read.

    Raises:
        ConfigError: as convert, or the flags do not go together.
    """
    theirs = is_megatron(Path(flags.input))
    check_flags(flags, theirs)
    export = None
    if flags.format is not None:
        export = Export(flags.format, parallel_of(flags), flags.iteration or RELEASE, flags.names)
    job = Run(flags.precision, flags.device, flags.verify)
    convert(flags.input, flags.output, job, export, flags.iteration if theirs else None, flags.hf_config)


def parallel_of(flags: argparse.Namespace) -> ParallelConfig:
    layers, firsts = flags.pipeline_layers, flags.num_layer_list
    return ParallelConfig(
        tensor_model_parallel_size=flags.tensor_model_parallel_size,
        pipeline_model_parallel_size=flags.pipeline_model_parallel_size or len(layers or firsts or (0,)),
        pipeline_layers=layers,
        num_layer_list=firsts,
    )


def check_flags(flags: argparse.Namespace, from_megatron: bool) -> None:
    """Raises ConfigError for a flag that is wrong, or that would do nothing."""
    sizes = {
        "tensor-model-parallel-size": flags.tensor_model_parallel_size,
        "pipeline-model-parallel-size": flags.pipeline_model_parallel_size or 1,
        "pipeline-layers": ",".join(map(str, flags.pipeline_layers or ())) or 1,
        "num-layer-list": ",".join(map(str, flags.num_layer_list or ())) or 1,
    }
    given = [f"--{name}={value}" for name, value in sizes.items() if value != 1]
    if flags.iteration not in (None, RELEASE) and not flags.iteration.isdecimal():
        raise ConfigError(f"--iteration={flags.iteration}: must be a number or release")
    if given and flags.format == "torch_dist":
        raise ConfigError("--format=torch_dist: is read under every layout; sizes are given with --format=mp_rank only")
    if given and flags.format is None:
        raise ConfigError(f"{given[0]}: is of a Megatron directory to write; give --format=mp_rank")
    if flags.names is not None and flags.format is None:
        raise ConfigError(f"--names={flags.names}: is of a Megatron directory to write; give --format")
    if flags.iteration is not None and flags.format is None and not from_megatron:
        raise ConfigError(f"--iteration={flags.iteration}: neither --input nor the output is a Megatron directory")
    if flags.hf_config is not None and not from_megatron:
        raise ConfigError(f"--hf-config={flags.hf_config}: describes a Megatron directory, and --input is none")
