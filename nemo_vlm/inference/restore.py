"""A model and its processor from a checkpoint of any format, under any layout that holds one copy of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from nemo_vlm.config import DataConfig, LanguageConfig, StepConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout, one_process
from nemo_vlm.mcore import cpu, groups, weights
from nemo_vlm.mcore.config import DTYPES, context
from nemo_vlm.mcore.engine import StageModule, materialize
from nemo_vlm.mcore.inference import Forward
from nemo_vlm.models.base import Processor, family
from nemo_vlm.models.templates import EOS, template_of
from nemo_vlm.sources.source import Source
from nemo_vlm.sources.tokenizers import stop_ids, tokenizer_of

EMBEDDING = "language_model.embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Restored:
    """A model ready for inference.

    Attributes:
        data: how its samples are made.
        stop_ids: tokens that end an answer.
    """

    forward: Forward
    config: LanguageConfig
    data: DataConfig
    processor: Processor
    tokenizer: Any
    stop_ids: set[int]


def terminators(config: LanguageConfig, data: DataConfig) -> tuple[str, ...]:
    """What stands behind an answer in the conversation template, where that is not EOS."""
    _, after = template_of(config, data).around_answer
    return () if EOS in after else (after,)


@contextlib.contextmanager
def restore(source: Source, precision: str, layout: Layout | None = None) -> Iterator[Restored]:
    """Build a checkpoint's model; each rank reads its part. Its process group lasts as long as the context.

    Args:
        precision: of trainer.precision.
        layout: None: one process.
    Raises:
        ConfigError: the checkpoint has no tokenizer, or its tensors are not those of its settings.
    """
    tokenizer, parts, data = tokenizer_of(source), family(source.family, "processor"), source.settings["data"]
    config = parts.settle(source.model, tokenizer)
    layout = layout or one_process(config)
    with process_group(layout), megatron_groups(layout):
        stage = StageModule(build(source, config, precision, layout).eval())
        yield Restored(
            Forward([stage], config.vocab_size),
            config,
            data,
            parts.Processor(config, data, tokenizer),
            tokenizer,
            stop_ids(source, tokenizer),
        )


def build(source: Source, config: LanguageConfig, precision: str, layout: Layout) -> nn.Module:
    """This rank's part of the model with the checkpoint's weights."""
    assert config.vocab_size is not None
    # Transformer Engine's attention knows no cache of ours.
    context_of_build = context(layout, precision, StepConfig(transformer_impl="local"))
    (stage,) = groups.stages(layout)
    model = materialize(family(source.family, "model").Model(config, context_of_build, stage), context_of_build.dtype)
    weights.load(weights.parts(model, config.vocab_size), source.reader)
    return model


def stored_precision(source: Source) -> str:
    """trainer.precision that computes in the dtype of the checkpoint's weights."""
    if EMBEDDING not in source.reader.names():
        raise ConfigError(f"{source}: holds no language model, but {', '.join(sorted(source.parts))}")
    dtype = source.reader.dtype(EMBEDDING)
    return next((name for name, known in DTYPES.items() if known is dtype), "32")


@contextlib.contextmanager
def megatron_groups(layout: Layout) -> Iterator[None]:
    groups.initialize(layout, seed=0)
    try:
        yield
    finally:
        groups.shut_down()


@contextlib.contextmanager
def process_group(layout: Layout) -> Iterator[None]:
    """The ranks of a layout: those that run already, else those that a launcher started, else this process alone."""
    if torch.distributed.is_initialized():
        yield
        return
    if layout.world_size == 1:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    else:
        join()
    ended = False
    try:
        yield
        ended = True
    finally:
        if ended or layout.world_size == 1:  # one of several that fails leaves at once: NCCL's end waits for the others
            torch.distributed.destroy_process_group()


def join() -> None:
    """Meet the other ranks, as the environment describes them.

    Raises:
        ConfigError: it does not.
    """
    if missing := [
        key for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ
    ]:
        raise ConfigError(f"{', '.join(missing)} missing in the environment of a rank; under Slurm, start torchrun")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = cpu.BACKENDS[cpu.device().type]
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))
