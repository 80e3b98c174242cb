"""Qwen2-VL: a tower of images and videos in their own sizes, a merger, and a language model under M-RoPE."""

from __future__ import annotations

from torch import Tensor

from nemo_vlm.batch import Batch
from nemo_vlm.mcore.cache import Cache
from nemo_vlm.mcore.config import BuildContext
from nemo_vlm.mcore.groups import Stage
from nemo_vlm.mcore.vit import VisionTransformer
from nemo_vlm.models.projector import build_merger
from nemo_vlm.models.qwen2_vl.config import Config
from nemo_vlm.models.vision_language import VisionLanguageModel, dynamic_positions
from nemo_vlm.models.vision_language import dynamic_shape as vision_shape  # by models.base's name


class Model(VisionLanguageModel):
    """This pipeline stage of a Qwen2-VL."""

    config: Config

    def __init__(self, config: Config, build: BuildContext, stage: Stage) -> None:
        super().__init__(config, build, stage)
        if stage.first:
            vision = config.mm_cfg.vision_encoder
            self.vision_model = VisionTransformer(vision_shape(vision), vision.num_layers, build)
            self.vision_projection = build_merger(config, build)

    def positions(self, batch: Batch, cache: Cache | None) -> Tensor | None:
        return dynamic_positions(self.config, batch, cache)
