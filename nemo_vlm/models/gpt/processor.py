"""Conversations to samples, text only: images of a record and their placeholders are left out, with a warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_vlm.batch import Images, Sample
from nemo_vlm.config import DataConfig
from nemo_vlm.errors import ConfigError
from nemo_vlm.models.gpt.config import Config
from nemo_vlm.models.text import ConversationText
from nemo_vlm.models.tokens import Encoded
from nemo_vlm.models.vocabulary import settle_vocabulary

log = logging.getLogger(__name__)


def settle(config: Config, tokenizer: Any) -> Config:
    """The config with the tokenizer's vocabulary size."""
    return settle_vocabulary(config, tokenizer)


class Processor:
    """Makes samples for a language model."""

    def __init__(self, config: Config, data: DataConfig, tokenizer: Any) -> None:
        self.config, self.data, self.tokenizer = config, data, tokenizer
        self.text = ConversationText(config, data, tokenizer)
        self.warned = False

    def sample(self, record: Mapping[str, Any]) -> Sample:
        """Tokens and labels of a LLaVA record.

        Raises:
            SampleError: there is no sample to be made of it.
        """
        return Sample(*self._encode(record).shifted())

    def length(self, record: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens of the record's sample, of which none stand for images.

        Raises:
            SampleError: as sample.
        """
        return len(self._encode(record)) - 1, 0

    def media(self, record: Mapping[str, Any]) -> list[Any]:
        """None, whatever the record has."""
        return []

    def seen(self, images: Images) -> list[Any]:
        """Nothing."""
        return []

    @property
    def length_settings(self) -> tuple[Any, ...]:
        """All that `length` depends on, beside the tokenizer and the files."""
        return self.text.limit, self.text.template, self.data.system_message, self.data.too_long

    def _encode(self, record: Mapping[str, Any]) -> Encoded:
        if record["image"] and not self.warned:
            log.warning(
                "the gpt family reads text only: the images of %s and of all other records are left out",
                record.get("id"),
            )
            self.warned = True
        return self.text.train(record, self.text.turns(record), [])

    def prompt(self, record: Mapping[str, Any]) -> Sample:
        """The first question alone.

        Raises:
            SampleError: it is too long.
        """
        tokens, _ = self.asked(record)
        return Sample(tokens, torch.empty(0, dtype=torch.int64))

    def asked(self, record: Mapping[str, Any]) -> tuple[Tensor, list[Any]]:
        """Tokens [s] of the first question, and no files.

        Raises:
            SampleError: it is too long.
        """
        return self.text.prompt(record, self.text.turns(record)[0], []), []

    def tokens(self, text: str, media: Sequence[Any], add_special_tokens: bool = True) -> Tensor:
        """Ids [s] of a raw text.

        Raises:
            ConfigError: there are images.
            SampleError: it is too long for the model.
        """
        if media:
            raise ConfigError(f"the gpt family reads text only, there are {len(media)} images")
        return self.text.raw(text, [], add_special_tokens)

    def pixels(self, media: Sequence[Any]) -> Images:
        """None of no image files."""
        return Images()


def hf_processor(config: Config, data: DataConfig) -> dict[str, dict[str, Any]]:
    """Hugging Face has none for text."""
    return {}


def data_from_hf(files: Mapping[str, dict[str, Any]], config: Config) -> tuple[dict[str, Any], list[str]]:
    return {}, []
