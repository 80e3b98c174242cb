"""LLaVA records to samples: template, image tokens, pixels, labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy

from nemo_vlm.config import DataConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.images import ImageTransform
from nemo_vlm.models.llava.config import Config
from nemo_vlm.models.llava.views import Views, image_transform
from nemo_vlm.models.multimodal import MultimodalProcessor
from nemo_vlm.models.tokens import MediaTokens
from nemo_vlm.models.vocabulary import settle_vocabulary, token_id


def settle(config: Config, tokenizer: Any) -> Config:
    """The config with what the tokenizer decides: vocabulary size and the image token's id."""
    image = token_id(tokenizer, config.mm_cfg.image_token, "model.mm_cfg.image_token")
    given = config.mm_cfg.image_token_index
    if given not in (None, image):
        raise ConfigError(
            f"model.mm_cfg.image_token_index={given}: the tokenizer's id of {config.mm_cfg.image_token} is {image}"
        )
    return settle_vocabulary(replace(config, mm_cfg=replace(config.mm_cfg, image_token_index=image)), tokenizer)


class Processor(MultimodalProcessor):
    """Makes samples of a settled config's model."""

    def __init__(self, config: Config, data: DataConfig, tokenizer: Any) -> None:
        super().__init__(config, data, tokenizer, Views(config, data), media_tokens(config, tokenizer))


def media_tokens(config: Config, tokenizer: Any) -> MediaTokens:
    """Raises:
    ConfigError: the tokenizer lacks those that mm_cfg.use_im_start_end puts around an image.
    """
    mm_cfg = config.mm_cfg
    assert mm_cfg.image_token_index is not None
    if not mm_cfg.use_im_start_end:
        return MediaTokens(mm_cfg.image_token_index)
    names = ("image_start_token", "image_end_token")
    start, end = (token_id(tokenizer, getattr(mm_cfg, name), f"model.mm_cfg.{name}") for name in names)
    return MediaTokens(mm_cfg.image_token_index, (start,), (end,))


FRAMES = ("num_frames", "splice_single_frame")  # of DataConfig, which Hugging Face's processor carries and overlooks
HF_CLASSES = {"crop": "CLIPImageProcessor", "stretch": "SiglipImageProcessor", "pad": "LlavaImageProcessor"}


def hf_processor(config: Config, data: DataConfig) -> dict[str, dict[str, Any]]:
    """Hugging Face's files of a processor that does as ours, by name.

    Raises:
        ConfigError: there is none.
    """
    vision = config.mm_cfg.vision_encoder
    if config.mm_cfg.use_image_tile or data.image_aspect_ratio == "keep":
        what = "mm_cfg.use_image_tile=true" if config.mm_cfg.use_image_tile else "data.image_aspect_ratio=keep"
        raise ConfigError(f"model.{what}: Hugging Face's LlavaProcessor cannot make such views")
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": config.mm_cfg.image_token,
        "patch_size": vision.patch_dim,
        "vision_feature_select_strategy": "default" if vision.class_token_length else "full",
        "num_additional_image_tokens": vision.class_token_length,
    }
    frames = {name: getattr(data, name) for name in FRAMES if getattr(data, name) is not None}
    images = hf_images(image_transform(config.mm_cfg, data.image_aspect_ratio))
    return {"processor_config.json": processor | frames, "preprocessor_config.json": images}


def hf_images(transform: ImageTransform) -> dict[str, Any]:
    """preprocessor_config.json. A square image's shortest edge is both, and to cut out its centre changes nothing."""
    edge = transform.size
    stretch = transform.mode == "stretch"
    return {
        "processor_class": "LlavaProcessor",
        "image_processor_type": HF_CLASSES[transform.mode],
        "do_convert_rgb": True,
        "do_pad": transform.mode == "pad",
        "do_resize": True,
        "size": {"height": edge, "width": edge} if stretch else {"shortest_edge": edge},
        "resample": 3,  # bicubic
        "do_center_crop": not stretch,
        "crop_size": {"height": edge, "width": edge},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


def data_from_hf(files: Mapping[str, dict[str, Any]], config: Config) -> tuple[dict[str, Any], list[str]]:
    """DataConfig's fields that Hugging Face's processor decides, and what it does otherwise than ours will.

    Args:
        files: preprocessor_config.json and processor_config.json, as far as there are any.
    """
    theirs = {key: value for file in files.values() for key, value in (file | file.get("image_processor", {})).items()}
    aspect_ratio = "pad" if theirs.get("do_pad") else "square"
    ours = hf_images(image_transform(config.mm_cfg, aspect_ratio))
    names = ("processor_class", "image_processor_type", *(() if ours["do_center_crop"] else ("crop_size",)))
    compared = {key: value for key, value in ours.items() if key in theirs and key not in names}
    different = [f"{k} is {theirs[k]}, here {value}" for k, value in compared.items() if unlike(theirs[k], value)]
    frames = {name: theirs[name] for name in FRAMES if theirs.get(name) is not None}
    return {"image_aspect_ratio": aspect_ratio, **frames}, different


def unlike(theirs: Any, ours: Any) -> bool:
    """Older files give one number for an edge."""
    if isinstance(ours, dict) and isinstance(theirs, int):
        return set(ours.values()) != {theirs}
    if isinstance(ours, float | list):
        return not numpy.allclose(theirs, ours)
    return bool(theirs != ours) and not (theirs is None and ours is False)
