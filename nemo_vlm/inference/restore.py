"""A model and its processor from a .nemo archive, in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_vlm.archive import Archive
from nemo_vlm.config import LanguageConfig
from nemo_vlm.data.tokenizer import load_tokenizer
from nemo_vlm.layout import one_process
from nemo_vlm.mcore import groups, weights
from nemo_vlm.mcore.config import one_process_context
from nemo_vlm.mcore.engine import materialize
from nemo_vlm.models.base import Processor, family
from nemo_vlm.typed import read_model

INSIDE = "nemo:"  # NeMo's mark of a path inside the archive


@dataclass(frozen=True)
class Restored:
    """A model ready for inference."""

    model: nn.Module
    config: LanguageConfig
    processor: Processor
    tokenizer: Any


@contextmanager
def restore(path: str, precision: str) -> Iterator[Restored]:
    """Open an archive, self-contained, and build its model; its process group lasts as long as the context."""
    archive = Archive(path)
    name = str(archive.config.get("family"))
    parts = read_model(archive.config, family(name, "config").Config)
    tokenizer = archive_tokenizer(archive, parts["tokenizer"])
    config = family(name, "processor").settle(parts["model"], tokenizer)
    torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1, backend="gloo")
    try:
        layout = one_process(config)
        groups.initialize(layout, seed=0)
        build, (stage,) = one_process_context(config, precision), groups.stages(layout)
        model = materialize(family(name, "model").Model(config, build, stage), build.dtype)
        assert config.vocab_size is not None
        weights.load(weights.parts(model, config.vocab_size), archive)
        yield Restored(
            model.eval(),
            config,
            family(name, "processor").Processor(config, parts["data"], tokenizer),
            tokenizer,
        )
    finally:
        groups.shut_down()
        torch.distributed.destroy_process_group()


def archive_tokenizer(archive: Archive, config: Any) -> Any:
    if not str(config.type).startswith(INSIDE):
        return load_tokenizer(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = archive.extract(config.type.removeprefix(INSIDE), Path(scratch))
        return load_tokenizer(replace(config, type=str(folder)))
