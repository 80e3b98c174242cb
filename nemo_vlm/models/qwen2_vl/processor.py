"""Records to samples of Qwen2-VL, and Hugging Face's files of its processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy

from nemo_vlm.config import DataConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.dynamic import DynamicViews, PatchFormat, PixelLimits
from nemo_vlm.models.images import CLIP
from nemo_vlm.models.multimodal import MultimodalProcessor
from nemo_vlm.models.qwen2_vl.config import Config
from nemo_vlm.models.tokens import MediaTokens
from nemo_vlm.models.video import RateSampling
from nemo_vlm.models.vocabulary import settle_vocabulary, token_id

TOKENS = ("image_token", "video_token", "vision_start_token", "vision_end_token")
IMAGES, VIDEOS, BOTH = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"
SHARE_OF_CONTEXT = 0.9  # of Hugging Face's max_video_tokens are a video's at most
# DataConfig's fields by the names that Hugging Face's processors have for them
IMAGE_KEYS = {"min_pixels": "min_pixels", "max_pixels": "max_pixels"}
VIDEO_KEYS = {"min_pixels": "video_min_pixels", "max_pixels": "video_max_pixels", "fps": "video_fps"}
VIDEO_KEYS |= {"min_frames": "video_min_frames", "max_frames": "video_max_frames", "num_frames": "num_frames"}
RATES = ("fps", "min_frames", "max_frames")  # which num_frames takes the place of


def settle(config: Config, tokenizer: Any) -> Config:
    """The config with what the tokenizer decides: vocabulary size and the ids of the tokens around and for features."""
    found: dict[str, Any] = {}
    for name in TOKENS:
        token, given = getattr(config.mm_cfg, name), getattr(config.mm_cfg, f"{name}_index")
        index = found[f"{name}_index"] = token_id(tokenizer, token, f"model.mm_cfg.{name}")
        if given not in (None, index):
            raise ConfigError(f"model.mm_cfg.{name}_index={given}: the tokenizer's id of {token} is {index}")
    return settle_vocabulary(replace(config, mm_cfg=replace(config.mm_cfg, **found)), tokenizer)


class Processor(MultimodalProcessor):
    """Makes samples of a settled config's model."""

    def __init__(self, config: Config, data: DataConfig, tokenizer: Any) -> None:
        super().__init__(config, data, tokenizer, views_of(config, data), media_tokens(config))


def views_of(config: Config, data: DataConfig) -> DynamicViews:
    """As Qwen2VLImageProcessor sees images, and qwen_vl_utils videos."""
    vision, chosen = config.mm_cfg.vision_encoder, config.media_choices(data)
    rates = (chosen[key] for key in ("video_fps", "video_min_frames", "video_max_frames", "num_frames"))
    return DynamicViews(
        PatchFormat(vision.patch_dim, vision.temporal_patch_size, vision.spatial_merge_size, **CLIP),
        PixelLimits(chosen["min_pixels"], chosen["max_pixels"]),
        PixelLimits(*(chosen[f"video_{name}_pixels"] for name in ("min", "max", "total"))),
        RateSampling(vision.temporal_patch_size, *rates),
    )


def media_tokens(config: Config) -> MediaTokens:
    mm_cfg = config.mm_cfg
    image, video = config.placeholder_ids
    start, end = mm_cfg.vision_start_token_index, mm_cfg.vision_end_token_index
    assert start is not None and end is not None
    return MediaTokens(image, (start,), (end,), video)


def hf_processor(config: Config, data: DataConfig) -> dict[str, dict[str, Any]]:
    """Hugging Face's files of a processor that does as ours, by name, for transformers 4 and 5.

    Which frames of a video are seen is chosen before they are given to it, as by qwen_vl_utils.
    """
    views, chosen = views_of(config, data), config.media_choices(data)
    videos = {name: chosen[key] for name, key in VIDEO_KEYS.items() if chosen[key] is not None}
    if data.num_frames is not None:  # Hugging Face takes one of them only
        del videos["fps"]
    if data.num_frames == -1:  # and neither, where all are seen
        del videos["num_frames"]
    total = chosen["video_total_pixels"] / (SHARE_OF_CONTEXT * views.format.factor**2)
    budget = {"cap_pixels_per_frame": True, "max_video_tokens": round(total), "do_sample_frames": False}
    return {
        IMAGES: {"image_processor_type": "Qwen2VLImageProcessor"} | hf_views(views.format, views.images),
        VIDEOS: {"video_processor_type": "Qwen2VLVideoProcessor"}
        | hf_views(views.format, views.videos)
        | videos
        | budget,
    }


def hf_views(patches: PatchFormat, limits: PixelLimits) -> dict[str, Any]:
    """What either processor is told; transformers 5 reads `size`, and older ones the limits by their names."""
    values = asdict(patches)
    return {
        "processor_class": "Qwen2VLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "size": {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels},
        "min_pixels": limits.min_pixels,
        "max_pixels": limits.max_pixels,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(values.pop("mean")),
        "image_std": list(values.pop("std")),
        **values,
    }


def data_from_hf(files: Mapping[str, dict[str, Any]], config: Config) -> tuple[dict[str, Any], list[str]]:
    """DataConfig's fields that Hugging Face's model decides, its template among them, as far as they are not the
    defaults; and what its processor does otherwise than ours will.

    Args:
        files: preprocessor_config.json, video_preprocessor_config.json and processor_config.json, as far as there are
            any; the last has the others in it, where transformers 5 wrote it.
    """
    whole = files.get(BOTH, {})
    images, videos = (files.get(IMAGES) or whole.get("image_processor") or {}, files.get(VIDEOS) or {})
    videos = videos or whole.get("video_processor") or {}
    patches = views_of(config, DataConfig()).format
    found = limits_of(images, IMAGE_KEYS) | limits_of(videos, VIDEO_KEYS)
    if videos.get("cap_pixels_per_frame") and videos.get("max_video_tokens"):
        found["video_total_pixels"] = int(videos["max_video_tokens"] * patches.factor**2 * SHARE_OF_CONTEXT)
    ours = hf_views(patches, PixelLimits(0, 0))
    fixed = [key for key in ours if key not in ("processor_class", "size", "min_pixels", "max_pixels")]
    different = [
        f"{key} of {kind} is {given[key]}, here {ours[key]}"
        for kind, given in (("images", images), ("videos", videos))
        for key in fixed
        if given.get(key) is not None and not numpy.allclose(given[key], ours[key])
    ]
    other = {key: value for key, value in found.items() if value != config.media_settings[key]}
    for name in RATES if "num_frames" in other else ():
        if other.pop(VIDEO_KEYS[name], None) is not None:
            different.append(f"{name} of videos is {videos[name]}, here num_frames decides")
    return {"conv_template": "qwen2"} | other, different


def limits_of(given: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Those settings of a processor, by ours; its limits of pixels have other names in newer files."""
    size = given.get("size") or {}
    named = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    named |= {name: value for name, value in given.items() if value is not None}
    return {key: named[name] for name, key in keys.items() if named.get(name) is not None}
