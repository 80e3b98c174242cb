"""Qwen3-VL: Qwen2-VL's tower with learned positions too, mergers at several of its depths, a Qwen3 (dense or MoE)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from nemo_vlm.batch import Batch
from nemo_vlm.config.dynamic import DynamicVisionConfig
from nemo_vlm.mcore.cache import Cache
from nemo_vlm.mcore.config import BuildContext
from nemo_vlm.mcore.groups import Stage
from nemo_vlm.mcore.vit import VisionShape, VisionTransformer
from nemo_vlm.models.projector import build_mergers
from nemo_vlm.models.qwen3_vl.config import Config
from nemo_vlm.models.vision_language import VisionLanguageModel, dynamic_positions, dynamic_shape


class Model(VisionLanguageModel):
    """This pipeline stage of a Qwen3-VL."""

    config: Config

    def __init__(self, config: Config, build: BuildContext, stage: Stage) -> None:
        super().__init__(config, build, stage)
        if stage.first:
            vision = config.mm_cfg.vision_encoder
            self.vision_model = VisionTransformer(vision_shape(vision), vision.num_layers, build)
            self.vision_projection = build_mergers(config, build)

    def positions(self, batch: Batch, cache: Cache | None) -> Tensor | None:
        return dynamic_positions(self.config, batch, cache)


def vision_shape(vision: DynamicVisionConfig) -> VisionShape:
    return replace(
        dynamic_shape(vision),
        table_size=vision.num_position_embeddings,
        taps=vision.deepstack_visual_indexes,
        patch_bias=True,
    )
