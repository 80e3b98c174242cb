"""Qwen2-VL's settings: the language model's flat under `model`, the rest under `model.mm_cfg`, spelled as LLaVA's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nemo_vlm.config import DataConfig, LanguageConfig
from nemo_vlm.config.checks import demand
from nemo_vlm.config.dynamic import DynamicMediaConfig, settle_axes
from nemo_vlm.config.multimodal import STARTS as STARTS

SHARES = (2, 3, 3)  # half a head of 128 is 16, 24 and 24


@dataclass(frozen=True)
class Config(LanguageConfig):
    """A Qwen2-VL."""

    mm_cfg: DynamicMediaConfig = field(default_factory=DynamicMediaConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        settle_axes(self, SHARES)
        branch, vision = "model.mm_cfg.vision_encoder", self.mm_cfg.vision_encoder
        table, layers = vision.num_position_embeddings, vision.deepstack_visual_indexes
        demand(table is None, f"{branch}.num_position_embeddings", table, "null: Qwen2-VL learns no positions")
        demand(not layers, f"{branch}.deepstack_visual_indexes", list(layers), "[]: Qwen2-VL has no DeepStack")

    @property
    def media(self) -> DynamicMediaConfig:
        return self.mm_cfg

    @property
    def position_axes(self) -> int:
        return 3

    @property
    def frames_apart(self) -> bool:
        return False

    @property
    def conv_template(self) -> str:
        return "qwen2"

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
            "image_draft": False,
        }

    def typical_views(self, data: DataConfig) -> list[tuple[int, int, int]]:
        choices = self.media_choices(data)
        return [self.mm_cfg.typical_grid(choices["min_pixels"], choices["max_pixels"])]

    def visual_tokens(self, grids: Iterable[tuple[int, int, int]]) -> int:
        return self.mm_cfg.visual_tokens(grids)

    def vision_flops(self, patches: float, squared_frames: float) -> float:
        return self.mm_cfg.vision_flops(self.hidden_size, patches, squared_frames)

    def projector_flops(self, patches: float) -> float:
        return self.mm_cfg.projector_flops(self.hidden_size, patches)
