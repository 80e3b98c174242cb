"""LLaVA as one forward: embed, encode, project, merge, decode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nemo_vlm.batch import Batch, Images
from nemo_vlm.mcore.cache import Cache
from nemo_vlm.mcore.config import BuildContext
from nemo_vlm.mcore.gpt import build_gpt, decode, embed
from nemo_vlm.mcore.groups import Stage
from nemo_vlm.mcore.vit import VisionShape, VisionTransformer
from nemo_vlm.models.adapter import DOWNSAMPLE
from nemo_vlm.models.llava.config import Config, VisionConfig
from nemo_vlm.models.merge import merge
from nemo_vlm.models.projector import build_projector, fuse_neighbours


class Model(nn.Module):
    """This pipeline stage of a LLaVA; vision tower and projector stand on the first.

    Args:
        config: settled (see processor.settle).
    """

    def __init__(self, config: Config, build: BuildContext, stage: Stage) -> None:
        super().__init__()
        self.config, self.stage = config, stage
        self.language_model = build_gpt(config, build, stage)
        if stage.first:
            vision = config.mm_cfg.vision_encoder
            self.vision_model = VisionTransformer(vision_shape(vision), vision.depth, build)
            self.vision_projection = build_projector(
                config.mm_cfg.mm_mlp_adapter_type, vision.hidden_size, config.hidden_size, build
            )

    def forward(self, batch: Batch, labels: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Losses [b, s] where labels are given, else logits; hidden states on all but the last stage."""
        embeddings = self.embed(batch, together=labels is not None) if self.stage.first else None
        return decode(self.language_model, embeddings, batch, labels, cache)

    def embed(self, batch: Batch, together: bool) -> Tensor:
        """Word embeddings [s, b, h] with the projected vision features at the image tokens.

        Args:
            together: other ranks may have images where this one has none, as in training and validation.
        """
        embeddings = embed(self.language_model, batch.tokens)
        features = self.encode(batch.images) if len(batch.images) or together else embeddings[0, :0]
        return merge(embeddings, batch.tokens, features, self.config.mm_cfg.image_token_index)

    def encode(self, images: Images) -> Tensor:
        """Features [tokens, h] of all views, in order.

        No image is still one of a single patch to compute: ranks gather and reduce the tower's weights together, so all
        must run it.
        """
        seen = images if len(images) else blank(self.config.mm_cfg.vision_encoder.patch_dim, self.device)
        features = self.vision_model(seen)
        if self.config.mm_cfg.mm_mlp_adapter_type == DOWNSAMPLE:
            features = fuse_neighbours(features, seen.grids)
        features = self.vision_projection(features)
        return features if len(images) else features[:0]

    @property
    def device(self) -> torch.device:
        return self.vision_model.conv1.weight.device


def blank(patch_size: int, device: torch.device) -> Images:
    return Images(torch.zeros(1, 3 * patch_size**2, device=device), torch.ones(1, 3, dtype=torch.int64))


def vision_shape(vision: VisionConfig) -> VisionShape:
    """HF's CLIP and Siglip towers differ in class token, norm in front and the patch convolution's bias."""
    clip = vision.model_type == "clip"
    return VisionShape(
        image_size=vision.image_size,
        patch_size=vision.patch_dim,
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        activation=vision.activation,
        layernorm_epsilon=vision.layernorm_epsilon,
        class_token=clip,
        pre_norm=clip,
        patch_bias=not clip,
        pooling_head=vision.use_head,
    )
