"""This rank's part of a run's model, whatever the family."""

from __future__ import annotations

from torch import nn

from nemo_vlm.config import RunConfig
from nemo_vlm.layout import Layout
from nemo_vlm.mcore import groups
from nemo_vlm.mcore.config import context
from nemo_vlm.models.base import family


def build_chunks(run: RunConfig, layout: Layout) -> list[nn.Module]:
    """One module for each pipeline stage that this rank holds, frozen where the run freezes it.

    Args:
        run: settled; Megatron's groups must stand.
    """
    build = context(layout, run.trainer.precision, run.step)
    chunks = [family(run.family, "model").Model(run.model, build, stage) for stage in groups.stages(layout)]
    for chunk in chunks:
        for name, part in chunk.named_children():
            if name in run.model.parts and run.model.parts[name].freeze:
                part.requires_grad_(False)
    return chunks
