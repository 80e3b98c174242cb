"""Records to samples of Qwen3-VL, and Hugging Face's files of its processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_vlm.config import DataConfig
from nemo_vlm.models.dynamic import PixelLimits
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
from nemo_vlm.models.images import SIGLIP
from nemo_vlm.models.multimodal import MultimodalProcessor
from nemo_vlm.models.qwen3_vl.config import Config
from nemo_vlm.models.qwen3_vl.video import EvenSampling, TimedViews, TotalLimits

VIDEO_KEYS = {"min_pixels": "video_total_min_pixels", "max_pixels": "video_total_pixels"} | RATE_KEYS | NUM_FRAMES
MANY = 2**31 - 1  # frames, more than any video has


class Processor(MultimodalProcessor):
    """Makes samples of a settled config's model."""

    def __init__(self, config: Config, data: DataConfig, tokenizer: Any) -> None:
        super().__init__(config, data, tokenizer, views_of(config, data), media_tokens(config))


def views_of(config: Config, data: DataConfig) -> TimedViews:
    """As Qwen2VLImageProcessor sees images, and Qwen3VLVideoProcessor videos."""
    patches, chosen = patches_of(config, **SIGLIP), config.media_choices(data)
    return TimedViews(
        patches,
        PixelLimits(chosen["min_pixels"], chosen["max_pixels"]),
        TotalLimits(chosen["video_total_min_pixels"], chosen["video_total_pixels"]),
        EvenSampling(*rates_of(chosen)),
        data.image_draft,
    )


def hf_processor(config: Config, data: DataConfig) -> dict[str, dict[str, Any]]:
    """Hugging Face's files of a processor that does as ours, by name, for transformers 4.57 and 5."""
    patches, chosen = views_of(config, data).format, config.media_choices(data)
    images, videos = (
        hf_views(patches, "Qwen3VLProcessor", chosen[low], chosen[high])
        for low, high in (("min_pixels", "max_pixels"), ("video_total_min_pixels", "video_total_pixels"))
    )
    limits = {name: chosen[key] for name, key in IMAGE_KEYS.items()}  # 4.57's slow class overlooks `size`
    rates = {name: chosen[key] for name, key in RATE_KEYS.items()}
    if (count := chosen["num_frames"]) is not None:  # beside a rate, which its class takes for granted, it has no place
        rates |= dict.fromkeys(("min_frames", "max_frames"), MANY if count == -1 else count)
    # Without a word on cap_pixels_per_frame transformers 5 will have a limit for each frame too
    seen = {"do_sample_frames": True, "cap_pixels_per_frame": False}
    return {
        IMAGES: {"image_processor_type": "Qwen2VLImageProcessorFast"} | images | limits,
        VIDEOS: {"video_processor_type": "Qwen3VLVideoProcessor"} | videos | rates | seen,
    }


def data_from_hf(files: Mapping[str, dict[str, Any]], config: Config) -> tuple[dict[str, Any], list[str]]:
    """See dynamic_processor.data_from and given_views."""
    images, videos = given_views(files)
    found, lines = data_from(images, videos, limits_of(videos, VIDEO_KEYS), patches_of(config, **SIGLIP), config)
    if videos.get("cap_pixels_per_frame"):
        lines.append("cap_pixels_per_frame of videos is true, here only all frames together have limits")
    if videos.get("do_sample_frames") is False:
        lines.append("do_sample_frames of videos is false, here video_fps or num_frames of model.data decides")
    return found, lines
