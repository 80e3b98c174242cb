"""What the processors of Qwen2-VL and its successors share: tokens of images and videos, and Hugging Face's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

import numpy

from nemo_vlm.config import LanguageConfig
from nemo_vlm.config.data import RATES
from nemo_vlm.config.dynamic import DynamicConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.dynamic import PatchFormat
from nemo_vlm.models.tokens import MediaTokens
from nemo_vlm.models.vocabulary import settle_vocabulary, token_id

C = TypeVar("C", bound=LanguageConfig)
Given = Mapping[str, Any]  # a processor's settings, as Hugging Face's files say them
RGB = tuple[float, float, float]
TOKENS = ("image_token", "video_token", "vision_start_token", "vision_end_token")
IMAGES, VIDEOS, BOTH = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"
# DataConfig's fields by the names that Hugging Face's processors have for them
IMAGE_KEYS = {"min_pixels": "min_pixels", "max_pixels": "max_pixels"}
RATE_KEYS = {"fps": "video_fps", "min_frames": "video_min_frames", "max_frames": "video_max_frames"}
NUM_FRAMES = {"num_frames": "num_frames"}  # which takes the place of the rates


def settle(config: C, tokenizer: Any) -> C:
    """The config with what the tokenizer decides: vocabulary size and the ids of the tokens around and for features."""
    mm_cfg: Any = config.media
    found: dict[str, Any] = {}
    for name in TOKENS:
        token, given = getattr(mm_cfg, name), getattr(mm_cfg, f"{name}_index")
        index = found[f"{name}_index"] = token_id(tokenizer, token, f"model.mm_cfg.{name}")
        if given not in (None, index):
            raise ConfigError(f"model.mm_cfg.{name}_index={given}: the tokenizer's id of {token} is {index}")
    return settle_vocabulary(replace(config, **{"mm_cfg": replace(mm_cfg, **found)}), tokenizer)


def media_tokens(config: DynamicConfig) -> MediaTokens:
    mm_cfg = config.mm_cfg
    image, video = mm_cfg.placeholder_ids
    start, end = mm_cfg.vision_start_token_index, mm_cfg.vision_end_token_index
    assert start is not None and end is not None
    return MediaTokens(image, (start,), (end,), video)


def patches_of(config: DynamicConfig, mean: RGB, std: RGB) -> PatchFormat:
    vision = config.mm_cfg.vision_encoder
    return PatchFormat(vision.patch_dim, vision.temporal_patch_size, vision.spatial_merge_size, mean, std)


def rates_of(chosen: Mapping[str, Any]) -> list[Any]:
    """A sampling's arguments."""
    return [chosen[key] for key in (*RATES, "num_frames")]


def hf_views(patches: PatchFormat, processor: str, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """What Hugging Face's processor of images, or of videos, is told."""
    values = asdict(patches)
    return {
        "processor_class": processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(values.pop("mean")),
        "image_std": list(values.pop("std")),
        **values,
    }


def given_views(files: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint's files say of images and of videos.

    Args:
        files: preprocessor_config.json, video_preprocessor_config.json and processor_config.json, as far as there are
            any; the last has the others in it, where transformers 5 wrote it.
    """
    whole = files.get(BOTH, {})
    images, videos = (files.get(IMAGES) or whole.get("image_processor") or {}, files.get(VIDEOS) or {})
    return images, videos or whole.get("video_processor") or {}


def limits_of(given: Given, keys: Mapping[str, str]) -> dict[str, Any]:
    """Those settings of a processor, by ours; its limits of pixels have other names in newer files."""
    size = given.get("size") or {}
    named = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    named |= {name: value for name, value in given.items() if value is not None}
    return {key: named[name] for name, key in keys.items() if named.get(name) is not None}


def data_from(
    images: Given, videos: Given, found: Given, patches: PatchFormat, config: DynamicConfig
) -> tuple[dict[str, Any], list[str]]:
    """DataConfig's fields that Hugging Face's model decides, its template among them, as far as they are not the
    defaults; and what its processor does otherwise than ours will.

    Args:
        found: of these fields, what is said of videos.
    """
    other, lines = unlike_defaults(limits_of(images, IMAGE_KEYS) | dict(found), config)
    return {"conv_template": config.conv_template} | other, differences(images, videos, patches) + lines


def differences(images: Given, videos: Given, patches: PatchFormat) -> list[str]:
    """What they do otherwise than ours will."""
    ours = hf_views(patches, "", 0, 0)
    fixed = [key for key in ours if key not in ("processor_class", "size")]
    return [
        f"{key} of {kind} is {given[key]}, here {ours[key]}"
        for kind, given in (("images", images), ("videos", videos))
        for key in fixed
        if given.get(key) is not None and not numpy.allclose(given[key], ours[key])
    ]


def unlike_defaults(found: Mapping[str, Any], config: DynamicConfig) -> tuple[dict[str, Any], list[str]]:
    """Those settings that are not the family's defaults, without the rates that num_frames takes the place of.

    Returns:
        them, and a line where fps is given beside num_frames, which Hugging Face refuses; there, too, its limits then
        say nothing.
    """
    counted = "num_frames" in found
    other = {key: value for key, value in found.items() if not (counted and key in RATES)}
    both = counted and "video_fps" in found
    lines = [f"fps of videos is {found['video_fps']}, here num_frames decides"] if both else []
    return {key: value for key, value in other.items() if value != config.media_settings[key]}, lines
