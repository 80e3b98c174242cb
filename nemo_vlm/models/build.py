"""This rank's part of a run's model, whatever the family."""

from __future__ import annotations

from torch import nn

from nemo_vlm.config import RunConfig
from nemo_vlm.config.peft import trains
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups, lora
from nemo_vlm.mcore.config import context
from nemo_vlm.models.base import family


def build_chunks(run: RunConfig, layout: Layout) -> list[nn.Module]:
    """One module for each pipeline stage that this rank holds, with adapters, and frozen, where the run says so.

    Args:
        run: settled; Megatron's groups must stand.
    """
    build = context(layout, run.trainer.precision, run.step)
    chunks = [family(run.family, "model").Model(run.model, build, stage) for stage in groups.stages(layout)]
    for chunk in chunks:
        for name, part in chunk.named_children():
            if name in run.model.parts and run.model.parts[name].freeze:
                part.requires_grad_(False)
        if run.peft.lora:
            lora.install(chunk, run.peft.lora)
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(trains(name, run.model))
    return chunks
