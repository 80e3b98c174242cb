"""Qwen2-VL's settings: the language model's flat under `model`, the rest under `model.mm_cfg`, spelled as LLaVA's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_vlm.config import LanguageConfig, fill, tower_flops
from nemo_vlm.config.checks import demand
from nemo_vlm.config.multimodal import STARTS as STARTS
from nemo_vlm.config.multimodal import MediaConfig, TowerConfig
from nemo_vlm.errors import ConfigError

SHARES = (2, 3, 3)  # of time, height and width in half a head, which Qwen2-VL splits into 16, 24 and 24


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """`model.mm_cfg.vision_encoder.*`; the defaults are the tower of all Qwen2-VLs."""

    patch_dim: int = 14  # pixels along an edge of a patch
    temporal_patch_size: int = 2  # frames of a patch; an image is seen as so many equal ones
    spatial_merge_size: int = 2  # patches along an edge of a block that becomes one token
    num_layers: int = 32
    hidden_size: int = 1280
    ffn_hidden_size: int = 5120
    activation: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"] = "quick_gelu"
    layernorm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        branch = "model.mm_cfg.vision_encoder"
        sizes = ("patch_dim", "temporal_patch_size", "spatial_merge_size", "num_attention_heads")
        for name in (*sizes, "num_layers", "hidden_size", "ffn_hidden_size"):
            demand(getattr(self, name) > 0, f"{branch}.{name}", getattr(self, name), "1 or more")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ConfigError(
                f"{branch}.num_attention_heads={self.num_attention_heads}: hidden_size={self.hidden_size} must divide "
                "by it, into heads whose size divides by 4 (rotary positions in height and width)"
            )

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return 3 * self.temporal_patch_size * self.patch_dim**2


@dataclass(frozen=True)
class MultimodalConfig(MediaConfig):
    """`model.mm_cfg.*`."""

    vision_encoder: VisionConfig = field(default_factory=VisionConfig)
    image_token: str = "<|image_pad|>"  # placeholders in the text, one token for each feature
    video_token: str = "<|video_pad|>"
    vision_start_token: str = "<|vision_start|>"  # these two stand around an image's or a video's placeholders
    vision_end_token: str = "<|vision_end|>"
    # null: as the tokenizer says
    video_token_index: int | None = None
    vision_start_token_index: int | None = None
    vision_end_token_index: int | None = None

    @property
    def projector_input_size(self) -> int:
        """Width of what the merger makes one token of."""
        return self.vision_encoder.spatial_merge_size**2 * self.vision_encoder.hidden_size


@dataclass(frozen=True)
class Config(LanguageConfig):
    """A Qwen2-VL."""

    mm_cfg: MultimodalConfig = field(default_factory=MultimodalConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        half = (self.kv_channels or 0) // 2
        if not half % sum(SHARES):
            fill(self, mrope_section=tuple(half // sum(SHARES) * share for share in SHARES))
        sections = list(self.mrope_section or ())
        if len(sections) != 3 or min(sections) < 0 or sum(sections) != half:
            raise ConfigError(
                f"model.mrope_section={sections or 'null'}: must be three numbers, of time, height and width, whose "
                f"sum is half a head, {half}"
            )
        for key in ("seq_len_interpolation_factor", "rope_scaling_factor"):
            demand(getattr(self, key) is None, f"model.{key}", getattr(self, key), "null: M-RoPE is not scaled")

    @property
    def media(self) -> MultimodalConfig:
        return self.mm_cfg

    @property
    def position_axes(self) -> int:
        return 3

    @property
    def placeholder_ids(self) -> tuple[int, int]:
        """The tokens that stand for features, of images and of videos."""
        image, video = self.mm_cfg.image_token_index, self.mm_cfg.video_token_index
        assert image is not None and video is not None, "placeholders are settled before a model is built"
        return image, video

    @property
    def image_text(self) -> str:
        mm = self.mm_cfg
        return f"{mm.vision_start_token}{mm.image_token}{mm.vision_end_token}"

    @property
    def video_placeholder(self) -> str:
        return self.mm_cfg.video_token

    @property
    def video_text(self) -> str:
        mm = self.mm_cfg
        return f"{mm.vision_start_token}{mm.video_token}{mm.vision_end_token}"

    @property
    def media_break(self) -> str:
        return ""

    @property
    def media_settings(self) -> dict[str, Any]:
        """Hugging Face's classes have these limits, and qwen_vl_utils these rates and the budget of a video."""
        block = 28**2
        return {
            "min_pixels": 4 * block,
            "max_pixels": 1280 * block,
            "video_min_pixels": 128 * block,
            "video_max_pixels": 768 * block,
            "video_total_pixels": 128_000 * block * 9 // 10,
            "video_fps": 2.0,
            "video_min_frames": 4,
            "video_max_frames": 768,
            "num_frames": None,
            "max_visual_tokens": None,
        }

    def visual_tokens(self, grids: Iterable[tuple[int, int, int]]) -> int:
        block = self.mm_cfg.vision_encoder.spatial_merge_size**2
        return sum(time * rows * columns // block for time, rows, columns in grids)

    def vision_flops(self, patches: float, squared_frames: float) -> float:
        """The tower, which attends inside each frame, the patches' embedding, and the merger."""
        vision = self.mm_cfg.vision_encoder
        tower = tower_flops(vision.num_layers, vision.hidden_size, vision.ffn_hidden_size, patches, squared_frames)
        embedding = 2 * patches * vision.patch_values * vision.hidden_size
        merged, block = self.mm_cfg.projector_input_size, vision.spatial_merge_size**2
        return tower + embedding + 2 * patches / block * merged * (merged + self.hidden_size)
