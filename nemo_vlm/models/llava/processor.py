"""LLaVA records to samples: template, image tokens, pixels, labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from nemo_vlm.batch import IMAGE_TAG, Sample
from nemo_vlm.config import DataConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.conversation import TEMPLATES, Turn, check_length, encode, expand, shift, turns
from nemo_vlm.models.images import CLIP, SIGLIP, ImageTransform, load_image
from nemo_vlm.models.llava.config import Config, VisionConfig
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
        self.transform = image_transform(self.vision, data.image_aspect_ratio)

    def sample(self, record: Mapping[str, Any]) -> Sample:
        """Tokens, labels and pixels of a LLaVA record whose `image` lists paths.

        Raises:
            ConfigError: too long for the model, or images and placeholders differ in number.
        """
        return self._encode(record, turns(record))

    def prompt(self, record: Mapping[str, Any]) -> Sample:
        """The first question alone, with the whole of it as tokens."""
        first = turns(record)[0]
        return self._encode(record, [Turn(first.question, None)])

    def _encode(self, record: Mapping[str, Any], conversation: list[Turn]) -> Sample:
        system = record.get("system") or self.data.system_message
        segments = TEMPLATES[self.data.conv_template](conversation, system, self.tokenizer.eos_token)
        token = self.config.mm_cfg.image_token
        ids, trained = encode(
            [(text.replace(IMAGE_TAG, token), is_trained) for text, is_trained in segments],
            self.tokenizer,
        )
        paths, placeholder = record["image"], self.config.mm_cfg.image_token_index
        count = int((ids == placeholder).sum())
        if count != len(paths):
            raise ConfigError(f"record {record.get('id')}: {count} {IMAGE_TAG} in the text, {len(paths)} images")
        repeats = expand(ids, placeholder, self.vision.num_image_tokens)
        ids, trained = ids.repeat_interleave(repeats), trained.repeat_interleave(repeats)
        check_length(record, len(ids) - 1, self.config.encoder_seq_length)
        size = self.vision.image_size
        images = [self.transform(load_image(path)) for path in paths]
        pixels = torch.stack(images) if images else torch.empty(0, 3, size, size)
        if conversation[-1].answer is None:
            return Sample(ids, torch.empty(0, dtype=torch.int64), pixels)
        return Sample(*shift(ids, trained), pixels)


def image_transform(vision: VisionConfig, aspect_ratio: str) -> ImageTransform:
    clip = vision.model_type == "clip"
    mode = "pad" if aspect_ratio == "pad" else "crop" if clip else "stretch"
    return ImageTransform(vision.image_size, **(CLIP if clip else SIGLIP), mode=mode)  # type: ignore[arg-type]
