"""Qwen3-VL's settings, spelled as Qwen2-VL's; it is a mixture of experts where `model.num_moe_experts` is given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nemo_vlm.config import DataConfig, LanguageConfig
from nemo_vlm.config.checks import demand
from nemo_vlm.config.dynamic import DynamicMediaConfig, DynamicVisionConfig, settle_axes
from nemo_vlm.config.multimodal import STARTS as STARTS
from nemo_vlm.errors import ConfigError

MOST_TAPS = 8  # as many mergers have names in other derivatives' checkpoints; all Qwen3-VLs have 3
SHARES = (6, 5, 5)  # half a head of 128 is 24, 20 and 20
TOWER = DynamicVisionConfig(  # from 8B on
    patch_dim=16,
    num_layers=27,
    hidden_size=1152,
    ffn_hidden_size=4304,
    activation="gelu_pytorch_tanh",
    num_position_embeddings=2304,
    deepstack_visual_indexes=(8, 16, 24),
)


@dataclass(frozen=True)
class Config(LanguageConfig):
    """A Qwen3-VL."""

    mm_cfg: DynamicMediaConfig = field(default_factory=lambda: DynamicMediaConfig(vision_encoder=TOWER))

    def __post_init__(self) -> None:
        super().__post_init__()
        settle_axes(self, SHARES)
        branch, vision = "model.mm_cfg.vision_encoder", self.mm_cfg.vision_encoder
        table, taps = vision.num_position_embeddings, list(vision.deepstack_visual_indexes)
        demand(table is not None, f"{branch}.num_position_embeddings", "null", "a number: Qwen3-VL learns positions")
        demand(len(taps) <= MOST_TAPS, f"{branch}.deepstack_visual_indexes", taps, f"{MOST_TAPS} layers at most")
        sections = self.mrope_section or ()
        if 3 * max(sections[1:]) > sum(sections):
            raise ConfigError(
                f"model.mrope_section={list(sections)}: height and width take turns with time, so neither may have "
                "more than a third"
            )
        right = f"{len(taps)} or more, one a DeepStack feature"
        demand(len(taps) <= self.num_layers, "model.num_layers", self.num_layers, right)

    @property
    def media(self) -> DynamicMediaConfig:
        return self.mm_cfg

    @property
    def position_axes(self) -> int:
        return 3

    @property
    def mrope_interleaved(self) -> bool:
        return True

    @property
    def frames_apart(self) -> bool:
        return True

    @property
    def deepstack_layers(self) -> int:
        return len(self.mm_cfg.vision_encoder.deepstack_visual_indexes)

    @property
    def conv_template(self) -> str:
        return "chatml"

    @property
    def media_settings(self) -> dict[str, Any]:
        """The limits and rates of Hugging Face's classes."""
        block = 32**2
        return {
            "min_pixels": 64 * block,
            "max_pixels": 16384 * block,
            "video_total_min_pixels": 128 * block,
            "video_total_pixels": 768 * block,
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
