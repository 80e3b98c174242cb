"""LLaVA: a CLIP or SigLIP, a projector, and a language model."""

from __future__ import annotations

from torch import Tensor

from nemo_vlm.batch import Images
from nemo_vlm.mcore.config import BuildContext
from nemo_vlm.mcore.groups import Stage
from nemo_vlm.mcore.vit import VisionShape, VisionTransformer
from nemo_vlm.models.adapter import DOWNSAMPLE
from nemo_vlm.models.llava.config import Config, VisionConfig
from nemo_vlm.models.projector import build_projector, fuse_neighbours
from nemo_vlm.models.vision_language import VisionLanguageModel


class Model(VisionLanguageModel):
    """This pipeline stage of a LLaVA."""

    config: Config

    def __init__(self, config: Config, build: BuildContext, stage: Stage) -> None:
        super().__init__(config, build, stage)
        if stage.first:
            vision = config.mm_cfg.vision_encoder
            self.vision_model = VisionTransformer(vision_shape(vision), vision.depth, build)
            self.vision_projection = build_projector(
                config.mm_cfg.mm_mlp_adapter_type, vision.hidden_size, config.hidden_size, build
            )

    def joined(self, features: Tensor, images: Images) -> Tensor:
        if self.config.mm_cfg.mm_mlp_adapter_type == DOWNSAMPLE:
            return fuse_neighbours(features, images.grids)
        return features


def vision_shape(vision: VisionConfig) -> VisionShape:
    """HF's CLIP and Siglip towers differ in class token, norm in front and the patch convolution's bias."""
    clip = vision.model_type == "clip"
    return VisionShape(
        patch_size=vision.patch_dim,
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        activation=vision.activation,
        layernorm_epsilon=vision.layernorm_epsilon,
        table_size=vision.num_patches,
        class_token=clip,
        pre_norm=clip,
        post_norm=True,
        patch_bias=not clip,
        pooling_head=vision.use_head,
    )
