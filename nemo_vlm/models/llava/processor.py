"""LLaVA records to samples: template, image tokens, pixels, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor

from nemo_vlm.batch import IMAGE_TAG, Images, Sample
from nemo_vlm.config import DataConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.images import ImageTransform
from nemo_vlm.models.llava.config import Config
from nemo_vlm.models.llava.views import Media, Views, image_transform, media_of
from nemo_vlm.models.templates import PLACEHOLDERS, spoken
from nemo_vlm.models.text import ConversationText
from nemo_vlm.models.tokens import Encoded, MediaTokens
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


class Processor:
    """Makes samples of a settled config's model."""

    def __init__(self, config: Config, data: DataConfig, tokenizer: Any) -> None:
        self.config, self.data, self.tokenizer = config, data, tokenizer
        self.vision = config.mm_cfg.vision_encoder
        self.views = Views(config, data)
        self.text = ConversationText(data, tokenizer, config.encoder_seq_length, media_tokens(config, tokenizer))

    def sample(self, record: Mapping[str, Any]) -> Sample:
        """Tokens, labels and pixels of a LLaVA record whose `image` and `video` list files.

        Raises:
            SampleError: there is no sample to be made of it.
        """
        encoded, media = self._encode(record)
        return Sample(*encoded.shifted(), self.pixels(media[: self.text.num_media(encoded)]))

    def media(self, record: Mapping[str, Any]) -> list[Media]:
        """The images and videos that its sample sees, in the order of its text.

        Raises:
            SampleError: as length.
        """
        encoded, media = self._encode(record)
        return media[: self.text.num_media(encoded)]

    def length(self, record: Mapping[str, Any]) -> int:
        """Tokens of the record's sample; no pixels are loaded.

        Raises:
            SampleError: as sample, but for pixels that cannot be read.
        """
        return len(self._encode(record)[0]) - 1

    @property
    def length_settings(self) -> tuple[Any, ...]:
        """All that `length` depends on, beside the tokenizer and the files."""
        text, views, data = self.text, self.views, self.data
        said = text.limit, text.media, text.template, data.system_message, data.sep_image_conv_front, data.too_long
        return said, views.transform, views.patch_size, views.sampling, self.config.mm_cfg.mm_mlp_adapter_type

    def _encode(self, record: Mapping[str, Any]) -> tuple[Encoded, list[Media]]:
        turns = self.text.turns(record)
        media = media_of(record, spoken(turns))
        return self.text.train(record, turns, [self.views.num_features(one) for one in media]), media

    def prompt(self, record: Mapping[str, Any]) -> Sample:
        """The first question alone, with the whole of it as tokens.

        Raises:
            ConfigError: it is too long, or a file cannot be read.
        """
        tokens, media = self.asked(record)
        return Sample(tokens, torch.empty(0, dtype=torch.int64), self.pixels(media))

    def asked(self, record: Mapping[str, Any]) -> tuple[Tensor, list[Media]]:
        """Tokens [s] of the first question, and what it speaks of; no pixels are loaded.

        Raises:
            ConfigError: it is too long, or a file that must be opened cannot be read.
        """
        turns = self.text.turns(record)
        media = media_of(record, spoken(turns))[: len(PLACEHOLDERS.findall(turns[0].question))]
        return self.text.prompt(record, turns[0], [self.views.num_features(one) for one in media]), media

    def tokens(self, text: str, media: Sequence[Media], add_special_tokens: bool = True) -> Tensor:
        """Ids [s] of a raw text, an image token for each feature.

        Raises:
            ConfigError: it is too long, or images and placeholders differ in number.
        """
        placeholder = self.config.image_placeholder
        text = text.replace(self.config.image_text, placeholder).replace(IMAGE_TAG, placeholder)
        return self.text.raw(text, [self.views.num_features(one) for one in media], add_special_tokens)

    def pixels(self, paths: Sequence[Media]) -> Images:
        """The views of images and videos as patches."""
        return self.views.pixels(paths)


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
    images = hf_images(image_transform(config.mm_cfg, data.image_aspect_ratio))
    return {"processor_config.json": processor, "preprocessor_config.json": images}


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
    return {"image_aspect_ratio": aspect_ratio}, different


def unlike(theirs: Any, ours: Any) -> bool:
    """Older files give one number for an edge."""
    if isinstance(ours, dict) and isinstance(theirs, int):
        return set(ours.values()) != {theirs}
    if isinstance(ours, float | list):
        return not numpy.allclose(theirs, ours)
    return bool(theirs != ours) and not (theirs is None and ours is False)
