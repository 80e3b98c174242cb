"""A vision-language model as one forward: embed, encode, merge, decode. A family builds the parts."""

from __future__ import annotations

from torch import Tensor, nn

from nemo_vlm.batch import Batch, Images
from nemo_vlm.config import LanguageConfig
from nemo_vlm.config.dynamic import DynamicConfig, DynamicVisionConfig
from nemo_vlm.mcore.cache import Cache
from nemo_vlm.mcore.config import BuildContext
from nemo_vlm.mcore.gpt import build_gpt, decode, embed
from nemo_vlm.mcore.groups import Stage
from nemo_vlm.mcore.vit import VisionShape, VisionTransformer
from nemo_vlm.models.feature_cache import KeptFeatures
from nemo_vlm.models.merge import merge
from nemo_vlm.models.positions import mrope_positions


class VisionLanguageModel(nn.Module):
    """A pipeline stage; on the first, a family adds `vision_model` and `vision_projection`.

    Args:
        config: settled (see the family's processor.settle).
    """

    vision_model: VisionTransformer
    vision_projection: nn.Module

    def __init__(self, config: LanguageConfig, build: BuildContext, stage: Stage) -> None:
        super().__init__()
        self.config, self.stage = config, stage
        self.kept_features: KeptFeatures | None = None
        self.language_model = build_gpt(config, build, stage)

    def forward(self, batch: Batch, labels: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Losses [b, s] where labels are given, else logits; hidden states on all but the last stage."""
        embeddings = self.embed(batch, together=cache is None) if self.stage.first else None
        return decode(self.language_model, embeddings, batch, labels, cache, self.positions(batch, cache))

    def embed(self, batch: Batch, together: bool) -> Tensor:
        """Word embeddings [s, b, h] with vision features at the placeholders, or wider, see mcore.deepstack.

        Args:
            together: other ranks may have images where this one has none, as whenever a run trains.
        """
        embeddings = embed(self.language_model, batch.tokens)
        features = self.encode(batch.images) if len(batch.images) or together else embeddings[0, :0]
        return merge(embeddings, batch.at_hand.tokens, features, self.config.placeholder_ids)

    def encode(self, images: Images) -> Tensor:
        """Features [tokens, h] of all views, in order, or wider.

        No image is still a smallest one to compute: ranks gather and reduce the tower's weights together, so all must
        run it.
        """
        seen, kept = images if len(images) else self.vision_model.blank(), self.kept_features
        hidden = kept(images) if kept else self.vision_model(seen)
        features = self.vision_projection(self.joined(hidden, seen))
        return features if len(images) else features[:0]

    def joined(self, features: Tensor, images: Images) -> Tensor:
        """The tower's features [patches, h] as the projector takes them."""
        return features

    def positions(self, batch: Batch, cache: Cache | None) -> Tensor | None:
        """[3, b, s] of M-RoPE; None: each token's place in its sample."""
        return None


def dynamic_positions(config: DynamicConfig, batch: Batch, cache: Cache | None) -> Tensor | None:
    """[3, b, s] of M-RoPE; None of tokens behind a prompt, where the cache counts on."""
    if cache is not None and cache.filled:
        return None
    merge_size = config.mm_cfg.vision_encoder.spatial_merge_size
    return mrope_positions(batch, config.mm_cfg.placeholder_ids, merge_size, config.frames_apart)


def dynamic_shape(vision: DynamicVisionConfig) -> VisionShape:
    """The tower of Qwen2-VL; later ones add to it."""
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
