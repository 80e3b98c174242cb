"""Conversations to samples, text only: images of a record and their placeholders are left out, with a warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.batch import IMAGE_TAG, Images, Sample
from nemo_vlm.config import DataConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.conversation import TEMPLATES, Turn, check_length, check_prompt, encode, raw_ids, shift, turns
from nemo_vlm.models.gpt.config import Config
from nemo_vlm.models.vocabulary import settle_vocabulary

log = logging.getLogger(__name__)


def settle(config: Config, tokenizer: Any) -> Config:
    """The config with the tokenizer's vocabulary size."""
    return settle_vocabulary(config, tokenizer)


class Processor:
    """Makes samples for a language model."""

    def __init__(self, config: Config, data: DataConfig, tokenizer: Any) -> None:
        self.config, self.data, self.tokenizer = config, data, tokenizer
        self.warned = False

    def sample(self, record: Mapping[str, Any]) -> Sample:
        """Tokens and labels of a LLaVA record."""
        return self._encode(record, turns(record))

    def prompt(self, record: Mapping[str, Any]) -> Sample:
        """The first question alone."""
        first = turns(record)[0]
        return self._encode(record, [Turn(first.question, None)])

    def _encode(self, record: Mapping[str, Any], conversation: list[Turn]) -> Sample:
        if record["image"] and not self.warned:
            log.warning(
                "the gpt family reads text only: the images of %s and of all other records are left out",
                record.get("id"),
            )
            self.warned = True
        text = [Turn(turn.question.replace(IMAGE_TAG, "").lstrip("\n"), turn.answer) for turn in conversation]
        system = record.get("system") or self.data.system_message
        ids, trained = encode(
            TEMPLATES[self.data.conv_template](text, system, self.tokenizer.eos_token),
            self.tokenizer,
        )
        check_length(record, len(ids) - 1, self.config.encoder_seq_length)
        none = Images()
        if text[-1].answer is None:
            return Sample(ids, torch.empty(0, dtype=torch.int64), none)
        return Sample(*shift(ids, trained), none)

    def tokens(self, text: str, num_images: int, add_special_tokens: bool = True) -> Tensor:
        """Ids [s] of a raw text.

        Raises:
            ConfigError: there are images, or it is too long for the model.
        """
        if num_images:
            raise ConfigError(f"the gpt family reads text only, there are {num_images} images")
        ids = raw_ids(text, self.tokenizer, add_special_tokens)
        check_prompt(len(ids), self.config.encoder_seq_length)
        return ids

    def pixels(self, paths: Sequence[Path]) -> Images:
        """None of no image files."""
        return Images()


def hf_processor(config: Config, data: DataConfig) -> dict[str, dict[str, Any]]:
    """Hugging Face has none for text."""
    return {}


def data_from_hf(files: Mapping[str, dict[str, Any]], config: Config) -> tuple[dict[str, Any], list[str]]:
    return {}, []
