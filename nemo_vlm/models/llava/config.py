"""LLaVA's settings: the language model's flat under `model`, the rest under `model.mm_cfg`, as in NeMo."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_vlm.config import DataConfig, LanguageConfig, fill, tower_flops
from nemo_vlm.config.checks import only, refuse_others
from nemo_vlm.config.multimodal import STARTS as STARTS
from nemo_vlm.config.multimodal import LlmConfig as CommonLlmConfig
from nemo_vlm.config.multimodal import MediaConfig, TowerConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.adapter import DOWNSAMPLE, num_linear_layers


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """`model.mm_cfg.vision_encoder.*`; the defaults are CLIP ViT-L/14 at 336 pixels."""

    model_type: Literal["clip", "siglip"] = "clip"
    image_size: int = 336
    patch_dim: int = 14  # pixels along an edge of a patch
    num_layers: int = 24
    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    activation: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"] | None = None  # null: the model type's own
    layernorm_epsilon: float | None = None  # null: the model type's own
    vision_select_layer: int = -2  # index into the hidden states, the embeddings counted as the first
    class_token_length: int | None = None  # tokens in front of the patches: 1 in CLIP, 0 in SigLIP
    use_head: bool = False  # carry SigLIP's pooling head along, which LLaVA does not use
    hf_prefix: str = "vision_model."  # of the tower's names in Hugging Face's files; "" where transformers 5 made them
    crop_size: tuple[int, int] | None = None  # NeMo's words for image_size, which it must be twice
    vision_select_feature: str = only("patch", "class tokens are always dropped; leave it out")
    from_hf: bool = only(True, "towers of NeMo's own are not read; give from_pretrained a CLIP or SigLIP")

    def __post_init__(self) -> None:
        refuse_others(self, "model.mm_cfg.vision_encoder")
        if self.crop_size not in (None, (self.image_size, self.image_size)):
            raise ConfigError(
                f"model.mm_cfg.vision_encoder.crop_size={list(self.crop_size or ())}: the tower sees "
                f"{self.image_size} x {self.image_size} pixels (image_size); leave it out"
            )
        clip = self.model_type == "clip"
        fill(
            self,
            activation="quick_gelu" if clip else "gelu_pytorch_tanh",
            layernorm_epsilon=1e-5 if clip else 1e-6,
        )
        fill(self, class_token_length=int(clip))
        if self.class_token_length != int(clip):
            raise ConfigError(
                f"model.mm_cfg.vision_encoder.class_token_length={self.class_token_length}: "
                f"{self.model_type} has {int(clip)} class tokens"
            )
        if not 0 < self.patch_dim <= self.image_size:
            raise ConfigError(
                f"model.mm_cfg.vision_encoder.image_size={self.image_size}: "
                f"must not be below patch_dim={self.patch_dim}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.mm_cfg.vision_encoder.num_attention_heads={self.num_attention_heads}: "
                f"hidden_size={self.hidden_size} must divide by it"
            )
        if not 0 <= self.depth <= self.num_layers:
            raise ConfigError(
                f"model.mm_cfg.vision_encoder.vision_select_layer={self.vision_select_layer}: "
                f"a tower of {self.num_layers} layers has hidden states {-self.num_layers - 1} to {self.num_layers}"
            )

    @property
    def depth(self) -> int:
        """Layers that run to reach the selected hidden state."""
        return self.vision_select_layer + (self.num_layers + 1 if self.vision_select_layer < 0 else 0)

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return 3 * self.patch_dim**2

    @property
    def num_patches(self) -> int:
        """Of an image of the tower's own size; a rest that makes no whole patch is cut off."""
        return (self.image_size // self.patch_dim) ** 2


@dataclass(frozen=True)
class LlmConfig(CommonLlmConfig):
    """`model.mm_cfg.llm.*`."""

    # Of no effect: mm_cfg.image_token stands for an image, whatever the language model
    model_type: Literal["llama_2", "llama_3", "v1", "nvgpt", "mistral"] = "llama_2"


@dataclass(frozen=True)
class MultimodalConfig(MediaConfig):
    """`model.mm_cfg.*`."""

    llm: LlmConfig = field(default_factory=LlmConfig)
    vision_encoder: VisionConfig = field(default_factory=VisionConfig)
    mm_mlp_adapter_type: str = "mlp2x_gelu"  # linear, identity, mlpNx_gelu, mlp_downsample
    use_image_tile: bool = False  # see an image as a whole and in 2 x 2 tiles of twice the resolution
    use_im_start_end: bool = False  # the next two stand around an image's placeholders
    image_start_token: str = "<extra_id_4>"
    image_end_token: str = "<extra_id_5>"

    use_lita: bool = only(False, "videos are seen frame by frame; model.data.num_frames says how many")

    def __post_init__(self) -> None:
        refuse_others(self, "model.mm_cfg")
        num_linear_layers(self.mm_mlp_adapter_type)

    def features_of_grid(self, rows: int, columns: int) -> int:
        """Tokens of a view of so many patches."""
        if self.mm_mlp_adapter_type == DOWNSAMPLE:
            return -(-rows // 2) * -(-columns // 2)
        return rows * columns

    @property
    def image_text(self) -> str:
        around = (self.image_start_token, self.image_end_token) if self.use_im_start_end else ("", "")
        return self.image_token.join(around)

    @property
    def projector_input_size(self) -> int:
        """Width of what the projector makes one token of."""
        return (4 if self.mm_mlp_adapter_type == DOWNSAMPLE else 1) * self.vision_encoder.hidden_size

    @property
    def num_image_tokens(self) -> int:
        """Of an image that is seen in the tower's own size, its tiles included."""
        edge = self.vision_encoder.image_size // self.vision_encoder.patch_dim
        return self.features_of_grid(edge, edge) * (5 if self.use_image_tile else 1)


@dataclass(frozen=True)
class Config(LanguageConfig):
    """A LLaVA."""

    mm_cfg: MultimodalConfig = field(default_factory=MultimodalConfig)

    @property
    def media(self) -> MultimodalConfig:
        return self.mm_cfg

    @property
    def image_facts(self) -> dict[str, int]:
        edge = self.mm_cfg.vision_encoder.image_size
        return {"image_token_len": self.mm_cfg.num_image_tokens, "crop_size": edge, "image_size": edge}

    @property
    def media_settings(self) -> dict[str, Any]:
        keys = ("image_aspect_ratio", "splice_single_frame", "max_visual_tokens")
        return {"num_frames": 8} | dict.fromkeys(keys) | {"image_draft": False}

    @property
    def tiles_images(self) -> bool:
        return self.mm_cfg.use_image_tile

    def typical_views(self, data: DataConfig) -> list[tuple[int, int, int]]:
        edge = self.mm_cfg.vision_encoder.image_size // self.mm_cfg.vision_encoder.patch_dim
        return [(1, edge, edge)] * (5 if self.mm_cfg.use_image_tile else 1)

    def visual_tokens(self, grids: Iterable[tuple[int, int, int]]) -> int:
        return sum(time * self.mm_cfg.features_of_grid(rows, columns) for time, rows, columns in grids)

    def vision_flops(self, patches: float, squared_frames: float) -> float:
        """The layers of the tower that run, and a two-layer projector.

        Class tokens, the patches' embedding and norms are too small to count.
        """
        vision = self.mm_cfg.vision_encoder
        tower = tower_flops(vision.depth, vision.hidden_size, vision.ffn_hidden_size, patches, squared_frames)
        return tower + self.projector_flops(patches)

    def projector_flops(self, patches: float) -> float:
        return 2 * patches * self.hidden_size * (self.mm_cfg.vision_encoder.hidden_size + self.hidden_size)
