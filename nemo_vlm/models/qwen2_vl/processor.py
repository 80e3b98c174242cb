"""Records to samples of Qwen2-VL, and Hugging Face's files of its processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_vlm.config import DataConfig
from nemo_vlm.models.dynamic import DynamicViews, PixelLimits
from nemo_vlm.models.dynamic_processor import (
    IMAGE_KEYS,
    IMAGES,
    NUM_FRAMES,
    RATE_KEYS,
    VIDEOS,
    data_from,
    given_views,
    hf_views,
    limits_of,
    media_tokens,
    patches_of,
    rates_of,
)
from nemo_vlm.models.dynamic_processor import settle as settle
from nemo_vlm.models.images import CLIP
from nemo_vlm.models.multimodal import MultimodalProcessor
from nemo_vlm.models.qwen2_vl.config import Config
from nemo_vlm.models.video import RateSampling

SHARE_OF_CONTEXT = 0.9  # of Hugging Face's max_video_tokens are a video's at most
VIDEO_KEYS = {"min_pixels": "video_min_pixels", "max_pixels": "video_max_pixels"} | RATE_KEYS | NUM_FRAMES


class Processor(MultimodalProcessor):
    """Makes samples of a settled config's model."""

    def __init__(self, config: Config, data: DataConfig, tokenizer: Any) -> None:
        super().__init__(config, data, tokenizer, views_of(config, data), media_tokens(config))


def views_of(config: Config, data: DataConfig) -> DynamicViews:
    """As Qwen2VLImageProcessor sees images, and qwen_vl_utils videos."""
    patches, chosen = patches_of(config, **CLIP), config.media_choices(data)
    return DynamicViews(
        patches,
        PixelLimits(chosen["min_pixels"], chosen["max_pixels"]),
        PixelLimits(*(chosen[f"video_{name}_pixels"] for name in ("min", "max", "total"))),
        RateSampling(patches.temporal_patch_size, *rates_of(chosen)),
        data.image_draft,
    )


def hf_processor(config: Config, data: DataConfig) -> dict[str, dict[str, Any]]:
    """Hugging Face's files of a processor that does as ours, by name, for transformers 4 and 5.

    Which frames of a video are seen is chosen before they are given to it, as by qwen_vl_utils.
    """
    patches, chosen = views_of(config, data).format, config.media_choices(data)
    videos = {name: chosen[key] for name, key in VIDEO_KEYS.items() if chosen[key] is not None}
    if data.num_frames is not None:  # Hugging Face takes one of them only
        del videos["fps"]
    if data.num_frames == -1:  # and neither, where all are seen
        del videos["num_frames"]
    total = chosen["video_total_pixels"] / (SHARE_OF_CONTEXT * patches.factor**2)
    budget = {"cap_pixels_per_frame": True, "max_video_tokens": round(total), "do_sample_frames": False}
    images = {name: chosen[key] for name, key in IMAGE_KEYS.items()}  # which transformers 5 reads in `size` alone
    seen = [hf_views(patches, "Qwen2VLProcessor", one["min_pixels"], one["max_pixels"]) for one in (images, videos)]
    return {
        IMAGES: {"image_processor_type": "Qwen2VLImageProcessor"} | seen[0] | images,
        VIDEOS: {"video_processor_type": "Qwen2VLVideoProcessor"} | seen[1] | videos | budget,
    }


def data_from_hf(files: Mapping[str, dict[str, Any]], config: Config) -> tuple[dict[str, Any], list[str]]:
    """See dynamic_processor.data_from and given_views."""
    (images, videos), patches = given_views(files), patches_of(config, **CLIP)
    found = limits_of(videos, VIDEO_KEYS)
    if videos.get("cap_pixels_per_frame") and videos.get("max_video_tokens"):
        found["video_total_pixels"] = int(videos["max_video_tokens"] * patches.factor**2 * SHARE_OF_CONTEXT)
    return data_from(images, videos, found, patches, config)
