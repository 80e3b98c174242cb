"""Settings of the families that see in any resolution, Qwen2-VL's and its successors'."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nemo_vlm.config.checks import demand, fill
from nemo_vlm.config.model import LanguageConfig, tower_flops
from nemo_vlm.config.multimodal import MediaConfig, TowerConfig
from nemo_vlm.errors import ConfigError, SampleError

PHOTOGRAPH = (640, 480)  # pixels
MAX_RATIO = 200  # of an image's sides


def smart_resize(
    width: int, height: int, factor: int, min_pixels: int, max_pixels: int, frames: int = 1, depth: int = 1
) -> tuple[int, int]:
    """(width, height), multiples of `factor` near an image's own proportions; smart_resize of Qwen2VLImageProcessor,
    and of Qwen3VLVideoProcessor, whose limits are those of all frames together.

    Args:
        frames: which the limits are for.
        depth: frames of a patch; to whole patches their number is rounded where it is compared with the limits.
    Raises:
        SampleError: narrow_image: one side is more than 200 times the other.
    """
    if max(width, height) / min(width, height) > MAX_RATIO:
        long = f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other"
        raise SampleError("narrow_image", long)
    near = [round(side / factor) * factor for side in (width, height)]
    pixels, nearest = frames * width * height, round(frames / depth) * depth * near[0] * near[1]
    if nearest > max_pixels:
        scale = math.sqrt(pixels / max_pixels)
        near = [max(factor, math.floor(side / scale / factor) * factor) for side in (width, height)]
    elif nearest < min_pixels:
        scale = math.sqrt(min_pixels / pixels)
        near = [math.ceil(side * scale / factor) * factor for side in (width, height)]
    return near[0], near[1]


@dataclass(frozen=True)
class DynamicVisionConfig(TowerConfig):
    """`model.mm_cfg.vision_encoder.*`; the defaults are the tower of all Qwen2-VLs, other families have their own."""

    patch_dim: int = 14  # pixels along an edge of a patch
    temporal_patch_size: int = 2  # frames of a patch; an image is seen as so many equal ones
    spatial_merge_size: int = 2  # patches along an edge of a block that becomes one token
    num_layers: int = 32
    hidden_size: int = 1280
    ffn_hidden_size: int = 5120
    activation: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"] = "quick_gelu"
    layernorm_epsilon: float = 1e-6
    # Of Qwen3-VL: learned positions of a square, interpolated to each view; and layers, counted from 0, whose outputs
    # the decoder's first layers get, one after another (DeepStack)
    num_position_embeddings: int | None = None
    deepstack_visual_indexes: tuple[int, ...] = ()

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
        table, layers = self.num_position_embeddings, list(self.deepstack_visual_indexes)
        square = table is None or (table > 0 and math.isqrt(table) ** 2 == table)
        demand(square, f"{branch}.num_position_embeddings", table, "the square of a number, 1 or more")
        rising = layers == sorted(set(layers)) and all(0 <= layer < self.num_layers for layer in layers)
        right = f"layers of the tower in rising order, 0 to {self.num_layers - 1}"
        demand(rising, f"{branch}.deepstack_visual_indexes", layers, right)

    @property
    def depth(self) -> int:
        """Layers that run."""
        return self.num_layers

    @property
    def patch_values(self) -> int:
        """Numbers in a patch."""
        return 3 * self.temporal_patch_size * self.patch_dim**2


@dataclass(frozen=True)
class DynamicMediaConfig(MediaConfig):
    """`model.mm_cfg.*`."""

    vision_encoder: DynamicVisionConfig = field(default_factory=DynamicVisionConfig)
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
        """Width of what a merger makes one token of."""
        return self.vision_encoder.spatial_merge_size**2 * self.vision_encoder.hidden_size

    @property
    def placeholder_ids(self) -> tuple[int, int]:
        """Of images and of videos."""
        image, video = self.image_token_index, self.video_token_index
        assert image is not None and video is not None, "placeholders are settled before a model is built"
        return image, video

    @property
    def image_text(self) -> str:
        return f"{self.vision_start_token}{self.image_token}{self.vision_end_token}"

    @property
    def video_placeholder(self) -> str:
        return self.video_token

    @property
    def video_text(self) -> str:
        return f"{self.vision_start_token}{self.video_token}{self.vision_end_token}"

    @property
    def media_break(self) -> str:
        return ""

    def typical_grid(self, min_pixels: int, max_pixels: int) -> tuple[int, int, int]:
        """Patches in time, height and width of a photograph as COCO's, resized between those limits."""
        vision = self.vision_encoder
        factor = vision.patch_dim * vision.spatial_merge_size
        width, height = (side // vision.patch_dim for side in smart_resize(*PHOTOGRAPH, factor, min_pixels, max_pixels))
        return 1, height, width

    def visual_tokens(self, grids: Iterable[tuple[int, int, int]]) -> int:
        """What views of these patches in time, height and width are in the text."""
        block = self.vision_encoder.spatial_merge_size**2
        return sum(time * rows * columns // block for time, rows, columns in grids)

    def vision_flops(self, out_size: int, patches: float, squared_frames: float) -> float:
        """The tower, which attends inside each frame, the patches' embedding, and the mergers, to `out_size`."""
        vision = self.vision_encoder
        tower = tower_flops(vision.num_layers, vision.hidden_size, vision.ffn_hidden_size, patches, squared_frames)
        embedding = 2 * patches * vision.patch_values * vision.hidden_size
        return tower + embedding + self.projector_flops(out_size, patches)

    def projector_flops(self, out_size: int, patches: float) -> float:
        """The mergers alone."""
        merged, mergers = self.projector_input_size, 1 + len(self.vision_encoder.deepstack_visual_indexes)
        return mergers * 2 * patches / self.vision_encoder.spatial_merge_size**2 * merged * (merged + out_size)


class DynamicConfig(Protocol):
    """A family's Config, as far as what these families share asks it."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def mm_cfg(self) -> DynamicMediaConfig: ...
    @property
    def conv_template(self) -> str: ...
    @property
    def media_settings(self) -> dict[str, Any]: ...
    @property
    def frames_apart(self) -> bool:
        """Whether text stands between the frames of a video (patches of one time): each is then a view of its own."""
        ...


def settle_axes(config: LanguageConfig, shares: tuple[int, int, int]) -> None:
    """Fill in and check `model.mrope_section` of a language model under M-RoPE.

    Args:
        shares: of time, height and width in half a head, where nothing is said.
    """
    half, whole = (config.kv_channels or 0) // 2, sum(shares)
    if config.mrope_section is None:
        right = f"a multiple of {2 * whole}, or model.mrope_section be given"
        demand(half % whole == 0, "model.kv_channels", config.kv_channels, right)
        fill(config, mrope_section=tuple(half // whole * share for share in shares))
    sections = list(config.mrope_section or ())
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != half:
        raise ConfigError(
            f"model.mrope_section={sections}: must be three numbers, of time, height and width, whose sum is half a "
            f"head, {half}"
        )
    for key in ("seq_len_interpolation_factor", "rope_scaling_factor"):
        demand(getattr(config, key) is None, f"model.{key}", getattr(config, key), "null: M-RoPE is not scaled")
