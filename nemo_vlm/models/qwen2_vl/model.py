"""Qwen2-VL: a tower of images and videos in their own sizes, a merger, and a language model under M-RoPE."""

from __future__ import annotations

from torch import Tensor

from nemo_vlm.batch import Batch
from nemo_vlm.mcore.cache import Cache
from nemo_vlm.mcore.config import BuildContext
from nemo_vlm.mcore.groups import Stage
from nemo_vlm.mcore.vit import VisionShape, VisionTransformer
from nemo_vlm.models.positions import mrope_positions
from nemo_vlm.models.projector import build_merger
from nemo_vlm.models.qwen2_vl.config import Config, VisionConfig
from nemo_vlm.models.vision_language import VisionLanguageModel


class Model(VisionLanguageModel):
    """This pipeline stage of a Qwen2-VL."""

    config: Config

    def __init__(self, config: Config, build: BuildContext, stage: Stage) -> None:
        super().__init__(config, build, stage)
        if stage.first:
            vision = config.mm_cfg.vision_encoder
            self.vision_model = VisionTransformer(vision_shape(vision), vision.num_layers, build)
            self.vision_projection = build_merger(
                vision.hidden_size, vision.spatial_merge_size, config.hidden_size, vision.layernorm_epsilon, build
            )

    def positions(self, batch: Batch, cache: Cache | None) -> Tensor | None:
        """[3, b, s]; None of tokens behind a prompt, where the cache counts on."""
        if cache is not None and cache.filled:
            return None
        merge_size = self.config.mm_cfg.vision_encoder.spatial_merge_size
        return mrope_positions(batch, self.config.placeholder_ids, merge_size)


def vision_shape(vision: VisionConfig) -> VisionShape:
    return VisionShape(
        patch_size=vision.patch_dim,
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        activation=vision.activation,
        layernorm_epsilon=vision.layernorm_epsilon,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )
