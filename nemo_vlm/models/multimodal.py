"""The processor of every family that sees: a record's text and its images and videos as one sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from nemo_vlm.batch import IMAGE_TAG, VIDEO_TAG, Images, Sample
from nemo_vlm.config import DataConfig, LanguageConfig
from nemo_vlm.data.media import Source
from nemo_vlm.errors import ConfigError, SampleError
from nemo_vlm.models.templates import PLACEHOLDERS, spoken
from nemo_vlm.models.text import ConversationText
from nemo_vlm.models.tokens import Encoded, MediaTokens, Runs
from nemo_vlm.models.video import Video

Media = Source | Video


class Views(Protocol):
    """A family's way from image and video files to patches."""

    def runs(self, media: Media) -> Runs:
        """The placeholders of an image or a video, and the text between them; no pixels are decoded.

        Raises:
            SampleError: the file must be opened to tell, and cannot be.
        """
        ...

    def pixels(self, media: Sequence[Media]) -> Images:
        """All of them as patches.

        Raises:
            SampleError: a file cannot be read, or is too small or too long.
        """
        ...

    def frames(self, images: Images) -> list[list[Image.Image]]:
        """The pictures that the patches of each view were cut from: an image's one, or a video's frames."""
        ...

    @property
    def settings(self) -> tuple[Any, ...]:
        """All that `runs` depends on, beside the files."""
        ...

    @property
    def pixel_settings(self) -> tuple[Any, ...]:
        """All that `pixels` depends on, beside the files."""
        ...


class MultimodalProcessor:
    """Makes samples of a settled config's model.

    Args:
        views: the family's.
        media: what stands in the text for an image or a video.
    """

    def __init__(
        self, config: LanguageConfig, data: DataConfig, tokenizer: Any, views: Views, media: MediaTokens
    ) -> None:
        self.config, self.data, self.tokenizer, self.views = config, data, tokenizer, views
        self.text = ConversationText(config, data, tokenizer, media)

    def sample(self, record: Mapping[str, Any]) -> Sample:
        """Tokens, labels and pixels of a LLaVA record whose `image` and `video` list files.

        Raises:
            SampleError: there is no sample to be made of it.
        """
        encoded, media = self._encode(record)
        return Sample(*encoded.shifted(), self.pixels(media))

    def media(self, record: Mapping[str, Any]) -> list[Media]:
        """The images and videos that its sample sees, in the order of its text.

        Raises:
            SampleError: as length.
        """
        return self._encode(record)[1]

    def length(self, record: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens of the record's sample, and how many of them stand for images and videos; no pixels are loaded.

        Raises:
            SampleError: as sample, but for pixels that cannot be read.
        """
        encoded, _ = self._encode(record)
        return len(encoded) - 1, self.text.num_media_tokens(encoded)

    @property
    def length_settings(self) -> tuple[Any, ...]:
        """All that `length` depends on, beside the tokenizer and the files."""
        text, data = self.text, self.data
        said = text.limit, text.media, text.template, data.system_message, data.sep_image_conv_front, data.too_long
        return *said, data.most_visual_tokens, *self.views.settings

    def _encode(self, record: Mapping[str, Any]) -> tuple[Encoded, list[Media]]:
        """The text, cut to its length, and what is left of the media."""
        turns = self.text.turns(record)
        media = media_of(record, spoken(turns))
        runs = self._runs(media)
        encoded = self.text.train(record, turns, runs)
        visual, most = self.text.num_media_tokens(encoded), self.data.most_visual_tokens
        if most is not None and visual > most:
            key = "max_visual_tokens" + "_per_micro_batch" * (most != self.data.max_visual_tokens)
            message = f"{visual} tokens of images and videos, more than model.data.{key}={most}"
            raise SampleError("too_many_visual_tokens", f"record {record.get('id')}: {message}")
        ends, left = accumulate(map(len, runs)), self.text.num_runs(encoded)
        return encoded, [one for one, end in zip(media, ends, strict=True) if end <= left]

    def _runs(self, media: Sequence[Media]) -> list[Runs]:
        return [self.views.runs(one) for one in media]

    def prompt(self, record: Mapping[str, Any]) -> Sample:
        """The first question alone, with the whole of it as tokens.

        Raises:
            SampleError: it is too long, speaks of other media than there are, or a file cannot be read.
        """
        tokens, media = self.asked(record)
        return Sample(tokens, torch.empty(0, dtype=torch.int64), self.pixels(media))

    def asked(self, record: Mapping[str, Any]) -> tuple[Tensor, list[Media]]:
        """Tokens [s] of the first question, and what it speaks of; no pixels are loaded.

        Raises:
            SampleError: as prompt, but for pixels that cannot be read.
        """
        turns = self.text.turns(record)
        media = media_of(record, spoken(turns))[: len(PLACEHOLDERS.findall(turns[0].question))]
        return self.text.prompt(record, turns[0], self._runs(media)), media

    def tokens(self, text: str, media: Sequence[Media], add_special_tokens: bool = True) -> Tensor:
        """Ids [s] of a raw text in which <image> and <video> say where media go, a placeholder for each feature.

        Raises:
            SampleError: it is too long, media and placeholders differ in number, or a file cannot be read.
        """
        return self.text.raw(text, self._runs(media), add_special_tokens)

    def pixels(self, media: Sequence[Media]) -> Images:
        """Images and videos as patches.

        Raises:
            SampleError: a file cannot be read, or is too small or too long.
        """
        return self.views.pixels(media)

    def seen(self, images: Images) -> list[list[Image.Image]]:
        """The pictures that the patches of each view were cut from: an image's one, or a video's frames."""
        return self.views.frames(images)


def media_of(record: Mapping[str, Any], text: str) -> list[Media]:
    """A record's images and videos in the order in which the text speaks of them.

    Raises:
        SampleError: the text speaks of more or fewer than there are.
    """
    try:
        return in_order(text, record.get("image") or (), record.get("video") or ())
    except ConfigError as error:
        raise SampleError("broken_record", f"record {record.get('id')}: {error}") from None


def in_order(text: str, images: Iterable[Source], videos: Iterable[Any]) -> list[Media]:
    """Images and videos in the order of their tags in a text.

    Raises:
        ConfigError: there are more or fewer tags.
    """
    left: dict[str, list[Media]] = {IMAGE_TAG: list(images), VIDEO_TAG: [Video(video) for video in videos]}
    for tag, media in left.items():
        if (count := text.count(tag)) != len(media):
            kind = "images" if tag == IMAGE_TAG else "videos"
            raise ConfigError(f"{count} {tag} in the text, {len(media)} {kind}")
    return [left[tag].pop(0) for tag in PLACEHOLDERS.findall(text)]
